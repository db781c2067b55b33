"""Speed, each figure beside a peer and the machine's limit: python -m llm_jax.bench."""
import os
import platform


def hardware() -> str:
  """The device and host in a few words."""
  import jax
  device = jax.devices()[0]
  return f'{device.device_kind}, {len(os.sched_getaffinity(0))} cores {platform.machine()}'


def import_torch():
  """The torch module. Raises ConfigError where it is not installed."""
  from llm_jax.config import ConfigError
  try:
    import torch
  except ImportError as e:
    raise ConfigError("--peer=torch: PyTorch is not installed; pip install -e '.[parity]'") from e
  return torch
