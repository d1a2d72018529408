#!/usr/bin/env bash
# Starts a run on GKE as a JobSet, on TPU or GPU node pools, follows its logs, and returns the run's exit code.
#
#   launch/gke.sh --name NAME --image IMAGE [options] VERB RECIPE [key=value ...]
#   launch/gke.sh --name seven --image us-docker.pkg.dev/P/R/maxllm --bucket B \
#     pretrain pretrain/llama2-7b_synthetic_v5p-16 run.dir=/data/runs/seven
#
#   --name NAME          of the JobSet
#   --image IMAGE        in which maxllm is installed
#   --build              build it from this folder (launch/Dockerfile) and push it first
#   --hardware NAME      the machine, as `maxllm plan` names it, 2xv5p-16 for two slices (run.hardware of the recipe)
#   --bucket BUCKET      Cloud Storage bucket to mount at /data (the cluster has GKE's Cloud Storage FUSE driver)
#   --service-account A  the pods' account in Kubernetes, which may use the bucket
#   --spot               on spot nodes
#   --restarts N         of the whole JobSet: after a pod was lost, or asked for a restart (20)
#   --context NAME       --namespace NAME     as kubectl takes them
#   --no-follow          apply, and return
#   --delete             delete the JobSet when the run has ended
#   --dry-run            print the commands and the manifest, run nothing
#
# The cluster has the JobSet controller (https://jobset.sigs.k8s.io) and a node pool of the machine for each slice.
# The recipe, overrides included, goes over in a ConfigMap, the code in the image, the data lies in the bucket. Lines
# of the log begin with their pod. Ctrl-C stops following; the JobSet goes on.
set -euo pipefail
declare -A options=(
  [name]='' [image]='' [build]=no [hardware]='' [bucket]='' [service-account]='' [spot]=no [restarts]=20
  [context]='' [namespace]='' [follow]=yes [delete]=no
)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
need_recipe
need name
need image
need_number restarts
need_command kubectl
ask_machine

render=("$maxllm" manifest jobset "${words[@]}" "--name=${options[name]}" "--image=${options[image]}"
  "--restarts=${options[restarts]}")
for option in hardware bucket service-account; do
  [ -z "${options[$option]}" ] || render+=("--$option=${options[$option]}")
done
[ "${options[spot]}" = no ] || render+=(--spot)
manifest=$("${render[@]}") || exit $?

kubectl=(kubectl)
for option in context namespace; do
  [ -z "${options[$option]}" ] || kubectl+=("--$option=${options[$option]}")
done
kube() { run "${kubectl[@]}" "$@"; }

if [ "${options[build]}" = yes ]; then
  need_command docker
  extra=tpu
  [ "${machine[platform]}" = tpu ] || extra=cuda
  run docker build --file "$launch/Dockerfile" --build-arg "EXTRA=$extra" --tag "${options[image]}" "$root"
  run docker push "${options[image]}"
fi
if dry; then
  echo "# with this manifest as input:"
  kube apply --filename=-
  printf '%s\n' "$manifest"
  exit 0
fi
if [ -n "$(kube get jobset "${options[name]}" --ignore-not-found --output=name)" ]; then
  refuse "there is a JobSet ${options[name]} already: ${kubectl[*]} delete jobset ${options[name]}, or another --name"
fi
printf '%s\n' "$manifest" | kube apply --filename=-
[ "${options[follow]}" = yes ] || exit 0

pods="jobset.sigs.k8s.io/jobset-name=${options[name]}"
hosts=${machine[hosts]}
trap 'kill "$logs" 2>/dev/null; say "${options[name]} goes on: ${kubectl[*]} delete jobset ${options[name]} ends it"; exit 130' INT TERM
logs=
ended=
while [ -z "$ended" ]; do
  ended=$(kube get jobset "${options[name]}" '--output=jsonpath={.status.terminalState}') || {
    say "the cluster does not answer; again in 10 s"
    ended=
  }
  # Pods of a restart are new ones, and their logs begin anew.
  if [ -z "$ended" ] && ! kill -0 "$logs" 2>/dev/null; then
    if [ -n "$(kube get pods "--selector=$pods" --field-selector=status.phase=Running --output=name)" ]; then
      "${kubectl[@]}" logs "--selector=$pods" --follow --prefix --tail=-1 "--max-log-requests=$hosts" &
      logs=$!
    fi
  fi
  [ -n "$ended" ] || sleep "${MAXLLM_POLL_SECONDS:-10}"
done
[ -z "$logs" ] || wait "$logs" 2>/dev/null || true

code=0
if [ "$ended" != Completed ]; then
  # Of the pods of the last start, the one that failed first.
  columns='{.status.containerStatuses[0].state.terminated.finishedAt} {.status.containerStatuses[0].state.terminated.exitCode} {.metadata.name} {.spec.nodeName}'
  while read -r _ status pod node; do
    if [[ $status =~ ^[0-9]+$ ]] && ((status != 0 && (code == 0 || code == 75 && status != 75))); then
      code=$status
      first="$pod on $node failed first, with exit code $status"
    fi
  done < <(kube get pods "--selector=$pods" "--output=jsonpath={range .items[*]}$columns{'\n'}{end}" | sort)
  ((code != 0)) || code=1
  say "${first:-the JobSet failed; see ${kubectl[*]} describe jobset ${options[name]}}"
fi
[ "${options[delete]}" = no ] || kube delete jobset "${options[name]}"
exit "$code"
