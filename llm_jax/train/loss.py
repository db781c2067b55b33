"""Cross-entropy with z-loss and label smoothing, whole or in chunks of positions.

Everything is a sum over the positions, weighted by the mask; the caller divides by 'tokens', once, after it has added
up microbatches and devices. The target's logit is picked by comparing with an iota: elementwise, so it stays
sharded over V and its backward fuses with the softmax's, where a gather's is a scatter.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax.config import ConfigError


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, z_loss: float,
                  label_smoothing: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss, sums), float32 scalars computed in float32 from logits of any float dtype; nats, summed under the mask.

  loss: sum of (1 - label_smoothing) * ce + label_smoothing * (mean over V of -log p) + z_loss * logsumexp ** 2 (z-loss:
  arXiv 2204.02311). sums: 'loss/ce' (without smoothing), 'loss/z' (with its factor), 'accuracy' (targets that are the
  argmax), 'tokens' (the mask). No gradient reaches the sums' accuracy; unused sums cost nothing under jit.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  is_target_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == target_BT[..., None]
  logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  ce_BT = logsumexp_BT - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
  z_BT = z_loss * jnp.square(logsumexp_BT)
  loss_BT = ce_BT + z_BT if z_loss else ce_BT
  if label_smoothing:
    loss_BT += label_smoothing * (logsumexp_BT - logits_BTV.mean(-1) - ce_BT)
  hit_BT = jnp.argmax(logits_BTV, axis=-1) == target_BT
  mask_BT = mask_BT.astype(jnp.float32)
  sums = {'loss/ce': (ce_BT * mask_BT).sum(), 'loss/z': (z_BT * mask_BT).sum(), 'accuracy': (hit_BT * mask_BT).sum(),
          'tokens': mask_BT.sum()}
  return (loss_BT * mask_BT).sum(), sums


def chunked_cross_entropy(x_BTD: jax.Array, logits_fn: Callable[[jax.Array], jax.Array], target_BT: jax.Array,
                          mask_BT: jax.Array, z_loss: float, label_smoothing: float,
                          chunk: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`cross_entropy` of logits_fn(x_BTD), for `chunk` positions at a time: never more than [B, chunk, V] logits exist.

  logits_fn: [B, C, D] -> [B, C, V], unembedding and softcap; position by position. The backward pass computes each
  chunk's logits again. Raises ConfigError where chunk does not divide T.
  """
  B, T = target_BT.shape
  if T % chunk:
    raise ConfigError(f'config.train.loss_chunk: {T} positions are not a multiple of {chunk}')

  def split(array):
    return jnp.moveaxis(array.reshape(B, T // chunk, chunk, *array.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(x_BCD, target_BC, mask_BC):
    return cross_entropy(logits_fn(x_BCD), target_BC, mask_BC, z_loss, label_smoothing)

  def body(total, inputs):
    return jax.tree.map(jnp.add, total, one(*inputs)), None

  start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *(a[:, :chunk] for a in (
      x_BTD, target_BT, mask_BT))))
  return jax.lax.scan(body, start, (split(x_BTD), split(target_BT), split(mask_BT)))[0]


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
