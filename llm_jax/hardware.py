"""What accelerators can do, and which machines are made of them: figures for MFU (train/metrics.py) and for planning
runs on machines that are not here (plan.py). And what this one keeps: compiled programs, and memory."""
import ctypes
import dataclasses
import glob
import hashlib
import pathlib
import platform
import re

from llm_jax.config import ConfigError, nearest

GIB = 2**30
ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel*', '/dev/vfio/[0-9]*')


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device (half a chip on TPU v2, v3 and 7x). FLOP/s are bf16, dense; bandwidths in bytes/s; `link`: of one
  link of the fast network (ICI, NVLink) in one direction, `links` of them; `slow`: of the network between slices or
  hosts, per device. 0: not known."""
  kind: str              # a pattern of device_kind
  flops: float
  watts: float
  memory: float = 0      # bytes
  bandwidth: float = 0   # of the memory
  link: float = 0
  links: int = 0
  slow: float = 0


def _chip(kind, tflops, watts, gib=0.0, memory_gb=0.0, link_gb=0.0, links=0, slow_gb=0.0):
  return Chip(kind, tflops * 1e12, watts, gib * GIB, memory_gb * 1e9, link_gb * 1e9, links, slow_gb * 1e9)


# kind, TFLOP/s, watts, memory GiB and GB/s, a link's GB/s in one direction, links, GB/s between slices or hosts.
# FLOP/s and memory are the vendors' data sheets (T4 and V100: f16); memory is what a program can use of it. Watts are
# board limits; TPU v2-v4 from arXiv 2304.01433, newer TPUs guesses. Links and slow networks of TPUs as in "How to scale
# your model" (jax-ml.github.io/scaling-book), of GPUs NVLink and one 400 Gbit/s adapter each.
CHIPS = (
    _chip('TPU v2', 22.5, 140), _chip('TPU v3', 61.5, 225), _chip('TPU v4 lite', 137, 175),
    _chip('TPU v4', 275, 192, 31.25, 1228, 45, 6, 6.25), _chip('TPU v5( lite|e)', 197, 200, 15.75, 819, 45, 4, 6.25),
    _chip('TPU v5p?', 459, 400, 95, 2765, 90, 6, 6.25), _chip('TPU v6( lite|e)', 918, 350, 31.25, 1640, 90, 4, 12.5),
    _chip('TPU7x?', 1153.5, 500, 94.75, 3690, 45, 6, 6.25),
    _chip('V100', 125, 300), _chip('T4', 65, 70, 14.6, 320), _chip('A10G', 70, 300, 22.5, 600),
    _chip('A10', 125, 150, 22.5, 600), _chip('A40', 149.7, 300),
    _chip(r'A100[\w-]*40GB', 312, 400, 39.4, 1555, 300, 1, 25), _chip('A100', 312, 400, 79.2, 2039, 300, 1, 25),
    _chip('L4', 121, 72, 22.5, 300), _chip('L40S', 362, 350), _chip('H100 NVL', 835, 400, 93, 3938),
    _chip('H100 PCIe', 756, 350, 79.6, 2039), _chip('H100', 989, 700, 79.6, 3350, 450, 1, 50),
    _chip('H200 NVL', 835, 600, 140, 4800),
    _chip('H200', 989, 700, 140, 4800, 450, 1, 50), _chip('GH200', 989, 700),
    _chip('B200', 2250, 1000, 178, 8000, 900, 1, 50), _chip('GB200', 2500, 1200),
    _chip('RTX 3090', 71, 350), _chip('RTX 4090', 165.2, 450), _chip('RTX 5090', 209.5, 575),
    _chip('RTX A6000', 154.8, 300), _chip('RTX 6000 Ada', 364, 300))


def known(device_kind: str) -> Chip | None:
  return next((c for c in CHIPS if re.search(rf'(?<!\w)(?:{c.kind})(?!\w)', device_kind)), None)


# Machines that are not here -------------------------------------------------------------------------------------------

FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16',
         '16x16x24')
TPUS = dict(v4=('TPU v4', CUBES, 2), v5e=('TPU v5e', FLAT, 1), v5p=('TPU v5p', CUBES, 2), v6e=('TPU v6e', FLAT, 1),
            tpu7x=('TPU7x', CUBES, 2))      # kind, shapes, what a slice's number counts per chip
GPUS = dict(t4='T4', a10='A10', l4='L4', a100='A100', h100='H100', h200='H200', b200='B200')


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine by its name: v5e:16x16 (or v5e-256), h100:64, cpu:8."""
  name: str
  platform: str        # tpu | gpu | cpu
  chip: Chip | None    # None: a CPU, which is measured
  devices: int = 0     # GPU, CPU
  shape: str = ''      # TPU
  host: int = 1        # devices joined by the fast network: a GPU node of 8


def topology(name: str) -> Topology:
  """Raises ConfigError with the machines that are known."""
  family, _, shape = name.lower().replace('-', ':', 1).partition(':')
  if family in TPUS:
    kind, shapes, per_chip = TPUS[family]
    if shape.isdecimal():                             # v5p-128 counts cores: 64 chips
      shape = next((s for s in shapes if _size(s) * per_chip == int(shape)), shape)
    if shape not in shapes:
      raise ConfigError(f'--topology: no {name!r}; {family} has {", ".join(shapes)}')
    return Topology(f'{family}:{shape}', 'tpu', known(kind), shape=shape)
  if family in (*GPUS, 'cpu'):
    if not shape.isdecimal() or not 0 < int(shape) <= 4096:
      raise ConfigError(f'--topology: expected {family}:N, N devices of at most 4096, got {name!r}')
    chip = known(GPUS[family]) if family in GPUS else None
    return Topology(f'{family}:{shape}', 'cpu' if chip is None else 'gpu', chip, int(shape), host=8)
  every = [f'{tpu}:{shapes[-1]}' for tpu, (_, shapes, _) in TPUS.items()] + [f'{gpu}:8' for gpu in GPUS] + ['cpu:8']
  raise ConfigError(f'--topology: no {name!r}{nearest(name, every)}; known: ' + '; '.join(
      [f'{tpu}:{"|".join(shapes)}' for tpu, (_, shapes, _) in TPUS.items()] + [f'{"|".join(GPUS)}|cpu:N']))


def _size(shape):
  size = 1
  for part in shape.split('x'):
    size *= int(part)
  return size


def keep_programs(folder) -> None:
  """Compiled programs that took half a second are kept in folder/xla-..., one for each kind of CPU: JAX would load what
  was compiled for another. A cache that the user has named to JAX stays."""
  import jax
  if jax.config.jax_compilation_cache_dir:
    return
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  flags = re.search(r'^(flags|Features)\s*:.*', cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
  cpu = hashlib.sha256((platform.machine() + (flags.group() if flags else '')).encode()).hexdigest()[:8]
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(folder) / f'xla-{cpu}'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def keep_memory() -> None:
  """On a CPU, memory that a step frees stays with the process for the next one; to be called before JAX starts its
  threads. XLA allocates a step's temporaries anew for each step, and glibc by default gives blocks of more than 32 MiB
  back to the system, which then clears every page again: up to a third of a small model's step (docs/log.md). Nothing
  changes without glibc, and where an accelerator computes."""
  if platform.libc_ver()[0] == 'glibc' and not accelerated():
    libc = ctypes.CDLL(None)
    libc.mallopt(-8, 1)         # M_ARENA_MAX: one heap for all threads, for others are cut into blocks of 64 MiB
    libc.mallopt(-4, 0)         # M_MMAP_MAX: no block of its own, all in the heap
    libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: the heap's end stays too


def give_back_memory() -> None:
  """What is free by now goes back to the system once, such as what setting up a run took."""
  if platform.libc_ver()[0] == 'glibc':
    ctypes.CDLL(None).malloc_trim(0)


def accelerated() -> bool:
  """Whether JAX will find a GPU or a TPU, by what is named to it or by the machine's devices: to ask JAX starts it."""
  import jax
  if jax.config.jax_platforms:
    return not jax.config.jax_platforms.startswith('cpu')
  return any(found for pattern in ACCELERATORS for found in glob.glob(pattern))
