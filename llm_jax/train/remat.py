"""How much of the forward pass a run keeps for the backward pass: with remat='auto' as much as fits. Each way is
compiled, from the fastest, until the compiler's account of the step's memory fits what a device has."""
import math
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from llm_jax.config import ConfigError

ORDER = ('none', 'dots', 'full')   # of time and memory; offload is asked for by name
SHARE = 0.95                       # of a device's memory; the rest is for batches that wait, and fragments
GIB = 2**30
OWN_GROUPS, GROUPS = pathlib.Path('/proc/self/cgroup'), pathlib.Path('/sys/fs/cgroup')
ADVICE = 'a smaller train.batch_size, or more train.accumulate'


def needed(step) -> float:
  """Bytes of a device while a compiled step runs: its arguments, results that are not written over them, and
  temporaries; 0 where the compiler gives no account."""
  found = step.memory_analysis()
  return 0.0 if found is None else float(
      found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes +
      found.temp_size_in_bytes + found.generated_code_size_in_bytes)


def refused(error: Exception) -> bool:
  """Whether a compiler found that a device's memory is too small (not that of one multiprocessor for a kernel)."""
  return (isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)
          and 'hared memory' not in str(error))


def lightest(compiled: Callable, remat: str, limit: float | None = None, size_of: Callable | None = None,
             no_room: Callable | None = None) -> tuple[object, str, str]:
  """(what compiled(remat) gives, its remat, why). limit: bytes that a device may hold (None: `memory`); size_of: what
  was compiled (None: `needed`); no_room: whether an exception says that it does not fit (None: `refused`).

  Of several processes the most that one needs counts, so that all choose the same. Where nothing fits it is 'full', and
  why says what to change; where not even that compiles, the exception, as a ConfigError where it is XLA's."""
  if remat != 'auto':
    return compiled(remat), remat, 'as configured'
  limit, size_of, no_room = memory() if limit is None else limit, size_of or needed, no_room or refused
  tried = []
  for remat in ORDER:
    step, size = None, math.inf
    try:
      step = compiled(remat)
      size = size_of(step)
    except Exception as e:
      if not no_room(e):
        raise
      if remat == ORDER[-1] and isinstance(e, jax.errors.JaxRuntimeError):
        raise ConfigError(f"config.model.remat: not even 'full' fits, says the compiler; {ADVICE}: "
                          f'{" ".join(str(e).split())[:200]}') from e
      if remat == ORDER[-1]:
        raise
    size = _over_processes(size, np.max)
    tried.append(f'{remat} needs {size / GIB:.3g}' if size < math.inf else f'{remat} does not fit, says the compiler')
    if size <= SHARE * limit:
      break
  else:
    tried[-1] += f' and may not fit: {ADVICE}'
  return step, remat, f'{"; ".join(tried)} of {limit / GIB:.3g} GiB'


def memory() -> float:
  """Bytes that a device may hold: what XLA has set aside of an accelerator's memory (no limit where it does not tell);
  of a machine's memory, or what this process's container or job may take of it, the share of each virtual CPU device.
  Of several processes the least."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', math.inf)
  if jax.default_backend() == 'cpu':
    machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limit = min([machine, *_group_limits()]) / jax.local_device_count()
  return _over_processes(limit, np.min)


def _group_limits() -> list[int]:
  """Bytes that Linux' control groups allow this process, of its own group and those around it (versions 1 and 2)."""
  found = []
  for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
    _, controllers, path = line.split(':', 2)
    if controllers and 'memory' not in controllers.split(','):
      continue
    root, name = (GROUPS / 'memory', 'memory.limit_in_bytes') if controllers else (GROUPS, 'memory.max')
    own = root / path.lstrip('/')
    for folder in (own, *own.parents[:len(own.parts) - len(root.parts)]):
      text = (folder / name).read_text().strip() if (folder / name).exists() else ''
      found += [int(text)] if text.isdecimal() else []
  return found


def _over_processes(value: float, pick) -> float:
  if jax.process_count() == 1:
    return float(value)
  from jax.experimental import multihost_utils
  return float(pick(multihost_utils.process_allgather(np.float32(value))))
