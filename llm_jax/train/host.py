"""What the host process is told before it trains on its own CPU."""
import ctypes
import sys

import jax

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4    # of mallopt(3)


def keep_freed_memory() -> bool:
  """Lets glibc keep what XLA:CPU frees, instead of returning it to the kernel; True where it did.

  Every step allocates the same large buffers. Given back each time, each of their pages faults anew: an elementwise
  pass over 50 MB took 28 ms instead of 5 (docs/benchmarks.md). The process's memory stays at its peak. Nothing happens
  on accelerators and outside glibc.
  """
  if jax.default_backend() != 'cpu' or not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:        # musl
    return False
  return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 1 << 26)])
