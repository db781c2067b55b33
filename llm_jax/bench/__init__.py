"""Speed, each figure beside a peer and the machine's limit: python -m llm_jax.bench."""
import os
import platform
import statistics
import time


def hardware() -> str:
  """The device and host in a few words, and jax's version."""
  import jax
  device = jax.devices()[0]
  return f'{device.device_kind}, {len(os.sched_getaffinity(0))} cores {platform.machine()}, jax {jax.__version__}'


def import_torch():
  """The torch module. Raises ConfigError where it is not installed."""
  from llm_jax.config import ConfigError
  try:
    import torch
  except ImportError as e:
    raise ConfigError("--peer=torch: PyTorch is not installed; pip install -e '.[parity]'") from e
  return torch


def token_batch(flags):
  """Random tokens [batch, length + 1]: inputs and targets of a step."""
  import numpy as np
  return np.random.default_rng(0).integers(0, flags.vocab, (flags.batch, flags.length + 1), dtype=np.int32)


def seconds_of(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def alternate(runs: dict, rounds: int) -> dict[str, list[float]]:
  """What each run returns in each of several rounds, in which they take turns."""
  found = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
  return {name: [row[name] for row in found] for name in runs}


def medians(found: dict[str, list[float]]) -> dict[str, float]:
  return {name: statistics.median(values) for name, values in found.items()}
