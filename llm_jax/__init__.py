"""llm_jax: a JAX/Flax codebase for large language models. `llm_jax.load(RUN_DIR)` is what notebooks use.

Importing this starts no device and imports no JAX.
"""
import glob
import importlib.util
import os
import pathlib
import sys

__version__ = '0.1.0'


def _leave_absent_devices_alone() -> None:
  """Where there is no accelerator, JAX's errors about that are not for users. With libtpu installed (extra `plan`) it
  tries TPUs on every machine and prints what it misses: so the platforms are named, unless the user has. And of every
  program in its cache it says as an error that the CPU lacks what are mere preferences (jax issue 38445)."""
  vendors = glob.glob('/sys/bus/pci/devices/*/vendor')
  if glob.glob('/dev/accel*') or any(pathlib.Path(v).read_text().strip() == '0x1ae0' for v in vendors):   # Google's
    return
  nvidia = os.path.exists('/dev/nvidiactl')
  if not nvidia and os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':      # what JAX sets it to
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
  if 'JAX_PLATFORMS' in os.environ or importlib.util.find_spec('libtpu') is None:
    return
  if importlib.util.find_spec('jax_plugins') is None:
    platforms = 'cpu'
  elif nvidia:
    platforms = 'cuda,cpu'
  else:
    return
  os.environ['JAX_PLATFORMS'] = platforms
  if 'jax' in sys.modules:                   # it has read the variable already
    sys.modules['jax'].config.update('jax_platforms', platforms)


_leave_absent_devices_alone()


def load(path, step: int | None = None, ema: bool = False, dtype: str | None = None):
  """A trained model by its run directory or one of its checkpoint steps; see llm_jax.api.load."""
  from llm_jax import api
  return api.load(path, step, ema, dtype)
