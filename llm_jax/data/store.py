"""Text becomes token ids once: one memory-mapped store per source.

A store is a folder named by everything that decides its content. Work is written in numbered parts: the files grow, are
flushed to disk, and only then `progress.json` is replaced, so a killed run goes on behind its last part. `store.json`
appears last, which is what makes a store complete.
"""
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import sys
import time

import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import packing
from llm_jax.data import sources as sources_lib

FORMAT = 1                    # of the files below; raise it with every change, and keep reading the older ones
PART_BYTES = 16 << 20         # text per part: what a kill can cost
WHOLE_BYTES = 64 << 20        # up to which Store.fingerprint reads everything
BATCH_CHARS = 2 << 20         # text per call of tokenizer.encode_batch; bounds the memory


@dataclasses.dataclass(frozen=True)
class Stores:
  """What `prepare` returns: one store per source and split, in the order of the mixture."""
  train: list['Store']
  valid: list['Store']
  weights: tuple[float, ...]   # as in the config, before temperature


class Store:
  """One split of one source. Pickles as its path, so worker processes map the files again instead of copying them."""

  def __init__(self, folder: pathlib.Path, split: str):
    self.folder, self.split = pathlib.Path(folder), split
    meta = _read_meta(self.folder)
    counts = meta['splits'][split]
    self.label = meta['label']                         # for messages: the source in words
    self.n_tokens, self.n_docs, self.total_bytes = counts['tokens'], counts['documents'], counts['bytes']
    self.tokens = packing.map_file(self._path('tokens'), np.dtype(meta['dtype']), (self.n_tokens,))
    # Row i holds the tokens, text bytes and bytes of names before document i; there are n_docs + 1 rows.
    self.rows = packing.map_file(self._path('documents'), np.dtype(np.int64), (self.n_docs + 1, 3))

  def __reduce__(self):
    return Store, (self.folder, self.split)

  def _path(self, kind):
    return self.folder / f'{self.split}.{kind}'

  @property
  def offsets(self) -> np.ndarray:
    """int64 [n_docs + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    return self.rows[:, 0]

  @property
  def text_bytes(self) -> np.ndarray:
    """int64 [n_docs]: UTF-8 bytes of each document's text."""
    return np.diff(self.rows[:, 1])

  def name(self, document: int) -> str:
    """The document's name, as the source gave it."""
    start, stop = (int(x) for x in self.rows[document:document + 2, 2])
    with open(self._path('names'), 'rb') as f:
      f.seek(start)
      return f.read(stop - start).decode('utf-8', 'surrogatepass')

  def document_at(self, token: int) -> int:
    """The document that holds this token of the stream."""
    return int(np.searchsorted(self.offsets, token, 'right')) - 1

  def fingerprint(self) -> str:
    """Hex key of the tokens and where documents start, wherever they came from. Above 64 MiB of tokens 256 stretches of
    them stand for all: reading a whole corpus at every start would cost minutes."""
    key = hashlib.sha256(json.dumps([self.n_tokens, self.n_docs, self.total_bytes]).encode())
    for array in (self.tokens, self.offsets):
      parts = 1 if array.nbytes <= WHOLE_BYTES else 256
      for i in range(parts):
        start = i * len(array) // parts
        key.update(np.ascontiguousarray(array[start:start + (len(array) if parts == 1 else 4096)]))
    return key.hexdigest()

  def plan(self, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The packing for sequences of `length` tokens, made on first use and kept beside the store: int64 ends [n + 1] and
    spans [m, 3]; see packing.read."""
    done = self._path(f'pack{length}.json')
    if not packing.complete(done):
      with _lock(self.folder / 'lock', f'the packing of {self.label}'):
        if not packing.complete(done):
          packing.write(self.offsets, length, done)
    return packing.read(done)


def cache_folder(data: config_lib.Data) -> pathlib.Path:
  """Where stores and trained tokenizers are kept."""
  if data.cache_dir:
    return pathlib.Path(data.cache_dir).expanduser()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'llm_jax'


def prepare(data: config_lib.Data, tokenizer, cache_dir: pathlib.Path | None = None, progress: str = 'auto') -> Stores:
  """Tokenises every source of the config, or finds it done. Every document is [bos] ids [eos], the last only where
  it differs from bos. `progress`: 'auto' (a bar on a terminal, lines elsewhere), 'rich', 'lines' or 'none'."""
  folder = pathlib.Path(cache_dir or cache_folder(data)) / 'stores'
  if data.source == 'mixture' and data.valid == 'given':
    raise ConfigError("config.data.valid: 'given' is for a single source; a mixture takes 'hash' or 'tail'")
  sources = data.mixture or (config_lib.Source(data.source, data.path, data.field),)
  train, valid = [], []
  for source in sources:
    if data.valid == 'given':
      train += _prepare(source, 'train', 'all', data, tokenizer, folder, progress)
      held_out = source if source.source == 'tfds' else dataclasses.replace(source, path=data.valid_path)
      split = data.valid_path if source.source == 'tfds' else 'train'
      valid += _prepare(held_out, split, 'all', data, tokenizer, folder, progress)
    else:
      pair = _prepare(source, 'train', f'{data.valid} {data.valid_fraction!r}', data, tokenizer, folder, progress)
      train.append(pair[0])
      valid.append(pair[1])
  if data.packing == 'pack':
    for store in train + valid:
      store.plan(data.length)
  return Stores(train, valid, tuple(source.weight for source in sources))


def _prepare(source, split, rule, data, tokenizer, stores, progress) -> list[Store]:
  """The stores of one source: [train, valid], or [all] where the rule is 'all'."""
  label = f'{source.source} {source.path}'.strip() + (f' ({split})' if split != 'train' else '')
  signature = sources_lib.signature(source, split)
  # The format is no part of the name: newer code must find, and read, what older code wrote.
  key = hashlib.sha256(json.dumps([signature, tokenizer.fingerprint, rule]).encode()).hexdigest()[:24]
  folder = stores / key
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise ConfigError(f'config.data.cache_dir: cannot make {folder}: {e.strerror}') from e
  names = ['all'] if rule == 'all' else ['train', 'valid']
  if not _complete(folder):
    with _lock(folder / 'lock', label):
      if not _complete(folder):
        _tokenise(source, split, rule, names, label, data, tokenizer, folder, progress)
        if sources_lib.signature(source, split) != signature:
          _clear(folder)
          raise ConfigError(f'config.data: {label} changed while it was being read; run again once it is complete')
  bad = _read_meta(folder)['bad']
  if bad > data.max_bad_records:
    raise ConfigError(f'config.data.max_bad_records: {label} has {bad} bad records (skipped when it was tokenised), '
                      f'got {data.max_bad_records}; set at least {bad}')
  found = [Store(folder, name) for name in names]
  for store in found:
    if not store.n_tokens:
      fix = {'all': 'give it text', 'hash': f"whole documents are held out: try data.valid='tail', or another "
             f'valid_fraction than {data.valid_fraction}', 'tail': 'change data.valid_fraction'}[rule.split()[0]]
      raise ConfigError(f'config.data.valid: no text of {label} is in the split {store.split!r}; {fix}')
  return found


def _tokenise(source, split, rule, names, label, data, tokenizer, folder, progress):
  """Reads, encodes and writes a store, from behind its last finished part."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  journal = folder / 'progress.json'
  if (folder / 'store.json').exists():
    print(f'warning: {folder}: a file is missing or has the wrong size; tokenising again', file=sys.stderr)
    _clear(folder)
  state = json.loads(journal.read_text()) if journal.exists() else {}
  if state.get('format') != FORMAT:
    cut = 0
    if rule.startswith('tail'):
      # The cut is exact by characters, so they are counted first. As nanoGPT: the first int(n * (1 - share)) train.
      count = sum(len(d.text) for d in sources_lib.documents(source, split, data.max_bad_records))
      cut = int(count * (1 - data.valid_fraction))
    state = dict(format=FORMAT, part=0, next=(0, 0), bad=0, chars=0, cut=cut, splits={})
  documents = sources_lib.documents(source, split, data.max_bad_records, tuple(state['next']))
  documents.bad = state['bad']
  with contextlib.ExitStack() as stack:
    writers = {n: stack.enter_context(_Writer(folder, n, dtype, tokenizer, state['splits'].get(n))) for n in names}
    bar = stack.enter_context(_Progress(documents, label, progress))
    state['splits'] = {n: w.state for n, w in writers.items()}
    bar.update(state, first=True)
    written = _written(state)[1]
    for pieces in _batches(documents, rule, data.valid_fraction, state):
      for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces])):
        writers[piece.split].add(ids, piece)
      state['next'], state['bad'], state['chars'] = pieces[-1].next, documents.bad, pieces[-1].chars
      bar.update(state)
      if _written(state)[1] - written >= PART_BYTES:
        written = _written(state)[1]
        for writer in writers.values():
          writer.flush()
        state['part'] += 1
        packing.replace(journal, json.dumps(state))
    for writer in writers.values():
      writer.flush()
  files = {p.name: p.stat().st_size for n in names for p in folder.glob(f'{n}.*') if 'pack' not in p.name}
  packing.replace(folder / 'store.json', json.dumps(dict(
      format=FORMAT, label=label, dtype=dtype.name, rule=rule, bad=documents.bad, splits=state['splits'], files=files,
      tokenizer=tokenizer.fingerprint), indent=1))
  journal.unlink(missing_ok=True)


def _written(state):
  """Documents and text bytes written so far."""
  return tuple(sum(s[k] for s in state['splits'].values()) for k in ('documents', 'bytes'))


_Piece = collections.namedtuple('_Piece', 'text name last split next chars')


def _batches(documents, rule, fraction, state):
  """Lists of _Pieces of about BATCH_CHARS; the last piece of a list is a place where reading can go on."""
  pieces, size, chars, cut = [], 0, state['chars'], state['cut']
  for d in documents:
    start, chars, last = chars, chars + len(d.text), not d.continues
    if not rule.startswith('tail'):
      split = 'all' if rule == 'all' else sources_lib.split_of(d.name, fraction)
      pieces.append(_Piece(d.text, d.name, last, split, d.next, chars))
    else:
      head, tail = d.text[:max(cut - start, 0)], d.text[max(cut - start, 0):]
      if start < cut:
        pieces.append(_Piece(head, d.name, last or chars >= cut, 'train', d.next, chars))
      if chars > cut or start >= cut:
        pieces.append(_Piece(tail, d.name, last, 'valid', d.next, chars))
    size += len(d.text)
    if size >= BATCH_CHARS or len(pieces) >= 1 << 14:
      yield pieces
      pieces, size = [], 0
  if pieces:
    yield pieces


class _Writer:
  """Appends documents to the three files of a split. `state` counts what was added; a resumed run cuts them to it."""

  def __init__(self, folder, split, dtype, tokenizer, state):
    self.dtype, self.vocab_size = dtype, tokenizer.vocab_size
    self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id if tokenizer.eos_id != tokenizer.bos_id else None
    self.state = state or dict(documents=0, tokens=0, bytes=0, names=0, open=False)
    sizes = dict(tokens=self.state['tokens'] * dtype.itemsize, documents=24 * (self.state['documents'] + 1),
                 names=self.state['names'])
    self.files = {}
    for kind, size in sizes.items():
      self.files[kind] = open(folder / f'{split}.{kind}', 'r+b' if state else 'wb', buffering=1 << 20)
      if state:
        self.files[kind].truncate(size)
        self.files[kind].seek(size)
    if not state:
      self.files['documents'].write(bytes(24))

  def add(self, ids, piece):
    s = self.state
    if not piece.text and not s['open']:
      return
    ids = np.asarray(ids, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
      raise ValueError(f'{piece.name}: ids {ids.min()} to {ids.max()} outside the vocabulary of {self.vocab_size}')
    first = [] if s['open'] or self.bos is None else [self.bos]
    last = [self.eos] if piece.last and self.eos is not None else []
    for part in (first, ids, last):
      s['tokens'] += self.files['tokens'].write(np.asarray(part, self.dtype)) // self.dtype.itemsize
    s['bytes'] += len(piece.text.encode('utf-8', 'surrogatepass'))
    s['open'] = not piece.last
    if piece.last:
      s['names'] += self.files['names'].write(piece.name.encode('utf-8', 'surrogatepass'))
      s['documents'] += 1
      self.files['documents'].write(np.array([s['tokens'], s['bytes'], s['names']], np.int64))

  def flush(self):
    for f in self.files.values():
      f.flush()
      os.fsync(f.fileno())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for f in self.files.values():
      f.close()


def _read_meta(folder):
  meta = json.loads((folder / 'store.json').read_text())
  if meta['format'] > FORMAT:
    raise ConfigError(f'{folder / "store.json"}: expected store format {FORMAT} or older, got {meta["format"]}; '
                      'update llm_jax, or set config.data.cache_dir elsewhere')
  return meta


def _complete(folder):
  """True where store.json is there and every file has the size it says."""
  if not (folder / 'store.json').exists():
    return False
  files = _read_meta(folder)['files']
  return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in files.items())


def _clear(folder):
  """Removes all but the lock. Files are unlinked, never cut, so that a process that has them mapped keeps its pages."""
  for path in [folder / 'store.json', *folder.glob('*.*')]:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path, what):
  """One process at a time; the system releases the lock of a process that dies."""
  with open(path, 'w') as f:
    for _ in range(20):                      # a second: what is worth no message
      with contextlib.suppress(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      time.sleep(0.05)
    else:
      print(f'waiting for another process that prepares {what}', file=sys.stderr)
      fcntl.flock(f, fcntl.LOCK_EX)
    yield


class _Progress:
  """documents/s, MB/s and the time left: a bar where stdout is a terminal, else a line every few seconds."""

  def __init__(self, documents, label, kind):
    self.documents, self.label, self.bar = documents, label, None
    self.kind = kind if kind != 'auto' else ('rich' if sys.stdout.isatty() else 'lines')

  def __enter__(self):
    self.start = self.printed = time.monotonic()
    if self.kind == 'rich':
      from rich import progress as rich_progress
      from rich import table
      rates = rich_progress.TextColumn('{task.fields[rates]}', table_column=table.Column(no_wrap=True, min_width=60))
      self.bar = rich_progress.Progress(rates, rich_progress.BarColumn(16), 'tokenising {task.description}')
      self.bar.start()
      self.task = self.bar.add_task(self.label, total=1.0, rates='')
    return self

  def update(self, state, first=False):
    """`first`: the state that an earlier, killed run left."""
    self.now = (*_written(state), self.documents.fraction)
    if first:
      self.before = self.now
    elif self.bar:
      self.bar.update(self.task, completed=self.now[2], rates=self._rates())
    elif self.kind == 'lines' and time.monotonic() - self.printed > 3:
      self.printed = time.monotonic()
      print(f'tokenising {self.label}: {self._rates()}', flush=True)

  def _rates(self):
    seconds = max(time.monotonic() - self.start, 1e-6)
    documents, size, share = (now - before for now, before in zip(self.now, self.before))
    text = (f'{self.now[0]:,} docs, {self.now[1] / 1e6:.1f} MB, {documents / seconds:,.0f} docs/s, '
            f'{size / 1e6 / seconds:.1f} MB/s')
    return text + (f', {self.now[2]:.0%}, ETA {(1 - self.now[2]) / share * seconds:.0f} s' if share else '')

  def __exit__(self, kind, *_):
    if self.bar:
      self.bar.stop()
    elif self.kind == 'lines' and kind is None:
      print(f'tokenised {self.label}: {self._rates()}, in {time.monotonic() - self.start:.1f} s', flush=True)
