"""Every test runs on 8 virtual CPU devices, with numpy-like silent rank promotion forbidden."""
import gc
import os
import signal

import pytest
from smollm2 import smollm2  # noqa: F401

# A device that waits for others in a collective holds one of XLA's threads, of which there are as many as devices; and
# XLA takes a machine that is busy for 40 seconds for one that stands still, and aborts.
os.environ.setdefault('PJRT_NPROC', '16')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8 '
                      '--xla_cpu_collective_call_terminate_timeout_seconds=600')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUMPY_RANK_PROMOTION', 'raise')
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it, and so would theirs


@pytest.fixture(scope='module', autouse=True)
def compiled_here():
  """Every file compiles its own programs. Each takes some of the 65,530 memory maps that Linux gives a process, at
  whose end XLA dies of a segmentation fault: those of a file go with it. And a command that a test runs in this process
  has its programs kept on the disk: not those of the tests after it, some of which look at the compiler's warnings."""
  yield
  import jax
  from jax.experimental.compilation_cache import compilation_cache
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope='session')
def tokenizer_json() -> str:
  """A tokenizer.json of 96 entries, as text."""
  import theirs
  return theirs.tokenizer_json()
