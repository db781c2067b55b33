#!/usr/bin/env bash
# One run on several GPU nodes without a scheduler: start this on every node, with its own RANK, within 5 minutes.
#   COORDINATOR=10.0.0.1:8476 NODES=2 RANK=0 scripts/gpu_nodes.sh [--config.group.key=value ...]    # on 10.0.0.1
#   COORDINATOR=10.0.0.1:8476 NODES=2 RANK=1 scripts/gpu_nodes.sh [--config.group.key=value ...]    # on the other
# Checked by shellcheck and against the documentation of JAX and NCCL; not run on several nodes.
set -euo pipefail

COORDINATOR=${COORDINATOR:?address:port of the node with RANK=0, the same on every node}
NODES=${NODES:?how many nodes}
RANK=${RANK:?0 ... NODES-1, another on every node}
PYTHON=${PYTHON:-python}
CONFIG=${CONFIG:-configs/gpt2_124m.py}
WORKDIR=${WORKDIR:-runs/gpt2_124m}               # a folder that all nodes see, or gs://...
INTERFACE=${INTERFACE:-}                         # for NCCL, as eth0; empty: NCCL chooses

cd "$(dirname "$0")/.."
export JAX_COORDINATOR_ADDRESS=$COORDINATOR JAX_NUM_PROCESSES=$NODES JAX_PROCESS_ID=$RANK
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}            # INFO shows which network it took
[[ -z $INTERFACE ]] || export NCCL_SOCKET_IFNAME=$INTERFACE
# One process per node with all its GPUs (or those of CUDA_VISIBLE_DEVICES). exec: signals reach the run itself.
exec "$PYTHON" -u -m llm_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@" --config.mesh.distributed=True
