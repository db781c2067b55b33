"""llm_jax: a JAX/Flax codebase for large language models. `llm_jax.load(RUN_DIR)` is what notebooks use.

Importing this starts no device and imports no JAX.
"""
import glob
import importlib.util
import os
import pathlib
import sys

__version__ = '0.1.0'


def _leave_absent_tpus_alone() -> None:
  """With libtpu installed (extra `plan`) JAX tries it on every machine, and where there is no TPU it prints errors: so
  there the platforms are named, unless the user has."""
  if 'JAX_PLATFORMS' in os.environ or importlib.util.find_spec('libtpu') is None:
    return
  vendors = glob.glob('/sys/bus/pci/devices/*/vendor')
  if glob.glob('/dev/accel*') or any(pathlib.Path(v).read_text().strip() == '0x1ae0' for v in vendors):   # Google's
    return
  if importlib.util.find_spec('jax_plugins') is None:
    platforms = 'cpu'
  elif os.path.exists('/dev/nvidiactl'):
    platforms = 'cuda,cpu'
  else:
    return
  os.environ['JAX_PLATFORMS'] = platforms
  if 'jax' in sys.modules:                   # it has read the variable already
    sys.modules['jax'].config.update('jax_platforms', platforms)


_leave_absent_tpus_alone()


def load(path, step: int | None = None, ema: bool = False, dtype: str | None = None):
  """A trained model by its run directory or one of its checkpoint steps; see llm_jax.api.load."""
  from llm_jax import api
  return api.load(path, step, ema, dtype)
