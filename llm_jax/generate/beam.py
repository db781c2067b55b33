"""Beam search: the likeliest continuations that keeping the best few at every step finds."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.generate import engine, programs
from llm_jax.models import transformer


def search(cfg: config_lib.Model, params, prompt: list[int], *, beams: int = 4, max_tokens: int = 64,
           stop_ids: tuple[int, ...] = (), length_penalty: float = 1.0, vocab_size: int = 0) -> list[tuple]:
  """[(tokens, score), ...] of at most `beams` continuations, the best first; a stop id that ends one is its last token.

  score: the sum of log-probabilities divided by (number of tokens) ** length_penalty. The search ends when no beam can
  beat the worst that is kept, at the best score that it could have now. Raises ConfigError as engine.check_prompt does.
  """
  if beams < 1 or max_tokens < 1:
    raise ConfigError(f'beams and max_tokens: expected at least 1, got {beams} and {max_tokens}')
  if cfg.attention != 'causal' or cfg.encoder_layers:
    raise ConfigError("beam search needs a model with config.model.attention='causal' and no encoder")
  vocab_size = min(vocab_size or cfg.vocab_size, cfg.vocab_size)
  engine.check_prompt(cfg, prompt, vocab_size)
  max_tokens = min(max_tokens, cfg.max_length - len(prompt))
  length = engine.bucket(len(prompt) + max_tokens, engine.SHORTEST)
  token_BT = np.zeros((beams, engine.bucket(len(prompt), 16)), np.int32)
  token_BT[:, :len(prompt)] = prompt
  cache, logp_BJ, id_BJ = _start(cfg, vocab_size, beams, length, params, token_BT, np.int32(len(prompt)))
  alive, done = [([], 0.0)], []
  for step in range(max_tokens):
    logp, ids = np.asarray(logp_BJ, np.float64), np.asarray(id_BJ)
    options = sorted(((score + logp[b, j], b, int(ids[b, j])) for b, (_, score) in enumerate(alive)
                      for j in range(ids.shape[1])), key=lambda option: -option[0])[:2 * beams]
    length_now, next_alive = (step + 1) ** length_penalty, []
    for rank, (score, b, token) in enumerate(options):
      if token in stop_ids:
        if rank < beams:
          done.append((alive[b][0] + [token], score / length_now))
      elif len(next_alive) < beams:
        next_alive.append((alive[b][0] + [token], score, b))
    done = sorted(done, key=lambda found: -found[1])[:beams]
    alive = [(tokens, score) for tokens, score, _ in next_alive]
    if len(done) == beams and alive[0][1] / length_now <= done[-1][1] or step == max_tokens - 1:
      break
    parent_B, token_B = np.zeros((2, beams), np.int32)
    for i, (tokens, _, b) in enumerate(next_alive):
      parent_B[i], token_B[i] = b, tokens[-1]
    cache, logp_BJ, id_BJ = _step(cfg, vocab_size, params, cache, parent_B, token_B, np.int32(len(prompt) + step))
  done += [(tokens, score / len(tokens) ** length_penalty) for tokens, score in alive]
  return sorted(done, key=lambda found: -found[1])[:beams]


def _best(cfg, vocab_size, logits_BV, beams):
  logits_BV = jnp.where(jnp.arange(cfg.vocab_size)[None] < vocab_size, logits_BV, -jnp.inf)
  return jax.lax.top_k(jax.nn.log_softmax(logits_BV, 1), min(2 * beams, vocab_size))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(cfg, vocab_size, beams, length, params, token_BT, n):
  model = transformer.bind(cfg, params)
  x_BTD, cache = model.decode(model.layers(), token_BT, jnp.zeros(beams, jnp.int32),
                              programs.empty_cache(cfg, beams, length))
  last_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, n - 1, 1, 1)
  return cache, *_best(cfg, vocab_size, model.logits(last_B1D)[:, 0], beams)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(cfg, vocab_size, params, cache, parent_B, token_B, position):
  model, beams = transformer.bind(cfg, params), len(parent_B)
  cache = jax.tree.map(lambda x: x[parent_B], cache)
  x_B1D, cache = model.decode(model.layers(), token_B[:, None], jnp.broadcast_to(position, beams), cache)
  return cache, *_best(cfg, vocab_size, model.logits(x_B1D)[:, 0], beams)
