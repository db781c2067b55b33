#!/usr/bin/env bash
# One run on the TPU slices of a GKE cluster, through XPK (pip install xpk).
#   scripts/gke_xpk.sh cluster | run [--config.group.key=value ...] | list | stop | delete
# Checked by shellcheck and against XPK's documentation; not run on a cluster.
set -euo pipefail

CLUSTER=${CLUSTER:-llm-jax}
WORKLOAD=${WORKLOAD:-llama3-8b}                  # a name is free again after `stop`
PROJECT=${PROJECT:-$(gcloud config get-value project)}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}                      # of one slice
SLICES=${SLICES:-1}
CAPACITY=${CAPACITY:---on-demand}                # --on-demand | --spot | --flex | --reservation=NAME
IMAGE=${IMAGE:-}                                 # has llm_jax in /app; empty: this folder, installed at each start
RESTARTS=${RESTARTS:-50}                         # after a failure or a lost node: the same command resumes
CONFIG=${CONFIG:-configs/llama3_8b.py}
WORKDIR=${WORKDIR:-gs://BUCKET/llama3_8b}

where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

cd "$(dirname "$0")/.."
action=${1:-}
shift || true
case $action in
  cluster)                                       # run again with another SLICES to change it
    xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices="$SLICES" "$CAPACITY"
    ;;
  run)
    mesh=()
    if ((SLICES > 1)); then mesh=(--config.mesh.data="$SLICES"); fi
    printf -v args ' %q' --config="$CONFIG" --workdir="$WORKDIR" ${mesh[@]+"${mesh[@]}"} "$@" \
      --config.mesh.distributed=True
    # exec: XPK sends SIGTERM to its own child, which must be the run and not a shell around it.
    if [[ $IMAGE ]]; then
      image=(--docker-image="$IMAGE") command="cd /app && exec python -u -m llm_jax.main$args"
    else
      image=(--base-docker-image=python:3.12 --script-dir="$PWD")
      command="pip install --quiet -e '.[tpu,bucket]' && exec python -u -m llm_jax.main$args"
    fi
    xpk workload create "${where[@]}" --workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices="$SLICES" \
      "${image[@]}" --command="$command" --max-restarts="$RESTARTS" --restart-on-user-code-failure \
      --termination-grace-period-seconds=300
    ;;
  list)
    xpk workload list "${where[@]}"
    ;;
  stop)
    xpk workload delete "${where[@]}" --workload="$WORKLOAD"
    ;;
  delete)
    xpk cluster delete "${where[@]}"
    ;;
  *)
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
    ;;
esac
