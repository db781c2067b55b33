"""Where documents come from: text, jsonl, parquet, ArrayRecord, the Python standard library, TensorFlow Datasets.

`documents(source)` iterates over `Document`s in a fixed order. A long text file comes in pieces of about 1 MiB, so that
memory stays constant: all but the last have `continues=True`, and the reader joins them. `Document.next` says where
reading goes on after a piece: `documents(source, start=document.next)` restarts there without parsing what came before.
"""
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import pathlib
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator

from llm_jax import config as config_lib
from llm_jax.config import ConfigError, nearest

PIECE = 1 << 20        # bytes of a text file read at a time
LONGEST = 64 << 20     # bytes of one jsonl record; a longer line is a bad record, so that memory stays constant
EXACT = 64 << 20       # bytes in all up to which a signature hashes everything (0.1 s)
BATCH = 64             # ArrayRecords and parquet rows decoded at a time
NOT_TEXT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '_bundled', '__pycache__'}
SUFFIXES = {'jsonl': r'\.(jsonl|ndjson|json)(\.gz)?$', 'parquet': r'\.(parquet|pq)$',
            'arrayrecord': r'\.array_?record', 'text': r''}


@dataclasses.dataclass(frozen=True)
class Document:
  """A document, or a piece of one."""
  text: str
  name: str                  # file name relative to the path given, and ':byte' or ':record' where a file holds many
  next: tuple[int, int]      # where reading goes on after it, for documents(start=): file, and byte or record in it
  continues: bool = False    # the next piece belongs to the same document


@dataclasses.dataclass(frozen=True)
class File:
  path: pathlib.Path
  name: str
  first: int = 0             # records of a tfds split: [first, first + count)
  count: int = -1            # -1: all


class Documents:
  """One pass over the documents of a source. `bad` is how many records it has skipped, `fraction` how far it is."""

  def __init__(self, source: config_lib.Source, split: str, max_bad_records: int, start: tuple[int, int]):
    self.source, self.max_bad_records, self.bad = source, max_bad_records, 0
    self.files = files(source, split)
    self._sizes = [f.path.stat().st_size for f in self.files]
    self._start, self._at, self._within = tuple(start), start[0], 0.0

  def __iter__(self) -> Iterator[Document]:
    read = {'text': _text, 'stdlib': _text, 'jsonl': _jsonl, 'parquet': _parquet}.get(self.source.source, _arrayrecord)
    for i, file in enumerate(self.files):
      if i >= self._start[0]:
        self._at, self._within = i, 0.0
        yield from read(self, i, file, self._start[1] if i == self._start[0] else 0)
    self._at, self._within = len(self.files), 0.0

  @property
  def fraction(self) -> float:
    """Share of the bytes on disk read so far, for a progress bar."""
    done = sum(self._sizes[:self._at]) + (self._within * self._sizes[self._at] if self._at < len(self._sizes) else 0)
    return done / max(1, sum(self._sizes))

  def reached(self, share: float) -> None:
    """Notes how far the current file is read."""
    self._within = min(1.0, share)

  def skip(self, message: str) -> None:
    """Counts and warns of a bad record, or raises ConfigError where that makes more than max_bad_records."""
    self.bad += 1
    if self.bad > self.max_bad_records:
      raise ConfigError(f'{message}; config.data.max_bad_records={self.max_bad_records} skips no more of these')
    warnings.warn(f'skipped bad record {self.bad} of at most {self.max_bad_records}: {message}', stacklevel=2)


def documents(source: config_lib.Source, split: str = 'train', max_bad_records: int = 0,
              start: tuple[int, int] = (0, 0)) -> Documents:
  """The non-empty documents of a source, in a fixed order, from `start` (a Document.next). `split` is for tfds only.

  Bad UTF-8, corrupt JSON, gzip, parquet or ArrayRecord, and records without a text at source.field raise ConfigError
  with file and position, or are skipped, counted and warned of up to max_bad_records; in a text file, bad bytes only.
  """
  return Documents(source, split, max_bad_records, start)


def split_of(name: str, fraction: float) -> str:
  """'valid' for about `fraction` of all names, else 'train': a hash of the name only, not of order or machine."""
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return 'valid' if int.from_bytes(digest[:8], 'big') < fraction * 2**64 else 'train'


def signature(source: config_lib.Source, split: str = 'train') -> str:
  """Hex key of the text a source gives, for telling whether something made from it is stale.

  Up to 64 MB in all it hashes every byte, so a copy or a fresh checkout (new times) keeps its key and no edit escapes.
  Above, hashing would cost minutes: size, modification time and the first and last 64 KiB of each file stand in.
  """
  found = files(source, split)
  exact = sum(f.path.stat().st_size for f in found) <= EXACT
  key = hashlib.sha256(json.dumps([source.source, source.field, exact]).encode())
  for f in found:
    stat = f.path.stat()
    key.update(json.dumps([f.name, f.first, f.count, stat.st_size, None if exact else stat.st_mtime_ns]).encode())
    with open(f.path, 'rb') as data:
      key.update(data.read(EXACT if exact else 1 << 16))
      if not exact:
        data.seek(max(0, stat.st_size - (1 << 16)))
        key.update(data.read())
  return key.hexdigest()


def files(source: config_lib.Source, split: str = 'train') -> list[File]:
  """The files of a source, sorted by name. Raises ConfigError where there are none."""
  if source.source == 'stdlib':
    return _under(pathlib.Path(sysconfig.get_paths()['stdlib']), r'\.py$')
  if source.source == 'tfds':
    from llm_jax.data import tfds
    return tfds.files(source.path, split)
  path = pathlib.Path(source.path).expanduser()
  if path.is_dir():
    return _under(path, SUFFIXES[source.source])
  if path.is_file():
    return [File(path, path.name)]
  found = sorted(p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file())
  if not found:
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if 0 < len(beside) < 100 else ''
    raise ConfigError(f'config.data.path: no file, folder or glob {source.path!r}{hint}')
  root = pathlib.Path(os.path.commonpath([p.parent for p in found]))
  return [File(p, p.relative_to(root).as_posix()) for p in found]


def _under(root, suffix):
  """Files below a folder, but hidden ones and those of the standard library that are tests or other people's code."""
  left_out = NOT_TEXT if suffix == r'\.py$' else set()
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [d for d in folders if d not in left_out and not d.startswith('.')]
    found += [pathlib.Path(folder, n) for n in names if re.search(suffix, n) and not n.startswith('.')]
  if not found:
    raise ConfigError(f'config.data.path: no file whose name has {suffix!r} in folder {str(root)!r}')
  return sorted((File(p, p.relative_to(root).as_posix()) for p in found), key=lambda f: f.name)


def _open(path):
  return gzip.open(path, 'rb') if path.suffix == '.gz' else open(path, 'rb')


def _share(f, size):
  """How much of an open file is read; for gzip by its compressed bytes."""
  return (f.fileobj if isinstance(f, gzip.GzipFile) else f).tell() / max(1, size)


def _text(run, i, file, offset):
  size = file.path.stat().st_size
  with _open(file.path) as f:
    rest, last = b'', False
    try:
      f.seek(offset)
      while not last:
        data = rest + f.read(PIECE - len(rest))     # so that pieces depend on the offset alone, as restarts must
        last = not f.peek(1)
        cut = len(data) if last else data.rfind(b'\n') + 1 or _whole_characters(data)
        piece, rest = data[:cut], data[cut:]
        text = _decode(run, piece, file.path, offset)
        offset += cut
        run.reached(_share(f, size))
        if piece:
          yield Document(text, file.name, (i + 1, 0) if last else (i, offset), continues=not last)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
      run.skip(f'{file.path}: corrupt gzip after byte {offset} of its text ({e})')
      if offset:
        yield Document('', file.name, (i + 1, 0))     # ends the document begun


def _whole_characters(data):
  """Length of data without a UTF-8 character that its end cuts in two."""
  for n in range(1, min(4, len(data)) + 1):
    if data[-n] >= 0xC0:
      return len(data) - n
    if data[-n] < 0x80:
      break
  return len(data)


def _decode(run, data, path, offset):
  """UTF-8 to text; each run of invalid bytes is one bad record, and left out."""
  parts = []
  while data:
    try:
      return ''.join([*parts, data.decode()])
    except UnicodeDecodeError as e:
      run.skip(f'{path}: expected UTF-8, got {data[e.start:e.end]!r} at byte {offset + e.start}')
      parts.append(data[:e.start].decode())
      data, offset = data[e.end:], offset + e.end
  return ''.join(parts)


def _jsonl(run, i, file, offset):
  size = file.path.stat().st_size
  with _open(file.path) as f:
    try:
      f.seek(offset)
      while line := f.readline(LONGEST):
        start, offset = offset, offset + len(line)
        if len(line) == LONGEST and not line.endswith(b'\n'):
          while line := f.readline(LONGEST):
            offset += len(line)
            if line.endswith(b'\n'):
              break
          run.skip(f'{file.path}: a record of over {LONGEST >> 20} MiB at byte {start}')
          continue
        run.reached(_share(f, size))
        yield from _record(run, line.strip(b' \t\r\n'), 'json', file, start, (i, offset), 'byte')
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
      run.skip(f'{file.path}: corrupt gzip after byte {offset} of its text ({e})')


def _record(run, record, kind, file, at, after, unit):
  """The Document in one raw record, or none where it is empty or bad."""
  if not record:
    return
  try:
    text = _field_of(record, kind, run.source.field)
  except (ValueError, UnicodeError) as e:
    run.skip(f'{file.path}: {unit} {at}: {e}')
    return
  if text:
    yield Document(text, f'{file.name}:{at}', after)


def _field_of(record, kind, field):
  """Text of one record's bytes. Raises ValueError, in words, where there is none."""
  if kind == 'text':
    return _utf8(record)
  if kind == 'json':
    try:
      values = json.loads(_utf8(record).removeprefix('\ufeff'))
    except (json.JSONDecodeError, RecursionError) as e:
      raise ValueError(f'expected JSON, got {record[:40]!r} ({e})') from e
  else:
    values = _example(record)
  if not isinstance(values, dict):
    raise ValueError(f'expected a JSON object with {field!r}, got {type(values).__name__}')
  if field not in values:
    raise ValueError(f'config.data.field: no field {field!r}{nearest(field, list(values)[:20])}')
  value = values[field]
  if isinstance(value, bytes):
    return _utf8(value)
  if not isinstance(value, str):
    raise ValueError(f'config.data.field: expected text at {field!r}, got {type(value).__name__}')
  if re.search('[\ud800-\udfff]', value):
    raise ValueError(f'{field!r} has half of a surrogate pair')
  return value


def _utf8(data):
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise ValueError(f'expected UTF-8, got {data[e.start:e.end]!r} {e.start} bytes on') from e


def _parquet(run, i, file, row):
  import pyarrow
  import pyarrow.parquet
  field = run.source.field
  try:
    table = pyarrow.parquet.ParquetFile(file.path)
    names = table.schema_arrow.names
  except (pyarrow.ArrowException, OSError) as e:
    run.skip(f'{file.path}: expected a parquet file ({e})')
    return
  if field not in names:
    raise ConfigError(f'config.data.field: no column {field!r} in {file.path}{nearest(field, names)}')
  first = 0
  for group in range(table.num_row_groups):
    rows = table.metadata.row_group(group).num_rows
    if first + rows > row:
      yield from _row_group(run, i, file, table, group, first, row)
    first += rows
    run.reached(first / max(1, table.metadata.num_rows))


def _row_group(run, i, file, table, group, at, row):
  """Rows of one row group from `row` of the file on; `at` is the group's first."""
  import pyarrow
  kind = table.schema_arrow.field(run.source.field).type
  if pyarrow.types.is_dictionary(kind):
    kind = kind.value_type
  if str(kind) not in ('string', 'large_string', 'binary', 'large_binary'):
    raise ConfigError(f'config.data.field: expected text in column {run.source.field!r} of {file.path}, got {kind}')
  try:
    for batch in table.iter_batches(BATCH, row_groups=[group], columns=[run.source.field]):
      for value in batch.column(0).cast(kind).cast(pyarrow.large_binary()).to_pylist():
        at += 1
        if at > row and value is None:
          run.skip(f'{file.path}: row {at - 1}: no text at {run.source.field!r}')
        elif at > row:
          yield from _record(run, value, 'text', file, at - 1, (i, at), 'row')
  except (pyarrow.ArrowException, OSError) as e:
    run.skip(f'{file.path}: corrupt after row {at} ({e}); the rest of row group {group}')


def _arrayrecord(run, i, file, record):
  from array_record.python import array_record_module
  try:
    reader = array_record_module.ArrayRecordReader(str(file.path))
    sound, total = reader.ok(), reader.num_records()
  except (RuntimeError, ValueError, IndexError) as e:
    run.skip(f'{file.path}: expected an ArrayRecord file ({e})')
    return
  if not sound or (total == 0 and file.path.stat().st_size > (1 << 16)):    # a broken index reads as no records
    run.skip(f'{file.path}: expected an ArrayRecord file, got one whose index is missing or corrupt')
    return
  end = total if file.count < 0 else file.first + file.count
  kind = ''
  for at in range(max(record, file.first), end, BATCH):
    for n, data in enumerate(_read(run, reader, file, at, min(at + BATCH, end)), at):
      if data is not None:
        kind = kind or _kind(data, run.source.field)
        yield from _record(run, data, kind, file, n, (i, n + 1), 'record')
    run.reached(at / end)


def _read(run, reader, file, first, last):
  """Records [first, last); None for those that cannot be read."""
  try:
    return reader.read(list(range(first, last)))
  except (RuntimeError, IndexError):
    pass
  found = []
  for n in range(first, last):
    try:
      found += reader.read([n])
    except (RuntimeError, IndexError) as e:
      run.skip(f'{file.path}: record {n} is corrupt ({e})')
      found.append(None)
  return found


def _kind(record, field):
  """What a file's first record is: 'example' (tf.train.Example, as tfds writes), 'json' (an object) or raw 'text'."""
  if not field:
    return 'text'
  if record.startswith(b'\n'):     # the tag of Example's one field; text that begins with a newline fails to parse
    try:
      if _example(record):
        return 'example'
    except ValueError:
      pass
  return 'json' if record.lstrip()[:1] == b'{' else 'text'


def _example(record):
  """{feature: bytes | other} of a serialised tf.train.Example, by the protocol buffers tfds ships."""
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_generated_pb2
  try:
    features = tf_example_generated_pb2.Example.FromString(record).features.feature
  except DecodeError as e:
    raise ValueError(f'expected a tf.train.Example ({e})') from e
  values = {name: list(getattr(f, f.WhichOneof('kind') or 'bytes_list').value) for name, f in features.items()}
  return {name: v[0] if len(v) == 1 else v for name, v in values.items()}
