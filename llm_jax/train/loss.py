"""Cross-entropy with z-loss and label smoothing, whole or for a part of the vocabulary at a time.

Everything is a sum over the positions, weighted by the mask; the caller divides by 'tokens', once, after it has added
up microbatches and devices. The target's logit is picked by comparing with an iota: elementwise, so it stays
sharded over V and its backward fuses with the softmax's, where a gather's is a scatter.
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, z_loss: float,
                  label_smoothing: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss, sums), float32 scalars computed in float32 from logits of any float dtype; nats, summed under the mask.

  loss: sum of (1 - label_smoothing) * ce + label_smoothing * (mean over V of -log p) + z_loss * logsumexp ** 2 (z-loss:
  arXiv 2204.02311). sums: 'loss/ce' (without smoothing), 'loss/z' (with its factor), 'accuracy' (targets whose logit is
  the largest; of several that are, each counts as its share), 'tokens' (the mask). No gradient reaches the accuracy;
  unused sums cost nothing under jit.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  logsumexp_BT, picked_BT, hit_BT = _softmax(logits_BTV, target_BT)
  even_BT = logsumexp_BT - logits_BTV.mean(-1) if label_smoothing else 0.0
  return _add_up(logsumexp_BT - picked_BT, logsumexp_BT, even_BT, hit_BT, mask_BT, z_loss, label_smoothing)


@jax.custom_vjp
def _softmax(logits_BTV, target_BT):
  """Of each position the logsumexp, the target's logit, and the target's share of the largest ones. The backward pass
  computes the probabilities again from the logits; kept, they would be written and read once more."""
  return _softmax_fwd(logits_BTV, target_BT)[0]


def _softmax_fwd(logits_BTV, target_BT):
  most_BT1 = logits_BTV.max(-1, keepdims=True)
  log_sum_BT1 = jnp.log(jnp.exp(logits_BTV - most_BT1).sum(-1, keepdims=True))
  picked_BT = jnp.where(_is_target(logits_BTV, target_BT), logits_BTV, 0).sum(-1)
  hit_BT = (picked_BT == most_BT1[..., 0]) / jnp.maximum((logits_BTV == most_BT1).sum(-1), 1)      # nan: no hit
  return ((log_sum_BT1 + most_BT1)[..., 0], picked_BT, hit_BT), (logits_BTV, target_BT, most_BT1, log_sum_BT1)


def _softmax_bwd(saved, gradients):
  logits_BTV, target_BT, most_BT1, log_sum_BT1 = saved
  to_logsumexp_BT, to_picked_BT, _ = gradients
  picked_BTV = jnp.where(_is_target(logits_BTV, target_BT), to_picked_BT[..., None], 0)
  return jnp.exp(logits_BTV - most_BT1 - log_sum_BT1) * to_logsumexp_BT[..., None] + picked_BTV, None


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


def _is_target(logits_BTV, target_BT):
  return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == target_BT[..., None]


def _add_up(ce_BT, logsumexp_BT, even_BT, hit_BT, mask_BT, z_loss, label_smoothing):
  z_BT = z_loss * jnp.square(logsumexp_BT)
  loss_BT = ce_BT + z_BT if z_loss else ce_BT
  if label_smoothing:
    loss_BT += label_smoothing * (even_BT - ce_BT)
  mask_BT = mask_BT.astype(jnp.float32)
  sums = {'loss/ce': (ce_BT * mask_BT).sum(), 'loss/z': (z_BT * mask_BT).sum(), 'accuracy': (hit_BT * mask_BT).sum(),
          'tokens': mask_BT.sum()}
  return (loss_BT * mask_BT).sum(), sums


def chunked_cross_entropy(x_BTD: jax.Array, w_VD: jax.Array, logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
                          target_BT: jax.Array, mask_BT: jax.Array, z_loss: float, label_smoothing: float,
                          chunk: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`cross_entropy` of logits_fn(x_BTD, w_VD) for about `chunk` entries of the vocabulary at a time, with the running
  maximum and sum of arXiv 1805.02867: never more than [B, T, chunk] logits exist.

  logits_fn: [B, T, D] and [C, D] -> [B, T, C], unembedding and softcap. Each part of w_VD is gathered once per pass,
  and its gradient reduced once, where chunks of positions would do both for all of it every time. The backward pass
  computes each part's logits again.
  """
  V, ways = w_VD.shape[0], sharding.ways('tensor')
  parts = math.ceil(V / max(chunk, ways))
  each = math.ceil(V // ways / parts)                        # entries of a device
  padded = parts * each * ways > V

  def split(a, fill):                                        # [V, ...] -> [parts, ways * each, ...], where it lies
    a = a.reshape(ways, V // ways, *a.shape[1:])
    a = jnp.pad(a, ((0, 0), (0, parts * each - V // ways), *((0, 0),) * (a.ndim - 2)), constant_values=fill)
    return a.reshape(ways, parts, each, *a.shape[2:]).swapaxes(0, 1).reshape(parts, ways * each, *a.shape[2:])

  high_BTD = x_BTD.astype(jnp.float32)                       # so that the parts' gradients add up in float32

  def body(carry, part):
    most_BT, ties_BT, sum_BT, picked_BT, total_BT = carry
    w_CD, index_C = part
    index_BTC = index_C[None, None]
    logits_BTC = logits_fn(high_BTD.astype(x_BTD.dtype), w_CD)
    if padded:
      logits_BTC = jnp.where(index_BTC < V, logits_BTC, -jnp.inf)
    top_BT = jax.lax.stop_gradient(logits_BTC.max(-1))
    new_BT = jnp.maximum(most_BT, top_BT)
    ties_BT = jnp.where(most_BT == new_BT, ties_BT, 0) + (logits_BTC == new_BT[..., None]).sum(-1)
    sum_BT = sum_BT * jnp.exp(most_BT - new_BT) + jnp.exp(logits_BTC - new_BT[..., None]).sum(-1)
    picked_BT += jnp.where(index_BTC == target_BT[..., None], logits_BTC, 0).sum(-1)
    if label_smoothing:
      total_BT += jnp.where(index_BTC < V, logits_BTC, 0).sum(-1)
    return (new_BT, ties_BT, sum_BT, picked_BT, total_BT), None

  zero_BT = jnp.zeros(target_BT.shape, jnp.float32)
  w_XVD = sharding.shard(split(w_VD, 0), 'XVD', sharding.PARAM)
  start = zero_BT - jnp.inf, jnp.zeros_like(target_BT), zero_BT, zero_BT, zero_BT
  (most_BT, ties_BT, sum_BT, picked_BT, total_BT), _ = jax.lax.scan(
      jax.checkpoint(body, prevent_cse=False), start, (w_XVD, split(jnp.arange(V, dtype=jnp.int32), V)))
  logsumexp_BT = most_BT + jnp.log(sum_BT)
  hit_BT = (picked_BT == most_BT) / jnp.maximum(ties_BT, 1)
  return _add_up(logsumexp_BT - picked_BT, logsumexp_BT, logsumexp_BT - total_BT / V, hit_BT, mask_BT, z_loss,
                 label_smoothing)


def router_losses(train: config_lib.Train, routed: dict, tokens: jax.Array) -> tuple[jax.Array, dict]:
  """(loss, sums) of the routers of one microbatch, each times its target tokens, so that microbatches add up as their
  tokens do. routed: {stack: moe.statistics, with a leading L}. sums: router/balance, router/z and router/dropped, means
  over layers; load: {stack: load_LE}."""
  over_layers = lambda name: jnp.concatenate([of[name] for of in routed.values()])
  balance_L, z_L = over_layers('balance'), over_layers('z')
  loss = tokens * (train.balance_loss * balance_L.sum() + train.router_z_loss * z_L.sum())
  return loss, {'router/balance': tokens * balance_L.mean(), 'router/z': tokens * z_L.mean(),
                'router/dropped': tokens * over_layers('dropped').mean(),
                'load': {stack: of['load_E'] for stack, of in routed.items()}}
