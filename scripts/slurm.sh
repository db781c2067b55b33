#!/usr/bin/env bash
# One run on the GPU nodes of a SLURM cluster: srun starts the processes, JAX reads who they are from SLURM.
#   sbatch --nodes=4 scripts/slurm.sh [--config.group.key=value ...]          # from the root of the repository
# One process per node with all its GPUs; with --ntasks-per-node=8 one per GPU (as many as --gpus-per-node).
# Checked by shellcheck and against the documentation of SLURM and JAX; not run on a cluster.
#SBATCH --job-name=llm_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}               # the same path on every node
CONFIG=${CONFIG:-configs/gpt2_124m.py}
WORKDIR=${WORKDIR:-runs/gpt2_124m}               # a folder that all nodes see, or gs://...

cd "$SLURM_SUBMIT_DIR"
# JAX gives each SLURM process the one GPU of its local number, unless this says which.
if [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 && ${SLURM_GPUS_ON_NODE:-0} -gt 0 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# srun does not take --cpus-per-task from sbatch (since SLURM 22.05); exec: nothing is left to do here.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --label \
  "$PYTHON" -u -m llm_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@" --config.mesh.distributed=True
