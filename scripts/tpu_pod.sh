#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice, or of several slices, through a queued resource.
#   scripts/tpu_pod.sh create | status | install | run [--config.group.key=value ...] | logs | stop | delete
# Checked by shellcheck and against gcloud's documentation; not run on a pod.
set -euo pipefail

NAME=${NAME:-llm-jax}
PROJECT=${PROJECT:-$(gcloud config get-value project)}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}                      # of one slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}          # of v5e; v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
SLICES=${SLICES:-1}
CREATE_FLAGS=${CREATE_FLAGS:-}                   # --spot, --reserved, --network=..., --service-account=..., ...
CONFIG=${CONFIG:-configs/llama3_8b.py}
WORKDIR=${WORKDIR:-gs://BUCKET/llama3_8b}        # a bucket, or a folder that all hosts see
CODE=${CODE:-HEAD}                               # the commit that all hosts run

where=(--project="$PROJECT" --zone="$ZONE")
all=(--node=all --worker=all)
ssh() { gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" "$@"; }

action=${1:-}
shift || true
case $action in
  create)
    if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); else nodes=(--node-id="$NAME"); fi
    read -ra extra <<<"$CREATE_FLAGS"
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" "${nodes[@]}" ${extra[@]+"${extra[@]}"}
    ;;
  status)                                        # go on when it says ACTIVE
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
    ;;
  install)                                       # the images' own Python may be older than 3.11: uv brings one
    cd "$(dirname "$0")/.."
    archive=$(mktemp -d)/llm_jax.tar.gz
    git archive --format=tar.gz --output="$archive" "$CODE"
    gcloud compute tpus queued-resources scp "$archive" "$NAME": "${where[@]}" "${all[@]}"
    ssh "${all[@]}" --command='set -e
      rm -rf llm_jax && mkdir llm_jax && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --python 3.12 .venv
      ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e ".[tpu,bucket]"'
    ;;
  run)                                           # detached, so that a lost connection does not end it
    mesh=()
    if ((SLICES > 1)); then mesh=(--config.mesh.data="$SLICES"); fi
    printf -v args ' %q' --config="$CONFIG" --workdir="$WORKDIR" ${mesh[@]+"${mesh[@]}"} "$@" \
      --config.mesh.distributed=True
    ssh "${all[@]}" --command="cd llm_jax || exit 1
      if kill -0 \$(cat ../run.pid 2>/dev/null) 2>/dev/null; then echo 'already running' >&2; exit 1; fi
      nohup .venv/bin/python -u -m llm_jax.main$args >../run.log 2>&1 </dev/null & echo \$! >../run.pid"
    ;;
  logs)                                          # process 0 prints the banner and the steps; the others their errors
    ssh --node="${NODE:-0}" --worker="${WORKER:-0}" --command='tail -n 100 -f run.log'
    ;;
  stop)                                          # one host is enough: all stop after the same step, saved
    ssh --node=0 --worker=0 --command='kill -TERM $(cat run.pid)'
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force
    ;;
  *)
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
    ;;
esac
