#!/usr/bin/env bash
# The batch script of a run in Slurm: one job step of all processes, and a place in the queue again where it asks
# for a restart. slurm.sh submits it; by hand:
#
#   sbatch --nodes=2 --gpus-per-node=8 --exclusive --time=24:00:00 launch/slurm_job.sh pretrain RECIPE run.dir=…
#
#   MAXLLM             the program (.venv/bin/maxllm of the folder that the job is submitted in)
#   MAXLLM_SRUN        more options for srun
#   MAXLLM_RESTARTS    at most so many starts after the first (20)
#
#SBATCH --job-name=maxllm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail
say() { echo "slurm_job: $*" >&2; }

maxllm=${MAXLLM:-.venv/bin/maxllm}
restarts=${MAXLLM_RESTARTS:-20}
started=${SLURM_RESTART_COUNT:-0}
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: start $((started + 1))"
export PYTHONUNBUFFERED=1

# The processes meet on the first node. Its name in Slurm need not be a host's; then the controller knows its address.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "${MAXLLM_COORDINATOR:-}" ] && ! getent hosts "$node" >/dev/null; then
  address=$(scontrol --oneliner show node "$node")
  address=${address#* NodeAddr=}
  export MAXLLM_COORDINATOR="${address%% *}:$((61440 + SLURM_JOB_ID % 4096))"
fi

# A signal to the job goes to the processes, which save; this script waits for them.
trap : TERM
srun=()
[ -z "${MAXLLM_SRUN:-}" ] || eval "srun=($MAXLLM_SRUN)" # words that slurm.sh has quoted
status=0
# When one process ends the others have a minute to end too, as those do that save.
srun --label --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${srun[@]}" "$maxllm" "$@" || status=$?

case $status in
  0) say "done" ;;
  75 | 137 | 143) # asks for a restart; killed, by the system for memory, say, or with its node
    if ((started < restarts)); then
      say "exit code $status: queued again"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # Slurm ends this script
    fi
    say "exit code $status after $((started + 1)) starts: not queued again"
    ;;
  *) say "exit code $status: the message above says why" ;;
esac
exit "$status"
