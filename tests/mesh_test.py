"""Every mesh computes what one device computes: the gradients of the first step leaf by leaf, and ten steps of losses
and gradient norms, for dense models and experts, with accumulation, packing, remat, pipelines and a resume on another
mesh. `pytest tests/mesh_test.py -s` prints the table."""
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import checkpoint, sharding
from llm_jax import config as config_lib
from llm_jax.models import attention
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import step as step_lib

B, T, V, STEPS = 32, 16, 128, 10
# Sizes that leave more than one of T, N, F and V on each device. E, D and F of an expert occur nowhere else.
DENSE = dict(vocab_size=V, layers=4, width=32, heads=8, kv_heads=8, head_dim=4, mlp_dim=64, mlp='swiglu', unroll=False)
MOE = dict(DENSE, kv_heads=4, experts=8, experts_per_token=2, expert_dim=24)
# Plain Adam turns the last bit of a gradient of zero into a full step; eps keeps what is compared continuous.
FAST = {'learning_rate': 3e-2, 'schedule': 'constant', 'warmup_steps': 0, 'eps': 3e-3}
MODELS = {        # model, train, optimizer, packed?
    'dense': (DENSE, dict(accumulate=1, ema=0.9), {}, False),
    'dense, accumulated, packed, dropout, remat': (
        dict(DENSE, dropout=0.1, remat='full'), dict(accumulate=4, loss_chunk=32, z_loss=1e-4), {}, True),
    'windows, skips, unrolled, kv heads': (
        dict(DENSE, windows=(4, 0), kv_heads=2, embedding_skips=True, value_skips=True, unroll=True,
             remat='dots'), dict(accumulate=4), dict(learning_rate=1e-2), False),
    'experts, packed': (MOE, dict(accumulate=1), {}, True),
    'experts with capacity, shared, biases, accumulated, remat': (
        dict(MOE, expert_capacity=1.0, shared_experts=1, router='sigmoid', router_bias=True, remat='full'),
        # At some other rates two experts of a token score the same but for rounding, and meshes choose differently.
        dict(accumulate=4), dict(learning_rate=2e-2), False),
    # Heavier repeats:
    'learned positions, untied, layer norm, muon': (
        dict(DENSE, positions='learned', tied_embeddings=False, norm='layer', norm_bias=True, attention_bias=True,
             mlp='gelu', mlp_bias=True, attention_out_bias=True), dict(accumulate=2), dict(name='muon'), True),
    'alibi, softcap, lion': (
        dict(DENSE, positions='alibi', attention_softcap=5.0, logit_softcap=10.0, qk_norm='head'), dict(accumulate=2),
        dict(name='lion', learning_rate=6e-3), False),
    'experts, dropout': (dict(MOE, dropout=0.1, remat='dots'), dict(accumulate=2), {}, False),
    'adafactor': (dict(DENSE, width=256, mlp_dim=128, layers=2), dict(accumulate=1),
                  dict(name='adafactor', learning_rate=3e-3), False),
}
DENSE_MESHES = ['data=8', 'fsdp=8', 'data=2 fsdp=4', 'fsdp=2 tensor=4', 'data=2 fsdp=2 tensor=2', 'context=8',
                'fsdp=4 context=2', 'tensor=2 context=4', 'fsdp=2 tensor=2 context=2']
STAGES = ['fsdp=4 stage=2', 'data=2 stage=4', 'fsdp=2 tensor=2 stage=2', 'fsdp=2 context=2 stage=2',
          'fsdp=4 stage=2 interleave=2']
EXPERTS = ['expert=8', 'fsdp=2 expert=4', 'fsdp=2 tensor=2 expert=2', 'fsdp=2 context=2 expert=2',
           'data=2 tensor=2 expert=2']
ONE, TWO, THREE, FOUR, FIVE, *MORE = MODELS
TABLE = [(ONE, mesh) for mesh in DENSE_MESHES] + [(TWO, mesh) for mesh in DENSE_MESHES[1:7] + STAGES] + [
    (THREE, mesh) for mesh in ('fsdp=4 tensor=2', 'fsdp=2 tensor=2 context=2', STAGES[0])] + [
    (FOUR, mesh) for mesh in [*EXPERTS, 'fsdp=4 tensor=2']] + [
    (FIVE, mesh) for mesh in [*EXPERTS[:4], 'fsdp=2 expert=2 stage=2', 'data=2 expert=2 stage=2 interleave=2']]
RESUMED = [(ONE, 'fsdp=8', 'fsdp=2 tensor=4'), (TWO, 'fsdp=4 stage=2', 'fsdp=4 context=2'),
           (TWO, 'fsdp=2 tensor=4', 'data=2 stage=4'), (FOUR, 'expert=8', 'fsdp=4 tensor=2'),
           (FIVE, 'fsdp=2 expert=2 stage=2', 'fsdp=2 tensor=2 expert=2')]
SLOW = [(name, mesh) for name in MODELS for mesh in DENSE_MESHES + STAGES + EXPERTS + ['fsdp=2 expert=2 stage=2']
        if (name, mesh) not in TABLE]


def mesh_of(text):
  return config_lib.Mesh(**dict(fsdp=1) | {k: int(n) for k, n in (part.split('=') for part in text.split())})


def config(name, mesh=''):
  model, train, optimizer, packed = MODELS[name]
  return config_lib.Config(
      model=config_lib.Model(**model), data=config_lib.Data(length=T, packing='pack' if packed else 'concat'),
      train=config_lib.Train(batch_size=B, steps=STEPS, **train), mesh=mesh_of(mesh),
      optimizer=config_lib.Optimizer(**FAST | optimizer))


def batch_of(cfg, step):
  """Rows that count upwards, of very different numbers of targets: easy to learn. Packed: two documents
  and padding in each."""
  rng = np.random.default_rng(step)
  token = ((rng.integers(0, V, (B, 1)) + np.arange(T + 1)) % V).astype(np.int32)
  mask = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
  batch = dict(token_BT=token[:, :-1].copy(), target_BT=token[:, 1:].copy(), mask_BT=mask)
  if cfg.data.packing == 'pack':
    ends = np.sort(rng.integers(2, T + 1, (B, 2)), 1)
    at = np.arange(T)[None]
    segment = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
    position = np.where(segment == 2, at - ends[:, :1], at).astype(np.int32)
    batch |= dict(segment_BT=segment, position_BT=position, mask_BT=mask * (segment > 0))
  return batch


KEEP = optax.GradientTransformation(      # passes gradients on, and keeps them, to the last bit
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads))


class Program:
  """A compiled step of a config on its mesh, or on one device."""

  def __init__(self, cfg, devices=None):
    self.cfg, self.mesh = cfg, sharding.make_mesh(cfg.mesh, devices)
    step_lib.check_rows(cfg, self.mesh)
    model = config_lib.derive(cfg.model, V, T)
    kernel, _ = attention.choose(model, 'cpu', 'float32', T, cfg.data.packing == 'pack', self.mesh.shape['context'])
    tx = optax.chain(KEEP, optimizer_lib.make(cfg.optimizer, tiny.shapes(model)))
    init = lambda key: step_lib.init_state(cfg, model, tx, key)
    with jax.set_mesh(self.mesh), jax.default_matmul_precision('highest'):
      abstract = jax.eval_shape(init, jax.random.key(0))
      self.shardings = step_lib.state_shardings(abstract, tx, self.mesh)
      self.abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract,
                                   self.shardings)
      self.init = tiny.quick_jit(init, out_shardings=self.shardings)
      self.step = tiny.quick_jit(step_lib.make_train_step(cfg, model, tx, kernel), donate_argnums=0,
                                 out_shardings=(self.shardings, None)).lower(self.abstract, self.batch(0)).compile()

  def batch(self, step):
    return sharding.put_batch(batch_of(self.cfg, step), self.mesh)

  def run(self, state=None, steps=range(STEPS)):
    """(final state, losses, gradient norms, gradients of the first of the steps)."""
    figures = []
    with jax.set_mesh(self.mesh):
      state = self.init(jax.random.key(0)) if state is None else state
      for i in steps:
        state, metrics = self.step(state, self.batch(i))
        figures.append((float(metrics['loss/train']), float(metrics['grads/norm'])))
        if i == steps[0]:
          gradients = {name: np.array(x) for name, x in leaves(state['opt_state'][0]).items()}
    return state, *np.array(figures).T, gradients


@functools.cache
def one_device(name):
  state, losses, norms, gradients = Program(config(name), jax.devices()[:1]).run()
  assert losses[-1] < 0.8 * losses[0], losses       # a flat curve would prove nothing
  sizes = {key: np.linalg.norm(g) for key, g in gradients.items()}
  assert sum(size > noise(sizes) for size in sizes.values()) > 0.8 * len(sizes)
  return losses, norms, gradients, sizes


def noise(sizes):
  return 1e-6 * max(sizes.values())        # some gradients are zero but for rounding: e.g. the bias of keys


def leaves(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def worst(a, b):
  return float(np.max(np.abs(np.asarray(a) - b) / np.abs(b)))


def compare(name, mesh, losses, norms, gradients=None, first=0):
  """Prints a line of the table; everything within 1e-5, relative."""
  want_losses, want_norms, want, sizes = one_device(name)
  loss, norm = worst(losses, want_losses[first:]), worst(norms, want_norms[first:])
  print(f'\n| {name} | {mesh} | {want_losses[0]:.3f} to {want_losses[-1]:.3f} | {loss:.1e} | {norm:.1e} |', end='')
  assert loss <= 1e-5 and norm <= 1e-5
  for key, g in (gradients or {}).items():
    most = 1e-5 * sizes[key] if sizes[key] > noise(sizes) else noise(sizes)
    assert np.linalg.norm(g - want[key]) <= most, key


def check_layout(program, state):
  """Parameters, moments and gradients lie as their letters say, and nothing that is split is anywhere whole."""
  for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.shardings)):
    assert x.sharding.is_equivalent_to(wanted, x.ndim)
  params = leaves(state['params'])
  for name, m in leaves(state['opt_state']).items():        # gradients (KEEP) and moments end in their parameter's path
    param = next((p for key, p in params.items() if name.endswith('/' + key) and p.shape == m.shape), None)
    if param is not None:
      assert m.sharding.is_equivalent_to(param.sharding, m.ndim), name
  sizes = program.mesh.shape
  shapes = {tuple(map(int, s.split(','))) for s in re.findall(r'f32\[([\d,]+)\]', program.step.as_text())}
  if sizes['fsdp'] * sizes['tensor'] * sizes['stage'] > 1:
    assert all(x.addressable_shards[0].data.size < x.size for x in params.values() if x.ndim > 2)
  if sizes['fsdp'] > 1 and not program.cfg.model.unroll:     # no buffer holds a matrix, or its gradient, of all layers
    assert not shapes & {x.shape for key, x in params.items()    # shared: the shape of a device's experts, by chance
                         if x.ndim > 2 and key.startswith('blocks') and 'shared' not in key}
  if sizes['expert'] > 1:                                   # nor every expert's matrices
    D, E, F = (program.cfg.model.width, program.cfg.model.experts, program.cfg.model.expert_dim)
    parts = {(D // d, F // f) for d in (1, sizes['fsdp']) for f in (1, sizes['tensor'])}
    assert any(E // sizes['expert'] in s and (s[-2:] in parts or s[-2:][::-1] in parts) for s in shapes)
    assert not [s for s in shapes if E in s and len(s) > 2 and (s[-2:] in parts or s[-2:][::-1] in parts)]


@pytest.mark.parametrize('name, mesh', TABLE + [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW], ids=str)
def test_ten_steps_equal_one_device(name, mesh, capfd):
  try:
    program = Program(config(name, mesh))
  except config_lib.ConfigError as e:
    if (name, mesh) in TABLE:
      raise
    pytest.skip(f'no such combination: {e}')
  state, *figures = program.run()
  out = capfd.readouterr()
  assert 'ematerialization' not in out.err, out.err
  with capfd.disabled():
    compare(name, mesh, *figures)
  check_layout(program, state)


@pytest.mark.parametrize('name, first, then', RESUMED, ids=str)
def test_resumed_on_another_mesh(name, first, then, tmp_path, capfd):
  cut = STEPS // 2
  program = Program(config(name, first))
  state, losses, norms, gradients = program.run(steps=range(cut))
  (tmp_path / 'tokenizer').mkdir()
  with checkpoint.Checkpointer(tmp_path, 1, config_lib.to_dict(program.cfg)) as checkpoints:
    checkpoints.save(cut, state)
    checkpoints.wait()
  program = Program(config(name, then))
  state = checkpoint.restore(tmp_path, abstract_state=program.abstract)
  _, more_losses, more_norms, _ = program.run(state, range(cut, STEPS))
  assert 'ematerialization' not in capfd.readouterr().err
  with capfd.disabled():
    compare(name, f'{first}, resumed on {then}', [*losses, *more_losses], [*norms, *more_norms], gradients)


def test_the_table_is_long_enough():
  assert len(set(TABLE)) + len(RESUMED) >= 40


def factors(n, axes):
  """Every way to split n devices among the axes."""
  if len(axes) == 1:
    return [{axes[0]: n}]
  return [{axes[0]: k, **rest} for k in (1, 2, 4, 8) if n % k == 0 for rest in factors(n // k, axes[1:])]


@functools.cache
def runnable(name):
  """The meshes that a model accepts; each of the others is refused in a line that names the key."""
  out = []
  for sizes in factors(8, ('data', 'fsdp', 'tensor', 'context', 'expert', 'stage')):
    cfg = config(name, text := ' '.join(f'{axis}={n}' for axis, n in sizes.items()))
    try:
      model = config_lib.derive(cfg.model, V, T)
      step_lib.check_rows(cfg, mesh := sharding.make_mesh(cfg.mesh))
      attention.choose(model, 'cpu', 'float32', T, cfg.data.packing == 'pack', mesh.shape['context'])
      sharding.param_specs(tiny.shapes(model), mesh)
      out.append(text)
    except config_lib.ConfigError as e:
      assert str(e).startswith('config.') and '\n' not in str(e)
  return out


@given(st.data())
@settings(max_examples=int(os.environ.get('LLM_JAX_MESH_EXAMPLES', 3)), deadline=None, derandomize=True, database=None)
def test_any_mesh(data):
  name = data.draw(st.sampled_from([ONE, TWO, FOUR, FIVE]))
  mesh = data.draw(st.sampled_from(runnable(name)))
  _, *figures = Program(config(name, mesh)).run()
  compare(name, mesh, *figures)


def test_most_meshes_run():
  assert all(len(runnable(name)) > 20 for name in (ONE, TWO, FOUR, FIVE))


def test_the_warning_that_fails_a_mesh_is_seen(capfd):
  """The partitioner does warn, where the tests look: of rows over three axes that become columns over two, in
  another order."""
  mesh = sharding.make_mesh(mesh_of('data=2 fsdp=2 tensor=2'))
  rows = NamedSharding(mesh, P(('data', 'fsdp', 'tensor')))
  columns = NamedSharding(mesh, P(None, ('tensor', 'fsdp')))
  x = jax.ShapeDtypeStruct((64, 64), 'float32', sharding=rows)
  f = lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), rows)) * 2
  jax.jit(lambda x: jax.lax.with_sharding_constraint(f(x), columns), out_shardings=columns).lower(x).compile()
  assert 'ematerialization' in capfd.readouterr().err
