"""Mixture of experts: a router sends each token to J of E MLPs (arXiv 1701.06538, 2101.03961).

The code is one device's part and runs under `shard_map`: a device's tokens are packed, exchanged with the devices that
hold the experts they chose (all_to_all over `expert`), computed, sent back and summed. No device ever holds the weights
of other experts than its own. Letters beside the legend's: J choices of a token, R the tokens of a device, S slots.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import layers


class Moe(nnx.Module):
  """Routed experts, and shared ones (arXiv 2401.06066), which are one MLP of their joined width that reads all."""

  def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
    D, E, F = cfg.width, cfg.experts, cfg.expert_dim
    self.cfg = cfg
    self.w_router_DE = layers.normal(rngs, D, E, std=cfg.init_scale * D**-0.5)
    if cfg.router_bias:
      self.router_bias_E = nnx.Param(jnp.zeros(E))       # no gradient moves it: see balance_bias
    self.w_up_EDF = layers.normal(rngs, E, D, F, std=cfg.init_scale * D**-0.5)
    if cfg.mlp in ('geglu', 'swiglu'):
      self.w_gate_EDF = layers.normal(rngs, E, D, F, std=cfg.init_scale * D**-0.5)
    self.w_down_EFD = layers.normal(rngs, E, F, D, std=layers.out_std(cfg, F))
    if cfg.shared_experts:
      self.shared = layers.Mlp(cfg, rngs, cfg.shared_experts * F)

  def __call__(self, x_BTD, segment_BT=None, training: bool = False):
    """y_BTD and what the router did, as `statistics` says. segment_BT: 0 is padding, which goes to no expert. training:
    tokens past an expert's capacity are left out of it; otherwise none ever is."""
    weights = [self.w_up_EDF[...], self.w_down_EFD[...]]
    weights += [self.w_gate_EDF[...]] if hasattr(self, 'w_gate_EDF') else []
    weights = [w.astype(x_BTD.dtype) for w in weights]           # where they are quantised
    bias_E = self.router_bias_E[...] if hasattr(self, 'router_bias_E') else jnp.zeros(self.cfg.experts)
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segment_BT is None else segment_BT != 0
    arrays = x_BTD, real_BT, self.w_router_DE[...], jax.lax.stop_gradient(bias_E), weights
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    sizes = {axis: 1 for axis in sharding.AXES} if alone else dict(mesh.shape)
    x_spec = P() if alone else sharding.spec('BTD', sharding.ACT, x_BTD.shape, mesh)
    tokens = (*sharding.ACT['B'], 'context') if not alone and x_spec[1] else sharding.ACT['B']      # what splits them
    part = Part(self.cfg, sizes | dict(context=sizes['context'] if 'context' in tokens else 1),
                x_BTD.shape[0] * x_BTD.shape[1], training)
    if alone:
      y_BTD, counts = part(*arrays, {axis: jnp.zeros(1, jnp.int32) for axis in ('B', 'context', 'expert')})
    else:
      w_specs = [sharding.spec(dims, sharding.PARAM, w.shape, mesh) for dims, w in zip(('EDF', 'EFD', 'EDF'), weights)]
      place = dict(B=sharding.ACT['B'], context='context', expert='expert')
      y_BTD, counts = sharding.per_device(
          part, (x_spec, P(*x_spec[:2]), P(), P(), w_specs, {name: P(axis) for name, axis in place.items()}),
          (x_spec, P(tokens)))(*arrays, {name: jnp.arange(sharding.axis_size(mesh, axis))
                                         for name, axis in place.items()})
    if hasattr(self, 'shared'):
      y_BTD = y_BTD + self.shared(x_BTD)
    return y_BTD, statistics(self.cfg, jax.tree.map(lambda x: x.sum(0), counts))


def statistics(cfg: config_lib.Model, sums) -> dict[str, jax.Array]:
  """What a layer's router did with all tokens of a pass, float32: load_E (assignments per expert), balance (E times
  the sum over experts of their share of assignments x their mean probability, 1 where all are equal: arXiv 2101.03961,
  eq. 4), z (mean of logsumexp ** 2: arXiv 2202.08906, eq. 5) and dropped (share of assignments without a slot)."""
  tokens = jnp.maximum(sums['tokens'], 1)
  share_E = sums['load_E'] / (tokens * cfg.experts_per_token)
  return dict(load_E=sums['load_E'], balance=cfg.experts * (share_E * sums['probability_E']).sum() / tokens,
              z=sums['z'] / tokens, dropped=sums['dropped'] / (tokens * cfg.experts_per_token))


def balance_bias(bias_LE, load_LE, rate: float):
  """Balance without a loss (arXiv 2408.15664): the bias that is added to an expert's score where experts are chosen,
  and nowhere else, rises by `rate` where its load was below the mean and falls where it was above."""
  return bias_LE + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)


def route(cfg: config_lib.Model, x_RD, real_R, w_router_DE, bias_E):
  """expert_JR, weight_JR of each token's choices, best first, and sums over the real tokens. In float32."""
  J = cfg.experts_per_token
  logits_RE = jnp.einsum('RD,DE->RE', x_RD.astype(jnp.float32), w_router_DE.astype(jnp.float32))
  score_RE = jax.nn.softmax(logits_RE) if cfg.router == 'softmax' else jax.nn.sigmoid(logits_RE)
  _, expert_RJ = jax.lax.top_k(score_RE + bias_E[None], J)
  weight_RJ = jnp.take_along_axis(score_RE, expert_RJ, 1)
  if cfg.router_normalize:
    weight_RJ = weight_RJ / jnp.maximum(weight_RJ.sum(1, keepdims=True), 1e-20)
  probability_RE = score_RE / score_RE.sum(1, keepdims=True) if cfg.router == 'sigmoid' else score_RE
  real_R = real_R.astype(jnp.float32)
  load_E = jnp.zeros(cfg.experts).at[expert_RJ].add(real_R[:, None])
  counts = dict(load_E=load_E, probability_E=real_R @ probability_RE, tokens=real_R.sum(),
                z=(jnp.square(jax.nn.logsumexp(logits_RE, 1)) * real_R).sum())
  return expert_RJ.T, cfg.router_scale * weight_RJ.T, counts


@dataclasses.dataclass(frozen=True)
class Part:
  """One device's part of an expert layer: what its program is compiled for."""
  cfg: config_lib.Model
  sizes: dict[str, int]        # of the mesh's axes; context 1 where T is not split
  tokens: int                  # of all devices
  training: bool

  def __call__(self, x_BTD, real_BT, w_router_DE, bias_E, weights, place):
    """y_BTD of this device's tokens, and its counts, each with a leading 1. real_BT: False for padding. weights: up,
    down and maybe gate. place: this device's index along B, context and expert, each as a [1] array."""
    cfg, place = self.cfg, {axis: i[0] for axis, i in place.items()}
    B, T, D = x_BTD.shape
    x_RD, real_R = x_BTD.reshape(B * T, D), real_BT.reshape(B * T)
    expert_JR, weight_JR, counts = route(cfg, x_RD, real_R, w_router_DE, bias_E)
    if self.sizes['fsdp'] > 1:
      weights = [jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True) for w, axis in zip(weights, (1, 2, 1))]
    kept_JR = jnp.broadcast_to(real_R[None], expert_JR.shape)
    compute = self.by_rows
    if self.capacity:
      kept_JR &= self.order(expert_JR, kept_JR, B, place) < self.capacity
      compute = self.by_slots
    y_JRD, placed_JR = compute(x_RD, expert_JR, kept_JR, weights, place['expert'])
    y_RD = jnp.einsum('JRD,JR->RD', y_JRD, jnp.where(placed_JR, weight_JR, 0).astype(y_JRD.dtype))
    if self.sizes['tensor'] > 1:
      y_RD = jax.lax.psum(y_RD, 'tensor')
    counts['dropped'] = (real_R[None] & ~placed_JR).sum(dtype=jnp.float32)
    return y_RD.reshape(B, T, D), jax.tree.map(lambda x: x[None], counts)

  @property
  def capacity(self) -> int:
    """Slots of an expert among all tokens; 0: no limit."""
    cfg = self.cfg
    return math.ceil(cfg.expert_capacity * cfg.experts_per_token * self.tokens / cfg.experts) if self.training else 0

  def room(self, worst: int, share: float) -> int:
    """Rows of an exchange's buffer: what could come at worst, or expert_buffer times what comes where all are equal."""
    return min(worst, math.ceil(self.cfg.expert_buffer * share)) if self.cfg.expert_buffer else worst

  def order(self, expert_JR, kept_JR, B, place):
    """How many assignments to the same expert come before each one, on all devices: all first choices in the order of
    the batch's tokens, then all second ones. So no mesh changes what is dropped."""
    (J, R), E = expert_JR.shape, self.cfg.experts
    row_JR = jnp.arange(J)[:, None] * B + (jnp.arange(R) // (R // B))[None]           # (choice, row of the batch)
    key_JR = jnp.where(kept_JR, row_JR * E + expert_JR, J * B * E)
    rank_JR, count = rank(key_JR, J * B * E)
    count_JBXE = count.reshape(J, B, 1, E)                                            # X: the parts of a row
    rows = tuple(axis for axis in sharding.ACT['B'] if self.sizes[axis] > 1)
    if rows:
      count_JBXE = jax.lax.all_gather(count_JBXE, rows, axis=1, tiled=True)
    if self.sizes['context'] > 1:
      count_JBXE = jax.lax.all_gather(count_JBXE, 'context', axis=2, tiled=True)
    before_JBXE = jnp.cumsum(count_JBXE.reshape(-1, E), 0).reshape(count_JBXE.shape) - count_JBXE
    mine_JBE = jax.lax.dynamic_slice(before_JBXE, (0, place['B'] * B, place['context'], 0), (J, B, 1, E))
    return rank_JR + mine_JBE.reshape(-1).at[key_JR].get(mode='fill', fill_value=0)

  def by_slots(self, x_RD, expert_JR, kept_JR, weights, _):
    """A fixed number of slots per expert and one batched product: (y_JRD, placed_JR)."""
    (J, R), E, devices = expert_JR.shape, self.cfg.experts, self.sizes['expert']
    C = self.room(min(R, self.capacity), J * R / E)
    slot_JR = slots(jnp.where(kept_JR, expert_JR, E), E, C)
    sent = pack(x_RD, slot_JR, E * C).reshape(devices, E // devices, C, -1)
    got = all_to_all(sent, devices).swapaxes(0, 1).reshape(E // devices, devices * C, -1)
    y = self.mlp(lambda x, w: jnp.einsum('ESX,EXY->ESY', x, w), got, weights)
    y = all_to_all(y.reshape(E // devices, devices, C, -1).swapaxes(0, 1), devices)
    return unpack(y.reshape(E * C, -1), slot_JR), slot_JR < E * C

  def by_rows(self, x_RD, expert_JR, kept_JR, weights, index):
    """As many rows per expert as choose it (dropless, arXiv 2211.15841), by jax.lax.ragged_dot."""
    (J, R), devices = expert_JR.shape, self.sizes['expert']
    each = self.cfg.experts // devices                                                # experts of a device
    to_JR = jnp.where(kept_JR, expert_JR // each, devices)
    if devices > 1 and self.cfg.expert_exchange == 'ragged':
      exchange = Ragged(to_JR, devices, self.room(devices * R * min(J, each), J * R), index)
    else:
      exchange = Fixed(to_JR, devices, self.room(R * min(J, each), J * R / devices))
    got_SD = exchange.send(x_RD, 0)
    expert_S = exchange.send(jnp.broadcast_to(expert_JR % each, (J, R)), each)        # `each`: an empty slot
    order_S = jnp.argsort(expert_S, stable=True)
    sizes_E = jnp.zeros(each, jnp.int32).at[expert_S].add(1, mode='drop')
    ragged = lambda x, w: jax.lax.ragged_dot(x, w, sizes_E)
    y_SD = self.mlp(ragged, got_SD[order_S], weights)
    back_SD = jnp.zeros_like(y_SD).at[order_S].set(y_SD, unique_indices=True)
    return exchange.back(back_SD)

  def mlp(self, product, x, weights):
    up, down, *gate = weights
    h = product(x, up)
    kind = self.cfg.mlp
    return product(layers.gated(kind, h, product(x, gate[0])) if gate else layers.ACTIVATIONS[kind](h), down)


# Packing and exchanging -----------------------------------------------------------------------------------------------

def rank(key, bins: int):
  """For each entry of key (int, any shape; `bins` and more: none) how many equal ones come before it, and the count
  [bins] of each."""
  flat = key.reshape(-1)
  count = jnp.zeros(bins, jnp.int32).at[flat].add(1, mode='drop')
  order = jnp.argsort(flat, stable=True)
  place = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=flat.dtype), unique_indices=True)
  first = jnp.cumsum(count) - count
  return (place - first.at[flat].get(mode='fill', fill_value=0)).reshape(key.shape), count


def slots(bin_JR, bins: int, room: int):
  """The slot of each entry where every bin has `room` of them; bins * room for those that find none."""
  rank_JR, _ = rank(bin_JR, bins)
  return jnp.where((bin_JR < bins) & (rank_JR < room), bin_JR * room + rank_JR, bins * room)


def pack(x, slot_JR, size: int, fill=0):
  """[size, ...]: x [R, ...], or [J, R, ...] where each choice has its own, at the entries' slots; `fill` elsewhere."""
  J, R = slot_JR.shape
  each = x.shape[:2] == (J, R)
  entry_JR = jnp.arange(J * R).reshape(J, R) if each else jnp.broadcast_to(jnp.arange(R)[None], (J, R))
  source_S = jnp.full(size, J * R).at[slot_JR].set(entry_JR, mode='drop')
  return (x.reshape(J * R, *x.shape[2:]) if each else x).at[source_S].get(mode='fill', fill_value=fill)


def unpack(y_SD, slot_JR):
  """[J, R, D]: what is in each entry's slot, 0 for those without."""
  return y_SD.at[slot_JR].get(mode='fill', fill_value=0)


def all_to_all(x, devices: int):
  """x [devices, ...]: part i goes to device i of `expert`, and comes from it."""
  return x if devices == 1 else jax.lax.all_to_all(x, 'expert', 0, 0, tiled=True)


class Fixed:
  """Rows to and from the devices of `expert`, `room` for each pair of them: works on every backend."""

  def __init__(self, to_JR, devices: int, room: int):
    self.slot_JR, self.devices, self.room = slots(to_JR, devices, room), devices, room

  def send(self, x, fill):
    packed = pack(x, self.slot_JR, self.devices * self.room, fill)
    return all_to_all(packed.reshape(self.devices, self.room, *packed.shape[1:]), self.devices).reshape(packed.shape)

  def back(self, y_SD):
    """(y_JRD, placed_JR)."""
    returned = all_to_all(y_SD.reshape(self.devices, self.room, -1), self.devices).reshape(y_SD.shape)
    return unpack(returned, self.slot_JR), self.slot_JR < self.devices * self.room


class Ragged:
  """The same with jax.lax.ragged_all_to_all: only real rows travel; `room` of them fit a device. TPU and GPU."""

  def __init__(self, to_JR, devices: int, room: int, index):
    rank_JR, count = rank(to_JR, devices)
    self.room, self.size = room, to_JR.size
    count_XY = jax.lax.all_gather(count, 'expert')                       # rows from device X to device Y
    start_XY = jnp.cumsum(count_XY, 0) - count_XY                        # where they begin on Y
    self.count_XY = jnp.clip(room - start_XY, 0, count_XY)
    self.start_XY = jnp.minimum(start_XY, room)
    self.first_XY = jnp.cumsum(count_XY, 1) - count_XY                   # where they begin on X
    self.index = index
    mine = self.count_XY[index].at[to_JR].get(mode='fill', fill_value=0)
    placed_JR = (to_JR < devices) & (rank_JR < mine)
    self.slot_JR = jnp.where(placed_JR, self.first_XY[index].at[to_JR].get(mode='clip') + rank_JR, self.size)

  def send(self, x, fill):
    packed, i = pack(x, self.slot_JR, self.size, fill), self.index
    out = jnp.full((self.room, *packed.shape[1:]), fill, packed.dtype)
    return jax.lax.ragged_all_to_all(packed, out, self.first_XY[i], self.count_XY[i], self.start_XY[i],
                                     self.count_XY[:, i], axis_name='expert')

  def back(self, y_SD):
    """(y_JRD, placed_JR)."""
    i = self.index
    out = jnp.zeros((self.size, y_SD.shape[1]), y_SD.dtype)
    returned = jax.lax.ragged_all_to_all(y_SD, out, self.start_XY[:, i], self.count_XY[:, i], self.first_XY[:, i],
                                         self.count_XY[i], axis_name='expert')
    return unpack(returned, self.slot_JR), self.slot_JR < self.size
