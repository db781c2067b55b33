"""Whole texts in one pass: the log-probability of each token, and the mean of the hidden states as an embedding."""
import base64

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.generate import programs
from llm_jax.generate.engine import bucket, row_count
from llm_jax.generate.filters import TOP

PART = 128                 # positions whose logits are made at once, at most


class Scorer:
  """With an engine's weights. Texts are padded to powers of two: few programs are compiled."""

  def __init__(self, engine):
    self.cfg, self.weights, self.limit = engine.cfg, engine.weights, engine.limit

  def __call__(self, ids: list[int], top: int) -> list:
    """[None, (logp, likeliest ids, theirs), ...] of the tokens, given those before."""
    token_BT = self._padded(ids)
    after_BT = np.append(token_BT[:, 1:], token_BT[:, :1], 1)
    logp, tops, top_logps = map(np.asarray, next_tokens(self.weights[0], after_BT, self._hidden(token_BT)))
    rows = zip(logp[:len(ids) - 1].tolist(), tops[:, :top].tolist(), top_logps[:, :top].tolist())
    return [None, *rows]

  def embedding(self, ids: list[int]) -> np.ndarray:
    """float32 [D], of length 1."""
    return np.asarray(_embed(self.weights[0], self._hidden(self._padded(ids)), np.int32(len(ids))))

  def _hidden(self, token_BT):
    """The last layer's output, layer by layer as the engine reads its prompts."""
    return programs.through(self.cfg, self.weights, token_BT, np.zeros(len(token_BT), np.int32))[0]

  def warm_up(self) -> None:
    """Compiles every program that a text may need."""
    for length in sorted({self._length(1 << k) for k in range(4, self.limit.bit_length() + 1)}):
      self([0] * length, 0), self.embedding([0] * length)

  def _length(self, n: int) -> int:
    return min(bucket(n, 16), self.limit)

  def _padded(self, ids) -> np.ndarray:
    out = np.zeros((row_count(1), self._length(len(ids))), np.int32)
    out[0, :len(ids)] = ids
    return out


@jax.jit
def next_tokens(model, after_BT, x_BTD):
  """(logp_T of the first row's next tokens after_BT, the likeliest ids [T, TOP], theirs), from the layers' output."""
  T, D = x_BTD.shape[1:]
  size = min(PART, T)
  pad = -T % size

  def part(xs):
    x_TD, next_T = xs
    logp_TV = jax.nn.log_softmax(model.logits(model.finish(x_TD[None]))[0], 1)
    top_TJ, id_TJ = jax.lax.top_k(logp_TV, min(TOP, logp_TV.shape[1]))
    return jnp.take_along_axis(logp_TV, next_T[:, None], 1)[:, 0], id_TJ, top_TJ
  xs = jnp.pad(x_BTD[0], ((0, pad), (0, 0))).reshape(-1, size, D), jnp.pad(after_BT[0], (0, pad)).reshape(-1, size)
  return [y.reshape(-1, *y.shape[2:])[:T] for y in jax.lax.map(part, xs)]


@jax.jit
def _embed(model, x_BTD, length):
  x_TD = model.finish(x_BTD)[0].astype(jnp.float32)
  mean_D = jnp.where((jnp.arange(len(x_TD)) < length)[:, None], x_TD, 0).sum(0) / length
  return mean_D / jnp.linalg.norm(mean_D)


def written(x: np.ndarray, form: str):
  """An embedding as a client asked for it."""
  return base64.b64encode(x.astype('<f4').tobytes()).decode() if form == 'base64' else x.tolist()
