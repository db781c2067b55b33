"""How much of the forward pass a run keeps for the backward pass: with remat='auto' as much as fits. Each way is
compiled, from the fastest, until the compiler's account of the step's memory fits what a device has."""
import os
from collections.abc import Callable

import jax
import numpy as np

ORDER = ('none', 'dots', 'full')   # of time and memory; offload is asked for by name
SHARE = 0.95                       # of a device's memory; the rest is for batches that wait, and fragments
GIB = 2**30


def lightest(compiled: Callable, remat: str, limit: float | None = None) -> tuple[object, str, str]:
  """(the compiled step, its remat, why): compiled(remat) gives a step by lowered.compile(); limit: bytes that a device
  may hold (None: `memory`). Where nothing fits it is 'full', and why says so: what to change is for the user to say."""
  if remat != 'auto':
    return compiled(remat), remat, 'as configured'
  limit = memory() if limit is None else limit
  tried = []
  for remat in ORDER:
    try:
      step = compiled(remat)
    except jax.errors.JaxRuntimeError as e:            # a TPU's compiler finds that it does not fit
      if 'RESOURCE_EXHAUSTED' not in str(e) or 'hared memory' in str(e) or remat == ORDER[-1]:
        raise
      tried.append(f'{remat} does not fit, says the compiler')
      continue
    tried.append(f'{remat} needs {needed(step) / GIB:.3g}')
    if needed(step) <= SHARE * limit:
      break
  else:
    tried[-1] += ' and may not fit: a smaller train.batch_size, or more train.accumulate'
  return step, remat, f'{"; ".join(tried)} of {limit / GIB:.3g} GiB'


def needed(step) -> float:
  """Bytes of a device while a compiled step runs: its arguments, results that are not written over them, and
  temporaries."""
  found = step.memory_analysis()
  return float(found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes +
               found.temp_size_in_bytes + found.generated_code_size_in_bytes)


def memory() -> float:
  """Bytes that a device may hold: what XLA has set aside of an accelerator's memory; of a machine's memory, the share
  of each virtual device. Of several processes the least, so that all choose the same."""
  stats = jax.local_devices()[0].memory_stats() or {}
  here = stats.get('bytes_limit') or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils
    return float(np.min(multihost_utils.process_allgather(np.float32(here))))
  return float(here)
