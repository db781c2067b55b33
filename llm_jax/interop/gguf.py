"""GGUF files, llama.cpp's format for a model's fields and (quantised) weights: versions 2 and 3, little-endian.

Source: ggml's docs/gguf.md. The header is parsed here and nothing in it is believed before it is checked against the
size of the file, so that a damaged or hostile file costs a ConfigError, not memory. How a kind packs its values into
blocks is llama.cpp's `gguf` package's to know.
"""
import dataclasses
import itertools
import math
import pathlib
import struct
import typing

import ml_dtypes
import numpy as np

from llm_jax.config import ConfigError

READABLE = ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K')
WRITABLE = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')
ALIGNMENT = 32                # bytes; of every file that is written, and of those read that do not say

MOST_TENSORS = MOST_FIELDS = 1 << 16
MOST_VALUES = 1 << 22         # in all lists of a header together; the largest vocabularies take about 1,000,000
MOST_BYTES = 1 << 26          # of a header; those of the largest vocabularies take about 16 MB
LONGEST_KEY, LONGEST_NAME = (1 << 16) - 1, 256
LONGEST_WRITTEN = 63          # llama.cpp refuses longer names of tensors
PIECE = 1 << 18               # values converted at a time: 1 MB as float32, and some times that while it happens
DAMAGED = 'the file is truncated or damaged, download it again'

_PLAIN = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
# The largest magnitude whose scale still is a float16.
_LARGEST = {'F16': 65504., 'Q8_0': 65504. * 127, 'Q4_0': 65504. * 8}
_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies. shape: as numpy orders it, so a linear weight is [out, in]; offset, nbytes: in the file."""
  name: str
  shape: tuple[int, ...]
  kind: str
  offset: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class File:
  """A file's header. fields: each a bool, int, float, str or a list of one of these."""
  path: pathlib.Path
  fields: dict[str, object]
  tensors: dict[str, Tensor]

  def array(self, name: str) -> np.ndarray:
    """Reads one tensor: float32 of F32 and of every quantised kind, float16 of F16, bfloat16 of BF16. Takes some MB of
    memory beyond the result. ConfigError where there is no such tensor or the file has shrunk since."""
    if name not in self.tensors:
      raise ConfigError(f'{self.path}: expected a tensor {name!r}, it has none of that name')
    tensor = self.tensors[name]
    result = np.empty(tensor.shape, _PLAIN.get(tensor.kind, np.float32))
    flat = result.reshape(-1)
    with self.path.open('rb') as f:
      f.seek(tensor.offset)
      if tensor.kind in _PLAIN:
        self._fill(f, flat.view(np.uint8))
        return result
      from gguf.quants import dequantize
      ggml, block, size = _layout(tensor.kind)
      for start in range(0, flat.size, PIECE):
        piece = flat[start:start + PIECE]
        raw = np.empty(piece.size // block * size, np.uint8)
        self._fill(f, raw)
        piece[:] = dequantize(raw, ggml)
    return result

  def _fill(self, f, data):
    if f.readinto(data) != data.size:
      raise ConfigError(f'{self.path}: the file is shorter than when its header was read; read it again')


def read(path) -> File:
  """Parses the header only, in time and memory that the file's size bounds. Strings that are not UTF-8 keep their bytes
  as surrogates (errors='surrogateescape'), so that tokens that are bytes stay distinct and can be written back.
  ConfigError for what is not a whole GGUF file of readable kinds."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f'{path}: expected a GGUF file, got {"a folder" if path.is_dir() else "no file"}; check the path')
  try:
    with path.open('rb', buffering=1 << 18) as f:
      return _Header(path, f).parse()
  except OSError as e:
    raise ConfigError(f'{path}: expected a readable file, got {e.strerror}; check disk and permissions') from e


class _Header:
  """Takes the parts of a header in turn."""

  def __init__(self, path, f):
    self.path, self.f, self.size, self.values = path, f, path.stat().st_size, 0
    self.left = min(self.size, MOST_BYTES)

  def parse(self) -> File:
    if (magic := self.take(min(4, self.left))) != b'GGUF':
      self.fail("a GGUF file, which begins with b'GGUF'", repr(magic), 'check the path')
    version = self.number('I')
    if version and not version & 0xffff:
      self.fail('a little-endian file', 'a big-endian one')
    if version not in (2, 3):
      self.fail('GGUF version 2 or 3', version)
    tensors, fields = self.number('Q'), self.number('Q')
    self.hold(tensors, MOST_TENSORS, 'tensors', 32)      # the length of a name, n_dims, a dimension, a type, an offset
    self.hold(fields, MOST_FIELDS, 'fields', 13)         # the length of a key, a type, a byte
    found = {}
    for _ in range(fields):
      key = self.string(LONGEST_KEY, 'a key')
      if key in found:
        self.fail('each field once', f'{key!r:.80} twice')
      found[key] = self.value(f'in field {key!r:.80}')
    align = found.get('general.alignment', ALIGNMENT)
    if type(align) is not int or not 1 <= align <= 1 << 16 or align & (align - 1):
      self.fail('a power of two from 1 to 65536 as general.alignment', f'{align!r:.80}')
    entries = [self.tensor() for _ in range(tensors)]
    start = self.f.tell()
    return File(self.path, found, self.place(entries, start + -start % align, align))

  def fail(self, expected, got, do='convert the model again with a current llama.cpp') -> typing.NoReturn:
    raise ConfigError(f'{self.path}: expected {expected}, got {got}; {do}')

  def ends(self, what) -> typing.NoReturn:
    if self.size > MOST_BYTES:
      self.fail(f'a header of at most {MOST_BYTES} bytes', f'one that goes on with {what}', DAMAGED)
    self.fail(what, f'the end of the file, which has {self.size} bytes', DAMAGED)

  def take(self, count: int) -> bytes:
    data = self.f.read(count) if count <= self.left else b''
    if len(data) != count:
      self.ends(f'{count} more bytes of header')
    self.left -= count
    return data

  def number(self, code):
    return struct.unpack('<' + code, self.take(struct.calcsize('<' + code)))[0]

  def hold(self, count, most, what, least):
    """Refuses a count that is over the limit, or that the rest of the file cannot hold at `least` bytes for each."""
    if count * least > self.left:
      self.ends(f'{count} {what}')
    if count > most:
      self.fail(f'at most {most} {what}', count)

  def string(self, longest, what) -> str:
    length = self.number('Q')
    if length > self.left:
      self.ends(f'{what} of {length} bytes')
    if length > longest:
      self.fail(f'{what} of at most {longest} bytes', length)
    return self.take(length).decode('utf-8', 'surrogateescape')

  def value(self, where):
    if (kind := self.number('I')) != _ARRAY:
      return self.string(MOST_BYTES, f'a string {where}') if kind == _STRING else self.numbers(where, kind, 1)[0]
    kind, count = self.number('I'), self.number('Q')
    if kind == _ARRAY:
      self.fail(f'a list of numbers or strings {where}', 'one of lists')
    least = 8 if kind == _STRING else self.dtype(where, kind).itemsize
    self.hold(count, MOST_VALUES - self.values, f'values {where}', least)
    self.values += count
    return self.strings(where, count) if kind == _STRING else self.numbers(where, kind, count)

  def dtype(self, where, kind) -> np.dtype:
    if kind not in _NUMBERS:
      self.fail(f'a value type from 0 to 12 {where}', kind, DAMAGED)
    return np.dtype('<' + _NUMBERS[kind])

  def numbers(self, where, kind, count) -> list:
    dtype = self.dtype(where, kind)
    data = self.take(count * dtype.itemsize)
    if _NUMBERS[kind] == '?' and max(data, default=0) > 1:
      self.fail(f'bools of 0 or 1 {where}', max(data), DAMAGED)
    return np.frombuffer(data, dtype).tolist()

  def strings(self, where, count) -> list[str]:
    # Without string() and take(), which double the time that a vocabulary takes.
    read, unpack, left, found = self.f.read, struct.Struct('<Q').unpack, self.left, []
    for i in range(count):
      if left < 8:
        self.ends(f'{count} strings {where}')
      length, = unpack(read(8))
      left -= 8 + length
      if left < 0:
        self.ends(f'string {i} {where}, of {length} bytes')
      found.append(read(length).decode('utf-8', 'surrogateescape'))
    self.left = left
    return found

  def tensor(self) -> Tensor:
    """One tensor's entry; offset: from where the data starts."""
    name = self.string(LONGEST_NAME, 'the name of a tensor')
    where = f'for tensor {name!r:.80}'
    if not 1 <= (rank := self.number('I')) <= 4:
      self.fail(f'1 to 4 dimensions {where}', rank, DAMAGED)
    shape = struct.unpack(f'<{rank}Q', self.take(8 * rank))[::-1]
    kind, offset = _name(self.number('I')), self.number('Q')
    if not 0 < math.prod(shape) < 1 << 63:
      self.fail(f'1 to 2**63 - 1 values {where}', f'shape {list(shape)}', DAMAGED)
    if kind not in READABLE:
      self.fail(f'one of {", ".join(READABLE)} {where}', kind, 'requantise the model to one of these (llama-quantize)')
    _, block, size = _layout(kind)
    if shape[-1] % block:
      self.fail(f'rows of a multiple of {block} values {where}, {kind}', shape[-1])
    return Tensor(name, shape, kind, offset, math.prod(shape) // block * size)

  def place(self, entries, start, align) -> dict[str, Tensor]:
    """By name, with offsets from the start of the file: aligned, within it and apart."""
    found = {}
    for t in entries:
      if t.name in found:
        self.fail('each tensor once', f'{t.name!r:.80} twice')
      if t.offset % align:
        self.fail(f'an offset that is a multiple of {align} for tensor {t.name!r:.80}', t.offset)
      found[t.name] = t = dataclasses.replace(t, offset=start + t.offset)
      if t.offset + t.nbytes > self.size:
        self.fail(f'{t.offset + t.nbytes} bytes of file for tensor {t.name!r:.80}', self.size, DAMAGED)
    for t, after in itertools.pairwise(sorted(found.values(), key=lambda t: t.offset)):
      if after.offset < t.offset + t.nbytes:
        self.fail('tensors that lie apart', f'{after.name!r:.80} over {t.name!r:.80}', DAMAGED)
    return found


def write(path, fields: dict[str, object], tensors: dict[str, tuple[tuple[int, ...], str]],
          array: typing.Callable[[str], np.ndarray]) -> None:
  """Writes version 3: whole, by rename, or not at all. array(name) is asked for one tensor at a time, in order, and is
  cast or quantised to its kind, some MB at a time.

  fields: a bool, int, float (FLOAT32), str, or a non-empty list of one of these (ints: INT32); general.alignment is set
  to 32, whatever was there. tensors: shape and kind of each. ConfigError for what a file, a kind or llama.cpp cannot
  hold; ValueError for an array of another shape than was said."""
  path = pathlib.Path(path)
  head = _head(path, {**fields, 'general.alignment': ALIGNMENT}, tensors)
  part = path.with_name(path.name + '.part')
  try:
    with part.open('wb') as f:
      f.write(head + bytes(-len(head) % ALIGNMENT))
      for name, (shape, kind) in tensors.items():
        values = np.asarray(array(name))
        if values.shape != tuple(shape):
          raise ValueError(f'tensor {name!r}: expected shape {list(shape)}, got {list(values.shape)}')
        _write_values(path, f, name, kind, values)
        f.write(bytes(-f.tell() % ALIGNMENT))
        del values                                       # before the next one is made
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def _write_values(path, f, name, kind, values):
  from gguf.quants import quantize
  rows = values.reshape(-1, values.shape[-1])
  step = max(1, PIECE // rows.shape[1])
  for start in range(0, len(rows), step):
    piece = np.asarray(rows[start:start + step], np.float32).reshape(-1)
    if kind in _LARGEST and not (largest := np.abs(piece).max()) <= _LARGEST[kind]:
      raise ConfigError(f'{path}: expected finite values up to {_LARGEST[kind]:.0f} for tensor {name!r}, {kind}, got '
                        f'{largest}; write it as F32 or BF16')
    if kind not in _PLAIN:
      with np.errstate(over='ignore', invalid='ignore'):  # the inverse of a scale near 0
        piece = quantize(piece, _layout(kind)[0])
    f.write(piece.astype(_PLAIN.get(kind, np.uint8), copy=False).view(np.uint8))


def _head(path, fields, tensors) -> bytes:
  head, offset = [b'GGUF', struct.pack('<IQQ', 3, len(tensors), len(fields))], 0
  for key, value in fields.items():
    try:
      head += [_packed(key), _field(value)]
    except (ValueError, KeyError, OverflowError, struct.error) as e:
      raise ConfigError(f'{path}: expected a bool, int (64 bits), float (32 bits), str or non-empty list of one of '
                        f'these (ints of 32 bits) as field {key!r:.80}, got {value!r:.80}; leave it out') from e
  for name, (shape, kind) in tensors.items():
    if kind not in WRITABLE:
      raise ConfigError(f'{path}: expected one of {", ".join(WRITABLE)} for tensor {name!r}, got {kind}; choose one')
    ggml, block, size = _layout(kind)
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
      raise ConfigError(f'{path}: expected 1 to 4 dimensions, none of them 0, for tensor {name!r}, got {list(shape)}; '
                        'reshape it or leave it out')
    if shape[-1] % block:
      raise ConfigError(f'{path}: expected rows of a multiple of {block} values for tensor {name!r}, {kind}, got '
                        f'{shape[-1]}; choose F32, F16 or BF16 for it')
    if (length := len(_packed(name)) - 8) > LONGEST_WRITTEN:
      raise ConfigError(f'{path}: expected a name of at most {LONGEST_WRITTEN} bytes, all that llama.cpp reads, for '
                        f'tensor {name!r}, got {length}; rename it')
    head += [_packed(name), struct.pack(f'<I{len(shape)}QIQ', len(shape), *reversed(shape), ggml, offset)]
    offset += math.prod(shape) // block * size
    offset += -offset % ALIGNMENT
  return b''.join(head)


def _field(value) -> bytes:
  """A value's type and bytes. Raises ValueError, KeyError, OverflowError or struct.error for one that has none."""
  values = value if type(value) is list else [value]
  kind, = {type(v) for v in values}
  if kind is str:
    number, data = _STRING, b''.join(map(_packed, values))
  else:
    code = {bool: '?', int: 'i', float: 'f'}[kind]
    if type(value) is int:
      code = 'I' if 0 <= value < 1 << 32 else 'Q' if value > 0 else 'i' if value >= -1 << 31 else 'q'
    number, data = {c: n for n, c in _NUMBERS.items()}[code], struct.pack(f'<{len(values)}{code}', *values)
  return (struct.pack('<IIQ', _ARRAY, number, len(values)) if values is value else struct.pack('<I', number)) + data


def _packed(text: str) -> bytes:
  data = text.encode('utf-8', 'surrogateescape')
  return struct.pack('<Q', len(data)) + data


def _layout(kind):
  """ggml's type of a kind, the values of one of its blocks and the bytes these take."""
  from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
  ggml = GGMLQuantizationType[kind]
  return ggml, *GGML_QUANT_SIZES[ggml]


def _name(number: int) -> str:
  from gguf.constants import GGMLQuantizationType
  try:
    return GGMLQuantizationType(number).name
  except ValueError:
    return f'type {number}'
