"""How to continue a prompt, and what came of it."""
import dataclasses

import numpy as np

from llm_jax.config import ConfigError
from llm_jax.generate.filters import TOP


@dataclasses.dataclass(frozen=True)
class Options:
  """How to continue a prompt. Penalties and biases change the logits; the filters then apply in this order, to the
  distribution after the temperature."""
  max_tokens: int = 64
  temperature: float = 0.0         # 0: greedy
  top_k: int = 0                   # keep the k likeliest; 0: all
  top_p: float = 1.0               # keep the likeliest that together have this probability (arXiv 1904.09751)
  min_p: float = 0.0               # keep those at least this share of the likeliest (arXiv 2407.01082)
  typical_p: float = 1.0           # keep the most typical that together have this probability (arXiv 2202.00666)
  repetition_penalty: float = 1.0  # logits of tokens seen so far, prompt included (CTRL, arXiv 1909.05858)
  presence_penalty: float = 0.0    # taken off the logits of tokens that were generated (OpenAI's)
  frequency_penalty: float = 0.0   # the same, for each time
  logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)       # added to the logits of these tokens
  stop: tuple[str, ...] = ()       # texts to end before
  stop_ids: tuple[int, ...] | None = None   # tokens to end at; None: the tokenizer's
  seed: int = 0
  n: int = 1                       # samples per prompt
  logprobs: int | None = None      # the model's log-probabilities of each token and of so many of the likeliest

  def __post_init__(self):
    stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
    object.__setattr__(self, 'stop', stop)
    for name, fits, expected in (
        ('max_tokens', self.max_tokens >= 1, 'at least 1'),
        ('temperature', 0 <= self.temperature < np.inf, '0 (greedy) or more'),
        ('top_k', self.top_k >= 0, '0 (off) or more'),
        ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
        ('min_p', 0 <= self.min_p <= 1, 'between 0 and 1'),
        ('typical_p', 0 < self.typical_p <= 1, 'above 0 and at most 1'),
        ('repetition_penalty', 0 < self.repetition_penalty < np.inf, 'above 0'),
        ('presence_penalty', -np.inf < self.presence_penalty < np.inf, 'a finite number'),
        ('frequency_penalty', -np.inf < self.frequency_penalty < np.inf, 'a finite number'),
        ('logit_bias', all(np.isfinite(x) for x in self.logit_bias.values()), 'finite numbers'),
        ('n', self.n >= 1, 'at least 1'),
        ('logprobs', self.logprobs is None or 0 <= self.logprobs <= TOP, f'0 to {TOP}, or None'),
        ('stop', all(stop) and all(isinstance(s, str) for s in stop), 'texts that are not empty')):
      if not fits:
        raise ConfigError(f'{name}: expected {expected}, got {getattr(self, name)!r}')


@dataclasses.dataclass(frozen=True)
class Result:
  text: str              # what was generated, without the prompt, cut before a stop string
  tokens: list[int]      # all that was generated, with the stop id, or up to the token that completed the stop string
  finish_reason: str     # 'stop' | 'length'
  n_prompt_tokens: int
  seconds: float = 0.0   # from the first token to the last, without compiling
  logprobs: list[tuple] = dataclasses.field(default_factory=list)     # (logp, likeliest ids, theirs) of each token
