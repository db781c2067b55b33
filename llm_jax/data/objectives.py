"""What a sequence of tokens is asked: causal, prefix-LM, masked (BERT, arXiv 1810.04805), span corruption (T5, arXiv
1910.10683, as one decoder-only sequence).

Every random choice is a hash of (key of the example, place), so a batch never depends on how it was reached, nor on the
version of a random generator.
"""
import dataclasses

import numpy as np

from llm_jax.config import ConfigError

NOISE, SPAN = 0.15, 3.0     # share of tokens that are masked or corrupted; mean length of a corrupted span
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Ids:
  """What batches need to know of a tokenizer; small, so that it travels to worker processes."""
  vocab_size: int
  bos: int | None
  eos: int | None
  pad: int
  mask: int | None
  sentinels: tuple[int, ...]

  @classmethod
  def of(cls, tokenizer) -> 'Ids':
    return cls(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id,
               tuple(tokenizer.sentinel_ids))


def mix64(h: np.ndarray) -> np.ndarray:
  """A bijection of uint64 in which every bit in changes about half of the bits out: one step of splitmix64."""
  h = h + GOLDEN
  h ^= h >> np.uint64(30)
  h *= np.uint64(0xBF58476D1CE4E5B9)
  h ^= h >> np.uint64(27)
  h *= np.uint64(0x94D049BB133111EB)
  h ^= h >> np.uint64(31)
  return h


def hash64(*parts) -> np.ndarray:
  """uint64 hash of integers or integer arrays, broadcast; at least 1-D."""
  h = np.zeros(1, np.uint64)
  for part in parts:
    h = mix64(h ^ np.atleast_1d(np.asarray(part)).astype(np.uint64))
  return h


def _uniform(key_B, salt, n):
  """float64 [B, n] in [0, 1)."""
  return (mix64(hash64(key_B, salt)[:, None] ^ np.arange(n, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def raw_length(objective: str, length: int, ids: Ids, packing: str) -> int:
  """Tokens of the store that one sequence of `length` takes: span corruption adds sentinels, so it takes fewer.
  Raises ConfigError where the tokenizer lacks the special ids of the objective."""
  if objective == 'masked' and ids.mask is None:
    raise ConfigError("config.train.objective: 'masked' needs a tokenizer with a mask id: 'byte' or a trained "
                      "'sentencepiece'")
  if objective != 'span':
    return length
  if len(ids.sentinels) < 2:
    raise ConfigError("config.train.objective: 'span' needs a tokenizer with sentinel ids: 'byte' or a trained "
                      "'sentencepiece'")
  if packing != 'concat':
    raise ConfigError(f"config.data.packing: objective 'span' needs 'concat', got {packing!r}")
  fits = [n for n in range(4, length) if n + 2 * _noise(n, ids)[1] <= length]
  if not fits:
    raise ConfigError(f"config.data.length: objective 'span' needs at least 8, got {length}")
  return fits[-1]


def _noise(n, ids):
  """(corrupted tokens, spans) of n tokens; fewer, longer spans where the tokenizer has few sentinels."""
  noise = max(round(n * NOISE), 1)
  return noise, max(min(round(noise / SPAN), len(ids.sentinels) - 1), 1)


def apply(objective: str, batch: dict, key_B: np.ndarray, ids: Ids, length: int) -> dict:
  """Turns a causal batch of `raw_length` tokens into one of the objective; `key_B` uint64, one per example."""
  return _OBJECTIVES[objective](batch, key_B, ids, length)


def _causal(batch, key_B, ids, length):
  return batch


def _prefix(batch, key_B, ids, length):
  """The first part of each document (packed) or sequence is read in both directions; the loss is on the rest."""
  B, T = batch['token_BT'].shape
  if 'segment_BT' in batch:
    position_BT = batch['position_BT']
    row_BT = np.arange(B)[:, None] * (T + 1) + batch['segment_BT']
    size_BT = np.bincount(row_BT.ravel(), minlength=B * (T + 1))[row_BT]
    start_BT = np.arange(T) - position_BT
    u_BT = np.take_along_axis(_uniform(key_B, 1, T), np.maximum(start_BT, 0), axis=1)
    real_BT = batch['segment_BT'] > 0
  else:
    position_BT, size_BT, real_BT = np.broadcast_to(np.arange(T), (B, T)), T, True
    u_BT = _uniform(key_B, 1, 1)
  prefix_BT = (u_BT * size_BT).astype(np.int64)        # 0 .. size - 1: something is left to predict
  mask_BT = batch['mask_BT'] * (position_BT >= prefix_BT - 1)
  return {**batch, 'mask_BT': mask_BT.astype(np.float32), 'prefix_BT': (position_BT < prefix_BT) & real_BT}


def _masked(batch, key_B, ids, length):
  """15% of the tokens are to be recovered: 80% of them read as the mask id, 10% as a random one, 10% as they are."""
  token_BT = batch['token_BT']
  T = token_BT.shape[1]
  can_BT = batch['segment_BT'] > 0 if 'segment_BT' in batch else batch['mask_BT'] > 0
  for special in (ids.bos, ids.eos):
    can_BT = can_BT if special is None else can_BT & (token_BT != special)
  chosen_BT = can_BT & (_uniform(key_B, 1, T) < NOISE)
  how_BT = _uniform(key_B, 2, T)
  random_BT = (_uniform(key_B, 3, T) * ids.vocab_size).astype(np.int32)
  noisy_BT = np.where(how_BT < 0.8, np.int32(ids.mask), np.where(how_BT < 0.9, random_BT, token_BT))
  return {**batch, 'token_BT': np.where(chosen_BT, noisy_BT, token_BT), 'target_BT': token_BT,
          'mask_BT': chosen_BT.astype(np.float32)}


def _split(key_B, salt, total, parts):
  """int64 [B, parts]: a uniformly random way to write `total` as a sum of `parts` positive numbers."""
  order = np.argsort(_uniform(key_B, salt, total - 1), axis=1, kind='stable')[:, :parts - 1]
  cuts = np.sort(order, axis=1) + 1
  ends = np.full((len(key_B), 1), total)
  return np.diff(np.concatenate([ends * 0, cuts, ends], axis=1), axis=1)


def _span(batch, key_B, ids, length):
  """[text with each corrupted span as a sentinel | sentinel, span, sentinel, span, ... last sentinel]; loss on the
  second part. Every row has the same number of tokens in both."""
  raw_Bn = batch['token_BT']
  B, n = raw_Bn.shape
  noise, spans = _noise(n, ids)
  runs = np.stack([_split(key_B, 1, n - noise, spans), _split(key_B, 2, noise, spans)], axis=2).reshape(B, -1)
  run_Bn = np.repeat(np.tile(np.arange(2 * spans), B), runs.ravel()).reshape(B, n)   # even: kept, odd: corrupted
  first_Bn = np.diff(run_Bn, axis=1, prepend=-1) > 0
  sentinel_Bn = np.array(ids.sentinels, np.int32)[run_Bn // 2]
  is_noise_Bn = run_Bn % 2 == 1
  corrupted = np.where(is_noise_Bn, sentinel_Bn, raw_Bn)[~is_noise_Bn | first_Bn].reshape(B, -1)
  answer = np.where(is_noise_Bn, raw_Bn, sentinel_Bn)[is_noise_Bn | first_Bn].reshape(B, -1)
  end = np.full((B, 1), ids.sentinels[spans], np.int32)
  row = np.concatenate([corrupted, answer, end], axis=1)
  known = row.shape[1] - 1
  inputs = corrupted.shape[1]
  token_BT = np.full((B, length), ids.pad, np.int32)
  target_BT, mask_BT = token_BT.copy(), np.zeros((B, length), np.float32)
  token_BT[:, :known], target_BT[:, :known] = row[:, :-1], row[:, 1:]
  # A row that ends in padding (the last one of a store) would have the padding as text: it carries no loss.
  mask_BT[:, inputs - 1:known] = (batch['mask_BT'].min(axis=1) > 0)[:, None]
  prefix_BT = np.broadcast_to(np.arange(length) < inputs, (B, length)).copy()
  return dict(token_BT=token_BT, target_BT=target_BT, mask_BT=mask_BT, prefix_BT=prefix_BT)


_OBJECTIVES = {'causal': _causal, 'prefix': _prefix, 'masked': _masked, 'span': _span}
