"""Checkpoints for the tests, without a training run: random states of every kind of leaf, saved, and damaged."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import checkpoint, sharding
from llm_jax import config as config_lib
from llm_jax.config import ConfigError

CONFIG = config_lib.to_dict(config_lib.Config())
TREE = {'embed_VD': (16, 8), 'blocks0': {'mlp': {'w_up_DF': (3, 8, 16)}, 'norm': {'scale_D': (3, 8)}}}


def mesh_of(devices, fsdp, tensor):
  return sharding.make_mesh(config_lib.Mesh(fsdp=fsdp, tensor=tensor), jax.devices()[:devices])


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), TREE,
                      is_leaf=lambda x: isinstance(x, tuple))


def make_state(tx=None):
  """Optimizer states of random bits (NaN payloads too), among them bfloat16 moments and int32 counts."""
  tx = tx or optax.adamw(1e-2, mu_dtype=jnp.bfloat16)
  rng = np.random.default_rng(1)
  opt_state = jax.tree.map(
      lambda x: jnp.asarray(np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), x.dtype).reshape(x.shape)),
      jax.eval_shape(tx.init, make_params()))
  return dict(step=jnp.int32(7), horizon=jnp.int32(2**31 - 1), params=make_params(), opt_state=opt_state,
              ema=make_params(9))


def shardings_of(state, mesh):
  """Every leaf named like a parameter lies like that parameter; the rest is replicated."""
  def one(path, x):
    try:
      return NamedSharding(mesh, sharding.spec(sharding.dims_of(path), sharding.PARAM, x.shape, mesh))
    except ValueError:
      return NamedSharding(mesh, P())
  return jax.tree_util.tree_map_with_path(one, state)


def abstract(state, shardings=None):
  shardings = jax.tree.map(lambda x: x.sharding, state) if shardings is None else shardings
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def make_run(path):
  (path / 'tokenizer' / 'sub').mkdir(parents=True)
  (path / 'tokenizer' / 'tokenizer.json').write_text('{"kind": "byte"}')
  (path / 'tokenizer' / 'sub' / 'model').write_bytes(bytes(range(256)))
  return path


def save(run, *steps, state=None, keep=9, **kwargs):
  state = make_state() if state is None else state
  with checkpoint.Checkpointer(run, keep, CONFIG, **kwargs) as c:
    for step in steps:
      c.save(step, state, dict(horizon=100))
  return state


def folder_of(run, step):
  return run / 'checkpoints' / str(step)


def fails(match, function, *args, **kwargs):
  with pytest.raises(ConfigError, match=match) as e:
    function(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


def flip(path, offset=None, bit=0):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if offset is None else offset % len(data)] ^= 1 << bit
  path.write_bytes(data)
