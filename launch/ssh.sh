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
#   --ssh 'WORDS'        the ssh command (ssh -o BatchMode=yes -o ServerAliveInterval=15)
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
  [ssh]='ssh -o BatchMode=yes -o ServerAliveInterval=15' [grace-seconds]=60 [follow]=no
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
[ "${options[follow]}" = yes ] || need_recipe
need hosts
need_number port
need_number grace-seconds
IFS=, read -ra hosts <<<"${options[hosts]}"
read -ra ssh <<<"${options[ssh]}"
need_command "${ssh[0]}"
coordinator=${options[coordinator]:-${hosts[0]##*@}}

remote() { run "${ssh[@]}" "${hosts[$1]}" "$2"; }

place() {
  echo "MAXLLM_COORDINATOR=$coordinator:${options[port]}"
  echo "MAXLLM_NUM_PROCESSES=${#hosts[@]}"
  echo "MAXLLM_PROCESS_ID=$1"
}

# shellcheck source=launch/remote.sh
source "$launch/remote.sh"
if [ "${options[follow]}" = no ]; then
  if [ "${options[copy]}" = yes ]; then send_code; fi
  if [ "${options[install]}" = yes ]; then everywhere install_one "maxllm could not be installed"; fi
  everywhere start_one "the run could not be started"
fi
dry && exit 0
follow_all
exit "$code"
