"""Which documents share a sequence: planned once per store and length, without the seed, as a table on disk.

Best-fit decreasing (arXiv 2404.10830): only documents longer than a sequence are cut, and little is padding. Three
files: .ends and .spans hold the table, .json appears last and makes it complete.
"""
import collections
import json
import os
import pathlib

import numpy as np

from llm_jax.config import ConfigError

FORMAT = 1                  # of the table
BLOCK = 1 << 20             # documents packed together; bounds the memory


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
  """Best-fit decreasing. `lengths` [n], each in 1..capacity -> (the bin of each [n], number of bins). Works on all
  items of one length at once, so the cost lies in the number of different lengths, not of documents."""
  order = np.argsort(-lengths, kind='stable')
  bins = np.empty(len(lengths), np.int64)
  groups = collections.defaultdict(list)               # room left -> arrays of the bins that have it
  has = np.zeros(capacity + 1, bool)                   # has[room]: there are such bins
  used = at = 0
  values, counts = np.unique(-lengths, return_counts=True)
  for length, count in zip((-values).tolist(), counts.tolist()):
    items, at = order[at:at + count], at + count
    while len(items):
      room = length + int(has[length:].argmax())       # the tightest fit
      if has[room]:
        target = np.concatenate(groups.pop(room))
        has[room] = False
      else:
        room = capacity
        target = np.arange(used, used + -(-len(items) // (capacity // length)))
        used += len(target)
      taken, rest = target[:len(items)], target[len(items):]
      bins[items[:len(taken)]], items = taken, items[len(taken):]
      for left, group in ((room - length, taken), (room, rest)):
        if left and len(group):
          groups[left].append(group)
          has[left] = True
  return bins, used


def write(offsets: np.ndarray, length: int, done: pathlib.Path) -> None:
  """Cuts documents (offsets [n + 1]) into pieces of at most `length` tokens, packs them and writes the table."""
  sequences = n_spans = 0
  with open(done.with_suffix('.ends'), 'wb') as ends_file, open(done.with_suffix('.spans'), 'wb') as spans_file:
    ends_file.write(np.zeros(1, np.int64))
    for block in range(0, len(offsets) - 1, BLOCK):
      edges = np.array(offsets[block:block + BLOCK + 1])
      pieces = -(-np.diff(edges) // length)
      number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
      start = np.repeat(edges[:-1], pieces) + number * length
      stop = np.minimum(start + length, np.repeat(edges[1:], pieces))
      last = stop == np.repeat(edges[1:], pieces)
      bins, count = pack(stop - start, length)
      order = np.argsort(bins, kind='stable')          # stable: inside a sequence, the order of the store
      spans_file.write(np.stack([start, stop, last], 1)[order].astype(np.int64))
      ends_file.write(n_spans + np.cumsum(np.bincount(bins, minlength=count)))
      sequences, n_spans = sequences + count, n_spans + len(start)
    for f in (ends_file, spans_file):
      f.flush()
      os.fsync(f.fileno())
  replace(done, json.dumps(dict(format=FORMAT, sequences=sequences, spans=n_spans)))


def complete(done: pathlib.Path) -> bool:
  """True where the table is there and its files have the sizes it says."""
  if not done.exists():
    return False
  meta = json.loads(done.read_text())
  if meta['format'] > FORMAT:
    raise ConfigError(f'{done}: expected format {FORMAT} or older, got {meta["format"]}; update llm_jax')
  sizes = {'.ends': 8 * (meta['sequences'] + 1), '.spans': 24 * meta['spans']}
  files = {done.with_suffix(suffix): size for suffix, size in sizes.items()}
  return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def read(done: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """(int64 ends [sequences + 1], int64 spans [m, 3]): sequence i is spans[ends[i]:ends[i + 1]], each the first
  token, the end, and whether that is the document's end."""
  meta = json.loads(done.read_text())
  return (map_file(done.with_suffix('.ends'), np.dtype(np.int64), (meta['sequences'] + 1,)),
          map_file(done.with_suffix('.spans'), np.dtype(np.int64), (meta['spans'], 3)))


def map_file(path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  """A read-only memory map, or an empty array where there is nothing to map."""
  # As a plain array: indexing the memmap class is several times slower.
  return np.asarray(np.memmap(path, dtype, 'r', shape=shape)) if shape[0] else np.zeros(shape, dtype)


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a small file so that it is there whole or not at all, also after a power cut."""
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'w') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
