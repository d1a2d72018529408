#!/usr/bin/env bash
# Rents a Cloud TPU slice, or several as one, and starts a run there, one process on each host: creates, installs,
# starts, follows the logs, and returns the run's exit code.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE [options] VERB RECIPE [key=value ...]
#   launch/tpu_vm.sh --name seven --zone us-east5-a --capacity spot --delete pretrain pretrain/llama2-7b_synthetic_v5p-16
#   launch/tpu_vm.sh --name seven --zone us-east5-a --step follow      a step alone; also status, stop, delete
#
#   --name NAME          of the queued resource and its slices
#   --zone ZONE          --project PROJECT (gcloud's own)
#   --hardware NAME      the machine, as `maxllm plan` names it, 2xv5p-16 for two slices (run.hardware of the recipe)
#   --capacity KIND      on-demand, spot or reserved (on-demand)
#   --wait DURATION      in the queue at most so long, as in 6h; longer is an error (no limit)
#   --runtime VERSION    of the TPU software (that of the hardware)
#   --restarts N         after an exit code that asks for it, or when the slice was taken away, begin again so often (20)
#   --delete             delete the slice when the run has ended
#   --step STEP          only this: create, install, start, follow, status, stop or delete
#   --folder PATH        of the code on the hosts (maxllm, in the home folder)
#   --extra NAME         what is installed there with maxllm (tpu)
#   --grace-seconds S    when one fails the others are asked to end at once, and killed S seconds later (60)
#   --dry-run            print the commands, run nothing
#
# The code goes over as git knows it, uncommitted changes included; a recipe that is a file goes with it. Data does
# not: name what all hosts have. The run outlives the connection: Ctrl-C asks it to stop, saved (exit code 75);
# closing the terminal does not, and --step follow takes up the logs again.
set -euo pipefail
declare -A options=(
  [name]='' [zone]='' [project]='' [hardware]='' [capacity]=on-demand [wait]='' [runtime]='' [restarts]=20
  [delete]=no [step]='' [folder]=maxllm [extra]=tpu [grace-seconds]=60
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need name
need zone
case ${options[step]} in
  '' | create | install | start | follow | status | stop | delete) ;;
  *) refuse "--step ${options[step]} is none of create, install, start, follow, status, stop and delete" ;;
esac
case ${options[capacity]} in
  on-demand) capacity=() ;;
  spot | reserved) capacity=("--${options[capacity]}") ;;
  *) refuse "--capacity ${options[capacity]} is none of on-demand, spot and reserved" ;;
esac
need_command gcloud "see https://cloud.google.com/sdk/docs/install"
where=("--zone=${options[zone]}")
[ -z "${options[project]}" ] || where+=("--project=${options[project]}")

gcloud_tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

delete() { gcloud_tpus queued-resources delete "${options[name]}" --force --quiet; }

if [ "${options[step]}" = delete ]; then
  delete
  exit 0
fi

# The hosts must be known, from the recipe or --hardware.
if [ ${#words[@]} -lt 2 ] && [ -n "${options[step]}" ] && [ "${options[step]}" != start ]; then
  need hardware
  words=(pretrain pretrain/tiny_slice_cpu)
fi
need_recipe
ask_machine
[ "${machine[platform]}" = tpu ] || refuse "${machine[hardware]} is no TPU"
[ -n "${machine[runtime]}" ] || refuse "${machine[hardware]} is not rented as a Cloud TPU VM: see launch/gke.sh"
: "${options[runtime]:=${machine[runtime]}}"

nodes=("${options[name]}")
node_words=("--node-id=${options[name]}")
if ((machine[slices] > 1)); then
  # gcloud numbers the slices of a prefix.
  nodes=()
  for ((slice = 0; slice < machine[slices]; slice++)); do nodes+=("${options[name]}-$slice"); done
  node_words=("--node-count=${machine[slices]}" "--node-prefix=${options[name]}")
fi
hosts=()
workers=$((machine[hosts] / machine[slices]))
for node in "${nodes[@]}"; do
  for ((worker = 0; worker < workers; worker++)); do hosts+=("$node/$worker"); done
done

remote() {
  gcloud_tpus tpu-vm ssh "${hosts[$1]%/*}" "--worker=${hosts[$1]#*/}" "--command=$2"
}

place() { echo MAXLLM_DISTRIBUTED=auto; } # JAX asks the machine which slice and worker it is

# shellcheck source=launch/remote.sh
source "$launch/remote.sh"

state() {
  gcloud compute tpus queued-resources describe "${options[name]}" "${where[@]}" '--format=value(state.state)' \
    2>/dev/null || echo absent
}

create() {
  local wait=() now before=''
  [ -z "${options[wait]}" ] || wait=("--valid-until-duration=${options[wait]}")
  if ! dry && [ "$(state)" = ACTIVE ]; then
    say "${options[name]} is there already"
    return 0
  fi
  gcloud_tpus queued-resources create "${options[name]}" "${node_words[@]}" "--accelerator-type=${machine[tpu_type]}" \
    "--runtime-version=${options[runtime]}" "${capacity[@]}" "${wait[@]}"
  dry && return 0
  while now=$(state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$before" ] || say "${options[name]}: $now"
    before=$now
    case $now in
      FAILED | SUSPENDED | SUSPENDING | absent)
        say "${options[name]} was not given: see gcloud compute tpus queued-resources describe ${options[name]}"
        exit 1
        ;;
    esac
    sleep "${MAXLLM_POLL_SECONDS:-20}"
  done
}

install() {
  send_code
  everywhere install_one "maxllm could not be installed"
}

start() { everywhere start_one "the run could not be started"; }

show_status() {
  dry || say "${options[name]}: $(state)"
  everywhere status_one "no answer"
}
status_one() {
  if dry; then on "$1" launch/worker.sh status "$(known_as "$1")"; else
    echo "${hosts[$1]}: $(on "$1" launch/worker.sh status "$(known_as "$1")" </dev/null)"
  fi
}

stop_one() { on "$1" launch/worker.sh signal "$(known_as "$1")" TERM </dev/null; }

case ${options[step]} in
  create | install | start) "${options[step]}" && exit 0 ;;
  status) show_status && exit 0 ;;
  stop) everywhere stop_one "no answer" && exit 0 ;;
  follow)
    dry || follow_all
    exit "$code"
    ;;
esac

# Everything, again where that may help.
recipe_word=${words[1]}
for ((attempt = 0; ; attempt++)); do
  words[1]=$recipe_word
  create
  install
  start
  dry && break
  follow_all
  [ "$asked" -eq 0 ] || break
  case $code in
    75 | 137 | 143) ;;
    *) break ;;
  esac
  if ((attempt >= options[restarts])); then
    say "exit code $code after $((attempt + 1)) starts: not again"
    break
  fi
  say "exit code $code: again"
  if [ "$(state)" != ACTIVE ]; then delete || true; fi
done
[ "${options[delete]}" = no ] || delete
exit "$code"
