"""From logits to a token: penalties, temperature, the filters, the draw. Every row has its own options, and its token
depends on nothing but them, its logits, its seed and its position.

Nothing is sorted: what a filter keeps is what reaches a share, found bit by bit of the smallest logit that is kept.
"""
import typing

import jax
import jax.numpy as jnp

from llm_jax.generate import watermark

TOP = 20               # likeliest tokens whose log-probabilities can be asked for


class Row(typing.NamedTuple):
  """The options of each slot's request; see options.Options."""
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  typical_p_B: jax.Array
  repetition_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  seed_B: jax.Array      # uint32
  nth_B: jax.Array       # which sample of its prompt
  biased_B: jax.Array    # whether bias_BV says anything for it
  masked_B: jax.Array    # whether allowed_BW does
  top_B: jax.Array       # how many log-probabilities are wanted; -1: none, 0: of the token itself


def sample(logits_BV, position_B, row: Row, vocab_size, count_BV, seen_BV, bias_BV, allowed_BW, mark=None,
           before_BH=None):
  """Token int32 [B] for position_B of each row.

  count_BV: how often each token was generated; seen_BV: it was, or is in the prompt; bias_BV: added to the logits;
  allowed_BW: bits of the tokens that may come, 32 a word; mark: a Watermark, of the tokens before_BH. Penalties: CTRL,
  arXiv 1909.05858 (repetition), and OpenAI's (presence, frequency).
  """
  V = logits_BV.shape[1]
  logits_BV = jnp.where(jnp.arange(V)[None] < vocab_size, logits_BV, -jnp.inf)

  def penalise(logits_BV):
    repetition_B1 = row.repetition_B[:, None]
    smaller_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, smaller_BV, logits_BV)
    count = count_BV.astype(jnp.float32)
    return logits_BV - row.presence_B[:, None] * (count > 0) - row.frequency_B[:, None] * count

  penalised_B = (row.repetition_B != 1) | (row.presence_B != 0) | (row.frequency_B != 0)
  logits_BV = jax.lax.cond(penalised_B.any(), penalise, lambda x: x, logits_BV)
  logits_BV = jax.lax.cond(row.biased_B.any(), lambda x: x + bias_BV, lambda x: x, logits_BV)
  if mark and mark.kind == 'green':
    logits_BV = watermark.raise_green(mark, logits_BV, before_BH)
  logits_BV = jax.lax.cond(row.masked_B.any(), lambda x: _masked(x, row.masked_B, allowed_BW), lambda x: x, logits_BV)
  greedy_B = logits_BV.argmax(1).astype(jnp.int32)
  draw = lambda: jnp.where(row.temperature_B > 0, _draw(logits_BV, position_B, row, mark, before_BH), greedy_B)
  return jax.lax.cond((row.temperature_B > 0).any(), draw, lambda: greedy_B)


def _masked(logits_BV, masked_B, allowed_BW):
  B, V = logits_BV.shape
  bits = jnp.right_shift(allowed_BW[:, :, None], jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
  allowed_BV = bits.reshape(B, -1)[:, :V].astype(bool)
  return jnp.where(allowed_BV | ~masked_B[:, None], logits_BV, -jnp.inf)


def _draw(logits_BV, position_B, row: Row, mark, before_BH):
  temperature_B1 = jnp.where(row.temperature_B > 0, row.temperature_B, 1)[:, None]
  logits_BV = keep(logits_BV / temperature_B1, row)
  if mark and mark.kind == 'tournament':
    logits_BV = watermark.compete(mark, logits_BV, before_BH)

  def noise(seed, nth, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), nth), position)
    return jax.random.gumbel(key, logits_BV.shape[1:])

  return (logits_BV + jax.vmap(noise)(row.seed_B, row.nth_B, position_B)).argmax(1).astype(jnp.int32)


def keep(logits_BV, row: Row):
  """-inf for what the filters leave out, each applied to what the one before it has kept: top_k; top_p, the fewest
  likeliest that reach it (arXiv 1904.09751); min_p, a share of the likeliest (arXiv 2407.01082); typical_p, the fewest
  that reach it of those whose surprise is nearest to the entropy (arXiv 2202.00666). Equals of the last kept stay."""
  def filtered(on_B, weight, goal_B, key=lambda x: x):
    def apply(logits_BV):
      key_BV = _ordered(key(logits_BV))
      kept_BV = key_BV >= _reach(key_BV, weight(logits_BV), goal_B)[:, None]
      return jnp.where(kept_BV | ~on_B[:, None], logits_BV, -jnp.inf)
    return lambda x: jax.lax.cond(on_B.any(), apply, lambda x: x, x)

  def typical(x_BV):
    logp_BV = jax.nn.log_softmax(x_BV, 1)
    entropy_B1 = -jnp.where(jnp.isfinite(logp_BV), jnp.exp(logp_BV) * logp_BV, 0).sum(1, keepdims=True)
    return jnp.where(jnp.isfinite(logp_BV), -jnp.abs(logp_BV + entropy_B1), -jnp.inf)

  softmax = lambda x_BV: jax.nn.softmax(x_BV, 1)
  x_BV = filtered(row.top_k_B > 0, jnp.ones_like, row.top_k_B.astype(jnp.float32))(logits_BV)
  x_BV = filtered(row.top_p_B < 1, softmax, row.top_p_B)(x_BV)
  least_B1 = x_BV.max(1, keepdims=True) + jnp.log(row.min_p_B)[:, None]
  x_BV = jnp.where(x_BV >= least_B1, x_BV, -jnp.inf)
  return filtered(row.typical_p_B < 1, softmax, row.typical_p_B, typical)(x_BV)


def _ordered(x):
  """uint32 in the order of float32."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)         # + 0.0: no -0
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _reach(key_BV, weight_BV, goal_B):
  """The largest key such that the weights of it and all larger ones reach the goal; 0 where all together do not."""
  def bit(i, key_B):
    try_B = key_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    mass_B = jnp.where(key_BV >= try_B[:, None], weight_BV, 0).sum(1)
    return jnp.where(mass_B >= goal_B, try_B, key_B)
  return jax.lax.fori_loop(0, 32, bit, jnp.zeros(key_BV.shape[0], jnp.uint32))


def logprobs(logits_BV, token_B, row: Row, vocab_size):
  """(log-probability of each row's token, the TOP likeliest, theirs) by the model alone, before any option; zeros where
  no row wants them."""
  B, V = logits_BV.shape
  def find():
    logp_BV = jax.nn.log_softmax(jnp.where(jnp.arange(V)[None] < vocab_size, logits_BV, -jnp.inf), 1)
    top_BJ, id_BJ = jax.lax.top_k(logp_BV, min(TOP, V))
    pad = ((0, 0), (0, TOP - min(TOP, V)))
    return (jnp.take_along_axis(logp_BV, token_B[:, None], 1)[:, 0], jnp.pad(id_BJ, pad),
            jnp.pad(top_BJ, pad, constant_values=-jnp.inf))
  none = lambda: (jnp.zeros(B), jnp.zeros((B, TOP), jnp.int32), jnp.zeros((B, TOP)))
  return jax.lax.cond((row.top_B >= 0).any(), find, none)
