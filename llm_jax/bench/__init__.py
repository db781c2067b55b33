"""Speed, each figure beside a peer and the machine's limit: python -m llm_jax.bench."""
import os
import platform


def hardware() -> str:
  """The device and host in a few words."""
  import jax
  device = jax.devices()[0]
  return f'{device.device_kind}, {len(os.sched_getaffinity(0))} cores {platform.machine()}'
