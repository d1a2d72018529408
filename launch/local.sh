#!/usr/bin/env bash
# Starts several JAX processes on this machine as one run (gloo on CPU), to try multi-host code without a cluster.
#
#   launch/local.sh [options] VERB RECIPE [key=value ...]
#   launch/local.sh --processes 2 pretrain pretrain/tiny_slice_cpu mesh.data=2
#
#   --processes N            how many (2)
#   --devices N              simulated CPU devices of each (1)
#   --grace-seconds S        when one fails the others are asked to end at once, and killed S seconds later (10)
#   --dry-run                print the commands, run nothing
#
# All print; only process 0 writes the run folder's text files. Ctrl-C or SIGTERM asks all to stop after the step
# under way, saved (exit code 75); a second one kills them. The exit code is that of the process that failed
# first, 128 + N for one that signal N killed; which one it was is said last.
set -euo pipefail
declare -A options=([processes]=2 [devices]=1 [grace-seconds]=10)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
for option in processes devices grace-seconds; do need_number "$option"; done
find_maxllm

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
place=(
  JAX_PLATFORMS=cpu
  "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${options[devices]}"
  "MAXLLM_COORDINATOR=127.0.0.1:$port"
  "MAXLLM_NUM_PROCESSES=${options[processes]}"
)

# In a session of their own, where there is setsid: Ctrl-C in a terminal would reach them besides, as a second
# signal, which stops them unsaved.
session=()
command -v setsid >/dev/null && session=(setsid)
for ((index = 0; index < options[processes]; index++)); do
  command=("${session[@]}" env "${place[@]}" "MAXLLM_PROCESS_ID=$index" "$maxllm" "${words[@]}")
  if dry; then
    quoted "${command[@]}"
  else
    "${command[@]}" &
    index_of[$!]=$index
  fi
done
dry && exit 0

supervise "${options[grace-seconds]}"
[ "$code" -eq 0 ] || [ "$code" -eq 75 ] || say "$first"
exit "$code"
