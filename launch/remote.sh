#!/usr/bin/env bash
# Sourced, after common.sh, by the scripts that start a process on each of several hosts over a connection: the code
# goes over, is installed, started and followed. A script says how many hosts there are and how to reach them:
#
#   hosts=(NAME …)                  what they are called
#   remote INDEX COMMAND            runs a shell's command there, with the input that it is given
#   place INDEX                     prints the settings VAR=value of its process, one in a line
#
# Options that it has: folder, extra, name, grace-seconds.
#
# shellcheck disable=SC2154 # what common.sh and the script set

# What a host's process is known by there; hosts may share their file system.
known_as() { echo "${options[name]}.$1"; }

# Runs words on a host, in the folder of the code.
on() { remote "$1" "cd $(quoted "${options[folder]}") && $(quoted "${@:2}")"; }

# Runs a function on all hosts at once, with the index of each; where one fails, that is the end.
everywhere() {
  local index pids=() failed=()
  for index in "${!hosts[@]}"; do
    if dry; then
      "$1" "$index"
    else
      "$1" "$index" &
      pids+=($!)
    fi
  done
  for index in "${!pids[@]}"; do wait "${pids[$index]}" || failed+=("${hosts[$index]}"); done
  if [ ${#failed[@]} -gt 0 ]; then
    say "$2 on ${failed[*]}"
    exit 1
  fi
}

# The files of the code: those that git has or would take, or else all but what is made here.
files() {
  if git -C "$root" rev-parse --git-dir >/dev/null 2>&1; then
    git -C "$root" ls-files --cached --others --exclude-standard
  else
    (cd "$root" && find . -type f -not -path './.venv*' -not -path './runs/*')
  fi
}

# Packs the code, and the recipe where it is a file outside of it, and sends both to all hosts.
send_code() {
  local recipe='' file
  if [ -f "${words[1]}" ] && [[ $(realpath "${words[1]}") != "$root"/* ]]; then
    recipe=$(realpath "${words[1]}")
    words[1]=runs/launch/$(basename "$recipe")
  fi
  if ! dry; then
    files | (cd "$root" && while IFS= read -r file; do [ ! -e "$file" ] || echo "$file"; done) >"$scratch/files"
    tar -C "$root" -cf "$scratch/code.tar" -T "$scratch/files"
    [ -z "$recipe" ] || tar -rf "$scratch/code.tar" -C "$(dirname "$recipe")" --transform 's|^|runs/launch/|' \
      "$(basename "$recipe")"
  fi
  everywhere unpack_code "the code could not be copied"
}

unpack_code() {
  local folder
  folder=$(quoted "${options[folder]}")
  if dry; then
    echo "# with a tar of this folder's files${recipe:+ and of $recipe} as input:"
    remote "$1" "mkdir -p $folder && tar -xf - -C $folder"
  else
    remote "$1" "mkdir -p $folder && tar -xf - -C $folder" <"$scratch/code.tar"
  fi
}

install_one() { on "$1" launch/worker.sh install "${options[extra]}" </dev/null; }

start_one() {
  local settings
  readarray -t settings < <(place "$1")
  # What is set here on purpose goes along.
  while read -r name; do settings+=("$name=${!name}"); done \
    < <(compgen -e | grep -E '^(JAX_PLATFORMS|XLA_FLAGS|LIBTPU_INIT_ARGS|NCCL_.*)$' || true)
  on "$1" launch/worker.sh start "$(known_as "$1")" "${settings[@]}" -- .venv/bin/maxllm "${words[@]}" </dev/null
}

# Prints one host's log until its process has ended, whose exit code it returns; the time of its end goes to a file.
follow_one() {
  local host=${hosts[$1]} name line=1 text code='' failures=0
  name=$(known_as "$1")
  while true; do
    while IFS= read -r text; do
      if [[ $text =~ ^"$name"\ ended\ ([0-9]+)\ ([0-9.]+)$ ]]; then
        code=${BASH_REMATCH[1]}
        echo "${BASH_REMATCH[2]} $code $host" >"$scratch/end.$1"
      elif [[ $text == "[$host] "* ]]; then
        printf '%s\n' "$text"
        line=$((line + 1))
        failures=0
      else # of the connection
        printf '[%s] %s\n' "$host" "$text" >&2
      fi
    done < <(on "$1" launch/worker.sh follow "$name" "$host" "$line" 2>&1 </dev/null)
    [ -z "$code" ] || return "$code"
    failures=$((failures + 1))
    if ((failures > 20)); then
      say "$host cannot be reached any more"
      return 137
    fi
    say "the connection to $host broke; again in 5 s"
    sleep 5
  done
}

named() { echo "${hosts[$1]}"; }

# The children are shells that read logs: what is to reach the processes goes over the connection.
signal_one() {
  local index=${index_of[$2]}
  on "$index" launch/worker.sh signal "$(known_as "$index")" "$1" </dev/null && return 0
  [ "$1" != KILL ] || kill -USR1 "$2" 2>/dev/null || true
}

# Follows all hosts to their end; leaves the exit code in `code`: that of the host that failed first.
follow_all() {
  local index status host
  rm -f "$scratch"/end.*
  code=0
  first=
  for index in "${!hosts[@]}"; do
    (
      trap '' INT TERM
      trap 'say "${hosts[$index]} cannot be reached any more" && exit 75' USR1
      follow_one "$index"
    ) &
    index_of[$!]=$index
  done
  supervise "${options[grace-seconds]}"
  [ "$code" -ne 0 ] || return 0
  # All of them say why they end with 75.
  [ "$code" -ne 75 ] || { say "ended with 75: the same command continues" && return 0; }
  # Who failed first is what the hosts' clocks say: the logs come in by another order.
  while read -r _ status host; do
    if [ "$status" -ne 0 ] && [ "$status" -ne 75 ]; then
      code=$status
      say "$host failed first, with exit code $status; the end of its log:"
      for index in "${!hosts[@]}"; do
        [ "${hosts[$index]}" != "$host" ] || on "$index" tail -n 5 "runs/launch/$(known_as "$index")/log" \
          </dev/null >&2 || true
      done
      return 0
    fi
  done < <(cat "$scratch"/end.* 2>/dev/null | sort -n)
  say "$first"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
