#!/usr/bin/env bash
# Starts a run by SkyPilot (https://skypilot.readthedocs.io), on whichever of its clouds has the machine.
#
#   launch/skypilot.sh --name NAME [options] VERB RECIPE [key=value ...]
#
#   --name NAME          of the job
#   --hardware NAME      the machine, as `maxllm plan` names it (run.hardware of the recipe)
#   --spot               on spot capacity
#   --managed            as a managed job, which begins again when its machine is taken away, or after exit code 75
#   --dry-run            print the command and the task, run nothing
#
# This folder goes over as git knows it, and so does a recipe in it. Data does not: name what the hosts can reach.
set -euo pipefail
declare -A options=([name]='' [hardware]='' [spot]=no [managed]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
need name
need_command sky "pip install skypilot"
find_maxllm

manifest=("$maxllm" manifest skypilot "${words[@]}" "--name=${options[name]}")
[ -z "${options[hardware]}" ] || manifest+=("--hardware=${options[hardware]}")
[ "${options[spot]}" = no ] || manifest+=(--spot)
task=$("${manifest[@]}") || exit $?
command=(sky launch "--cluster=${options[name]}" --down)
[ "${options[managed]}" = no ] || command=(sky jobs launch)
if dry; then
  echo "# with this task as FILE:"
  quoted "${command[@]}" --yes FILE
  printf '%s\n' "$task"
  exit 0
fi
file=$(mktemp --suffix=.yaml)
trap 'rm -f "$file"' EXIT
printf '%s\n' "$task" >"$file"
"${command[@]}" --yes "$file"
