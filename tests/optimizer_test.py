"""Schedules, the four optimizers against float64 references, who gets decay and Muon, and moments on a mesh."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from llm_jax import config, sharding
from llm_jax.train import muon, optimizer

BASE = config.Optimizer()
NAMES = ('adamw', 'adafactor', 'lion', 'muon')


def factors(steps, horizon, **changes):
  return np.asarray(optimizer.schedule(dataclasses.replace(BASE, **changes), jnp.int32(steps), jnp.int32(horizon)))


@pytest.mark.parametrize('name, at_half, at_end', [
    ('constant', 1, 1), ('linear', 0.55, 0.1), ('cosine', 0.55, 0.1), ('inverse_sqrt', (100 / 551) ** 0.5, 0.1 ** 0.5),
    ('wsd', 1, 0.1)])
def test_schedule_values(name, at_half, at_end):
  got = factors([0, 49, 99, 550, 1000, 5000], 1000, schedule=name)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[:4], [0.01, 0.5, 1, at_half], rtol=1e-6)
  np.testing.assert_allclose(got[4], at_end, rtol=1e-3)
  if name != 'inverse_sqrt':
    assert got[5] == got[4]


def test_step_and_horizon_are_traced():
  run = jax.jit(lambda step, horizon: optimizer.schedule(BASE, step, horizon))
  for step, horizon in ((7, 20), (700, 1000), (700, 2000)):
    got = run(jnp.int32(step), jnp.int32(horizon))
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, factors(step, horizon), rtol=1e-6)
  assert run._cache_size() == 1


def test_wsd_decays_linearly_over_its_last_share():
  got = factors([599, 600, 700, 800, 900], 1000, schedule='wsd')
  np.testing.assert_allclose(got, [1, 1, 0.775, 0.55, 0.325], rtol=1e-6)


def test_warmup_and_stable_phase_do_not_see_the_horizon():
  steps = np.arange(400)
  np.testing.assert_array_equal(factors(steps, 1000, schedule='wsd'), factors(steps, 7777, schedule='wsd'))
  for name in ('linear', 'cosine', 'inverse_sqrt'):
    np.testing.assert_array_equal(factors(steps[:100], 1000, schedule=name), factors(steps[:100], 7777, schedule=name))


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(config.CHOICES['optimizer.schedule']), horizon=st.integers(1, 300),
       warmup=st.integers(0, 400), final=st.sampled_from([0.0, 0.1, 1.0]))
def test_schedule_rises_then_falls_within_its_bounds(name, horizon, warmup, final):
  got = factors(np.arange(300), horizon, schedule=name, warmup_steps=warmup, final_fraction=final)[:horizon]
  peak = min(warmup, horizon // 2)
  assert (got > 0).all() and (got <= 1).all()
  np.testing.assert_allclose(got[max(peak - 1, 0)], 1, rtol=1e-6)
  assert (np.diff(got[:peak]) > 0).all() and (np.diff(got[peak:]) <= 1e-6).all()


def test_a_run_shorter_than_its_warmup_warms_up_over_half():
  got = factors(np.arange(20), 20, schedule='cosine', warmup_steps=100)
  np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert got[10] == 1 and got[19] < 0.15


SHAPES = {
    'embed_VD': (160, 128), 'unembed_DV': (128, 160), 'position_embed_SD': (32, 128), 'norm_final': {'scale_D': (128,)},
    'blocks0': {
        'attention': {'w_q_DNH': (2, 128, 4, 32), 'w_k_DKH': (2, 128, 2, 32), 'w_o_NHD': (2, 4, 32, 128),
                      'b_q_NH': (2, 4, 32), 'norm_q': {'scale_NH': (2, 4, 32)}, 'value_mix_K': (2, 2)},
        'mlp': {'w_up_DF': (2, 128, 256), 'w_down_FD': (2, 256, 128), 'b_up_F': (2, 256)}, 'skip_x_D': (2, 128)},
    'tail0': {'mlp': {'w_gate_DF': (1, 128, 256), 'w_up_EDF': (1, 2, 128, 64), 'router_DE': (1, 128, 2),
                      'b_down_ED': (1, 2, 128)}},
}


def tree(make):
  keys = iter(range(1000))
  return jax.tree.map(lambda shape: make(next(keys), shape), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def normal(seed, scale):
  return tree(lambda i, shape: scale * np.random.default_rng([seed, i]).normal(size=shape).astype(np.float32))


def few(seed, scale):
  """One of each kind, for what has to be compiled."""
  params = normal(seed, scale)
  block, tail = params['blocks0'], params['tail0']
  return {'embed_VD': params['embed_VD'], 'norm_final': params['norm_final'],
          'blocks0': {'attention': {name: block['attention'][name] for name in ('w_q_DNH', 'w_o_NHD', 'b_q_NH')},
                      'mlp': {name: block['mlp'][name] for name in ('w_up_DF', 'w_down_FD')}},
          'tail0': {'mlp': {'w_up_EDF': tail['mlp']['w_up_EDF']}}}


def names(labels, label):
  return {jax.tree_util.keystr(path, simple=True, separator='/')
          for path, x in jax.tree_util.tree_leaves_with_path(labels) if x == label}


MATRICES = {'blocks0/attention/w_q_DNH', 'blocks0/attention/w_k_DKH', 'blocks0/attention/w_o_NHD',
            'blocks0/mlp/w_up_DF', 'blocks0/mlp/w_down_FD', 'tail0/mlp/w_gate_DF', 'tail0/mlp/w_up_EDF'}
INPUTS = dict(DNH=-3, DKH=-3, NHD=(-3, -2), DF=-2, FD=-2)     # axes that a matrix sums over
EMBEDDINGS = {'embed_VD', 'unembed_DV', 'position_embed_SD'}
VECTORS = {'norm_final/scale_D', 'blocks0/attention/b_q_NH', 'blocks0/attention/norm_q/scale_NH',
           'blocks0/attention/value_mix_K', 'blocks0/mlp/b_up_F', 'blocks0/skip_x_D', 'tail0/mlp/b_down_ED'}


def test_who_gets_muon():
  labels = optimizer.muon_labels(normal(0, 1))
  assert names(labels, 'matrix') == MATRICES
  assert names(labels, 'rest') == EMBEDDINGS | VECTORS | {'tail0/mlp/router_DE'}


def test_who_is_decayed():
  mask = optimizer.decayed(normal(0, 1))
  assert names(mask, True) == MATRICES | EMBEDDINGS | {'tail0/mlp/router_DE'}
  assert names(mask, False) == VECTORS


# References in float64, written from the papers.

def newton_schulz(x, steps):
  """By what the polynomials make of the singular values."""
  u, s, v = np.linalg.svd(x, full_matrices=False)
  s = s / np.linalg.norm(s) / 1.01
  for i, (a, b, c) in enumerate(muon.COEFFICIENTS[:steps]):
    s = s / 1.01 if i < steps - 1 else s
    s = a * s + b * s**3 + c * s**5
  return (u * s) @ v


def orthogonal(m, dims, steps):
  """Each layer's and expert's matrix by itself, as [in, out], scaled by sqrt(max(1, out / in))."""
  batch = m.shape[:len(dims) - len(dims.lstrip('LE'))]
  inner = m.shape[len(batch):]
  rows = inner[0] if dims.lstrip('LE')[0] == 'D' else int(np.prod(inner[:-1]))
  flat = m.reshape(-1, rows, int(np.prod(inner)) // rows)
  out = [newton_schulz(x, steps) * max(1, x.shape[1] / x.shape[0]) ** 0.5 for x in flat]
  return np.stack(out).reshape(m.shape)


def adam_direction(cfg, g, s, t):
  s['m'] = cfg.b1 * s.get('m', 0) + (1 - cfg.b1) * g
  s['v'] = cfg.b2 * s.get('v', 0) + (1 - cfg.b2) * g * g
  return s['m'] / (1 - cfg.b1**t) / (np.sqrt(s['v'] / (1 - cfg.b2**t)) + cfg.eps)


def lion_direction(cfg, g, s, t):
  m = s.get('m', np.zeros_like(g))
  s['m'] = cfg.b2 * m + (1 - cfg.b2) * g
  return np.sign(cfg.b1 * m + (1 - cfg.b1) * g)


def adafactor_direction(cfg, g, s, t):
  decay, square = 1 - t**-0.8, g * g + 1e-30
  rows, columns = np.argsort(g.shape)[-2:] if g.ndim > 1 else (0, 0)
  if g.ndim > 1 and g.shape[rows] >= 128:
    s['r'] = decay * s.get('r', 0) + (1 - decay) * square.mean(columns, keepdims=True)
    s['c'] = decay * s.get('c', 0) + (1 - decay) * square.mean(rows, keepdims=True)
    v = s['r'] * s['c'] / s['r'].mean(rows, keepdims=True)
  else:
    v = s['v'] = decay * s.get('v', 0) + (1 - decay) * square
  u = g / np.sqrt(v)
  return u / max(1, np.sqrt(np.mean(u * u)))


def muon_direction(cfg, g, s, t, dims):
  b = cfg.momentum
  s['m'] = b * s.get('m', 0) + (1 - b) * g
  u = orthogonal(b * s['m'] / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t), dims, cfg.muon_steps)
  if not cfg.muon_b2:
    return u
  rows = INPUTS[dims.lstrip('LE')]
  s['v'] = cfg.muon_b2 * s.get('v', 0) + (1 - cfg.muon_b2) * (u * u).mean(rows, keepdims=True)
  alike = u / np.sqrt(s['v'] / (1 - cfg.muon_b2**t))
  one = tuple(range(-len(dims.lstrip('LE')), 0))
  return alike * np.sqrt((u * u).sum(one, keepdims=True) / (alike * alike).sum(one, keepdims=True))


def reference(cfg, params, grads_by_step, factor):
  flat = {path: np.float64(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
  states = {path: {} for path in flat}
  direction = dict(adamw=adam_direction, lion=lion_direction, adafactor=adafactor_direction,
                   muon=adam_direction)[cfg.name]
  for t, grads in enumerate(grads_by_step, 1):
    g = {path: np.float64(x) for path, x in jax.tree_util.tree_leaves_with_path(grads)}
    norm = np.sqrt(sum((x * x).sum() for x in g.values()))
    for path, w in flat.items():
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      clipped = g[path] * min(1, cfg.clip_norm / norm) if cfg.clip_norm else g[path]
      matrix = cfg.name == 'muon' and name in MATRICES
      args = (cfg, clipped, states[path], t)
      update = muon_direction(*args, sharding.dims_of(path)) if matrix else direction(*args)
      decay = 0 if name in VECTORS else cfg.weight_decay
      peak = cfg.matrix_learning_rate if matrix else cfg.learning_rate
      flat[path] = w - factor * peak * (update + decay * w)
  return flat


@pytest.mark.parametrize('name, clip_norm, muon_b2', [
    ('adamw', 1.0, 0.0), ('adafactor', 1.0, 0.0), ('lion', 0.0, 0.0), ('muon', 1.0, 0.0), ('muon', 1.0, 0.9)])
def test_matches_float64_reference(name, clip_norm, muon_b2):
  cfg = dataclasses.replace(BASE, name=name, learning_rate=0.01, weight_decay=0.3, clip_norm=clip_norm,
                            muon_b2=muon_b2)
  params, factor = few(0, 0.1), 0.5
  grads_by_step = [few(t + 1, 0.02 * (t + 1)) for t in range(4)]
  tx = optimizer.make(cfg, params)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(lambda p, u: p + factor * u, params, updates), state

  got, state = params, tx.init(params)
  for grads in grads_by_step:
    got, state = step(got, state, grads)
  want = reference(cfg, params, grads_by_step, factor)
  for path, w in jax.tree_util.tree_leaves_with_path(got):
    start = next(x for p, x in jax.tree_util.tree_leaves_with_path(params) if p == path)
    moved = np.abs(want[path] - start).max()
    assert moved > 1e-3
    # float32 Newton-Schulz magnifies rounding in the smallest singular values
    error = np.abs(w - want[path]).max() / moved
    assert error < (2e-3 if name == 'muon' else 1e-4), (path, error)


@pytest.mark.parametrize('steps, most', [(3, 0.87), (4, 0.57), (5, 0.15), (6, 0.01)])
def test_singular_values_come_near_one(steps, most):
  s = np.geomspace(1.0, 0.002, 24)
  u, v = (np.linalg.qr(np.random.default_rng(seed).normal(size=(n, 24)))[0] for seed, n in enumerate((24, 40)))
  x = np.stack([(u * s) @ v.T, (u * s[::-1]) @ v.T])
  got = np.linalg.svd(np.float64(muon.newton_schulz(jnp.asarray(x, jnp.float32), steps, 1e-8)), compute_uv=False)
  assert np.abs(got - 1).max() < most + 1e-4
  assert most < 0.1 or np.abs(got - 1).max() > most / 4              # no closer than was said


def test_the_state_is_that_of_optax_so_that_its_checkpoints_go_on():
  params = {'blocks0': {'w_up_DF': jnp.ones((2, 16, 64))}}
  ours, theirs = (tx.init(params) for tx in (muon.orthogonal_momentum(0.9, 5, 1e-8), optax.contrib.scale_by_muon()))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def rounded(closed, *args):
  """A jaxpr's values where products read their operands in bfloat16, as a TPU's do."""
  values = dict(zip(closed.jaxpr.constvars + closed.jaxpr.invars, [*closed.consts, *args]))
  read = lambda v: v.val if hasattr(v, 'val') else values[v]
  for eqn in closed.jaxpr.eqns:
    operands = [read(v) for v in eqn.invars]
    if eqn.primitive.name == 'dot_general':
      operands = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in operands]
    out = (rounded(eqn.params['jaxpr'], *operands) if 'jaxpr' in eqn.params else
           eqn.primitive.bind(*operands, **eqn.params))
    values.update(zip(eqn.outvars, out if isinstance(out, list) else [out]))
  return [read(v) for v in closed.jaxpr.outvars]


@pytest.mark.parametrize('steps, most', [(3, 2.05), (4, 1.7), (5, 1.25), (6, 1.25)])
def test_rounded_products_do_not_let_singular_values_grow(steps, most):
  """Where only products round, and where everything does, as on accelerators."""
  for seed in range(4):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, 128)))[0] for n in (128, 512))
    x = jnp.asarray((u * np.geomspace(1, 1e-4, 128)) @ v.T, jnp.float32)
    out, = rounded(jax.make_jaxpr(lambda x: muon.newton_schulz(x, steps, 1e-8))(x), x)
    stored = muon.newton_schulz(x, steps, 1e-8, jnp.bfloat16)
    assert stored.dtype == x.dtype and (stored == stored.astype(jnp.bfloat16)).all()
    for found in (out, stored):
      assert np.linalg.svd(np.float64(found), compute_uv=False).max() < most


@pytest.mark.parametrize('size', [64, 2048])
def test_matrices_of_one_shape_go_together_and_come_back_each_to_its_own(size, monkeypatch):
  """Also where none is small enough."""
  monkeypatch.setattr(muon, 'TOGETHER', 16 * size)
  sizes = dict(w_up_DF=(2, 16, 64), w_gate_DF=(2, 16, 64), w_down_FD=(2, 64, 16), w_q_DNH=(2, 16, 4, 4))
  updates = {'blocks0': {name: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
                         for i, (name, shape) in enumerate(sizes.items())}}
  lowered = jax.jit(lambda x: muon.orthogonalise(x, 5, 1e-8)).lower(updates)
  products = lowered.as_text().count('stablehlo.dot_general')
  assert products == (15 * 4 if size == 64 else 15 * 2)
  for path, got in jax.tree_util.tree_leaves_with_path(muon.orthogonalise(updates, 5, 1e-8)):
    dims = sharding.dims_of(path)
    rows, columns = (16, 64) if dims[1] == 'D' and dims != 'LDNH' else (64, 16)
    scale = max(1, columns / rows) ** 0.5 if dims != 'LDNH' else 1
    want = orthogonal(np.float64(updates['blocks0'][path[-1].key]), dims, 5) / scale
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('name, muon_b2', [*((name, 0.0) for name in NAMES), ('muon', 0.9)])
def test_zero_gradients_only_decay(name, muon_b2):
  rng = np.random.default_rng(0)
  shapes = {'embed_VD': (8, 4), 'norm': {'scale_D': (4,)}, 'w_up_DF': (4, 6)}
  params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
  tx = optimizer.make(dataclasses.replace(BASE, name=name, muon_b2=muon_b2), params)
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  peak = BASE.matrix_learning_rate if name == 'muon' else BASE.learning_rate
  np.testing.assert_allclose(updates['w_up_DF'], -peak * 0.1 * params['w_up_DF'], rtol=1e-5)
  np.testing.assert_allclose(updates['embed_VD'], -BASE.learning_rate * 0.1 * params['embed_VD'], rtol=1e-5)
  assert not updates['norm']['scale_D'].any()


def mesh_222():
  return sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))


def place(tx, params):
  """(mesh, params, opt_state) on 8 devices, each created where its spec says."""
  mesh = mesh_222()
  specs = sharding.param_specs(params, mesh)
  shardings = sharding.named(mesh, (specs, optimizer.opt_state_specs(tx, params, specs)))
  placed = jax.device_put(params, shardings[0])
  return mesh, placed, jax.jit(tx.init, out_shardings=shardings[1])(placed), shardings


PARAMS_FOR_MESH = {name: x for name, x in SHAPES.items() if name != 'tail0'}


def mesh_params(seed=0):
  return {name: x for name, x in normal(seed, 0.1).items() if name in PARAMS_FOR_MESH}


def device_bytes(tree):
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', NAMES)
def test_moments_lie_where_their_parameters_lie(name):
  params = mesh_params()
  tx = optimizer.make(dataclasses.replace(BASE, name=name), params)
  mesh, placed, state, _ = place(tx, params)
  by_name = {jax.tree_util.keystr(p, simple=True, separator='/'): x
             for p, x in jax.tree_util.tree_leaves_with_path(placed)}
  moments = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    key = jax.tree_util.keystr(path, simple=True, separator='/')
    owner = next((x for n, x in by_name.items() if key.endswith('/' + n)), None)
    if owner is not None and owner.shape == leaf.shape:
      moments += 1
      assert leaf.sharding.is_equivalent_to(owner.sharding, leaf.ndim), key
    elif owner is None or leaf.shape == (1,):
      assert leaf.sharding.is_fully_replicated and leaf.size <= 3, key
  factored = 4 if name == 'adafactor' else 0
  assert moments == len(by_name) * (2 if name == 'adamw' else 1) - factored + (
      len(by_name) - 5 if name == 'muon' else 0)
  unsharded = sum(x.nbytes for x in jax.tree.leaves(state))
  assert device_bytes(state) < 0.3 * unsharded
  assert device_bytes(jax.jit(tx.init)(placed)) > 0.9 * unsharded    # the trap this guards against


def test_factored_moments_lose_the_reduced_letter():
  params = mesh_params()
  tx = optimizer.make(dataclasses.replace(BASE, name='adafactor'), params)
  specs = optimizer.opt_state_specs(tx, params, sharding.param_specs(params, mesh_222()))
  state = specs[1][0]
  assert state.v_row['embed_VD'] == P('fsdp') and state.v_col['embed_VD'] == P('tensor')          # (160, 128)
  assert state.v_row['unembed_DV'] == P('fsdp') and state.v_col['unembed_DV'] == P('tensor')
  mlp = (state.v_row['blocks0']['mlp'], state.v_col['blocks0']['mlp'])
  assert [m['w_up_DF'] for m in mlp] == [P('stage', 'fsdp'), P('stage', 'tensor')]
  assert [m['w_down_FD'] for m in mlp] == [P('stage', 'fsdp'), P('stage', 'tensor')]
  assert state.v['blocks0']['attention']['w_q_DNH'] == P('stage', 'fsdp', 'tensor', None)         # 4 x 32: not factored
  assert state.v['embed_VD'] == P()


def test_averaged_moments_lose_the_axes_of_what_was_averaged():
  params = mesh_params()
  tx = optimizer.make(dataclasses.replace(BASE, name='muon', muon_b2=0.9), params)
  specs = optimizer.opt_state_specs(tx, params, sharding.param_specs(params, mesh_222()))
  found = {jax.tree_util.keystr(path, simple=True, separator='/').split('.nu/')[-1]: spec for path, spec in
           jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda s: isinstance(s, P))}
  by_leaf = {name.split('/')[-1]: spec for name, spec in found.items() if 'nu' in name}
  assert by_leaf['w_q_DNH'] == P('stage', None, 'tensor', None), found
  assert by_leaf['w_o_NHD'] == P('stage', None, None, 'fsdp')
  assert by_leaf['w_up_DF'] == P('stage', None, 'tensor') and by_leaf['w_down_FD'] == P('stage', None, 'fsdp')
  place(tx, params)                                                          # and they can lie there


def test_factored_specs_follow_optax_for_square_matrices_too():
  """Gradients that vary along D only: a mean that kept D varies, one that lost it is flat; so which dim is left is seen
  in the values, whatever the order in which optax takes equal dims."""
  sizes = dict(blocks0=(2, 128, 256), blocks1=(2, 256, 128), blocks2=(2, 128, 128))
  params = {name: {'w_up_DF': jnp.zeros((L, d, f)), 'w_down_FD': jnp.zeros((L, f, d))}
            for name, (L, d, f) in sizes.items()}
  grads = {name: {'w_up_DF': jnp.zeros((L, d, f)) + jnp.arange(1.0, d + 1)[None, :, None],
                  'w_down_FD': jnp.zeros((L, f, d)) + jnp.arange(1.0, d + 1)[None, None, :]}
           for name, (L, d, f) in sizes.items()}
  tx = optimizer.make(dataclasses.replace(BASE, name='adafactor'), params)
  specs = optimizer.opt_state_specs(tx, params, sharding.param_specs(params, mesh_222()))[1][0]
  state = jax.jit(tx.update)(grads, tx.init(params), params)[1][1][0]
  for field in ('v_row', 'v_col'):
    for path, moment in jax.tree_util.tree_leaves_with_path(getattr(state, field)):
      spec = getattr(specs, field)[path[0].key][path[1].key]
      assert spec == P('stage', 'fsdp' if float(jnp.ptp(moment)) > 0 else 'tensor'), (field, path)


@pytest.mark.parametrize('name, muon_b2', [('adafactor', 0.0), ('muon', 0.9)])
def test_update_on_a_mesh_equals_one_device(name, muon_b2):
  params, grads = few(0, 0.1), [few(1, 0.1), few(2, 0.1)]
  tx = optimizer.make(dataclasses.replace(BASE, name=name, muon_b2=muon_b2), params)
  mesh, placed, state, shardings = place(tx, params)
  on_mesh = jax.jit(tx.update, in_shardings=(shardings[0], shardings[1], shardings[0]),
                    out_shardings=(shardings[0], shardings[1]))
  alone, single = tx.init(params), jax.jit(tx.update)
  for g in grads:
    want, alone = single(g, alone, params)
    got, state = on_mesh(jax.device_put(g, shardings[0]), state, placed)
  for path, w in jax.tree_util.tree_leaves_with_path(want):
    x = next(x for p, x in jax.tree_util.tree_leaves_with_path(got) if p == path)
    error = float(np.abs(np.asarray(x) - np.asarray(w)).max() / np.abs(w).max())
    assert error < (1e-3 if name == 'muon' else 1e-5), (path, error)


def test_ema():
  params = {'w_D': jnp.full(3, 2.0)}
  ema = {'w_D': jnp.zeros(3)}
  update = jax.jit(optimizer.ema_update, static_argnums=2)
  first = update(ema, params, 0.99, jnp.int32(0))['w_D']
  np.testing.assert_allclose(first, 2.0 * 0.9, rtol=1e-6)                        # d = 1 / 10
  late = update(ema, params, 0.99, jnp.int32(100_000))['w_D']
  np.testing.assert_allclose(late, 2.0 * 0.01, rtol=1e-5)
  same = update(params, params, 0.99, jnp.int32(5))['w_D']
  np.testing.assert_array_equal(same, params['w_D'])


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('model', ['gpt2_124m', 'mixtral_8x7b'])
def test_a_rate_tuned_at_another_width_is_less_where_the_width_is_summed_over(name, model):
  """Half for twice the width: in all matrices but the embeddings and, with Muon, its own."""
  cfg = tiny.model(model, tied_embeddings=False)
  params = tiny.params(cfg)
  grads = jax.tree.map(lambda w: np.ones_like(w) * 0.1, params)
  updates = {}
  for tuned in (0, cfg.width // 2):
    tx = optimizer.make(config.Optimizer(name=name, weight_decay=0.1, tuned_width=tuned), params)
    updates[tuned], _ = tx.update(grads, tx.init(params), params)
  ratio = jax.tree.map(lambda a, b: float(np.median(np.asarray(b / a))), updates[0], updates[cfg.width // 2])
  for path, found in jax.tree_util.tree_leaves_with_path(ratio):
    leaf = path[-1].key.partition('_')[0]
    wide = leaf in ('w', 'unembed') and not (name == 'muon' and path[-1].key.split('_')[1] != 'router' and leaf == 'w')
    np.testing.assert_allclose(found, 0.5 if wide else 1, rtol=1e-5, err_msg=str(path))
