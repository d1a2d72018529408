#!/usr/bin/env bash
# One host's part of a run that ssh.sh or tpu_vm.sh starts: they call it on the hosts, in the folder of the code.
#
#   launch/worker.sh install EXTRA                   maxllm[EXTRA] into .venv, from this folder
#   launch/worker.sh start NAME [VAR=value …] -- COMMAND …    begins a command that outlives the connection
#   launch/worker.sh follow NAME [LABEL [LINE]]      prints its log from a line on, each line after [LABEL];
#                                                    its last line is "NAME ended CODE SECONDS", seconds since 1970
#   launch/worker.sh signal NAME TERM|KILL           passes a signal on
#   launch/worker.sh status NAME                     running, ended CODE SECONDS, or absent
#
# What a run NAME is known by lies in runs/launch/NAME: log, pid, and once it has ended, ended.
set -euo pipefail

say() { echo "worker: $*" >&2; }

# The first Python that is new enough; where there is none and the system is Debian's or Ubuntu's, theirs.
find_python() {
  local python
  for python in python3.12 python3.13 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return 0
    fi
  done
  return 1
}

install() {
  local python
  if ! python=$(find_python); then
    say "no Python of 3.11 or newer is here: apt-get installs python3.11-venv"
    sudo apt-get update -q >&2 && sudo apt-get install -qy python3.11-venv >&2
    python=$(find_python) || {
      say "still none: install Python 3.11 or newer with its venv module"
      exit 1
    }
  fi
  # Once for these dependencies: an interrupted install leaves no stamp, and is finished the next time.
  if [ "$(cat .venv/.launched 2>/dev/null)" != "$1 $(cksum <pyproject.toml)" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --editable ".${1:+[$1]}"
    echo "$1 $(cksum <pyproject.toml)" >.venv/.launched
  fi
  .venv/bin/maxllm --version
}

# Whether the run's process is there: its number, and the moment it began, for numbers are used again.
is_running() {
  [ -e "$run/pid" ] && [ ! -e "$run/ended" ] || return 1
  local pid began
  read -r pid began <"$run/pid"
  [ "$(began_at "$pid")" = "$began" ]
}

began_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

start() {
  local settings=()
  while [ "$1" != -- ]; do
    settings+=("$1")
    shift
  done
  shift
  if is_running; then
    say "$name is running here already: launch/worker.sh status $name"
    exit 2
  fi
  rm -rf "$run"
  mkdir -p "$run"
  # In a session of its own, with nothing of the connection's: it stays when that ends.
  # shellcheck disable=SC2016 # for the shell that it starts
  setsid env "${settings[@]}" PYTHONUNBUFFERED=1 bash -c '
    run=$1
    shift
    trap : TERM # this shell waits for the command, and writes down how it ended
    "$@" &
    echo "$! $(sed "s/.*) //" /proc/$!/stat | cut -d" " -f20)" >"$run/pid.new"
    mv "$run/pid.new" "$run/pid"
    while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
    echo "$code $(date +%s.%N)" >"$run/ended.new"
    mv "$run/ended.new" "$run/ended"
  ' bash "$run" "$@" >"$run/log" 2>&1 </dev/null &
  while [ ! -e "$run/pid" ]; do sleep 0.1; done
}

follow() {
  local label=${1:-} line=${2:-1} prefix=
  [ -d "$run" ] || { say "there is no run $name here" && exit 2; }
  [ -z "$label" ] || prefix="[$label] "
  local until=()
  ! is_running || until=(--follow --sleep-interval=0.5 "--pid=$(cut -d' ' -f1 "$run/pid")")
  tail -n "+$line" "${until[@]}" "$run/log" | sed -u "s/^/${prefix//\//\\/}/"
  for _ in {1..20}; do [ -e "$run/ended" ] || sleep 0.1; done # written down just after the end
  [ -e "$run/ended" ] || { say "$name vanished: was this host restarted?" && exit 137; }
  echo "$name ended $(cat "$run/ended")"
}

signal() {
  if is_running; then kill "-$1" "$(cut -d' ' -f1 "$run/pid")"; fi
}

status() {
  if [ -e "$run/ended" ]; then
    echo "ended $(cat "$run/ended")"
  elif is_running; then
    echo running
  else
    echo absent
  fi
}

verb=${1:-}
case $verb in
  install)
    install "${2:-}"
    exit 0
    ;;
  start | follow | signal | status) ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [[ $verb == --help || $verb == -h ]] && exit 0
    exit 2
    ;;
esac
name=${2:-}
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { say "$name is no name of a run" && exit 2; }
run=runs/launch/$name
"$verb" "${@:3}"
