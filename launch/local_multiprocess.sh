#!/usr/bin/env bash
# Starts N JAX processes on this machine as one program (gloo on CPU), to try multi-host code without a cluster.
#
#   launch/local_multiprocess.sh 2 pretrain pretrain/tiny_slice_cpu mesh.data=2
#
# Each process sees as many CPU devices as DEVICES_PER_PROCESS says (default 1). All print; only process 0
# writes the run folder's text files.
#
# Ctrl-C or SIGTERM asks all to stop after the step under way, saved (exit code 75); a second one kills them.
# When one fails, the others are asked to end at once and killed GRACE_SECONDS later (default 10); a process that
# has been stopped (SIGSTOP) for STOPPED_SECONDS (default 60) is killed, for the others wait for it for ever.
# The exit code is that of the process that failed first, 128 + N for one that signal N killed; which one it was
# is said last.
set -euo pipefail

say() { echo "local_multiprocess: $*" >&2; }

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local_multiprocess.sh N VERB RECIPE [key=value ...]" >&2
  exit 2
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  say "needs bash 5.1 or newer, this is $BASH_VERSION"
  exit 2
fi
count=$1
shift
maxllm=${MAXLLM:-$(dirname "$0")/../.venv/bin/maxllm}
command -v "$maxllm" >/dev/null || maxllm=maxllm
grace=${GRACE_SECONDS:-10}
stopped=${STOPPED_SECONDS:-60}

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MAXLLM_COORDINATOR=127.0.0.1:$port MAXLLM_NUM_PROCESSES=$count JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES_PER_PROCESS:-1}"

# In a session of their own, where there is setsid: Ctrl-C in a terminal would reach them besides, as a second
# signal, which stops them unsaved.
session=()
command -v setsid >/dev/null && session=(setsid)
declare -A index_of
for index in $(seq 0 $((count - 1))); do
  MAXLLM_PROCESS_ID=$index "${session[@]}" "$maxllm" "$@" &
  index_of[$!]=$index
done

signal_all() { kill "-$1" "${!index_of[@]}" 2>/dev/null || true; }

asked=0
# shellcheck disable=SC2317 # called by the traps
stop() {
  asked=$((asked + 1))
  if [ "$asked" -eq 1 ]; then signal_all TERM; else signal_all KILL; fi
}
trap stop INT TERM

# Ends processes that have been stopped for too long: the state T of ps, not t, a debugger's.
watch() {
  declare -A since
  while sleep 1; do
    for pid in "$@"; do
      if [[ $(ps -o state= -p "$pid" 2>/dev/null) == T ]]; then
        since[$pid]=${since[$pid]:-$SECONDS}
        if ((SECONDS - since[$pid] >= stopped)); then
          say "a process has been stopped (SIGSTOP) for $stopped s and is killed"
          kill -KILL "$pid" 2>/dev/null || true
        fi
      else
        unset "since[$pid]"
      fi
    done
  done
}
trap '' INT TERM # inherited by the two helpers alone: `watch`, and the one that kills after the grace
watch "${!index_of[@]}" &
helpers=($!)
trap stop INT TERM

# Sets `ended` to a process that has ended and `status` to its exit code; or `ended` to nothing, for a signal came.
await() {
  ended=
  status=0
  wait -n -p ended "${!index_of[@]}" 2>/dev/null || status=$?
  [ -z "${ended:-}" ] || return 0
  # Of one that ended just then, `wait -n` tells nothing any more, but `wait` does.
  ended=
  for pid in "${!index_of[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      ended=$pid
      status=0
      wait "$pid" 2>/dev/null || status=$?
      return 0
    fi
  done
  sleep 0.1
}

code=0
first=
while [ ${#index_of[@]} -gt 0 ]; do
  await
  [ -n "$ended" ] || continue
  index=${index_of[$ended]}
  unset "index_of[$ended]"
  if [ "$status" -eq 0 ] || [ "$code" -ne 0 ]; then
    continue
  fi
  code=$status
  first="process $index failed first, with exit code $status"
  if [ "$status" -gt 128 ]; then
    first="process $index was killed first, by SIG$(kill -l $((status - 128)))"
    [ "$status" -ne 137 ] || first+=" (out of memory, perhaps: see the system's log)"
  fi
  if [ "$status" -ne 75 ] && [ ${#index_of[@]} -gt 0 ]; then
    first+="; the others were ended for it"
    signal_all TERM
    survivors=("${!index_of[@]}")
    (trap '' INT TERM && sleep "$grace" && kill -KILL "${survivors[@]}" 2>/dev/null) &
    helpers+=($!)
  fi
done
kill -KILL "${helpers[@]}" 2>/dev/null || true
wait "${helpers[@]}" 2>/dev/null || true # so that bash does not tell of their end
[ "$code" -eq 0 ] || [ "$code" -eq 75 ] || say "$first"
exit "$code"
