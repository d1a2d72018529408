#!/usr/bin/env bash
# Submits a run to Slurm, follows its log, and returns the run's exit code.
#
#   launch/slurm.sh [options] VERB RECIPE [key=value ...]
#   launch/slurm.sh --partition gpu --time 24:00:00 pretrain pretrain/llama3-70b_synthetic_h100x64
#
#   --hardware NAME      the machine, as `maxllm plan` names it (run.hardware of the recipe)
#   --nodes N            nodes (those of the machine); MIN-MAX: as many as there are, also when it is queued again,
#                        for a mesh that takes them (mesh.data=-1)
#   --gpus N             GPUs of each node, 0 for none (those of the machine)
#   --per node|gpu       one process for each node (node), or for each GPU
#   --cpus N             CPUs of each process; without it, the nodes are the job's alone, with all they have
#   --partition NAME     --account NAME     --time HH:MM:SS     as sbatch takes them
#   --name NAME          of the job (maxllm)
#   --save-seconds S     so long before the time limit the run is asked to save (300)
#   --restarts N         at most so many starts after the first (20)
#   --container IMAGE    run in it, by pyxis (srun --container-image); it has maxllm installed
#   --mounts SRC:DST,…   into the container besides this folder
#   --sbatch 'WORDS'     more options for sbatch
#   --log FILE           where the job writes what it prints (runs/slurm/%x-%j.log; %x its name, %j its number)
#   --no-follow          submit, print the job's number, and return
#   --dry-run            print the command, run nothing
#
# The nodes see this folder, its .venv and the data on a file system that they share. A job that saved and asks
# for a restart (75: before its time limit, when preempted, when another process was lost), or one of whose
# processes was killed, is queued again and goes on; so does one whose node fails. Lines of the log begin with the
# number of their process. Ctrl-C stops following; the job goes on. What the job does is in slurm_job.sh.
set -euo pipefail
declare -A options=(
  [hardware]='' [nodes]='' [gpus]='' [per]=node [cpus]='' [partition]='' [account]='' [time]='' [name]=maxllm
  [save-seconds]=300 [restarts]=20 [container]='' [mounts]='' [sbatch]='' [log]=runs/slurm/%x-%j.log [follow]=yes
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
need_command sbatch "start this where jobs are submitted"
find_maxllm
if [ -z "${options[nodes]}" ] || [ -z "${options[gpus]}" ]; then
  ask_machine
  : "${options[nodes]:=${machine[hosts]}}" "${options[gpus]:=${machine[gpus_per_host]}}"
fi
[[ ${options[nodes]} =~ ^[1-9][0-9]*(-[1-9][0-9]*)?$ ]] || refuse "--nodes ${options[nodes]} is neither N nor MIN-MAX"
need_number save-seconds
[[ ${options[gpus]} =~ ^[0-9]+$ ]] || refuse "--gpus ${options[gpus]} is not a whole number"
case ${options[per]} in
  node) tasks=1 ;;
  gpu) tasks=${options[gpus]} ;;
  *) refuse "--per ${options[per]} is neither node nor gpu" ;;
esac
((tasks > 0)) || refuse "--per gpu needs nodes with GPUs: give --gpus"

export MAXLLM=$maxllm MAXLLM_RESTARTS=${options[restarts]}
srun=()
if [ -n "${options[container]}" ]; then
  mounts=$root:$root${options[mounts]:+,${options[mounts]}}
  srun=("--container-image=${options[container]}" "--container-mounts=$mounts" "--container-workdir=$root")
  export MAXLLM=maxllm
fi
[ -z "${options[cpus]}" ] || srun+=("--cpus-per-task=${options[cpus]}")
MAXLLM_SRUN=$(quoted "${srun[@]}")
export MAXLLM_SRUN

submit=(
  sbatch --parsable "--job-name=${options[name]}" "--nodes=${options[nodes]}" "--ntasks-per-node=$tasks"
  --requeue --open-mode=append "--signal=TERM@${options[save-seconds]}" "--output=${options[log]}" "--chdir=$root"
)
((options[gpus] == 0)) || submit+=("--gpus-per-node=${options[gpus]}")
if [ -n "${options[cpus]}" ]; then submit+=("--cpus-per-task=${options[cpus]}"); else submit+=(--exclusive --mem=0); fi
for option in partition account time; do
  [ -z "${options[$option]}" ] || submit+=("--$option=${options[$option]}")
done
read -ra more <<<"${options[sbatch]}"
submit+=("${more[@]}" "$launch/slurm_job.sh" "${words[@]}")
if dry; then
  quoted "MAXLLM=$MAXLLM" "MAXLLM_RESTARTS=$MAXLLM_RESTARTS" "MAXLLM_SRUN=$MAXLLM_SRUN" "${submit[@]}"
  exit 0
fi

# Slurm makes no folders: without this one, the job would end without a word.
(cd "$root" && mkdir -p "$(dirname "${options[log]}")")
job=$("${submit[@]}")
job=${job%%;*} # a cluster's name may follow
if [ "${options[follow]}" = no ]; then
  echo "$job"
  exit 0
fi

# What Slurm's controller says of the job in a field, as in `JobState=RUNNING`; it forgets one minutes after its end.
job_field() {
  local shown
  shown=$(scontrol --oneliner show job "$job" 2>/dev/null) || return 1
  shown=${shown#* "$1"=}
  echo "${shown%% *}"
}

log=$(job_field StdOut)
say "job $job, whose log is $log"
trap 'kill "$tail" 2>/dev/null; say "job $job goes on: tail -f $log follows it, scancel $job ends it"; exit 130' INT TERM
tail -n +1 -F "$log" 2>/dev/null &
tail=$!
# Whether the job goes on. One that is queued again stands as COMPLETING, then PENDING, and for a moment as FAILED.
live='^(PENDING|CONFIGURING|RUNNING|COMPLETING|REQUEUED|REQUEUE_FED|REQUEUE_HOLD|RESIZING|SIGNALING|SPECIAL_EXIT|STAGE_OUT|STOPPED|SUSPENDED)$'
goes_on() {
  state=$(job_field JobState) && [[ $state =~ $live ]]
}
while goes_on || { sleep 5 && goes_on; }; do sleep 2; done
sleep 1
kill "$tail" 2>/dev/null || true
wait "$tail" 2>/dev/null || true
[ -n "${state:-}" ] || refuse "Slurm has forgotten job $job: see $log, or sacct -j $job"
exit_code=$(job_field ExitCode) # code:signal
say "job $job: $state"
if [ "$state" = COMPLETED ]; then exit 0; fi
status=${exit_code%%:*}
((status > 0)) || status=$((128 + ${exit_code##*:}))
((status != 128)) || status=1 # ended by Slurm itself: cancelled, out of time, a node lost
exit "$status"
