#!/usr/bin/env bash
# Sourced by the scripts of this folder: their options, dry runs, and processes that end together.
#
# A script says its options first, with their defaults, where yes and no make a switch (--name, --no-name):
#
#   declare -A options=([nodes]=1 [follow]=yes)
#   source "$(dirname "$0")/common.sh"
#   parse "$@"
#
# After that ${options[nodes]} has a value, and `words` are VERB RECIPE key=value ...

script=$(basename "$0")
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$launch")
declare -A options
options[dry-run]=no
export PYTHONUNBUFFERED=1 # what a run prints is seen when it is printed

say() { echo "$script: $*" >&2; }

# Bad input: a sentence, and exit code 2.
refuse() {
  say "$*"
  exit 2
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  refuse "needs bash 5.1 or newer, this is $BASH_VERSION"
fi

# The comment at the head of a script is its help.
show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Options into `options`, and the words after them into `words`.
parse() {
  local name value
  while [[ ${1:-} == -* ]]; do
    [[ $1 != -h && $1 != --help ]] || {
      show_help
      exit 0
    }
    name=${1#--}
    value=${name#*=}
    name=${name%%=*}
    if [[ ${options[$name]:-} =~ ^(yes|no)$ && $1 != *=* ]]; then
      options[$name]=yes
    elif [[ $name == no-* && ${options[${name#no-}]:-} =~ ^(yes|no)$ && $1 != *=* ]]; then
      options[${name#no-}]=no
    elif [[ ! -v options[$name] ]]; then
      refuse "$1 is no option; --help lists them"
    elif [[ $1 == *=* ]]; then
      options[$name]=$value
    else
      [ $# -ge 2 ] || refuse "$1 needs a value"
      options[$name]=$2
      shift
    fi
    shift
  done
  words=("$@")
}

# VERB RECIPE must be there.
need_recipe() {
  [ ${#words[@]} -ge 2 ] || refuse "give VERB RECIPE [key=value ...]; --help says more"
}

# An option that must be a whole number of 1 or more.
need_number() {
  [[ ${options[$1]} =~ ^[1-9][0-9]*$ ]] || refuse "--$1 ${options[$1]} is not a whole number of 1 or more"
}

# An option that has no default.
need() {
  [ -n "${options[$1]}" ] || refuse "--$1 is needed; --help says more"
}

# A command of this machine must be there, unless nothing is run.
need_command() {
  [ "${options[dry-run]}" = yes ] || command -v "$1" >/dev/null || refuse "$1 is not installed here${2:+: $2}"
}

dry() { [ "${options[dry-run]}" = yes ]; }

# Words as a shell would take them, each quoted where it must be.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      words+=("$word")
    else
      words+=("'${word//\'/\'\\\'\'}'")
    fi
  done
  echo "${words[*]}"
}

# Runs a command; a dry run prints it instead.
run() {
  if dry; then quoted "$@"; else "$@"; fi
}

# The maxllm that belongs to this folder, or that is installed.
find_maxllm() {
  maxllm=${MAXLLM:-$root/.venv/bin/maxllm}
  command -v "$maxllm" >/dev/null || maxllm=maxllm
}

# What the recipe's machine is, into `machine`: ${machine[hosts]} and others; see `maxllm machine --help`.
declare -A machine
ask_machine() {
  local facts name value hardware=()
  find_maxllm
  [ -z "${options[hardware]:-}" ] || hardware=(--hardware "${options[hardware]}")
  facts=$("$maxllm" machine "${words[1]}" "${words[@]:2}" "${hardware[@]}" --shell) || exit $?
  # shellcheck disable=SC2034 # the scripts read it
  while IFS='=' read -r name value; do machine[$name]=$value; done <<<"$facts"
}

# --- processes that end together ---------------------------------------------------------------------------

declare -A index_of # child -> number of its process or host
code=0              # of the first that failed: another than 75 before 75, which asks for a restart
first=

# What a process is called, and how it is asked to end or is ended; a script may say it in another way.
named() { echo "process $1"; }
signal_one() { kill "-$1" "$2" 2>/dev/null || true; }

signal_all() {
  local pid
  for pid in "${!index_of[@]}"; do signal_one "$1" "$pid"; done
}

asked=0
# shellcheck disable=SC2317 # called by the traps
stop() {
  asked=$((asked + 1))
  if [ "$asked" -eq 1 ]; then signal_all TERM; else signal_all KILL; fi
}

# Sets `ended` to a child that has ended and `status` to its exit code; or `ended` to nothing, for a signal came.
await() {
  local pid
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

# Waits for all children of `index_of`. When one fails, the others are asked to end at once, and killed after the
# grace. Leaves the exit code in `code`, and in `first` who failed first.
#
#   supervise GRACE_SECONDS [HELPER ...]     helpers are children that end with the others
supervise() {
  local grace=$1 index helpers=("${@:2}")
  trap stop INT TERM
  while [ ${#index_of[@]} -gt 0 ]; do
    await
    [ -n "$ended" ] || continue
    index=${index_of[$ended]}
    unset "index_of[$ended]"
    if [ "$status" -eq 0 ] || { [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; }; then
      continue
    fi
    [ "$status" -ne 75 ] || [ "$code" -ne 75 ] || continue
    code=$status
    first="$(named "$index") failed first, with exit code $status"
    if [ "$status" -gt 128 ] && [ "$status" -lt 193 ]; then
      first="$(named "$index") was killed first, by SIG$(kill -l $((status - 128)))"
      [ "$status" -ne 137 ] || first+=" (out of memory, perhaps: see the system's log)"
    fi
    [ ${#index_of[@]} -gt 0 ] || continue
    if [ "$status" -ne 75 ]; then
      first+="; the others were ended for it"
      signal_all TERM
    fi
    # A shell of its own, which has the children's names but waits for none of them. Where one has ended with 75
    # all do by themselves, unless one is stopped, or cut off.
    # It sleeps in short parts and holds no pipe: whoever reads our output must not wait for it when it is ended.
    (
      trap '' INT TERM
      for ((left = status == 75 ? grace + 60 : grace; left > 0; left--)); do sleep 1; done
      signal_all KILL
    ) >/dev/null 2>&1 &
    helpers+=($!)
  done
  if [ ${#helpers[@]} -gt 0 ]; then
    kill -KILL "${helpers[@]}" 2>/dev/null || true
    wait "${helpers[@]}" 2>/dev/null || true # so that bash does not tell of their end
  fi
}
