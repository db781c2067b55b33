#!/usr/bin/env bash
# Rehearsal: one run in several processes on this machine's CPU, as on the hosts of a pod.
#   scripts/local_hosts.sh --config=configs/base.py --workdir=runs/rehearsal [--config.group.key=value ...]
# Prints what host 0 prints; the other hosts write to $LOGS. Ctrl-C and SIGTERM stop all after the same step.
# The exit status is that of the first host that failed, else 0.
set -euo pipefail

PYTHON=${PYTHON:-python}
HOSTS=${HOSTS:-2}                 # processes
DEVICES=${DEVICES:-1}             # CPU devices of each
LOGS=${LOGS:-}                    # folder of the other hosts' output; empty: a new one in $TMPDIR or /tmp

cd "$(dirname "$0")/.."
[[ -n $LOGS ]] || LOGS=$(mktemp -d "${TMPDIR:-/tmp}/local_hosts.XXXXXX")
mkdir -p "$LOGS"
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1 JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$HOSTS
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
pids=()
for ((i = 0; i < HOSTS; i++)); do
  export JAX_PROCESS_ID=$i
  command=("$PYTHON" -m llm_jax.main "$@" --config.mesh.distributed=True)
  if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$LOGS/host$i.log" 2>&1 & fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

status=0
for i in "${!pids[@]}"; do
  code=0
  wait "${pids[i]}" || code=$?
  while kill -0 "${pids[i]}" 2>/dev/null; do    # a signal to this script ended the wait, not the process
    code=0
    wait "${pids[i]}" || code=$?
  done
  echo "host $i: status $code$( ((i == 0)) || echo "  ($LOGS/host$i.log)")"
  ((status)) || status=$code
done
exit "$status"
