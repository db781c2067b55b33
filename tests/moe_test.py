"""Routing, capacity, exchange and balance of experts. That layers equal the float64 reference is in transformer_test.py
and that meshes change nothing in mesh_test.py."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import moe, transformer
from llm_jax.train import loss as loss_lib

B, T, D, E, J = 4, 8, 16, 6, 2
CFG = tiny.model(width=D, experts=E, experts_per_token=J, expert_dim=12, mlp='swiglu', layers=1)
ON_MESH = [dict(expert=2, fsdp=2, tensor=2), dict(expert=2, context=2, data=2, fsdp=1)]


def layer(cfg, seed=0):
  """(function of x_BTD, segment_BT, training -> y_BTD, statistics; parameters of one expert layer)."""
  values = jax.tree.map(lambda w: w[0], tiny.params(dataclasses.replace(cfg, layers=1), seed)['blocks0']['mlp'])

  def run(values, x_BTD, segment_BT=None, training=True):
    model = transformer.bind(cfg, tiny.params(cfg))
    block = jax.tree.map(lambda w: w[0], model.blocks0).mlp
    for name, w in values.items():
      setattr(block, name, type(block.w_up_EDF)(jnp.asarray(w)))
    return block(x_BTD, segment_BT, training)
  return run, values


def inputs(seed=0):
  return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


def choices(cfg, values, x_BTD):
  """expert [B, T, J], weight [B, T, J] by the definition, in float64."""
  logits = x_BTD.astype(np.float64) @ values['w_router_DE']
  score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expert = np.argsort(-score, -1, kind='stable')[..., :cfg.experts_per_token]
  weight = np.take_along_axis(score, expert, -1)
  return expert, weight / weight.sum(-1, keepdims=True), score


def expected(cfg, values, x_BTD, taken):
  """The layer where only the assignments in taken [B, T, J] count."""
  expert, weight, _ = choices(cfg, values, x_BTD)
  out = np.zeros(x_BTD.shape)
  for b, t, j in np.argwhere(taken):
    up, gate, down = (values[name][expert[b, t, j]].astype(np.float64) for name in ('w_up_EDF', 'w_gate_EDF',
                                                                                    'w_down_EFD'))
    g = x_BTD[b, t] @ gate
    out[b, t] += weight[b, t, j] * ((x_BTD[b, t] @ up * g / (1 + np.exp(-g))) @ down)
  return out


def in_order(cfg, expert_BTJ, capacity, real_BT):
  """Who finds a slot: all first choices in the order of the batch's tokens, then all second ones."""
  taken, count = np.zeros(expert_BTJ.shape, bool), np.zeros(cfg.experts, int)
  for j in range(expert_BTJ.shape[2]):
    for b, t in np.argwhere(real_BT):
      e = expert_BTJ[b, t, j]
      taken[b, t, j] = count[e] < capacity
      count[e] += taken[b, t, j]
  return taken


@pytest.mark.parametrize('mesh', [None, *ON_MESH], ids=str)
@pytest.mark.parametrize('capacity', [0.5, 1.0])
def test_capacity_drops_in_the_order_of_the_batch(capacity, mesh):
  """On one device and over a mesh: the same assignments are dropped, counted over all tokens."""
  cfg = dataclasses.replace(CFG, expert_capacity=capacity)
  run, values = layer(cfg)
  x_BTD, segment_BT = inputs(), np.ones((B, T), np.int32)
  segment_BT[1, 5:] = 0                                             # padding takes no slot
  slots = int(np.ceil(capacity * J * B * T / E))
  taken = in_order(cfg, choices(cfg, values, x_BTD)[0], slots, segment_BT > 0)
  assert 0 < taken.sum() < J * (segment_BT > 0).sum()
  with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(**mesh or {}), None if mesh else jax.devices()[:1])):
    y_BTD, statistics = tiny.quick_jit(run)(values, x_BTD, segment_BT)
  np.testing.assert_allclose(y_BTD, expected(cfg, values, x_BTD, taken), atol=2e-6)
  assert statistics['dropped'] == pytest.approx(1 - taken.sum() / (J * (segment_BT > 0).sum()), abs=1e-6)


def test_nothing_is_dropped_outside_training():
  run, values = layer(dataclasses.replace(CFG, expert_capacity=0.1))
  y_BTD, statistics = tiny.quick_jit(lambda v, x: run(v, x, training=False))(values, inputs())
  np.testing.assert_allclose(y_BTD, expected(CFG, values, inputs(), np.ones((B, T, J), bool)), atol=2e-6)
  assert statistics['dropped'] == 0


def test_statistics_are_their_definitions():
  run, values = layer(CFG)
  _, got = tiny.quick_jit(run)(values, inputs())
  expert, _, score = choices(CFG, values, inputs())
  load = np.bincount(expert.ravel(), minlength=E)
  np.testing.assert_array_equal(got['load_E'], load)
  assert got['balance'] == pytest.approx(E * (load / load.sum() * score.mean((0, 1))).sum(), rel=1e-5)
  logits = inputs().astype(np.float64) @ values['w_router_DE']
  assert got['z'] == pytest.approx(np.square(np.log(np.exp(logits).sum(-1))).mean(), rel=1e-5)
  _, even = tiny.quick_jit(run)(values | {'w_router_DE': np.zeros((D, E), np.float32)}, inputs())
  assert even['balance'] == pytest.approx(1, rel=1e-6)


def test_a_buffer_that_is_too_small_drops_and_says_so():
  """expert_buffer=1: room for equal shares alone. What is lost is counted, and the rest is exact."""
  cfg = dataclasses.replace(CFG, expert_buffer=1.0)
  run, values = layer(cfg)
  values['w_router_DE'] = values['w_router_DE'] * np.where(np.arange(E) < 3, 4, 0.1).astype(np.float32)   # lopsided
  with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(expert=2, fsdp=2, tensor=2))):
    y_BTD, statistics = tiny.quick_jit(run)(values, inputs())
  everything = expected(cfg, values, inputs(), np.ones((B, T, J), bool))
  right = np.isclose(y_BTD, everything, atol=1e-5).all(-1)
  assert 0 < statistics['dropped'] < 0.5 and 0.3 < right.mean() < 1


def test_the_ragged_exchange_is_the_fixed_one(monkeypatch):
  """jax.lax.ragged_all_to_all does not exist on a CPU: here it is played by its documented meaning, with all_gather."""
  def ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    gathered = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me, n = jax.lax.axis_index(axis_name), input_offsets.shape[0]
    for source in range(n):
      rows, offsets, sizes, targets = (x[source] for x in gathered)
      i = jnp.arange(rows.shape[0])
      mine = (i >= offsets[me]) & (i < offsets[me] + sizes[me])
      output = output.at[jnp.where(mine, i - offsets[me] + targets[me], output.shape[0])].set(rows, mode='drop')
    return output

  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged)
  mesh = sharding.make_mesh(config_lib.Mesh(expert=2, fsdp=2, tensor=2))
  for buffer in (0.0, 1.2):
    results = []
    for exchange in ('fixed', 'ragged'):
      run, values = layer(dataclasses.replace(CFG, expert_exchange=exchange, expert_buffer=buffer))
      with jax.set_mesh(mesh):
        loss = lambda v, x: (run(v, x)[0]**2).sum()                 # noqa: B023
        results.append((tiny.quick_jit(run)(values, inputs()), tiny.quick_jit(jax.grad(loss))(values, inputs())))
    if not buffer:
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)
    else:                                                           # they lose other rows, but both say how many
      assert all(0 <= r[0][1]['dropped'] < 0.3 for r in results)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_rank_and_slots(keys, room):
  key = np.array(keys, np.int32)
  rank, count = moe.rank(jnp.asarray(key), 4)                       # 4: none
  seen = [keys[:i].count(k) for i, k in enumerate(keys)]
  assert [int(r) for r, k in zip(rank, keys) if k < 4] == [s for s, k in zip(seen, keys) if k < 4]
  assert count.tolist() == [keys.count(k) for k in range(4)]
  slot = moe.slots(jnp.asarray(key)[None], 4, room)[0].tolist()
  assert slot == [k * room + s if k < 4 and s < room else 4 * room for k, s in zip(keys, seen)]
  packed = moe.pack(jnp.arange(len(keys)) + 1, jnp.asarray([slot]), 4 * room)
  assert all(packed[s] == i + 1 for i, s in enumerate(slot) if s < 4 * room)


def test_biases_even_out_the_load():
  """A router that prefers one expert: after some steps of its bias all have about the same."""
  logits = np.random.default_rng(0).normal(size=(512, E)) + np.array([3, 1, 0, 0, 0, -1])
  score = 1 / (1 + np.exp(-logits))
  bias, load_of = np.zeros((1, E)), lambda bias: np.bincount(
      np.argsort(-(score + bias), 1)[:, :J].ravel(), minlength=E).astype(float)[None]
  first = load_of(bias)
  for _ in range(300):
    bias = np.asarray(moe.balance_bias(bias, jnp.asarray(load_of(bias)), 0.005))
  assert first.max() / first.mean() > 2 and load_of(bias).max() / first.mean() < 1.15


def test_router_losses_weigh_microbatches_by_their_tokens():
  routed = dict(blocks0=dict(load_E=jnp.ones((3, E)), balance=jnp.array([1.0, 2, 3]), z=jnp.array([4.0, 5, 6]),
                             dropped=jnp.zeros(3)))
  loss, sums = loss_lib.router_losses(config_lib.Train(balance_loss=0.1, router_z_loss=0.01), routed, 10.0)
  assert loss == pytest.approx(10 * (0.1 * 6 + 0.01 * 15)) and sums['router/balance'] == pytest.approx(20)


@pytest.mark.parametrize('fields, message', [
    (dict(experts=4, experts_per_token=5), 'config.model.experts_per_token: expected 1 to 4'),
    (dict(experts=4, mlp_bias=True), 'config.model.mlp_bias: experts have no bias'),
    (dict(router_bias=True), 'config.model.router_bias: needs experts'),
    (dict(experts=4, expert_exchange='ragged', expert_capacity=1.0), 'config.model.expert_capacity'),
    (dict(experts=4, router='softmx'), "nearest: 'softmax'")])
def test_contradictions(fields, message):
  with pytest.raises(ConfigError, match=message):
    config_lib.check(config_lib.Config(model=config_lib.Model(**fields)))
