"""Marks in generated text that its maker can find again, and the detector: python -m llm_jax.generate.watermark

`green` (Kirchenbauer et al., arXiv 2301.10226): the token before picks a share of the vocabulary, whose logits are
raised. `tournament` (SynthID-Text, Nature 634, 818): tokens meet in rounds decided by bits of a keyed hash of the text
before; averaged over keys, the distribution stays what it was. Greedy texts bear no tournament.

  python -m llm_jax.generate.watermark --model=PATH --kind=green --key_file=KEY text.txt
"""
import dataclasses
import hashlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Watermark:
  """key: uint32, of a secret (`key_of`). share, raised: of the green list. rounds: of the tournament."""
  kind: str              # green | tournament
  key: int
  share: float = 0.25
  raised: float = 2.0    # added to the logits of green tokens
  rounds: int = 30

  @property
  def context(self) -> int:
    """Tokens before, on which a token's mark depends."""
    return 1 if self.kind == 'green' else 4


def key_of(secret: str) -> int:
  return int.from_bytes(hashlib.sha256(secret.encode()).digest()[:4], 'little')


def text_of(path) -> str:
  """Raises ConfigError for a file that is not UTF-8."""
  try:
    return pathlib.Path(path).expanduser().read_text(encoding='utf-8')
  except UnicodeDecodeError as e:
    raise ConfigError(f'{path}: expected a text in UTF-8 ({e.reason} at byte {e.start}); convert it') from e


def read(kind: str, path) -> Watermark:
  """The watermark whose secret is in a file. Raises ConfigError for one that is too short to be one."""
  secret = text_of(path).strip()
  if len(secret) < 16:
    raise ConfigError(f'{path}: expected a secret of at least 16 characters, such as `openssl rand -hex 16` makes')
  return Watermark(kind, key_of(secret))


def mix(x):
  """uint32 to uint32, every bit of which depends on every bit (the last step of MurmurHash3)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * np.uint32(0xc2b2ae35)
  return x ^ (x >> 16)


def context_hash(mark: Watermark, before_BH):
  """uint32 [B] of the tokens before, the newest last."""
  found = jnp.full(before_BH.shape[0], mark.key, jnp.uint32)
  for t in range(mark.context):
    found = mix(found ^ (before_BH[:, before_BH.shape[1] - mark.context + t].astype(jnp.uint32)
                         * np.uint32(0x9e3779b9) + np.uint32(t + 1)))
  return found


def marks(mark: Watermark, hash_B, token_BV, number: int):
  """uint32 [B, V]: the hash of each token in this context, for one round."""
  mixed_BV = mix(token_BV.astype(jnp.uint32) * np.uint32(0x9e3779b1) + np.uint32(number * 0x85ebca77 % 2**32))
  return mix(hash_B[:, None] ^ mixed_BV)


def green(mark: Watermark, hash_B, token_BV):
  """bool [B, V]: tokens of the green list."""
  return marks(mark, hash_B, token_BV, 0) < np.uint32(mark.share * 2**32)


def raise_green(mark: Watermark, logits_BV, before_BH):
  token_1V = jnp.arange(logits_BV.shape[1])[None]
  return logits_BV + mark.raised * green(mark, context_hash(mark, before_BH), token_1V)


def compete(mark: Watermark, logits_BV, before_BH):
  """Logits after the tournament: in each round a token meets another drawn alike, and the one with the bit goes on."""
  hash_B, token_1V = context_hash(mark, before_BH), jnp.arange(logits_BV.shape[1])[None]

  def one(i, p_BV):
    bit_BV = (marks(mark, hash_B, token_1V, 0) ^ marks(mark, hash_B, token_1V + (i + 1) * 0x10001, 1)) & 1
    bit_BV = bit_BV.astype(jnp.float32)
    return jnp.maximum(p_BV * (1 + bit_BV - (p_BV * bit_BV).sum(1, keepdims=True)), 0)        # rounding goes below
  return jnp.log(jax.lax.fori_loop(0, mark.rounds, one, jax.nn.softmax(logits_BV, 1)))


def detect(mark: Watermark, ids: list[int]) -> tuple[float, int]:
  """(z, tokens that counted): how many standard deviations the text has more marks than chance; above 4, chance is out
  of the question. A token counts once in each context."""
  H = mark.context
  pairs = list(dict.fromkeys(tuple(ids[i - H:i + 1]) for i in range(H, len(ids))))
  if not pairs:
    return 0.0, 0
  rows = np.array(pairs, np.int32)
  hash_B, token_B1 = context_hash(mark, jnp.asarray(rows[:, :H])), jnp.asarray(rows[:, H:])
  if mark.kind == 'green':
    found = float(np.asarray(green(mark, hash_B, token_B1)).sum())
    return (found - mark.share * len(rows)) / math.sqrt(len(rows) * mark.share * (1 - mark.share)), len(rows)
  base = marks(mark, hash_B, token_B1, 0)
  bits = sum(np.asarray((base ^ marks(mark, hash_B, token_B1 + (i + 1) * 0x10001, 1)) & 1).sum()
             for i in range(mark.rounds))
  n = len(rows) * mark.rounds
  return float((bits - n / 2) / math.sqrt(n / 4)), len(rows)


def main(args: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.generate.watermark', __doc__)
  parser.add_argument('--model', required=True, help='whose tokenizer')
  parser.add_argument('--kind', choices=('green', 'tournament'), required=True)
  parser.add_argument('--key_file', required=True)
  parser.add_argument('text', help='a file of UTF-8')
  with config_lib.one_line_errors('--debug' in args):
    flags = parser.parse_args(args)
    from llm_jax.interop import load
    mark, text = read(flags.kind, flags.key_file), text_of(flags.text)
    z, n = detect(mark, load.find(flags.model, verify=False).tokenizer.encode(text).tolist())
    print(f'z = {z:.2f} over {n} tokens: {"marked" if z > 4 else "no mark found"}')


if __name__ == '__main__':
  main(sys.argv[1:])
