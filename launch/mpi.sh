#!/usr/bin/env bash
# Starts a run on several hosts with Open MPI's mpirun, and returns the run's exit code.
#
#   launch/mpi.sh --hosts a,b [options] VERB RECIPE [key=value ...]
#
#   --hosts A,B,…        the hosts; the first one's name is where all meet, so the others must know it
#   --per-host N         processes of each host, which share its GPUs evenly (1)
#   --port N             on the first host, for the meeting (61500)
#   --grace-seconds S    when asked to stop, so long for the state to be saved (120)
#   --mpirun 'WORDS'     more options for mpirun
#   --dry-run            print the command, run nothing
#
# The hosts see this folder and its .venv at the same path, and the data. Lines are tagged with the number of their
# process. Ctrl-C or SIGTERM asks all to stop after the step under way, saved (exit code 75).
set -euo pipefail
declare -A options=([hosts]='' [per-host]=1 [port]=61500 [grace-seconds]=120 [mpirun]='')
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
need hosts
for option in per-host port grace-seconds; do need_number "$option"; done
need_command mpirun "Debian's package is openmpi-bin"
find_maxllm

IFS=, read -ra hosts <<<"${options[hosts]}"
slots=()
for host in "${hosts[@]}"; do slots+=("$host:${options[per-host]}"); done
coordinator=${hosts[0]}
# One host alone needs no name that others know.
((${#hosts[@]} > 1)) || coordinator=127.0.0.1
read -ra more <<<"${options[mpirun]}"
command=(
  mpirun --host "$(IFS=,; echo "${slots[*]}")" -np $((${#hosts[@]} * options[per-host]))
  --map-by "ppr:${options[per-host]}:node" --bind-to none --tag-output --wdir "$PWD"
  # The first that ends with another code than 0 has mpirun ask the others to stop: they have the grace to save.
  --mca odls_base_sigkill_timeout "${options[grace-seconds]}"
  -x "MAXLLM_COORDINATOR=$coordinator:${options[port]}" -x PYTHONUNBUFFERED=1
)
# What is set here on purpose goes along; mpirun itself passes nothing on to other hosts.
for name in JAX_PLATFORMS XLA_FLAGS LIBTPU_INIT_ARGS; do
  [ -z "${!name:-}" ] || command+=(-x "$name")
done
while read -r name; do command+=(-x "$name"); done < <(compgen -e | grep '^NCCL_' || true)
command+=("${more[@]}" "$maxllm" "${words[@]}")
if dry; then
  quoted "${command[@]}"
  exit 0
fi
# mpirun ends at once what runs when it is sent SIGTERM; SIGUSR2 it passes on, which asks maxllm to stop, saved.
asked=USR2
trap 'kill "-$asked" "$mpirun" && asked=TERM' INT TERM
"${command[@]}" &
mpirun=$!
while kill -0 "$mpirun" 2>/dev/null; do
  code=0
  wait "$mpirun" || code=$?
done
exit "$code"
