"""Whole texts in one pass: the log-probability of each token, and the mean of the hidden states as an embedding."""
import base64
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.generate.engine import bucket, row_count
from llm_jax.generate.filters import TOP
from llm_jax.models import transformer


class Scorer:
  """Texts are padded to powers of two: few programs are compiled."""

  def __init__(self, cfg, params):
    self.cfg, self.params = dataclasses.replace(cfg, unroll=False), params

  def __call__(self, ids: list[int], top: int) -> list:
    """[None, (logp, likeliest ids, theirs), ...] of the tokens, given those before."""
    logp, tops, top_logps = map(np.asarray, _score(self.cfg, self.params, self._padded(ids)))
    rows = zip(logp[:len(ids) - 1].tolist(), tops[:, :top].tolist(), top_logps[:, :top].tolist())
    return [None, *rows]

  def embedding(self, ids: list[int]) -> np.ndarray:
    """float32 [D], of length 1."""
    return np.asarray(_embed(self.cfg, self.params, self._padded(ids), np.int32(len(ids))))

  def _padded(self, ids) -> np.ndarray:
    out = np.zeros((row_count(1), min(bucket(len(ids), 16), self.cfg.max_length)), np.int32)
    out[0, :len(ids)] = ids
    return out


@functools.partial(jax.jit, static_argnums=0)
def _score(cfg, params, token_BT):
  logits_TV = transformer.bind(cfg, params)(token_BT)[0]
  logp_TV = jax.nn.log_softmax(logits_TV, 1)
  logp_T = jnp.take_along_axis(logp_TV[:-1], token_BT[0, 1:, None], 1)[:, 0]
  top_TJ, id_TJ = jax.lax.top_k(logp_TV, min(TOP, logp_TV.shape[1]))
  return logp_T, id_TJ, top_TJ


@functools.partial(jax.jit, static_argnums=0)
def _embed(cfg, params, token_BT, length):
  x_TD = transformer.bind(cfg, params).hidden(token_BT)[0].astype(jnp.float32)
  mean_D = jnp.where((jnp.arange(len(x_TD)) < length)[:, None], x_TD, 0).sum(0) / length
  return mean_D / jnp.linalg.norm(mean_D)


def written(x: np.ndarray, form: str):
  """An embedding as a client asked for it."""
  return base64.b64encode(x.astype('<f4').tobytes()).decode() if form == 'base64' else x.tolist()
