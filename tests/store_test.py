"""The store: splits exact, work not lost by a kill, nothing stale read, memory constant, packing complete."""
import hashlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import DATA, needs_data

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import packing, sources, store
from llm_jax.data import tokenizer as tokenizer_lib

BYTE = tokenizer_lib.build(config_lib.Tokenizer(kind='byte'), ())


class Words:
  """A tokenizer with separate bos and eos, that counts what it was given."""
  vocab_size, bos_id, eos_id, pad_id, mask_id, sentinel_ids, kind = 70_000, 69_998, 69_999, 0, None, (), 'words'
  fingerprint = 'words'

  def __init__(self):
    self.seen = 0

  def encode_batch(self, texts):
    self.seen += sum(map(len, texts))
    return [[int.from_bytes(w.encode()[:2], 'big') for w in t.split()] for t in texts]


def folder_of(tmp_path, n=40, size=50):
  """A folder of n small text files."""
  source = tmp_path / 'text'
  source.mkdir(exist_ok=True)
  for i in range(n):
    (source / f'{i:03}.txt').write_text(f'document {i}: ' + 'ü€𝄞 ' * (i % size + 1))
  return source


def data_of(path, **changes):
  return config_lib.Data(**{**dict(source='text', path=str(path), valid='hash', valid_fraction=0.2), **changes})


def documents_of(store_):
  """[(name, ids, bytes)] as read back."""
  return [(store_.name(i), store_.tokens[store_.offsets[i]:store_.offsets[i + 1]].tolist(), int(store_.text_bytes[i]))
          for i in range(store_.n_docs)]


def contents(cache):
  """Every file of the one store below a cache, by name."""
  folder, = (cache / 'stores').iterdir()
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'lock'}


def run(code, *args, wait=True, **env):
  process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], text=True,
                             env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             cwd=pathlib.Path(__file__).resolve().parents[1])
  if not wait:
    return process
  output = process.communicate(timeout=240)[0]
  assert process.returncode == 0, output
  return output


def test_hash_split_keeps_documents_names_bytes_and_the_bos(tmp_path):
  source = folder_of(tmp_path)
  stores = store.prepare(data_of(source), BYTE, tmp_path / 'cache', 'none')
  got = {'train': documents_of(stores.train[0]), 'valid': documents_of(stores.valid[0])}
  for split, found in got.items():
    expected = [(p.name, p.read_bytes()) for p in sorted(source.iterdir()) if sources.split_of(p.name, 0.2) == split]
    assert found == [(name, [BYTE.bos_id, *text], len(text)) for name, text in expected]
    assert stores.train[0].tokens.dtype == np.uint16
  assert 2 <= len(got['valid']) <= 20
  assert stores.valid[0].total_bytes == sum(b for _, _, b in got['valid'])


def test_a_separate_eos_ends_documents_and_a_large_vocabulary_takes_uint32(tmp_path):
  stores = store.prepare(data_of(folder_of(tmp_path)), Words(), tmp_path / 'cache', 'none')
  train = stores.train[0]
  assert train.tokens.dtype == np.uint32
  assert all(ids[0] == 69_998 and ids[-1] == 69_999 and ids.count(69_999) == 1 for _, ids, _ in documents_of(train))


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
  broken = Words()
  broken.vocab_size = 300
  with pytest.raises(ValueError, match='outside the vocabulary of 300'):
    store.prepare(data_of(folder_of(tmp_path)), broken, tmp_path / 'cache', 'none')


def test_tail_is_exact_by_characters_across_pieces_and_documents(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'PIECE', 1 << 12)      # many pieces per document
  source = tmp_path / 'text'
  source.mkdir()
  texts = ['aé€\n' * 5000, 'b𝄞\n' * 4000, 'c\n' * 999]
  for i, text in enumerate(texts):
    (source / f'{i}.txt').write_text(text)
  for fraction in (0.1, 0.5, 0.123456):
    stores = store.prepare(data_of(source, valid='tail', valid_fraction=fraction), BYTE, tmp_path / 'cache', 'none')
    train, valid = (''.join(bytes(ids[1:]).decode() for _, ids, _ in documents_of(s[0]))
                    for s in (stores.train, stores.valid))
    assert train + valid == ''.join(texts)
    assert len(train) == int(len(''.join(texts)) * (1 - fraction))
  assert stores.train[0].n_docs + stores.valid[0].n_docs == 4


@needs_data
def test_tail_of_tiny_shakespeare_is_nanogpts(tmp_path):
  text = (DATA / 'tinyshakespeare' / 'input.txt').read_text()
  char = tokenizer_lib.build(config_lib.Tokenizer(kind='char'), [text])
  data = data_of(DATA / 'tinyshakespeare' / 'input.txt', valid='tail', valid_fraction=0.1)
  stores = store.prepare(data, char, tmp_path, 'none')
  assert (stores.train[0].n_tokens, stores.valid[0].n_tokens) == (1003854, 111540)
  assert char.decode(stores.valid[0].tokens) == text[int(0.9 * len(text)):]


def test_given_valid_and_mixture(tmp_path):
  source = folder_of(tmp_path)
  other = tmp_path / 'other.txt'
  other.write_text('held out')
  stores = store.prepare(data_of(source, valid='given', valid_path=str(other)), BYTE, tmp_path / 'cache', 'none')
  assert stores.train[0].n_docs == 40
  assert documents_of(stores.valid[0]) == [('other.txt', [BYTE.bos_id, *b'held out'], 8)]
  mixture = tuple(config_lib.Source('text', str(source / name), weight=w) for name, w in (('00*', 1.), ('01*', 3.)))
  data = data_of('', source='mixture', mixture=mixture, valid='tail')
  stores = store.prepare(data, BYTE, tmp_path / 'cache', 'none')
  assert len(stores.train) == len(stores.valid) == 2 and stores.weights == (1., 3.)
  with pytest.raises(ConfigError, match="config.data.valid: 'given' is for a single source"):
    store.prepare(data_of('', source='mixture', mixture=mixture, valid='given', valid_path='x'), BYTE, tmp_path)


def test_an_empty_split_is_an_error_that_says_what_to_change(tmp_path):
  (tmp_path / 'one.txt').write_text('only one document')
  with pytest.raises(ConfigError, match="valid='tail'") as e:
    store.prepare(data_of(tmp_path / 'one.txt'), BYTE, tmp_path / 'cache', 'none')
  assert '\n' not in str(e.value)


SLOW_WORDS = '''
import pathlib, sys, time
sys.path.insert(0, 'tests')
import store_test as t
from llm_jax.data import sources, store
store.PART_BYTES, store.BATCH_CHARS, sources.PIECE = 60_000, 20_000, 10_000
class Slow(t.Words):
  def encode_batch(self, texts):
    time.sleep(0.05)
    return super().encode_batch(texts)
store.prepare(t.data_of(sys.argv[1], valid=sys.argv[3], max_bad_records=3), Slow(), pathlib.Path(sys.argv[2]), 'none')
'''


@pytest.mark.parametrize('valid', ['tail', 'hash'])
def test_killed_run_goes_on_behind_its_last_part(tmp_path, monkeypatch, valid):
  monkeypatch.setattr(store, 'PART_BYTES', 60_000)
  monkeypatch.setattr(store, 'BATCH_CHARS', 20_000)
  monkeypatch.setattr(sources, 'PIECE', 10_000)        # the long document spans several parts
  source = tmp_path / 'text'
  source.mkdir()
  rng = np.random.default_rng(0)
  for i in range(30):
    words = rng.integers(0, 10_000, 60_000 if i == 12 else 3_000)
    (source / f'{i:02}.txt').write_text('\n'.join(map(str, words)))
  process = run(SLOW_WORDS, source, tmp_path / 'killed', valid, wait=False)
  journal = None
  deadline = time.monotonic() + 120
  while not journal or json.loads(journal.read_text())['part'] < 4:
    assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
    time.sleep(0.01)
    journal = next((tmp_path / 'killed').glob('stores/*/progress.json'), None)
  process.send_signal(signal.SIGKILL)
  process.wait()
  state = json.loads(journal.read_text())
  counting, whole = Words(), Words()
  data = data_of(source, valid=valid, max_bad_records=3)
  with pytest.raises(FileNotFoundError):
    store.Store(journal.parent, 'train')               # an incomplete store cannot be opened
  store.prepare(data, counting, tmp_path / 'killed', 'none')
  store.prepare(data, whole, tmp_path / 'clean', 'none')
  assert state['chars'] >= 4 * 60_000 and counting.seen == whole.seen - state['chars']
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'clean')


def test_two_processes_prepare_one_store(tmp_path):
  source = folder_of(tmp_path, n=300, size=2000)
  processes = [run(SLOW_WORDS.replace("'none'", "'lines'"), source, tmp_path / 'both', 'hash', wait=False)
               for _ in range(2)]
  outputs = [p.communicate(timeout=240)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert sum('tokenised text' in o for o in outputs) == 1, outputs
  assert sum('waiting for another process' in o for o in outputs) <= 1
  store.prepare(data_of(source, max_bad_records=3), Words(), tmp_path / 'clean', 'none')
  assert contents(tmp_path / 'both') == contents(tmp_path / 'clean')


def test_nothing_stale_or_damaged_is_read(tmp_path, capsys):
  source, cache = folder_of(tmp_path), tmp_path / 'cache'

  def seen(**changes):
    words = Words()
    words.fingerprint = changes.pop('fingerprint', 'words')
    stores = store.prepare(data_of(source, **changes), words, cache, 'none')
    return words.seen, stores
  total, stores = seen()
  assert total > 0 and seen()[0] == 0                              # found, not made again
  assert seen(fingerprint='other words')[0] == total               # another tokenizer
  assert seen(valid_fraction=0.4)[0] == total                      # another split
  (source / '000.txt').write_text('changed text')
  changed, stores = seen()
  assert changed > 0                                               # other content
  tokens = stores.train[0].folder / 'train.tokens'
  before = tokens.read_bytes()
  tokens.write_bytes(before[:-4])
  assert seen()[0] == changed and tokens.read_bytes() == before    # a damaged file
  assert 'missing or has the wrong size' in capsys.readouterr().err
  (stores.train[0].folder / 'store.json').unlink()
  assert seen()[0] == changed                                      # an incomplete store


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
  source = folder_of(tmp_path)

  class Appending(Words):
    def encode_batch(self, texts):
      (source / 'late.txt').write_text('more')
      return super().encode_batch(texts)
  with pytest.raises(ConfigError, match='changed while it was being read'):
    store.prepare(data_of(source), Appending(), tmp_path / 'cache', 'none')
  assert not list((tmp_path / 'cache').glob('stores/*/store.json'))


def test_a_newer_format_is_refused_in_one_line(tmp_path):
  data = data_of(folder_of(tmp_path), packing='pack', length=64)
  train = store.prepare(data, BYTE, tmp_path / 'cache', 'none').train[0]
  for path in (train.folder / 'train.pack64.json', train.folder / 'store.json'):
    sound = path.read_text()
    path.write_text(json.dumps({**json.loads(sound), 'format': 2}))
    with pytest.raises(ConfigError, match='expected .*format 1 or older, got 2') as e:
      store.prepare(data, BYTE, tmp_path / 'cache', 'none')
    assert '\n' not in str(e.value)
    path.write_text(sound)
  store.prepare(data, BYTE, tmp_path / 'cache', 'none')


def test_bad_records_that_were_skipped_need_the_cap_that_skipped_them(tmp_path):
  source = folder_of(tmp_path)
  train = store.prepare(data_of(source, max_bad_records=2), BYTE, tmp_path / 'cache', 'none').train[0]
  path = train.folder / 'store.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'bad': 2}))
  store.prepare(data_of(source, max_bad_records=2), BYTE, tmp_path / 'cache', 'none')
  with pytest.raises(ConfigError, match='max_bad_records: .* set at least 2'):
    store.prepare(data_of(source, max_bad_records=1), BYTE, tmp_path / 'cache', 'none')


def test_a_store_pickles_as_its_path(tmp_path):
  train = store.prepare(data_of(folder_of(tmp_path)), BYTE, tmp_path / 'cache', 'none').train[0]
  pickled = pickle.dumps(train)
  assert len(pickled) < 500
  np.testing.assert_array_equal(pickle.loads(pickled).tokens, train.tokens)


def test_progress_tells_documents_megabytes_and_time_left(tmp_path, capsys, monkeypatch):
  source = folder_of(tmp_path)
  monkeypatch.setattr(store, 'BATCH_CHARS', 100)
  start, calls = time.monotonic(), []
  monkeypatch.setattr(store.time, 'monotonic', lambda: calls.append(1) or start + 2 * len(calls))
  store.prepare(data_of(source), BYTE, tmp_path / 'lines', 'lines')
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) > 2 and all(word in lines[0] for word in (' docs, ', ' MB, ', ' docs/s', ' MB/s', '%', 'ETA'))
  store.prepare(data_of(source), BYTE, tmp_path / 'rich', 'rich')
  assert ' docs/s' in capsys.readouterr().out


MEMORY = '''
import pathlib, re, sys
sys.path.insert(0, 'tests')
import store_test as t
from llm_jax.data import store
def peak():                              # of this program alone: ru_maxrss would begin at that of the tests' process
  return int(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) / 1024
before = peak()
store.prepare(t.data_of(sys.argv[1], valid='tail', packing='pack'), t.BYTE, pathlib.Path(sys.argv[2]), 'none')
print(peak() - before, peak())
'''


def big_text(path, megabytes):
  line = 'The quick brown fox jumps over the lazy dog; 0123456789 times.\n' * 1024
  with open(path, 'w') as f:
    for _ in range(megabytes * 1_000_000 // len(line)):
      f.write(line)


def test_memory_does_not_grow_with_the_text(tmp_path):
  big_text(tmp_path / 'big.txt', 100)
  growth, _ = map(float, run(MEMORY, tmp_path / 'big.txt', tmp_path / 'cache').split())
  assert growth < 90, f'{growth} MB for a text of 100 MB'


@pytest.mark.slow
def test_two_gigabytes_in_under_one_gigabyte(tmp_path):
  big_text(tmp_path / 'big.txt', 2000)
  growth, peak = map(float, run(MEMORY, tmp_path / 'big.txt', tmp_path / 'cache').split())
  assert peak < 1000 and growth < 600


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=300), st.integers(32, 50))
def test_pack_puts_every_item_in_one_bin_that_holds_it(lengths, capacity):
  bins, used = packing.pack(np.array(lengths), capacity)
  load = np.bincount(bins, lengths, minlength=used)
  assert bins.min() >= 0 and bins.max() < used and load.max() <= capacity and load.min() > 0
  assert used <= 11 / 9 * np.ceil(sum(lengths) / (capacity * 0.9)) + 6      # best-fit decreasing wastes little here


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=60), length=st.integers(1, 40), block=st.integers(1, 70))
def test_plan_covers_every_token_once_and_cuts_only_long_documents(tmp_path_factory, sizes, length, block):
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  done = tmp_path_factory.mktemp('plan') / 'train.pack.json'
  old, packing.BLOCK = packing.BLOCK, block
  try:
    packing.write(offsets, length, done)
  finally:
    packing.BLOCK = old
  ends, spans = packing.read(done)
  assert packing.complete(done) and ends[0] == 0 and ends[-1] == len(spans)
  covered = np.concatenate([np.arange(a, b) for a, b, _ in spans] or [[]])
  assert sorted(covered.tolist()) == list(range(offsets[-1]))
  for a, b, last in spans:
    document = np.searchsorted(offsets, a, 'right') - 1
    assert b <= offsets[document + 1] and last == (b == offsets[document + 1])
    assert a == offsets[document] or (a - offsets[document]) % length == 0
  for first, end in zip(ends[:-1], ends[1:]):
    assert 0 < sum(b - a for a, b, _ in spans[first:end]) <= length


def test_plan_is_kept_beside_the_store_and_made_again_when_damaged(tmp_path):
  data = data_of(folder_of(tmp_path), packing='pack', length=64)
  train = store.prepare(data, BYTE, tmp_path / 'cache', 'none').train[0]
  spans = train.folder / 'train.pack64.spans'
  digest, when = hashlib.sha256(spans.read_bytes()).digest(), spans.stat().st_mtime_ns
  train.plan(64)
  assert spans.stat().st_mtime_ns == when
  spans.write_bytes(b'')
  train.plan(64)
  assert hashlib.sha256(spans.read_bytes()).digest() == digest
