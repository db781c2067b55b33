"""The mesh, and the two tables that say how a tensor's letters lie on it.

Every parameter and activation ends in its dims (`w_up_DF`, `x_BTD`); PARAM and ACT map those letters to mesh axes, so
no parameter needs an annotation of its own. The letters are explained once, in models/transformer.py.
"""
import contextlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

AXES = ('data', 'fsdp', 'tensor', 'context', 'expert', 'stage')
PARAM = dict(D='fsdp', V='tensor', N='tensor', K='tensor', F='tensor', E='expert', L='stage')
ACT = dict(B=('data', 'fsdp', 'expert'), T='context', V='tensor', N='tensor', K='tensor', F='tensor')


def initialize_hosts() -> None:
  """jax.distributed.initialize, where the machine says who its hosts are: a TPU pod, Slurm, MPI, Kubernetes, or the
  three variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
  number = lambda name: int(os.environ[name]) if name in os.environ else None      # JAX itself reads only the address
  try:
    jax.distributed.initialize(num_processes=number('JAX_NUM_PROCESSES'), process_id=number('JAX_PROCESS_ID'))
  except (ValueError, RuntimeError) as e:
    raise ConfigError(f'config.mesh.distributed: {" ".join(str(e).split())[:200]}; on one host set it to False, '
                      'elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID') from e


@contextlib.contextmanager
def fail_together():
  """What one process fails at inside, all fail at, instead of waiting for it in their next collective."""
  error = None
  try:
    yield
  except (ConfigError, OSError) as e:
    error = e
  failed = [error is not None]
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils
    failed = np.ravel(multihost_utils.process_allgather(np.bool_(error is not None))).tolist()
  if error:
    raise error
  if any(failed):
    raise ConfigError(f'process {failed.index(True)} could not go on; its own message says why')


def make_mesh(mesh: config_lib.Mesh, devices=None) -> jax.sharding.Mesh:
  """The Mesh of a config over `devices` (default: all). Raises ConfigError where the sizes do not multiply to them.

  Where the devices lie in several slices (TPU) or on several hosts without a fast network between them (what the
  runtime calls slices), the slices are split among replicas first: `data`, then `stage`, then `fsdp`.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(mesh, axis) for axis in AXES]
  if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
    raise ConfigError(f'config.mesh: expected positive sizes and at most one -1, got {dict(zip(AXES, sizes))}')
  fixed = math.prod(s for s in sizes if s > 0)
  if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
    raise ConfigError(f'config.mesh: {dict(zip(AXES, sizes))} needs {"a multiple of " if -1 in sizes else ""}{fixed} '
                      f'devices, there are {len(devices)}')
  sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  kinds = (AxisType.Auto,) * len(AXES)
  between = across_slices(dict(zip(AXES, sizes)), slices)
  outer = [between.get(axis, 1) for axis in AXES]
  inner = [s // n for s, n in zip(sizes, outer)]

  def arrange(**options):
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)
    return mesh_utils.create_device_mesh(sizes, devices, **options)
  try:
    grid = arrange()
  except NotImplementedError:        # an axis that is no whole dimension of the TPU's torus, such as 4 of 16
    try:
      grid = arrange(allow_split_physical_axes=True)
    except NotImplementedError as e:
      raise ConfigError(f'config.mesh: {dict(zip(AXES, sizes))} does not fit the torus of the devices; use powers of '
                        'two, or fewer axes') from e
  return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def across_slices(sizes: dict[str, int], slices: int) -> dict[str, int]:
  """How many ways of each axis lie in different slices: the slow network carries what communicates least."""
  out, left = {}, slices
  for axis in ('data', 'stage', 'fsdp'):
    out[axis] = math.gcd(sizes[axis], left)
    left //= out[axis]
  if left > 1:
    raise ConfigError(f'config.mesh: {slices} slices must divide data x stage x fsdp, which are {sizes["data"]}, '
                      f'{sizes["stage"]} and {sizes["fsdp"]}; set data to a multiple of {slices}')
  return out


def spec(dims: str, table: dict, shape: tuple[int, ...] | None = None, mesh: jax.sharding.Mesh | None = None) -> P:
  """PartitionSpec of a tensor with these dims, e.g. 'LDF'. Raises ValueError for an axis used twice; with a shape and a
  mesh also for a size its axis does not divide, except K, which is replicated (few kv heads on a wide tensor axis),
  and T (a prompt, one new token; training checks its length)."""
  axes = [table.get(letter) for letter in dims]
  used = [a for axis in axes if axis for a in (axis if isinstance(axis, tuple) else (axis,))]
  if len(used) != len(set(used)):
    raise ValueError(f'{dims}: a mesh axis is used twice: {axes}')
  if shape is not None:
    if len(shape) != len(dims):
      raise ValueError(f'{dims}: {len(dims)} letters for shape {shape}')
    for i, (letter, size, axis) in enumerate(zip(dims, shape, axes)):
      ways = axis_size(mesh, axis)
      if size % ways and letter in 'KT':
        axes[i] = None
      elif size % ways:
        raise ConfigError(f'config.mesh: axis {axis!r} ({ways} ways) does not divide {letter}={size} of {dims}; '
                          f'set it to a divisor of {size}')
  return P(*axes)


def axis_size(mesh, axis) -> int:
  """Devices along an axis, a tuple of axes, or None (1)."""
  return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))


def ways(axis: str) -> int:
  """Devices along an axis of the mesh that is set; 1 where none is."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def shard(x, dims: str, table: dict = ACT):
  """Constrains an activation to its letters' axes; does nothing where no mesh is set (a single device, a test)."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(dims, table, x.shape, mesh))


def per_device(f, in_specs, out_specs):
  """f under `shard_map` over every axis that is not yet split by hand (inside the pipeline, `stage` is)."""
  mesh = jax.sharding.get_abstract_mesh()
  free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
  return jax.shard_map(f, axis_names=free, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def indices(axis: str) -> jax.Array:
  """[axis size]: give it to `per_device` with P(axis), and each device gets its own index along the axis as a [1]
  array. jax.lax.axis_index does not compile in a shard_map inside another."""
  return jnp.arange(jax.sharding.get_abstract_mesh().shape[axis])


def dims_of(path) -> str:
  """The dims in a parameter's path: the suffix of its name, with a leading L inside stacked layers."""
  keys = [k.key for k in path if isinstance(getattr(k, 'key', None), str)]
  named = next((k for k in reversed(keys) if '_' in k and k.rsplit('_', 1)[1].isupper()), None)
  if named is None:
    raise ValueError(f'no parameter name with dims in {jax.tree_util.keystr(path)}')
  return ('L' if any(k.startswith(STACKED) for k in keys) else '') + named.rsplit('_', 1)[1]


STACKED = ('blocks', 'tail', 'encoder_blocks')   # the names whose leaves have a leading L; see models/transformer.py


def param_specs(params, mesh: jax.sharding.Mesh):
  """PartitionSpecs of a tree of parameters (arrays or ShapeDtypeStructs), by the letters of their names."""
  return jax.tree_util.tree_map_with_path(lambda path, x: spec(dims_of(path), PARAM, x.shape, mesh), params)


def replicated_kv(params, mesh) -> bool:
  """True where K is replicated because the tensor axis does not divide it; the banner says so."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return any('K' in (dims := dims_of(p)) and x.shape[dims.index('K')] % mesh.shape['tensor'] for p, x in leaves)


def named(mesh: jax.sharding.Mesh, specs):
  """NamedShardings of a tree of PartitionSpecs."""
  return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def local_rows(rows: int, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(first, stop) of the rows of a global batch that this process's devices hold; where the tensor axis spans hosts,
  several hold the same."""
  ways = axis_size(mesh, ACT['B'])
  held = NamedSharding(mesh, P(ACT['B'])).addressable_devices_indices_map((ways,)).values()
  parts = sorted({i for (part,) in held for i in range(*part.indices(ways))})
  if parts != list(range(parts[0], parts[-1] + 1)):
    raise ConfigError('config.mesh: the devices of a host hold rows that are not next to each other; make tensor x '
                      'context a multiple of its devices, or a divisor')
  return parts[0] * rows // ways, (parts[-1] + 1) * rows // ways


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """This process's rows (local_rows) of a batch (names end in their dims) as global arrays, split over B's axes."""
  ways = axis_size(mesh, ACT['B'])
  first, stop = local_rows(ways, mesh)

  def put(name, x):
    sharding = NamedSharding(mesh, spec(name.rsplit('_', 1)[1], {'B': ACT['B'], 'T': 'context'}))
    return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * ways // (stop - first), *x.shape[1:]))
  return {name: put(name, x) for name, x in batch.items()}
