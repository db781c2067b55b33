"""Who may see whom in attention, and the scores of those who may."""
import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.models import layers, quantize


@dataclasses.dataclass(frozen=True)
class View:
  """What the queries of one forward pass may see; arrays are None where the plain case holds."""
  kind: str                       # causal | prefix | bidirectional
  position_BT: jax.Array | None = None   # of queries; None: 0..T-1
  key_position_BS: jax.Array | None = None   # of keys; None: 0..S-1 (a cache's slots are its positions)
  segment_BT: jax.Array | None = None    # document of each query; 0 is padding
  key_segment_BS: jax.Array | None = None
  prefix_BS: jax.Array | None = None     # keys that every query of their document sees


def visible(view: View, window: int, T: int, S: int):
  """bool [B or 1, T, S]: True where query t may see key s; None where it may see all. A window w keeps the w newest."""
  q = (jnp.arange(T)[None] if view.position_BT is None else view.position_BT)[:, :, None]
  k = (jnp.arange(S)[None] if view.key_position_BS is None else view.key_position_BS)[:, None, :]
  mask = None
  if view.kind != 'bidirectional':
    mask = k <= q
  if view.kind == 'prefix' and view.prefix_BS is not None:
    mask = mask | view.prefix_BS[:, None, :]
  if window:
    near = q - k < window if view.kind != 'bidirectional' else jnp.abs(q - k) < window
    mask = near if mask is None else mask & near
  if view.key_segment_BS is not None:
    same = view.segment_BT[:, :, None] == view.key_segment_BS[:, None, :]
    mask = same if mask is None else mask & same
  return mask


def scores(q_BKGTH, k_BKSH, view: View, *, window, scale, softcap, slopes_N=None):
  """(score_BKGTS float32, mask [B or 1, T, S] or None): scaled, capped, with ALiBi's bias, -1e30 where the mask is
  False (finite: a row that sees nothing is no NaN). K, G: a kv head and the queries that read it."""
  (K, G, T), S = q_BKGTH.shape[1:4], k_BKSH.shape[2]
  score_BKGTS = layers.settle(
      quantize.einsum('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, jnp.float32)) * scale
  if softcap:
    score_BKGTS = softcap * jnp.tanh(score_BKGTS / softcap)
  if slopes_N is not None:
    q = (jnp.arange(T)[None] if view.position_BT is None else view.position_BT)[:, None, None, :, None]
    k = (jnp.arange(S)[None] if view.key_position_BS is None else view.key_position_BS)[:, None, None, None, :]
    score_BKGTS = score_BKGTS - jnp.asarray(slopes_N).reshape(1, K, G, 1, 1) * jnp.abs(q - k)
  mask = visible(view, window, T, S)
  if mask is not None:
    score_BKGTS = jnp.where(mask[:, None, None], score_BKGTS, -1e30)
  return score_BKGTS, mask
