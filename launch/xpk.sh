#!/usr/bin/env bash
# Starts a run on a cluster that xpk made (https://github.com/AI-Hypercomputer/xpk), as a workload of its queue.
#
#   launch/xpk.sh --name NAME --cluster CLUSTER --image IMAGE [options] VERB RECIPE [key=value ...]
#
#   --name NAME          of the workload
#   --cluster CLUSTER    --zone ZONE     --project PROJECT     as xpk takes them
#   --image IMAGE        in which maxllm is installed (launch/gke.sh --build makes one); the recipe is one of it
#   --hardware NAME      the machine, as `maxllm plan` names it, 2xv5p-16 for two slices (run.hardware of the recipe)
#   --restarts N         after a pod was lost, or asked for a restart (20)
#   --storage NAME       storage of the cluster to mount (xpk storage attach)
#   --no-follow          submit, and return
#   --dry-run            print the commands, run nothing
#
# Waits until the workload has ended, and returns 0 or xpk's exit code (125: it failed).
set -euo pipefail
declare -A options=(
  [name]='' [cluster]='' [zone]='' [project]='' [image]='' [hardware]='' [restarts]=20 [storage]='' [follow]=yes
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
for option in name cluster image; do need "$option"; done
need_command xpk "pip install xpk"
ask_machine

where=("--cluster=${options[cluster]}")
for option in zone project; do
  [ -z "${options[$option]}" ] || where+=("--$option=${options[$option]}")
done
command="maxllm $(quoted "${words[@]}")"
create=(xpk workload create "${where[@]}" "--workload=${options[name]}" "--docker-image=${options[image]}"
  "--max-restarts=${options[restarts]}" --restart-on-exit-codes=75)
if [ "${machine[platform]}" = tpu ]; then
  create+=("--tpu-type=${machine[tpu_type]}" "--num-slices=${machine[slices]}" --env=MAXLLM_DISTRIBUTED=auto)
else
  create+=("--device-type=${machine[xpk_device]}" "--num-nodes=${machine[hosts]}")
  # shellcheck disable=SC2016 # variables that xpk sets in each pod
  place='MAXLLM_COORDINATOR=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT MAXLLM_NUM_PROCESSES=$NNODES MAXLLM_PROCESS_ID=$NODE_RANK'
  command="$place $command"
fi
[ -z "${options[storage]}" ] || create+=("--storage=${options[storage]}")
run "${create[@]}" "--command=$command"
if [ "${options[follow]}" = yes ]; then
  run xpk workload list "${where[@]}" "--wait-for-job-completion=${options[name]}"
fi
