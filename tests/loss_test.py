"""Cross-entropy against a float64 reference, its gradients, its chunked form's memory, and logits sharded over V."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import config, hlo, sharding
from llm_jax.train import loss


def batch(seed, B=3, T=8, V=17, scale=3.0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(B, T, V)).astype(np.float32) * scale, rng.integers(0, V, (B, T)).astype(np.int32),
          rng.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32))


def reference(logits, target, mask, z_loss, smoothing):
  x, mask = np.float64(logits), np.float64(mask)
  top = x.max(-1, keepdims=True)
  lse = (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]
  V = x.shape[-1]
  label = np.eye(V)[target]
  soft = (1 - smoothing) * label + smoothing / V
  log_p = x - lse[..., None]
  z = z_loss * lse**2
  total = -(soft * log_p).sum(-1) + z
  grad = np.exp(log_p) * (1 + 2 * z_loss * lse[..., None]) - soft
  sums = {'loss/ce': -((label * log_p).sum(-1) * mask).sum(), 'loss/z': (z * mask).sum(),
          'accuracy': ((x.argmax(-1) == target) * mask).sum(), 'tokens': mask.sum()}
  return (total * mask).sum(), sums, grad * mask[..., None]


value_and_grad = jax.jit(jax.value_and_grad(loss.cross_entropy, has_aux=True), static_argnums=(3, 4))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), extras=st.sampled_from([(0.0, 0.0), (1e-3, 0.0), (0.0, 0.1)]),
       scale=st.sampled_from([0.1, 3.0, 1000.0]))
def test_value_and_gradient_match_float64(seed, extras, scale):
  z_loss, smoothing = extras
  logits, target, mask = batch(seed, scale=scale)
  (total, sums), grad = value_and_grad(logits, target, mask, z_loss, smoothing)
  want_total, want_sums, want_grad = reference(logits, target, mask, z_loss, smoothing)
  np.testing.assert_allclose(total, want_total, rtol=1e-5)
  assert sums.keys() == want_sums.keys()
  for name, value in want_sums.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-5, atol=1e-4, err_msg=name)
  np.testing.assert_allclose(grad, want_grad, atol=1e-5 * max(1, np.abs(want_grad).max()))


def test_gradient_matches_the_naive_formula():
  logits, target, mask = batch(0)
  def naive(logits):
    return -(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0] * mask).sum()
  np.testing.assert_allclose(value_and_grad(logits, target, mask, 0.0, 0.0)[1], jax.grad(naive)(logits), atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  logits, target, mask = batch(1)
  low = jnp.asarray(logits, jnp.bfloat16)
  (total, _), grad = value_and_grad(low, target, mask, 1e-3, 0.1)
  want, _, want_grad = reference(low, target, mask, 1e-3, 0.1)
  assert total.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(np.float32(grad), want_grad, atol=5e-3)


def test_all_masked_is_zero_with_finite_gradients():
  logits, target, mask = batch(2)
  (total, sums), grad = value_and_grad(logits, target, 0 * mask, 1e-3, 0.1)
  assert total == 0 and all(value == 0 for value in sums.values())
  assert not grad.any()


def problem(B=2, T=32, D=16, V=50):
  rng = np.random.default_rng(0)
  params = {'x_BTD': rng.normal(size=(B, T, D)).astype(np.float32), 'w_VD': rng.normal(size=(V, D)).astype(np.float32)}
  return params, rng.integers(0, V, (B, T)).astype(np.int32), rng.choice([0.0, 1.0], (B, T)).astype(np.float32)


def logits_of(x_BTD, w_VD):
  return 5 * jnp.tanh(jnp.einsum('BTD,VD->BTV', x_BTD, w_VD) / 5)


@pytest.mark.parametrize('chunk', [1, 8, 10, 50, 64])
def test_chunked_equals_plain(chunk):
  """Chunks that divide the vocabulary of 50, that do not, and that are more than all of it."""
  params, target, mask = problem()
  target[0] = logits_of(params['x_BTD'], params['w_VD'])[0].argmax(-1)       # some hits
  def plain(p):
    return loss.cross_entropy(logits_of(p['x_BTD'], p['w_VD']), target, mask, 1e-3, 0.1)
  def chunked(p):
    return loss.chunked_cross_entropy(p['x_BTD'], p['w_VD'], logits_of, target, mask, 1e-3, 0.1, chunk)
  (want, want_sums), want_grad = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
  (got, sums), grad = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert sums.keys() == want_sums.keys() and sums['accuracy'] > 0
  for name, value in want_sums.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-5)
  for name in params:
    error = np.linalg.norm(grad[name] - want_grad[name]) / np.linalg.norm(want_grad[name])
    assert error < 1e-5, (name, error)


def test_of_equal_logits_each_hits_by_its_share_chunked_or_not():
  """As at the start of training with zero_init."""
  x, w = np.zeros((1, 3, 4), np.float32), np.zeros((20, 4), np.float32)
  target, mask = np.array([[0, 7, 19]], np.int32), np.ones((1, 3), np.float32)
  _, sums = loss.chunked_cross_entropy(x, w, logits_of, target, mask, 0.0, 0.0, 6)
  whole = loss.cross_entropy(logits_of(x, w), target, mask, 0.0, 0.0)[1]
  assert sums['accuracy'] == whole['accuracy'] == pytest.approx(3 / 20)


def test_chunked_never_holds_all_logits():
  B, T, D, V = 2, 512, 8, 8192
  params, target, mask = problem(B, T, D, V)
  def temp_bytes(f):
    return jax.jit(jax.grad(f, has_aux=True)).lower(params).compile().memory_analysis().temp_size_in_bytes
  plain = temp_bytes(lambda p: loss.cross_entropy(logits_of(p['x_BTD'], p['w_VD']), target, mask, 0.0, 0.0))
  chunked = temp_bytes(lambda p: loss.chunked_cross_entropy(p['x_BTD'], p['w_VD'], logits_of, target, mask, 0.0, 0.0,
                                                            256))
  all_logits = B * T * V * 4
  assert plain >= all_logits
  assert chunked < all_logits / 4


@pytest.mark.parametrize('chunk', [0, 250, 96])
def test_logits_sharded_over_v_are_never_gathered(chunk):
  B, T, D, V = 8, 16, 12, 1000
  params, target, mask = problem(B, T, D, V)
  mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
  specs = {'x_BTD': P(('data', 'fsdp'), None, None), 'w_VD': P('tensor', 'fsdp')}
  rows = NamedSharding(mesh, P(('data', 'fsdp'), None))

  def f(p, target, mask):
    gathered = lambda w_VD: sharding.shard(w_VD, 'VD', dict(V='tensor'))       # as Transformer.logits does
    logits = lambda x_BTD, w_VD: sharding.shard(logits_of(x_BTD, gathered(w_VD)), 'BTV')
    if chunk:
      return loss.chunked_cross_entropy(p['x_BTD'], p['w_VD'], logits, target, mask, 1e-3, 0.1, chunk)
    return loss.cross_entropy(logits(p['x_BTD'], p['w_VD']), target, mask, 1e-3, 0.1)

  step = jax.value_and_grad(f, has_aux=True)
  shardings = sharding.named(mesh, specs)
  with jax.set_mesh(mesh):
    compiled = jax.jit(step, in_shardings=(shardings, rows, rows),
                       out_shardings=((None, None), shardings)).lower(params, target, mask).compile()
  (total, _), grad = compiled(jax.device_put(params, shardings), jax.device_put(target, rows),
                              jax.device_put(mask, rows))
  (want, _), want_grad = jax.jit(step)(params, target, mask)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  for name in params:
    np.testing.assert_allclose(grad[name], want_grad[name], atol=1e-5 * np.abs(want_grad[name]).max())
  if chunk:                         # each part of w once forward and once backward, its gradient reduced once
    parts, w = -(-V // chunk), (V // 2) * D * 4
    cost = hlo.count(compiled.as_text(), dict(mesh.shape))
    sent = lambda kind, axes: sum(c.bytes for c in cost.collectives if c.kind == kind and set(c.axes) <= set(axes))
    assert sent('all-gather', ('fsdp',)) <= 1.1 * 2 * w / 2
    assert sent('all-reduce', ('data', 'fsdp')) <= 1.1 * 2 * w
    assert max(c.count for c in cost.collectives if c.kind == 'all-gather') == 2 * parts
  gathers = [line for line in compiled.as_text().splitlines() if re.search(r'= \S+ (all-gather|all-to-all)', line)]
  sizes = [np.prod([int(n) for n in shape.split(',')]) for line in gathers
           for shape in re.findall(r'\[([\d,]+)\]', line.split(' all-')[0])]
  assert all(size <= max(B // 4 * T * 2, D * V // 2) for size in sizes), gathers      # w over fsdp, figures per token
