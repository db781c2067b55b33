"""What the engine runs on the device: filling the cache with a prompt, its first token, and a loop of decoding steps.

State, donated from program to program: `cache`, a (k_BKHS, v_BKSH) per layer, whose slots along S are positions;
history_BS, every token of each row's text; position_B, where its newest token lies, which is not in the cache yet;
live_B; end_B, the length at which it ends; stop_BJ; the arrays that filters.sample reads; and, of an encoder-decoder,
memory_BSD with its segments. A prompt goes through the layers one program each: compiled once for all of them.
"""
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax import config as config_lib
from llm_jax.generate import filters, watermark
from llm_jax.models import layers, quantize, transformer
from llm_jax.models.attention import compute_dtype
from llm_jax.models.view import View
from llm_jax.sharding import shard

DIMS = dict(history='BS', position='B', live='B', end='B', stop='BJ', count='BV', seen='BV', bias='BV', allowed='BW',
            single='B', memory='BSD', memory_segment='BS')
CACHES = 'cache', 'draft_cache'


def program(**options):
  """jax.jit with layers.compiler_options, which depend on the backend: asked for at the first call."""
  def decorate(f):
    made = functools.cache(lambda: jax.jit(f, compiler_options=layers.compiler_options(), **options))
    call = functools.wraps(f)(lambda *args: made()(*args))
    call.jitted = made
    return call
  return decorate


class Plan(typing.NamedTuple):
  """What is static of a decoding program, beside shapes."""
  cfg: config_lib.Model
  vocab_size: int
  size: int              # steps at most
  ahead: int = 0         # tokens proposed per step
  draft: config_lib.Model | None = None      # by this model, else by looking them up in the row's own text
  mark: watermark.Watermark | None = None
  cache: str = ''        # 'int8', or '' for the compute dtype


@functools.partial(jax.jit, static_argnums=(0, 2))
def unstack(cfg: config_lib.Model, params, kind: str = ''):
  """(model, blocks): the weights as decoding reads them, in the compute dtype or of a quantize.KINDS, every layer's
  apart. Made once, before the loop, which would otherwise copy its slice of the stacked weights at every step."""
  model = transformer.bind(cfg, params)
  # A CPU transposes the table for every product of several rows; and rows are looked up in one that is not quantised.
  if cfg.tied_embeddings and (kind or layers.on_one_cpu()):
    model.unembed_DV = nnx.Param(layers.settle(model.embed_VD[...].swapaxes(0, 1)))
    model.cfg = dataclasses.replace(cfg, tied_embeddings=False)
  blocks = model.layers()
  for name, _, _ in transformer.stacks(cfg):
    delattr(model, name)
  if kind:
    for part in (model, *blocks):
      quantize.weights(part, kind)
  return model, blocks


def empty_cache(cfg: config_lib.Model, rows: int, length: int, kind: str = ''):
  B, K, H, S, dtype = rows, cfg.kv_heads, cfg.head_dim, length, compute_dtype(cfg.dtype)
  def zeros(*shape):
    return quantize.Quantized(jnp.zeros(shape, kind), jnp.zeros((B, K, S))) if kind else jnp.zeros(shape, dtype)
  return [placed_kv((zeros(B, K, H, S), zeros(B, K, S, H))) for _ in range(cfg.layers)]


def placed_kv(kv):
  of = lambda dims: lambda x: shard(x, dims if x.ndim == 4 else 'BKS')          # or the scales of one in few bits
  return jax.tree.map(of('BKHS'), kv[0]), jax.tree.map(of('BKSH'), kv[1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_state(plan: Plan, rows: int, length: int, stops: int, source: int):
  """A state in which no row is live. stops: ids that end a row, at most; source: positions of an encoder's."""
  V, words = plan.cfg.vocab_size, -(-plan.cfg.vocab_size // 32)
  state = dict(cache=empty_cache(plan.cfg, rows, length, plan.cache), history=jnp.zeros((rows, length), jnp.int32),
               position=jnp.zeros(rows, jnp.int32), live=jnp.zeros(rows, bool), end=jnp.zeros(rows, jnp.int32),
               stop=jnp.full((rows, stops), -1, jnp.int32), count=jnp.zeros((rows, V), jnp.int32),
               seen=jnp.zeros((rows, V), bool), bias=jnp.zeros((rows, V)),
               allowed=jnp.zeros((rows, words), jnp.uint32), single=jnp.zeros(rows, bool))
  if plan.draft is not None:
    state['draft_cache'] = empty_cache(plan.draft, rows, length, plan.cache)
  if source:
    state['memory'] = jnp.zeros((rows, source, plan.cfg.width), compute_dtype(plan.cfg.dtype))
    state['memory_segment'] = jnp.zeros((rows, source), jnp.int32)
  return placed(state)


def placed(state):
  """The state where its letters put it, so that each program finds it as the one before left it."""
  caches = {name: [placed_kv(kv) for kv in state[name]] for name in CACHES if name in state}
  return {name: shard(x, DIMS[name]) for name, x in state.items() if name not in caches} | caches


def everywhere(x):
  """Replicated over the mesh, so that every process can read it."""
  return shard(x, 'X' * x.ndim, {})


@functools.partial(jax.jit, static_argnums=1)
def resize(state, length: int):
  """The state with another number of positions; those past the new end are lost."""
  def to(x, axis):
    keep = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
    return jnp.pad(keep, [(0, length - keep.shape[a] if a == axis else 0) for a in range(x.ndim)])
  both = lambda k, v: (jax.tree.map(lambda x: to(x, x.ndim - 1), k), jax.tree.map(lambda x: to(x, 2), v))
  caches = {name: [both(*kv) for kv in state[name]] for name in CACHES if name in state}
  return placed(state | caches | dict(history=to(state['history'], 1)))


@functools.partial(jax.jit, donate_argnums=0)
def copy_row(state, source, target):
  """Another row's cache, of a prompt that begins alike."""
  caches = {name: jax.tree.map(lambda x: x.at[target].set(x[source]), state[name])
            for name in CACHES if name in state}
  return placed(state | caches)


@functools.partial(jax.jit, donate_argnums=0)
def admit(state, slot, row):
  """Sets a slot's arrays, which are not yet live: row is {name: the slot's part of state[name]}."""
  return placed(state | {name: state[name].at[slot].set(x) for name, x in row.items()})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def encode(cfg: config_lib.Model, params, state, slot, source_1S, segment_1S):
  memory_1SD = transformer.bind(cfg, params).encode(source_1S, segment_1S)
  return placed(state | dict(memory=state['memory'].at[slot].set(memory_1SD[0].astype(state['memory'].dtype)),
                             memory_segment=state['memory_segment'].at[slot].set(segment_1S[0])))


# A prompt -------------------------------------------------------------------------------------------------------------

@program(static_argnums=0)
def embed(cfg: config_lib.Model, model, token_RT, start_R):
  """[R, T, D] of R prompts' next T tokens."""
  position_RT = start_R[:, None] + jnp.arange(token_RT.shape[1])[None]
  return model.embed(token_RT, jnp.minimum(position_RT, cfg.max_length - 1))


@program(static_argnums=0, donate_argnums=4)
def layer(cfg: config_lib.Model, model, block, carry, kv, slot_R, start_R, prefix_R, index, embed_RTD, memory):
  """One layer over T tokens of R rows, whose cache it extends -> carry, kv. carry: (x_RTD, the first layer's values or
  None). kv None: nothing is kept, the rows are whole texts. prefix_R: length of what all may see, or None. memory: an
  encoder-decoder's (memory_BSD, segment_BS) or None.
  """
  x_RTD, first_v = carry
  R, T = x_RTD.shape[:2]
  position_RT = start_R[:, None] + jnp.arange(T)[None]
  if kv is None:
    context = model.context(View('causal'), position_RT, T, 'xla', embed_RTD)
    return block(x_RTD, first_v, context, index)[:2], None
  S = kv[0].shape[3]
  prefix_RS = None if prefix_R is None else jnp.arange(S)[None] < prefix_R[:, None]
  view = View('causal' if prefix_R is None else cfg.attention, position_BT=position_RT, prefix_BS=prefix_RS)
  context = model.context(view, position_RT, T, 'xla', embed_RTD)
  if memory is not None:
    context = transformer.with_memory(context, memory[0][slot_R], memory[1][slot_R], T)
  x_RTD, first_v, extended, _ = block(x_RTD, first_v, context, index, (*jax.tree.map(lambda x: x[slot_R], kv), start_R))
  return (x_RTD, first_v), placed_kv(put_positions(kv, extended, slot_R, position_RT))


def through(cfg: config_lib.Model, weights, token_RT, start_R, cache=None, slot_R=None, prefix_R=None, memory=None):
  """The layers' output over T tokens of R rows, and the cache that they extend, where there is one: see `layer`."""
  model, blocks = weights
  x_RTD = embed(cfg, model, token_RT, start_R)
  carry, embedded, extended = (x_RTD, None), x_RTD if cfg.embedding_skips else None, []
  for index, (block, kv) in enumerate(zip(blocks, cache or [None] * len(blocks))):
    carry, kv = layer(cfg, model, block, carry, kv, slot_R, start_R, prefix_R, np.int32(index), embedded, memory)
    extended.append(kv)
  return carry[0], extended


def put_positions(kv, part, slot_A, position_AP):
  """Keys and values with those of `part`, rows of some slots, at some positions."""
  def put_k(k_BKHS, k_AKHS):             # or BKS, as placed_kv
    k_AKHP = jnp.take_along_axis(k_AKHS, jnp.expand_dims(position_AP, range(1, k_AKHS.ndim - 1)), -1, mode='clip')
    return k_BKHS.at[slot_A[:, None], ..., position_AP].set(jnp.moveaxis(k_AKHP, -1, 1), mode='drop')

  def put_v(v_BKSH, v_AKSH):
    position_AKPH = jnp.expand_dims(position_AP, (1, *range(3, v_AKSH.ndim)))
    v_AKPH = jnp.take_along_axis(v_AKSH, position_AKPH, 2, mode='clip')
    return v_BKSH.at[slot_A[:, None], :, position_AP].set(v_AKPH.swapaxes(1, 2), mode='drop')
  return jax.tree.map(put_k, kv[0], part[0]), jax.tree.map(put_v, kv[1], part[1])


@program(static_argnums=0, donate_argnums=2)
def first(plan: Plan, model, state, row: filters.Row, slot_R, last_R, length_R, x_RTD):
  """The first tokens of R rows, from the layers' output at their last tokens -> state, token_R, logprobs of them."""
  last_RD = jnp.take_along_axis(x_RTD, last_R[:, None, None], 1, mode='clip')
  logits_RV = model.logits(model.finish(last_RD))[:, 0]
  of = lambda name: state[name].at[slot_R].get(mode='clip')
  part = jax.tree.map(lambda x: x.at[slot_R].get(mode='clip'), row)
  token_R = filters.sample(logits_RV, length_R, part, plan.vocab_size, of('count'), of('seen'), of('bias'),
                           of('allowed'), plan.mark, before(plan, of('history'), length_R))
  found = filters.logprobs(logits_RV, token_R, part, plan.vocab_size)
  set_at = lambda name, x: state[name].at[slot_R].set(x, mode='drop')
  add = lambda name, x: state[name].at[slot_R, token_R].add(x, mode='drop')
  state = state | dict(
      history=state['history'].at[slot_R, length_R].set(token_R, mode='drop'), position=set_at('position', length_R),
      count=add('count', 1), seen=state['seen'].at[slot_R, token_R].set(True, mode='drop'),
      live=set_at('live', going_on(token_R, length_R, of('stop'), of('end'))))
  return placed(state), everywhere(token_R), everywhere(state['live']), jax.tree.map(everywhere, found)


def before(plan: Plan, history_BS, position_B):
  """The tokens before these positions on which a watermark depends."""
  if plan.mark is None:
    return None
  place_BH = position_B[:, None] - plan.mark.context + jnp.arange(plan.mark.context)[None]
  return jnp.take_along_axis(history_BS, jnp.maximum(place_BH, 0), 1)


# Decoding -------------------------------------------------------------------------------------------------------------

def going_on(token_B, position_B, stop_BJ, end_B):
  """bool [B]: rows whose newest token, at position_B, is not their last."""
  return ~(token_B[:, None] == stop_BJ).any(1) & (position_B + 1 < end_B)


@program(static_argnums=0, donate_argnums=3)
def decode(plan: Plan, weights, draft_weights, state, row: filters.Row, slot_A, steps):
  """Up to `steps` <= plan.size steps of the live rows among slot_A, until none of them is live. A step takes a row 1 to
  1 + ahead tokens on.

  slot_A: the slots to decode, whose options are in `row`; past the last slot stands for none. Where they are fewer than
  all, they work on a copy of their rows, whose new positions are put back. A of slots: all of them, in order.

  Proposed tokens are kept while they are what the row samples anyway, each position with its own key: what comes out
  does not depend on them, greedy or not (the coupling of arXiv 2408.07978 for a draft model, whose own draws use the
  same noise). Returns state, token_BC (-1 past each row's made_B), made_B, live_B, logprobs of the tokens.
  """
  ahead, whole = plan.ahead, state
  B, C = slot_A.shape[0], plan.size * (1 + ahead)
  if B < state['live'].shape[0]:
    state = jax.tree.map(lambda x: x.at[slot_A].get(mode='clip'), whole)
    state['live'] &= slot_A < whole['live'].shape[0]
  rows, start_B = jnp.arange(B), state['position']
  memory = (state['memory'], state['memory_segment']) if 'memory' in state else None
  made = dict(token=jnp.full((B, C), -1, jnp.int32), logp=jnp.zeros((B, C)),
              top=jnp.zeros((B, C, filters.TOP), jnp.int32), top_logp=jnp.zeros((B, C, filters.TOP)))

  def more(carry):
    step, state, _, _ = carry
    return (step < steps) & state['live'].any()

  def one_step(carry):
    step, state, made, made_B = carry
    model, blocks = weights
    position_B = state['position']
    proposed_BT = jnp.zeros((B, 0), jnp.int32)
    if ahead:
      state, proposed_BT = propose(plan, draft_weights, state, row)
    current_B1 = jnp.take_along_axis(state['history'], position_B[:, None], 1)
    token_BT = jnp.concatenate([current_B1, proposed_BT], 1)
    x_BTD, cache = model.decode(blocks, token_BT, position_B, state['cache'], memory=memory)
    logits_TBV = model.logits(x_BTD).swapaxes(0, 1)
    state = state | dict(cache=cache)
    alive_B = state['live']
    after_BT = jnp.concatenate([proposed_BT, jnp.full((B, 1), -1, jnp.int32)], 1)       # what would have to come
    for t in range(1 + ahead):
      new_B = position_B + 1 + t
      token_B = filters.sample(logits_TBV[t], new_B, row, plan.vocab_size, state['count'], state['seen'],
                               state['bias'], state['allowed'], plan.mark, before(plan, state['history'], new_B))
      found = filters.logprobs(logits_TBV[t], token_B, row, plan.vocab_size)
      at_B = jnp.where(alive_B, made_B, C)                                              # dropped where not alive
      made = dict(token=made['token'].at[rows, at_B].set(token_B, mode='drop'),
                  logp=made['logp'].at[rows, at_B].set(found[0], mode='drop'),
                  top=made['top'].at[rows, at_B].set(found[1], mode='drop'),
                  top_logp=made['top_logp'].at[rows, at_B].set(found[2], mode='drop'))
      made_B = made_B + alive_B
      on_B = going_on(token_B, new_B, state['stop'], state['end'])
      place_B = jnp.where(alive_B, new_B, state['history'].shape[1])
      state = state | dict(
          history=state['history'].at[rows, place_B].set(token_B, mode='drop'),
          position=jnp.where(alive_B, new_B, state['position']), live=jnp.where(alive_B, on_B, state['live']),
          count=state['count'].at[rows, token_B].add(alive_B.astype(jnp.int32)),
          seen=state['seen'].at[rows, token_B].max(alive_B))
      alive_B = alive_B & on_B & (token_B == after_BT[:, t]) & ~state['single']
    return step + 1, state, made, made_B

  _, state, made, made_B = jax.lax.while_loop(more, one_step, (0, state, made, jnp.zeros(B, jnp.int32)))
  made, live_B = jax.tree.map(everywhere, made), everywhere(state['live'])
  if whole is not state and B < whole['live'].shape[0]:
    state = put_back(whole, state, slot_A, start_B[:, None] + jnp.arange(C + ahead)[None])
  return placed(state), made, everywhere(made_B), live_B


def put_back(whole, part, slot_A, position_AC):
  """The state with some rows changed; of their caches, at some positions."""
  return {name: [put_positions(*kvs, slot_A, position_AC) for kvs in zip(old, part[name])] if name in CACHES else
          old.at[slot_A].set(part[name], mode='drop') for name, old in whole.items()}


def propose(plan: Plan, draft_weights, state, row):
  """(state, proposed_BT): `ahead` tokens that may follow each row's newest."""
  if plan.draft is None:
    return state, look_up(state['history'], state['position'], plan.ahead)
  model, blocks = draft_weights
  position_B, cache, proposed = state['position'], state['draft_cache'], []
  before_B = jnp.maximum(position_B - 1, 0)                  # again: a proposal that was kept may not be in its cache
  token_BT = jnp.take_along_axis(state['history'], jnp.stack([before_B, position_B], 1), 1)
  start_B = before_B
  for t in range(plan.ahead):
    x_BTD, cache = model.decode(blocks, token_BT, start_B, cache)
    last_BD = x_BTD[:, -1:] if t else jnp.take_along_axis(x_BTD, (position_B - before_B)[:, None, None], 1)
    token_B = filters.sample(model.logits(last_BD)[:, 0], position_B + 1 + t, row, plan.vocab_size, state['count'],
                             state['seen'], state['bias'], state['allowed'])
    proposed.append(token_B)
    token_BT, start_B = token_B[:, None], position_B + 1 + t
  return state | dict(draft_cache=cache), jnp.stack(proposed, 1)


def look_up(history_BS, position_B, ahead: int):
  """What followed, the last time, the tokens that each row ends in: two of them where they came before, else one (as in
  arXiv 2304.04487). Zeros where nothing did: proposals are never trusted."""
  B, S = history_BS.shape
  index_1S = jnp.arange(S)[None]
  last_B1 = jnp.take_along_axis(history_BS, position_B[:, None], 1)
  before_B1 = jnp.take_along_axis(history_BS, jnp.maximum(position_B - 1, 0)[:, None], 1)
  earlier_BS = index_1S < position_B[:, None]
  one_BS = (history_BS == last_B1) & earlier_BS
  two_BS = one_BS & (jnp.roll(history_BS, 1, 1) == before_B1) & (index_1S > 0)
  at_B = jnp.where(two_BS, S + index_1S, jnp.where(one_BS, index_1S, -1)).max(1) % S
  place_BT = jnp.clip(at_B[:, None] + 1 + jnp.arange(ahead)[None], 0, S - 1)
  return jnp.take_along_axis(history_BS, place_BT, 1)
