"""Every mesh computes what one device computes: gradients leaf by leaf, loss curves step by step, nothing gathered
by surprise, and the optimizer's moments where their parameters are."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import step as step_lib

B, T, V, STEPS = 32, 16, 128, 20
FAST = {'learning_rate': 1e-2, 'schedule': 'constant', 'warmup_steps': 0}
# Sizes that leave more than one of B, T, N, K, F and V on each device of every mesh below.
MODEL = dict(vocab_size=V, layers=2, width=32, heads=8, kv_heads=8, head_dim=4, mlp_dim=64, dropout=0.1, mlp='swiglu')
DATA8, FSDP8, TENSOR4 = dict(data=8, fsdp=1), dict(fsdp=8), dict(data=2, fsdp=1, tensor=4)
CUBE, FSDP2_TENSOR4, DATA2_FSDP4 = dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4), dict(data=2, fsdp=4)
MESHES = [CUBE, FSDP2_TENSOR4, FSDP8] + [
    pytest.param(m, marks=pytest.mark.slow) for m in (DATA8, TENSOR4, DATA2_FSDP4)]


def config(model=(), train=(), optimizer=()):
  return config_lib.Config(
      model=config_lib.Model(**MODEL | dict(model)), data=config_lib.Data(length=T),
      train=config_lib.Train(batch_size=B, steps=STEPS, **dict(accumulate=1) | dict(train)),
      optimizer=config_lib.Optimizer(**FAST | dict(optimizer)))


def batch_of(step):
  """Rows that count upwards by 1, 2 or 3, of very different numbers of targets: easy to learn."""
  rng = np.random.default_rng(step)
  start, stride = rng.integers(0, V, (B, 1)), rng.integers(1, 4, (B, 1))
  token = ((start + stride * np.arange(T + 1)) % V).astype(np.int32)
  mask = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
  return dict(token_BT=token[:, :-1].copy(), target_BT=token[:, 1:].copy(), mask_BT=mask)


KEEP = optax.GradientTransformation(      # passes gradients on, and keeps them, to the last bit
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads))


def run(cfg, mesh=None):
  """(final state, its shardings, loss curve, gradients of the first step) on a mesh, or on one device."""
  model = config_lib.derive(cfg.model, V, T)
  devices = None if mesh is not None else jax.devices()[:1]
  mesh = sharding.make_mesh(config_lib.Mesh(**mesh or {}), devices)
  tx = optax.chain(KEEP, optimizer_lib.make(cfg.optimizer, tiny.shapes(model)))
  key = jax.random.key(0)
  init = lambda key: step_lib.init_state(cfg, model, tx, key)
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    shardings = step_lib.state_shardings(jax.eval_shape(init, key), tx, mesh)
    state = tiny.quick_jit(init, out_shardings=shardings)(key)
    batch = sharding.put_batch(batch_of(0), mesh)
    for name, x in batch.items():         # the point of the sizes above: more than one of each on a device
      assert min(x.addressable_shards[0].data.shape) // cfg.train.accumulate > 1, name
    train_step = tiny.quick_jit(step_lib.make_train_step(cfg, model, tx, 'xla'), donate_argnums=0,
                                out_shardings=(shardings, None)).lower(state, batch).compile()
    losses = []
    for step in range(STEPS):
      state, metrics = train_step(state, sharding.put_batch(batch_of(step), mesh))
      losses.append(float(metrics['loss/train']))
      if step == 0:
        gradients = {name: np.array(x) for name, x in leaves(state['opt_state'][0]).items()}
  return state, shardings, np.array(losses), gradients


@functools.cache
def one_device(cfg):
  return run(cfg)


def leaves(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(cfg, mesh):
  """Loss curve to 1e-5, gradients of the first step per leaf to 1e-5 of their norm; returns state and shardings."""
  _, _, losses, gradients = one_device(cfg)
  assert losses[-1] < 0.8 * losses[0]       # a flat curve would prove nothing
  state, shardings, got_losses, got_gradients = run(cfg, mesh)
  assert got_gradients.keys() == gradients.keys()
  norms = {name: np.linalg.norm(g) for name, g in gradients.items()}
  noise = 1e-6 * max(norms.values())        # some are zero but for rounding: e.g. the bias of keys
  assert sum(norm > noise for norm in norms.values()) > 0.8 * len(norms)
  for name, g in gradients.items():
    most = 1e-5 * norms[name] if norms[name] > noise else noise
    assert np.linalg.norm(got_gradients[name] - g) <= most, name
  np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
  return state, shardings


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_gradients_and_20_steps_equal_one_device(mesh, capfd):
  """With dropout and accumulation on: masks follow global positions, microbatches stay on their devices."""
  state, shardings = assert_same(config(train=dict(accumulate=2, ema=0.9)), mesh)
  assert 'rematerialization' not in capfd.readouterr().err
  for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
    assert x.sharding.is_equivalent_to(wanted, x.ndim)
  params = leaves(state['params'])
  for name, m in leaves(state['opt_state']).items():        # AdamW: mu and nu end in their parameter's path
    param = next((p for key, p in params.items() if name.endswith('/' + key)), None)
    if param is not None:
      assert m.sharding.is_equivalent_to(param.sharding, m.ndim), name
  matrices = [x for x in params.values() if x.ndim > 2]
  whole = [x for x in matrices if x.addressable_shards[0].data.size == x.size]
  assert not whole or mesh == DATA8


VARIANTS = {
    'muon': dict(optimizer=dict(name='muon')),
    'adafactor': dict(optimizer=dict(name='adafactor')),
    'lion': dict(optimizer=dict(name='lion', learning_rate=5e-3)),
    'kv heads replicated': dict(model=dict(kv_heads=2), optimizer=dict(learning_rate=2e-2)),
    'learned positions, untied, layer norm': dict(model=dict(
        positions='learned', tied_embeddings=False, norm='layer', norm_bias=True, attention_bias=True, mlp='gelu',
        mlp_bias=True, attention_out_bias=True)),
    'windows, scan, remat, chunked loss': dict(
        model=dict(layers=3, windows=(4, 0), unroll=False, remat='full', embedding_skips=True, value_skips=True),
        train=dict(loss_chunk=4, z_loss=1e-4)),
}


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [CUBE, FSDP2_TENSOR4], ids=str)
@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_equal_one_device(variant, mesh, capfd):
  assert_same(config(**VARIANTS[variant]), mesh)
  assert 'rematerialization' not in capfd.readouterr().err
