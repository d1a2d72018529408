#!/usr/bin/env bash
# Starts N JAX processes on this machine as one program (gloo on CPU), to try multi-host code without a cluster.
#
#   launch/local_multiprocess.sh 2 pretrain pretrain/tiny_slice_cpu mesh.data=2
#
# Each process sees as many CPU devices as DEVICES_PER_PROCESS says (default 1). All print; only process 0
# writes the run folder's text files. Ctrl-C stops all of them after the step under way, saved. The exit code is
# that of the first process that failed; when one fails, the others are ended.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local_multiprocess.sh N VERB RECIPE [key=value ...]" >&2
  exit 2
fi
count=$1
shift
maxllm=${MAXLLM:-$(dirname "$0")/../.venv/bin/maxllm}
command -v "$maxllm" >/dev/null || maxllm=maxllm

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MAXLLM_COORDINATOR=127.0.0.1:$port MAXLLM_NUM_PROCESSES=$count JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES_PER_PROCESS:-1}"

pids=()
forward() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap forward INT TERM
for index in $(seq 0 $((count - 1))); do
  MAXLLM_PROCESS_ID=$index "$maxllm" "$@" &
  pids+=($!)
done

code=0
for _ in "${pids[@]}"; do
  # A signal interrupts `wait` (codes over 128) before any process has ended: wait again.
  while :; do
    status=0
    wait -n || status=$?
    [ $status -gt 128 ] && [ -n "$(jobs -rp)" ] && [ $code -eq 0 ] || break
  done
  if [ $status -ne 0 ] && [ $code -eq 0 ]; then
    code=$status
    [ $status -eq 75 ] || forward
  fi
done
exit $code
