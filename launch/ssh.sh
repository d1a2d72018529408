#!/usr/bin/env bash
# Starts a run on several hosts over ssh, one process on each, follows it, and returns the run's exit code.
#
#   launch/ssh.sh --hosts a,b [options] VERB RECIPE [key=value ...]
#   launch/ssh.sh --hosts gpu1,gpu2 pretrain pretrain/llama3-8b_synthetic_h100x8 run.dir=/shared/runs/8b
#
#   --hosts A,B,…        the hosts, as ssh knows them (user@host too)
#   --coordinator NAME   the first host's name or address, as the others reach it (that of --hosts)
#   --port N             on the first host, for the meeting (61500)
#   --folder PATH        of the code on the hosts (maxllm, in the home folder)
#   --extra NAME         what is installed there: cuda, tpu, or '' (cuda)
#   --no-copy            the folder is there already, on a shared file system, say
#   --no-install         its .venv too
#   --name NAME          of the run on the hosts (maxllm)
#   --ssh 'WORDS'        the ssh command (ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ConnectTimeout=10)
#   --restarts N         start again so often, when a process was killed or asks for it (0)
#   --fewer              then without the hosts that do not answer, for a mesh that takes the others (mesh.data=-1)
#   --grace-seconds S    when one fails the others are asked to end at once, and killed S seconds later (60)
#   --follow             only follow a run that was started before
#   --dry-run            print the commands, run nothing
#
# 1. The code goes over as git knows it, uncommitted changes included; a recipe that is a file goes with it.
#    Data does not: name a file system that all hosts have.
# 2. Each host gets .venv with maxllm[EXTRA], once.
# 3. Each starts its process, which outlives the connection.
# 4. The logs come back, each line after its [host]; a connection that breaks is made again, where the log was.
#
# Ctrl-C or SIGTERM asks all to stop after the step under way, saved (exit code 75); a second one kills them. The
# exit code is that of the host that failed first, by the hosts' clocks, whose name is said last.
set -euo pipefail
declare -A options=(
  [hosts]='' [coordinator]='' [port]=61500 [folder]=maxllm [extra]=cuda [copy]=yes [install]=yes [name]=maxllm
  [ssh]='ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ConnectTimeout=10' [grace-seconds]=60 [follow]=no
  [restarts]=0 [fewer]=no
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
if [ "${options[follow]}" = yes ]; then options[restarts]=0; else need_recipe; fi
need hosts
need_number port
need_number grace-seconds
IFS=, read -ra hosts <<<"${options[hosts]}"
read -ra ssh <<<"${options[ssh]}"
need_command "${ssh[0]}"
[[ ${options[restarts]} =~ ^[0-9]+$ ]] || refuse "--restarts ${options[restarts]} is not a whole number"

remote() { run "${ssh[@]}" "${hosts[$1]}" "$2"; }

place() {
  echo "MAXLLM_COORDINATOR=${options[coordinator]:-${hosts[0]##*@}}:${options[port]}"
  echo "MAXLLM_NUM_PROCESSES=${#hosts[@]}"
  echo "MAXLLM_PROCESS_ID=$1"
}

# shellcheck source=launch/remote.sh
source "$launch/remote.sh"

start() { everywhere start_one "the run could not be started"; }

# Leaves out the hosts that do not answer.
keep_reachable() {
  local index pids=() there=()
  for index in "${!hosts[@]}"; do
    remote "$index" true </dev/null >/dev/null 2>&1 &
    pids+=($!)
  done
  for index in "${!hosts[@]}"; do
    if wait "${pids[$index]}"; then there+=("${hosts[$index]}"); else say "goes on without ${hosts[$index]}"; fi
  done
  [ ${#there[@]} -gt 0 ] || { say "no host answers" && exit 1; }
  hosts=("${there[@]}")
}

if [ "${options[follow]}" = no ]; then
  if [ "${options[copy]}" = yes ]; then send_code; fi
  if [ "${options[install]}" = yes ]; then everywhere install_one "maxllm could not be installed"; fi
  start
fi
dry && exit 0
for ((attempt = 1; ; attempt++)); do
  follow_all
  [ "$asked" -eq 0 ] || break
  case $code in
    75 | 137 | 143) ((attempt <= options[restarts])) || break ;;
    *) break ;;
  esac
  [ "${options[fewer]}" = no ] || keep_reachable
  say "starts again on ${#hosts[@]} hosts ($attempt of ${options[restarts]} restarts)"
  start
done
exit "$code"
