"""Batches: a pure function of (seed, step), so resuming needs the step number only and hosts cannot change the tokens.

Example i = step * batch_size + row. A mixture's source for example i, and how many examples of that source came before,
come from one period of a fixed schedule; the epoch's order is a keyed permutation computed for one index at a
time, and from the second epoch on a stream is cut elsewhere each time (`Concat`). Nothing walks over steps: step 10**7
costs what step 10 costs. prefetch.py makes them off the training thread.
"""
import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import objectives
from llm_jax.data.objectives import GOLDEN, Ids, hash64, mix64
from llm_jax.data.store import Store

VERSION = 2                   # of what batch a step has: kept with checkpoints, so that a run is told of a change
PERIOD = 1 << 14              # longest period of a mixture's schedule: weights are multiples of 1 / PERIOD or less


class Batches:
  """`batches(step)` is the global batch of a step, `batches(step, rows=(start, stop))` one host's rows of it."""

  def __init__(self, stores: list[Store], weights, data: config_lib.Data, train: config_lib.Train, tokenizer):
    self.ids = Ids.of(tokenizer)
    self.seed, self.batch_size, self.objective, self.length = train.seed, train.batch_size, train.objective, data.length
    raw = objectives.raw_length(train.objective, data.length, self.ids, data.packing)
    self.readers = [reader(store, data.packing, raw, self.ids) for store in stores]
    self.sizes = [r.whole for r in self.readers]         # sequences per epoch of each source
    for r, size in zip(self.readers, self.sizes):
      if not size:
        raise ConfigError(f'config.data.length: a sequence of {data.length} takes {raw + 1} tokens, the training text '
                          f'of {r.store.label} has {r.store.n_tokens}; lower it to at most {r.store.n_tokens - 1}')
    self.mixture = Mixture(weights, data.temperature)

  def __call__(self, step: int, rows: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """token_BT and target_BT int32, mask_BT float32 (the loss weight of each target); when packed also position_BT and
    segment_BT int32 (1.. per document, 0: padding); for prefix and span objectives prefix_BT bool."""
    example_B = self._examples(step, rows)
    batch = {}
    for reader_, row_b, sequence_b, shift_b in self._locate(example_B):
      for name, x in reader_.read(sequence_b, shift_b).items():
        batch.setdefault(name, np.zeros((len(example_B), *x.shape[1:]), x.dtype))[row_b] = x
    return objectives.apply(self.objective, batch, hash64(self.seed, 2, example_B), self.ids, self.length)

  def names(self, step: int, rows: tuple[int, int] | None = None) -> list[list[str]]:
    """The names of the documents in each row of the batch of a step."""
    example_B = self._examples(step, rows)
    found = [[] for _ in example_B]
    for reader_, row_b, sequence_b, shift_b in self._locate(example_B):
      for row, sequence, shift in zip(row_b, sequence_b, shift_b):
        documents = sorted({d for start, stop in reader_.ranges(int(sequence), int(shift))
                            for d in range(reader_.store.document_at(start), reader_.store.document_at(stop - 1) + 1)})
        found[row] = [reader_.store.name(d) for d in documents]
    return found

  def _examples(self, step, rows):
    start, stop = rows or (0, self.batch_size)
    return step * self.batch_size + np.arange(start, stop)

  def _locate(self, example_B):
    """(reader, rows, sequences, shifts) for every source that has examples among these."""
    source_B, index_B = self.mixture(example_B)
    for s, (reader_, size) in enumerate(zip(self.readers, self.sizes)):
      row_b = np.flatnonzero(source_B == s)
      if len(row_b):
        epoch_b, index_b = np.divmod(index_B[row_b], size)
        shift_b = hash64(self.seed, 3, s, epoch_b) % np.uint64(reader_.store.n_tokens) * (epoch_b > 0)
        yield reader_, row_b, permute(index_b, size, hash64(self.seed, 1, s, epoch_b)), shift_b.astype(np.int64)

  def prefetch(self, start_step: int, rows: tuple[int, int] | None = None, workers: int = 0, buffer: int = 4):
    """Iterator of (step, batch) from a step on, by Grain: `workers` processes, or threads for 0. See prefetch.py."""
    from llm_jax.data.prefetch import Prefetch
    return Prefetch(self, start_step, rows, workers, buffer)


class EvalBatches:
  """All of a held-out store, once, in a fixed order: `len(e)` batches, `e[n]` the n-th, the last filled with mask 0.

  Every token is predicted once, and where documents start with a bos their first token too, so the sum of nats over
  `total_bytes` (and ln 2) is bits per byte of all held-out text. Without a bos (characters) the very first token of the
  stream (concat) or of each document (pack) cannot be predicted. Other objectives than causal cover a fixed sample."""

  def __init__(self, store: Store, data: config_lib.Data, batch_size: int, tokenizer, objective: str = 'causal',
               rows: tuple[int, int] | None = None):
    self.ids, self.objective, self.length, self.batch_size = Ids.of(tokenizer), objective, data.length, batch_size
    raw = objectives.raw_length(objective, data.length, self.ids, data.packing)
    self.reader = reader(store, data.packing, raw, self.ids)
    if objective == 'span' and not self.reader.whole:
      raise ConfigError(f'config.data.length: a sequence of {data.length} takes {raw + 1} tokens, the held-out text of '
                        f'{store.label} has {store.n_tokens}; lower it, or raise data.valid_fraction')
    self.rows = rows or (0, batch_size)
    self.total_bytes = store.total_bytes

  def __len__(self):
    return -(-self.reader.all // self.batch_size)

  def __getitem__(self, n: int) -> dict[str, np.ndarray]:
    if not 0 <= n < len(self):
      raise IndexError(n)
    sequence_B = n * self.batch_size + np.arange(*self.rows)
    batch = self.reader.read(np.minimum(sequence_B, self.reader.all - 1))
    batch = objectives.apply(self.objective, batch, hash64(0, 2, sequence_B), self.ids, self.length)
    batch['mask_BT'][sequence_B >= self.reader.all] = 0
    return batch

  def __iter__(self):
    return (self[n] for n in range(len(self)))


def reader(store: Store, packing: str, length: int, ids: Ids):
  """What turns sequence numbers into rows, for one way to lay documents in sequences."""
  return Packed(store, length, ids) if packing == 'pack' else Concat(store, length, ids)


class Concat:
  """The stream of all tokens cut in windows of length + 1, each starting on the last token of the one before. shift:
  the token with which the first window starts; the stream then goes on from its end to its start. With the same cuts
  in every epoch a text seen eight times is learned by heart sooner."""

  def __init__(self, store, length, ids):
    self.store, self.length, self.pad = store, length, ids.pad
    self.whole = max(store.n_tokens - 1, 0) // length           # sequences without padding
    self.all = max(-(-(store.n_tokens - 1) // length), 1)

  def ranges(self, sequence, shift=0):
    """(start, stop) token ranges of a sequence: one, or two where it goes on at the start of the stream."""
    n = self.store.n_tokens
    start = (sequence * self.length + shift) % n
    stop = start + self.length + 1
    return [(start, n), (0, stop - n)] if shift and stop > n else [(start, min(stop, n))]

  def read(self, sequence_B, shift_B=None):
    """The causal batch of these sequences."""
    shift_B = np.zeros_like(sequence_B) if shift_B is None else shift_B
    window = np.full((len(sequence_B), self.length + 1), self.pad, np.int32)
    mask_BT = np.ones((len(sequence_B), self.length), np.float32)
    for row, (sequence, shift) in enumerate(zip(sequence_B.tolist(), shift_B.tolist())):
      end = 0
      for start, stop in self.ranges(sequence, shift):
        window[row, end:end + stop - start] = self.store.tokens[start:stop]
        end += stop - start
      mask_BT[row, end - 1:] = 0
    return dict(token_BT=window[:, :-1].copy(), target_BT=window[:, 1:].copy(), mask_BT=mask_BT)


class Packed:
  """Whole documents side by side, by the store's plan. Where eos is the bos of the next document (it is not stored
  twice), the last token of a document still has it as its target: a model must learn to stop."""

  def __init__(self, store, length, ids):
    self.store, self.length, self.pad = store, length, ids.pad
    self.stop_id = ids.eos if ids.eos is not None and ids.eos == ids.bos else None
    self.ends, self.spans = store.plan(length)
    self.whole = self.all = len(self.ends) - 1

  def ranges(self, sequence, _shift=0):
    """(start, stop) token ranges of a sequence."""
    return [(int(a), int(b)) for a, b, _ in self.spans[self.ends[sequence]:self.ends[sequence + 1]]]

  def read(self, sequence_B, _shift=None):
    """The causal batch of these sequences, with positions and segments."""
    B, T = len(sequence_B), self.length
    first_B, end_B = self.ends[sequence_B], self.ends[sequence_B + 1]
    count_B = end_B - first_B
    segment = _ranges(count_B)                                   # of every span, its number in its row, from 0
    start, stop, last = self.spans[np.repeat(first_B, count_B) + segment].T
    size = stop - start
    position = _ranges(size)                                     # of every token, its place in its span
    row = np.repeat(np.repeat(np.arange(B), count_B), size)
    token = np.repeat(start, size) + position
    column = _ranges(np.bincount(row, minlength=B))
    ends = np.cumsum(size) - 1                                   # of every span, its last token among these
    following = np.minimum(token + 1, self.store.n_tokens - 1)
    target, mask = self.store.tokens[following].astype(np.int32), np.ones(len(token), np.float32)
    target[ends[last == 1]] = self.pad if self.stop_id is None else self.stop_id
    mask[ends[last == 1]] = 0 if self.stop_id is None else 1

    def lay(values, fill, dtype):
      out = np.full((B, T), fill, dtype)
      out[row, column] = values
      return out
    return dict(token_BT=lay(self.store.tokens[token], self.pad, np.int32), target_BT=lay(target, self.pad, np.int32),
                mask_BT=lay(mask, 0, np.float32), position_BT=lay(position, 0, np.int32),
                segment_BT=lay(np.repeat(segment + 1, size), 0, np.int32))


def _ranges(counts):
  """0 .. counts[0] - 1, 0 .. counts[1] - 1, ... in one array."""
  return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
  """A bijection of 0..size-1 for each key (uint64, one or one per index), in O(1) memory: a Feistel network on the next
  power of two, applied again to what falls outside (cycle walking, Black and Rogaway 2002)."""
  bits = max((size - 1).bit_length(), 2)
  half, low = np.uint64(bits // 2), np.uint64((1 << bits // 2) - 1)
  high = np.uint64((1 << bits - bits // 2) - 1)
  key_r = np.broadcast_to(key, np.shape(index)) ^ (np.arange(1, 9, dtype=np.uint64) * GOLDEN)[:, None]
  out = np.asarray(index).astype(np.uint64)
  todo = np.arange(len(out))
  while len(todo):
    left, right = out[todo] >> half, out[todo] & low
    for i in range(0, 8, 2):
      left = left ^ (mix64(right ^ key_r[i, todo]) & high)
      right = right ^ (mix64(left ^ key_r[i + 1, todo]) & low)
    out[todo] = left << half | right
    todo = todo[out[todo] >= size]
  return out.astype(np.int64)


class Mixture:
  """Which source example i comes from, and its number within that source, in closed form: one period of a schedule.

  `shares` are the weights ** (1 / temperature), normalised, as multiples of 1 / period (exact where a period of at
  most PERIOD allows). After any n examples each source has given n * share of them, to within 1 (Tijdeman 1980: of
  those whose turn may come, the one whose turn must come first)."""

  def __init__(self, weights, temperature: float = 1.0):
    log_share = np.log(np.asarray(weights, np.float64)) / temperature
    share = np.exp(log_share - log_share.max())                  # no overflow, whatever the temperature
    share /= share.sum()
    periods = np.arange(1, PERIOD + 1)[:, None]
    whole = np.rint(periods * share)
    exact = np.flatnonzero(((whole >= 1) & (np.abs(periods * share - whole) < 1e-9 * periods)).all(axis=1))
    period = int(exact[0]) + 1 if len(exact) else PERIOD
    count = np.maximum(np.floor(period * share + 1e-6), 1).astype(np.int64)
    while count.sum() != period:                                 # largest remainder
      gap = period * share - count
      step = 1 if count.sum() < period else -1
      count[np.argmax(np.where((count > 1) | (step > 0), gap * step, -np.inf))] += step
    self.shares, self.count, self.period = count / period, count, period
    counts, given = count.tolist(), [0] * len(count)
    source, number = np.zeros(period, np.int64), np.arange(period)
    for n in range(period if len(counts) > 1 else 0):
      may = [s for s, c in enumerate(counts) if given[s] * period < (n + 1) * c]
      source[n] = s = min(may, key=lambda s: (given[s] + 1) / counts[s])
      number[n] = given[s]
      given[s] += 1
    self.source, self.number = source, number

  def __call__(self, example: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, number within the source) of each example."""
    round_, place = np.divmod(example, self.period)
    source = self.source[place]
    return source, round_ * self.count[source] + self.number[place]
