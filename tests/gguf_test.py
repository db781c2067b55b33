"""GGUF files round-trip, agree with llama.cpp's own package, and cost a ConfigError at worst where they are hostile."""
import datetime
import struct
import time
import tracemalloc

import gguf as official
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jax.config import ConfigError
from llm_jax.interop import gguf

F32, F16, Q4_0, Q8_0, IQ4_XS, Q4_K = 0, 1, 2, 8, 23, 12
U8, U32, F32_FIELD, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'Q8_0': np.float32, 'Q4_0': np.float32}
SCALES = {'Q2_K': [80, 82], 'Q3_K': [108], 'Q4_K': [0, 2], 'Q5_K': [0, 2], 'Q6_K': [208]}    # bytes into a block
FUZZ = dict(deadline=datetime.timedelta(seconds=5), suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(value):
  data = value if isinstance(value, bytes) else value.encode()
  return struct.pack('<Q', len(data)) + data


def field(key, kind, payload):
  return text(key) + struct.pack('<I', kind) + payload


def array_field(key, kind, count, payload=b''):
  return field(key, ARRAY, struct.pack('<IQ', kind, count) + payload)


def entry(name='t', dims=(32,), kind=F32, offset=0):
  return text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def built(fields=(), tensors=(), counts=None, version=3, magic=b'GGUF', data=1 << 12):
  """A file by hand; counts: what it says of its tensors and fields; data: zeros behind the header."""
  said = counts or (len(tensors), len(fields))
  head = magic + struct.pack('<IQQ', version, *said) + b''.join(fields) + b''.join(tensors)
  return head + bytes(-len(head) % 32 + data)


def saved(tmp_path, content):
  (tmp_path / 'x.gguf').write_bytes(content)
  return tmp_path / 'x.gguf'


def raw_blocks(kind, blocks, seed=0):
  """Bytes of `blocks` blocks of a kind, with finite scales."""
  rng, ggml = np.random.default_rng(seed), official.GGMLQuantizationType[kind]
  block, size = official.GGML_QUANT_SIZES[ggml]
  if kind not in SCALES:
    return quantize(rng.normal(size=blocks * block).astype(np.float32), ggml).view(np.uint8).reshape(-1)
  raw = rng.integers(0, 256, (blocks, size), np.uint8)
  for at in SCALES[kind]:
    raw[:, at:at + 2] = rng.normal(size=(blocks, 1)).astype(np.float16).view(np.uint8)
  return raw.reshape(-1)


# Round trips.

names = st.text(max_size=15)
integers = st.integers(-2**63, 2**64 - 1)
values = st.one_of(st.booleans(), integers, st.floats(width=32, allow_nan=False), st.text(), *(
    st.lists(s, min_size=1, max_size=5)
    for s in (st.booleans(), st.integers(-2**31, 2**31 - 1), st.floats(width=32, allow_nan=False), st.text())))
shapes = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 3)).map(lambda t: (*t[0], 32 * t[1]))


@settings(max_examples=60, **FUZZ)
@given(fields=st.dictionaries(st.text(), values, max_size=6),
       tensors=st.dictionaries(names, st.tuples(shapes, st.sampled_from(gguf.WRITABLE)), max_size=5),
       seed=st.integers(0, 99))
def test_what_is_written_is_read(tmp_path, fields, tensors, seed):
  """Fields with their types, tensors in their order; floating kinds to their rounding, quantised ones to half of a
  step and what rounding the scale to float16 adds (a whole step in Q4_0, whose range is not symmetric)."""
  fields.pop('general.alignment', None)
  rng = np.random.default_rng(seed)
  arrays = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in tensors.items()}
  path = tmp_path / 'x.gguf'
  gguf.write(path, fields, tensors, arrays.__getitem__)
  file = gguf.read(path)
  assert file.fields == fields | {'general.alignment': 32} and file.path == path
  assert [repr(file.fields[k]) for k in fields] == [repr(v) for v in fields.values()]     # True is not 1 is not 1.0
  assert list(file.tensors) == list(tensors)
  for name, (shape, kind) in tensors.items():
    got, expected = file.array(name), arrays[name]
    assert (file.tensors[name].shape, file.tensors[name].kind) == (shape, kind)
    assert got.dtype == DTYPES[kind] and got.shape == shape and file.tensors[name].offset % 32 == 0
    if kind in ('Q8_0', 'Q4_0'):
      largest = np.abs(expected.reshape(-1, 32)).max(1, keepdims=True)
      step = largest * {'Q8_0': 0.57 / 127, 'Q4_0': 1.01 / 8}[kind]
      assert (np.abs(got - expected).reshape(-1, 32) <= step).all()
    else:
      np.testing.assert_array_equal(got, expected.astype(DTYPES[kind]))


def test_tokens_that_are_bytes_survive(tmp_path):
  raw = [b'\xff\xfe', b'\xff', 'é'.encode(), b'\xc3']
  tokens = gguf.read(saved(tmp_path, built([array_field('t', STRING, 4, b''.join(map(text, raw)))]))).fields['t']
  assert [t.encode('utf-8', 'surrogateescape') for t in tokens] == raw
  gguf.write(tmp_path / 'y.gguf', {'t': tokens}, {}, None)
  assert gguf.read(tmp_path / 'y.gguf').fields['t'] == tokens


@pytest.mark.parametrize('version', [2, 3])
def test_every_type_of_field(tmp_path, version):
  numbers = dict(B=200, b=-3, H=60000, h=-300, I=1 << 31, i=-5, f=0.5, Q=1 << 63, q=-1 << 62, d=0.1)
  kinds = dict(zip('BbHhIifQqd', (0, 1, 2, 3, 4, 5, 6, 10, 11, 12)))
  fields = [field(c, kinds[c], struct.pack('<' + c, v)) for c, v in numbers.items()]
  fields += [array_field(c * 2, kinds[c], 2, struct.pack(f'<2{c}', v, v)) for c, v in numbers.items()]
  fields += [array_field('none', STRING, 0), array_field('no', BOOL, 0), array_field('bools', BOOL, 2, b'\0\1')]
  got = gguf.read(saved(tmp_path, built(fields, version=version))).fields
  assert got == numbers | {c * 2: [v, v] for c, v in numbers.items()} | dict(none=[], no=[], bools=[False, True])
  assert got['bools'][1] is True and type(got['f']) is float and type(got['B']) is int


def test_another_alignment_is_read_and_replaced(tmp_path):
  head = built([field('general.alignment', U32, struct.pack('<I', 256))], [entry()], data=0)
  values = np.arange(32, dtype=np.float32)
  path = saved(tmp_path, head + bytes(-len(head) % 256) + values.tobytes())
  file = gguf.read(path)
  np.testing.assert_array_equal(file.array('t'), values)
  gguf.write(path, file.fields, {'t': ((32,), 'F32')}, file.array)               # onto itself
  assert gguf.read(path).fields == {'general.alignment': 32}
  np.testing.assert_array_equal(gguf.read(path).array('t'), values)


# Dequantising.

@pytest.mark.parametrize('kind', gguf.READABLE)
def test_pieces_equal_the_whole(tmp_path, kind, monkeypatch):
  """In pieces that end inside rows, bit for bit what llama.cpp's package makes of all bytes at once."""
  monkeypatch.setattr(gguf, 'PIECE', 512)
  ggml = official.GGMLQuantizationType[kind]
  block = official.GGML_QUANT_SIZES[ggml][0]
  raw = raw_blocks(kind, 3 * 768 // block)
  file = gguf.read(saved(tmp_path, built(tensors=[entry(dims=(768, 3), kind=ggml)], data=0) + raw.tobytes()))
  got, expected = file.array('t'), dequantize(raw, ggml).reshape(3, 768)
  assert got.dtype == DTYPES.get(kind, np.float32) and np.isfinite(expected).all() and expected.std() > 0.1
  np.testing.assert_array_equal(got.astype(np.float32), expected)


def by_hand(kind, raw):
  """Straight from ggml-quants.c."""
  out = []
  for b in raw.reshape(-1, {'Q4_0': 18, 'Q4_1': 20, 'Q8_0': 34}[kind]).tolist():
    d, = struct.unpack('<e', bytes(b[:2]))
    if kind == 'Q8_0':
      out += [d * (q - 256 if q > 127 else q) for q in b[2:]]
    elif kind == 'Q4_0':
      out += [d * ((q & 15) - 8) for q in b[2:]] + [d * ((q >> 4) - 8) for q in b[2:]]
    else:
      m, = struct.unpack('<e', bytes(b[2:4]))
      out += [d * (q & 15) + m for q in b[4:]] + [d * (q >> 4) + m for q in b[4:]]
  return np.array(out, np.float32)


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q8_0'])
def test_dequantised_as_by_hand(tmp_path, kind):
  raw = raw_blocks(kind, 40, seed=1)
  ggml = official.GGMLQuantizationType[kind]
  file = gguf.read(saved(tmp_path, built(tensors=[entry(dims=(64, 20), kind=ggml)], data=0) + raw.tobytes()))
  np.testing.assert_allclose(file.array('t').reshape(-1), by_hand(kind, raw), rtol=1e-6, atol=1e-7)


# The other implementation.

FIELDS = {'general.architecture': 'llama', 'a.count': 32, 'a.big': 1 << 40, 'a.negative': -1, 'a.eps': 0.5,
          'a.yes': True, 'tokens': ['<s>', 'é', ''], 'scores': [0.0, -1.5], 'types': [1, -2]}


def test_llama_cpp_reads_what_is_written(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {kind: rng.normal(size=(3, 64)).astype(np.float32) for kind in gguf.WRITABLE}
  gguf.write(tmp_path / 'x.gguf', FIELDS, {k: (a.shape, k) for k, a in arrays.items()}, arrays.__getitem__)
  reader = official.GGUFReader(tmp_path / 'x.gguf')
  assert {k: reader.get_field(k).contents() for k in FIELDS} == FIELDS
  types = [reader.get_field(k).types[-1].name for k in FIELDS]
  assert types == ['STRING', 'UINT32', 'UINT64', 'INT32', 'FLOAT32', 'BOOL', 'STRING', 'FLOAT32', 'INT32']
  assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [(k, k, [64, 3]) for k in arrays]
  for t in reader.tensors:
    raw = np.asarray(t.data).view(np.uint8)
    assert raw.tobytes() == quantize(arrays[t.name], t.tensor_type).view(np.uint8).tobytes()


def test_what_llama_cpp_writes_is_read(tmp_path):
  writer = official.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  writer.add_uint32('a.count', 32)
  writer.add_int64('a.negative', -1)
  writer.add_float64('a.eps', 0.1)
  writer.add_bool('a.yes', True)
  writer.add_array('tokens', ['<s>', 'é', ''])
  writer.add_array('scores', [0.0, -1.5])
  weight = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
  raw = raw_blocks('Q4_K', 5).reshape(5, -1)
  writer.add_tensor('plain', weight)
  writer.add_tensor('quantised', raw, raw_dtype=official.GGMLQuantizationType.Q4_K)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  file = gguf.read(tmp_path / 'x.gguf')
  assert file.fields == {'general.architecture': 'llama', 'a.count': 32, 'a.negative': -1, 'a.eps': 0.1, 'a.yes': True,
                         'tokens': ['<s>', 'é', ''], 'scores': [0.0, -1.5]}
  assert [(t.shape, t.kind) for t in file.tensors.values()] == [((5, 256), 'F32'), ((5, 256), 'Q4_K')]
  np.testing.assert_array_equal(file.array('plain'), weight)
  np.testing.assert_array_equal(file.array('quantised'), dequantize(raw, official.GGMLQuantizationType.Q4_K))


# Writing.

@pytest.mark.parametrize('shape, kind, match', [
    ((2, 33), 'Q8_0', "rows of a multiple of 32 values for tensor 'w', Q8_0, got 33"),
    ((2, 256), 'Q4_K', r"one of F32, F16, BF16, Q8_0, Q4_0 for tensor 'w', got Q4_K"),
    ((), 'F32', "1 to 4 dimensions, none of them 0, for tensor 'w', got \\[\\]"),
    ((2, 0), 'F32', 'none of them 0'), ((1,) * 5, 'F32', '1 to 4 dimensions'),
])
def test_tensors_that_cannot_be_written(tmp_path, shape, kind, match):
  with pytest.raises(ConfigError, match=match):
    gguf.write(tmp_path / 'x.gguf', {}, {'w': (shape, kind)}, lambda name: np.zeros(shape))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [[], [1, 2.0], [True, 1], [1 << 31], 1 << 64, -1 << 64, 1e39, None, [[1]], '\ud800',
                                   np.int32(1)], ids=repr)
def test_fields_that_cannot_be_written(tmp_path, value):
  with pytest.raises(ConfigError, match="expected a bool, int .* as field 'k', got"):
    gguf.write(tmp_path / 'x.gguf', {'k': value}, {}, None)


@pytest.mark.parametrize('kind, value', [('F16', 7e4), ('Q8_0', np.nan), ('Q4_0', 1e6), ('Q8_0', np.inf)])
def test_values_that_a_kind_cannot_hold(tmp_path, kind, value):
  with pytest.raises(ConfigError, match=f"finite values up to .* for tensor 'w', {kind}, got .*; write it as F32"):
    gguf.write(tmp_path / 'x.gguf', {}, {'w': ((32,), kind)}, lambda name: np.full(32, value))


def test_a_long_name_is_refused_for_llama_cpp(tmp_path):
  with pytest.raises(ConfigError, match='a name of at most 63 bytes.*got 64'):
    gguf.write(tmp_path / 'x.gguf', {}, {'é' * 32: ((1,), 'F32')}, lambda name: np.zeros(1))


def test_a_failed_write_leaves_the_old_file(tmp_path):
  """And nothing beside it; also where an array has another shape than was said."""
  path = saved(tmp_path, b'old')
  with pytest.raises(ValueError, match=r"tensor 'b': expected shape \[2\], got \[3\]"):
    gguf.write(path, {}, {'a': ((2,), 'F32'), 'b': ((2,), 'F32')}, lambda n: np.zeros(2 if n == 'a' else 3))
  assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0'])
@pytest.mark.filterwarnings('error')
def test_tiny_values_quantise_to_zero(tmp_path, kind):
  gguf.write(tmp_path / 'x.gguf', {}, {'w': ((64,), kind)}, lambda n: np.array([1e-44, 0] * 32, np.float32))
  np.testing.assert_array_equal(gguf.read(tmp_path / 'x.gguf').array('w'), np.zeros(64))


# Hostile files.

LIE = 1 << 60
HOSTILE = {
    'empty': (b'', "begins with b'GGUF', got b''"),
    'magic': (built(magic=b'GGML'), "begins with b'GGUF', got b'GGML'; check the path"),
    'only magic': (b'GGUF', '4 more bytes of header, got the end of the file'),
    'version 1': (built(version=1), 'version 2 or 3, got 1'),
    'version 0': (built(version=0), 'version 2 or 3, got 0'),
    'version 4': (built(version=4), 'version 2 or 3, got 4'),
    'big-endian': (built(version=3 << 24), 'little-endian file, got a big-endian one'),
    'count of tensors': (built(counts=(LIE, 0)), f'expected {LIE} tensors, got the end of the file'),
    'count of fields': (built(counts=(0, LIE)), f'expected {LIE} fields, got the end of the file'),
    'fields one too many': (built(counts=(0, 1), data=4)[:36], 'expected 1 fields, got the end'),
    'tensors': (built(counts=(1 << 17, 0), data=1 << 22), 'at most 65536 tensors, got 131072'),
    'fields': (built(counts=(0, 1 << 17), data=1 << 21), 'at most 65536 fields, got 131072'),
    'length of a key': (built([struct.pack('<Q', LIE)], counts=(0, 1)), f'a key of {LIE} bytes, got the end'),
    'long key': (built([field('k' * 65536, U8, b'0')]), 'a key of at most 65535 bytes, got 65536'),
    'length of a string': (built([field('k', STRING, struct.pack('<Q', LIE))]),
                           f"a string in field 'k' of {LIE} bytes"),
    'type': (built([field('k', 13, b'')]), "a value type from 0 to 12 in field 'k', got 13"),
    'type of a list': (built([array_field('k', 99, 1)]), "a value type from 0 to 12 in field 'k', got 99"),
    'bool': (built([field('k', BOOL, b'\2')]), "bools of 0 or 1 in field 'k', got 2"),
    'list of lists': (built([array_field('k', ARRAY, 1, struct.pack('<IQ', U8, 1))]), "in field 'k', got one of lists"),
    'count of numbers': (built([array_field('k', U8, LIE)]), f"{LIE} values in field 'k', got the end"),
    'count of wide numbers': (built([array_field('k', U64, 513)], data=4080), "513 values in field 'k', got the end"),
    'count of strings': (built([array_field('k', STRING, LIE)]), f"{LIE} values in field 'k', got the end"),
    'string in a list': (built([array_field('k', STRING, 2, text('') + struct.pack('<Q', LIE))]),
                         f"string 1 in field 'k', of {LIE} bytes, got the end"),
    'strings end': (built([array_field('k', STRING, 2, text('abcdefgh'))])[:69], "2 strings in field 'k', got the end"),
    'values': (built([array_field('k', U8, (1 << 22) + 1)], data=1 << 23), "at most 4194304 values in field 'k'"),
    'values of two lists': (built([array_field('k', U8, 1 << 22, bytes(1 << 22)), array_field('l', U8, 1, b'0')]),
                            "at most 0 values in field 'l', got 1"),
    'field twice': (built([field('k', U8, b'0')] * 2), "each field once, got 'k' twice"),
    'long name': (built(tensors=[entry('n' * 257)]), 'the name of a tensor of at most 256 bytes, got 257'),
    'odd name': (built(tensors=[entry(b'\xff' * 256, dims=(32, 0))]), r'values for tensor .{80}, got shape'),
    'length of a name': (built(tensors=[struct.pack('<Q', LIE) + bytes(32)]), f'the name of a tensor of {LIE} bytes'),
    'no dimensions': (built(tensors=[entry(dims=()) + bytes(8)]), "1 to 4 dimensions for tensor 't', got 0"),
    'dimensions': (built(tensors=[entry(dims=(1,) * 5)]), "1 to 4 dimensions for tensor 't', got 5"),
    'overflow': (built(tensors=[entry(dims=(1 << 32, 1 << 32))]), r"1 to 2\*\*63 - 1 values for tensor 't', got shape"),
    'dimension of 0': (built(tensors=[entry(dims=(32, 0))]), r"got shape \[0, 32\]"),
    'kind that is not read': (built(tensors=[entry(dims=(256,), kind=IQ4_XS)]),
                              r"one of F32, .*, Q6_K for tensor 't', got IQ4_XS; requantise"),
    'unknown kind': (built(tensors=[entry(kind=250)]), "for tensor 't', got type 250; requantise"),
    'row': (built(tensors=[entry(dims=(33, 32), kind=Q8_0)]), "multiple of 32 values for tensor 't', Q8_0, got 33"),
    'row of K': (built(tensors=[entry(dims=(32, 8), kind=Q4_K)]), "of 256 values for tensor 't', Q4_K, got 32"),
    'unaligned': (built(tensors=[entry(offset=16)]), "a multiple of 32 for tensor 't', got 16"),
    'beyond': (built(tensors=[entry(offset=LIE)]), f"{LIE + 192} bytes of file for tensor 't', got 4160"),
    'truncated': (built(tensors=[entry(dims=(32,))], data=127),
                  "192 bytes of file for tensor 't', got 191; the file is truncated or damaged, download it again"),
    'overlap': (built(tensors=[entry('a', (16,)), entry('b', (4,), offset=32)]), "lie apart, got 'b' over 'a'"),
    'same place': (built(tensors=[entry('a'), entry('b')]), "lie apart, got 'b' over 'a'"),
    'tensor twice': (built(tensors=[entry('a'), entry('a', offset=128)]), "each tensor once, got 'a' twice"),
    **{f'alignment {n}': (built([field('general.alignment', U32, struct.pack('<I', n))]),
                          f'power of two from 1 to 65536 as general.alignment, got {n};') for n in (0, 3, 48, 1 << 17)},
    'alignment of text': (built([field('general.alignment', STRING, text('32'))]), "general.alignment, got '32'"),
    'alignment of bool': (built([field('general.alignment', BOOL, b'\1')]), 'general.alignment, got True'),
}


def outcome(path):
  """Reads a file and all its tensors; the ConfigError, or None. Anything else is a failure, as is much memory."""
  tracemalloc.start()
  try:
    file = gguf.read(path)
    for name in file.tensors:
      assert file.array(name).shape == file.tensors[name].shape
  except ConfigError as e:
    assert '\n' not in str(e) and str(e).startswith(f'{path}: expected') and len(str(e)) < 1000
    return e
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile(tmp_path, case):
  content, match = HOSTILE[case]
  path = saved(tmp_path, content)
  start = time.monotonic()
  with pytest.raises(ConfigError, match=match):
    gguf.read(path)
  assert time.monotonic() - start < 1
  assert outcome(path)


def test_a_header_without_end(tmp_path):
  path = saved(tmp_path, built([field('k', STRING, struct.pack('<Q', 1 << 27))]))
  with path.open('r+b') as f:
    f.truncate(1 << 28)
  with pytest.raises(ConfigError, match="at most 67108864 bytes, got one that goes on with a string in field 'k'"):
    gguf.read(path)


@pytest.mark.parametrize('most, fields, end', [
    (64, [field('k' * 7, U8, b'0'), field('l' * 12, U8, b'0')], '4 more bytes of header'),
    (100, [array_field('k', STRING, 1, text('s' * 16)), field('l', STRING, text('s' * 30))],
     "a string in field 'l' of 30 bytes")])
def test_a_long_header(tmp_path, monkeypatch, most, fields, end):
  """The limit counts everything that was read."""
  monkeypatch.setattr(gguf, 'MOST_BYTES', most)
  with pytest.raises(ConfigError, match=f'a header of at most {most} bytes, got one that goes on with {end}'):
    gguf.read(saved(tmp_path, built(fields)))


def test_no_file(tmp_path):
  with pytest.raises(ConfigError, match='got no file; check the path'):
    gguf.read(tmp_path / 'x')
  with pytest.raises(ConfigError, match='got a folder; check the path'):
    gguf.read(tmp_path)
  file = gguf.read(saved(tmp_path, built(tensors=[entry()])))
  with pytest.raises(ConfigError, match="a tensor 'missing'"):
    file.array('missing')
  saved(tmp_path, b'')
  with pytest.raises(ConfigError, match='shorter than when its header was read'):
    file.array('t')


def sample():
  """A file with a bit of everything, and where its header ends."""
  fields = [field('general.alignment', U32, struct.pack('<I', 32)), field('s', STRING, text('text')),
            array_field('tokens', STRING, 3, b''.join(map(text, 'abc'))), array_field('n', U8, 4, b'1234'),
            field('f', F32_FIELD, struct.pack('<f', 1)), field('b', BOOL, b'\1')]
  tensors = [entry('w', (256, 2), Q4_K), entry('x', (32, 2), Q8_0, 288), entry('y', (5,), F16, 384)]
  return built(fields, tensors, data=512), len(built(fields, tensors, data=0))


CONTENT, HEADER = sample()


@pytest.mark.filterwarnings('ignore::RuntimeWarning')                 # scales of random bytes
@settings(max_examples=400, **FUZZ)
@given(data=st.data())
def test_damaged(tmp_path, data):
  content = bytearray(CONTENT[:data.draw(st.integers(0, len(CONTENT)) | st.just(len(CONTENT)))])
  places = st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255))
  for at, value in data.draw(st.lists(places, max_size=4)):
    if at < len(content):
      content[at] = value
  outcome(saved(tmp_path, content))


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@settings(max_examples=200, **FUZZ)
@given(content=st.binary(max_size=300), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_random(tmp_path, content, counts):
  outcome(saved(tmp_path, content))
  outcome(saved(tmp_path, b'GGUF' + struct.pack('<IQQ', 3, *counts) + content))


def test_every_truncation_is_noticed(tmp_path):
  last = HEADER + 384 + 10
  assert outcome(saved(tmp_path, CONTENT[:last])) is None
  for size in range(last):
    with pytest.raises(ConfigError, match='begins with' if size < 4 else 'truncated or damaged, download it again'):
      gguf.read(saved(tmp_path, CONTENT[:size]))


# Memory and time.

def test_memory(tmp_path):
  """64 MB of Q8_0 take 40 MB beyond the result at most; writing, as little beyond one array at a time."""
  rows = (64 << 20) // (34 * 128)
  path = saved(tmp_path, built(tensors=[entry(dims=(4096, rows), kind=Q8_0)]))
  with path.open('r+b') as f:
    f.truncate(path.stat().st_size + (64 << 20))
  file = gguf.read(path)
  tracemalloc.start()
  result = file.array('t')
  assert tracemalloc.get_traced_memory()[1] <= result.nbytes + (40 << 20)
  del result
  tracemalloc.reset_peak()
  gguf.write(tmp_path / 'y', {}, {'a': ((4096, 4096), 'Q8_0'), 'b': ((4096, 4096), 'F16')},
             lambda name: np.ones((4096, 4096), np.float32))
  assert tracemalloc.get_traced_memory()[1] <= (64 << 20) + (40 << 20)
  tracemalloc.stop()


def test_a_large_vocabulary_is_read_quickly(tmp_path):
  tokens = [f'token {i}' for i in range(250_000)]
  gguf.write(tmp_path / 'x.gguf', dict(tokens=tokens, types=[1] * len(tokens)), {}, None)
  start = time.process_time()
  file = gguf.read(tmp_path / 'x.gguf')
  assert time.process_time() - start < 1
  assert file.fields['tokens'] == tokens
