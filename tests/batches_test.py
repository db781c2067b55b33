"""Batches: a pure function of (seed, step), however reached; every token once; nothing crosses documents."""
import collections
import functools
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import objectives, store
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.batches import Batches, EvalBatches, Mixture, permute
from llm_jax.data.objectives import hash64

BYTE = tokenizer_lib.build(config_lib.Tokenizer(kind='byte'), ())
BOS = BYTE.bos_id
OBJECTIVES = [('concat', o) for o in ('causal', 'prefix', 'masked', 'span')] + [
    ('pack', o) for o in ('causal', 'prefix', 'masked')]


@functools.cache
def text_folder():
  """60 documents of 1 to 400 bytes; the letters of a document are its number and a running count."""
  import tempfile
  folder = pathlib.Path(tempfile.mkdtemp())
  rng = np.random.default_rng(1)
  for i in range(60):
    (folder / f'{i:02}.txt').write_bytes(bytes(97 + (i + j) % 26 for j in range(rng.integers(1, 400))))
  return folder


def stores_of(**changes):
  data = config_lib.Data(**{**dict(source='text', path=str(text_folder()), valid_fraction=0.3, length=64), **changes})
  return data, store.prepare(data, BYTE, text_folder().with_suffix('.cache'), 'none')


def make(objective='causal', batch_size=8, seed=0, **changes):
  data, stores = stores_of(**changes)
  train = config_lib.Train(objective=objective, batch_size=batch_size, seed=seed)
  return Batches(stores.train, stores.weights, data, train, BYTE)


def mixture_of(packing):
  folder = text_folder()
  sources = tuple(config_lib.Source('text', str(folder / f'{i}*'), weight=w) for i, w in ((0, 0.5), (1, 1.), (2, 2.3)))
  return dict(source='mixture', path='', mixture=sources, packing=packing, temperature=1.5, valid='tail')


@functools.cache
def made(packing, objective, mixed):
  return make(objective, **(mixture_of(packing) if mixed else dict(packing=packing)), length=32)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_permutation_is_a_bijection(size, seed):
  out = permute(np.arange(size), size, hash64(seed))
  assert sorted(out.tolist()) == list(range(size))


def test_permutation_mixes_and_needs_no_memory_of_its_size():
  a, b = (permute(np.arange(1000), 1000, hash64(key)) for key in (1, 2))
  assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1 and (a == b).mean() < 0.01
  assert np.mean(np.abs(np.diff(a)) == 1) < 0.02                   # neighbours do not stay neighbours
  size = 10**15
  many = permute(np.arange(size - 500, size), size, hash64(3))
  assert len(set(many.tolist())) == 500 and many.min() >= 0 and many.max() < size
  # First places over many keys: uniform, by chi-square (19 degrees of freedom).
  first = permute(np.zeros(20_000, int), 20, hash64(np.arange(20_000)))
  assert (((np.bincount(first, minlength=20) - 1000) ** 2) / 1000).sum() < 45


@settings(deadline=None, max_examples=25)
@given(st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 20)), min_size=1, max_size=7),
       st.sampled_from([1.0, 1.0, 2.0, 0.7]))
def test_mixture_counts_stay_within_one_of_their_share(weights, temperature):
  mixture = Mixture(weights, temperature)
  share = np.array(weights) ** (1 / temperature)
  share /= share.sum()
  assert np.abs(mixture.shares - share).max() <= len(weights) / 2**14     # every source has at least one turn
  n = min(3 * mixture.period, 20_000)
  source, number = mixture(np.arange(n))
  given_ = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
  assert np.abs(given_ - np.arange(1, n + 1)[:, None] * mixture.shares).max() < 1 + 1e-6
  np.testing.assert_array_equal(number, given_[np.arange(n), source] - 1)   # the number within the source, without gaps
  far = 10**12 + np.arange(1000)
  source, number = mixture(far)
  assert np.abs(number - far * mixture.shares[source]).max() < 1 + 1e-3


def test_simple_weights_have_exact_short_periods():
  assert Mixture([7, 2, 1]).period == 10
  assert Mixture([0.5, 0.25, 0.25]).period == 4
  assert Mixture([3.]).period == 1


@pytest.mark.parametrize('weights, temperature', [([3, 1], 1e-3), ([1e300, 1e-300], 1.0), ([1e300, 1], 1e-9)])
def test_extreme_weights_keep_every_source(weights, temperature):
  mixture = Mixture(weights, temperature)
  assert mixture.count[0] > 1000 and mixture.count[1] == 1


@pytest.mark.parametrize('packing,objective', OBJECTIVES)
def test_shapes_dtypes_and_repeatability(packing, objective):
  batches = make(objective, packing=packing)
  batch = batches(5)
  expected = dict(token_BT=np.int32, target_BT=np.int32, mask_BT=np.float32)
  if packing == 'pack':
    expected |= dict(position_BT=np.int32, segment_BT=np.int32)
  if objective in ('prefix', 'span'):
    expected |= dict(prefix_BT=bool)
  assert {k: v.dtype.type for k, v in batch.items()} == {k: np.dtype(v).type for k, v in expected.items()}
  assert all(x.shape == (8, 64) for x in batch.values())
  assert 0 < batch['mask_BT'].sum() and set(np.unique(batch['mask_BT'])) <= {0, 1}
  assert batch['token_BT'].min() >= 0 and batch['token_BT'].max() < BYTE.vocab_size
  assert_equal(batch, make(objective, packing=packing)(5))
  assert (batch['token_BT'] != make(objective, seed=1, packing=packing)(5)['token_BT']).any()
  assert (batch['token_BT'] != batches(6)['token_BT']).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**9), st.sampled_from(OBJECTIVES), st.lists(st.integers(0, 8), max_size=3), st.booleans())
def test_any_number_of_hosts_gives_the_same_global_batch(step, how, cuts, mixed):
  batches = made(*how, mixed)
  edges = sorted({0, 8, *cuts})
  parts = [batches(step, rows) for rows in zip(edges[:-1], edges[1:])]
  whole = batches(step)
  assert_equal(whole, {name: np.concatenate([p[name] for p in parts]) for name in whole})
  assert_equal(whole, batches(step))


def epochs_of(batches, n=4):
  """The batches of each of n epochs, in order; batches of one sequence."""
  size = batches.sizes[0]
  return [[batches(e * size + i) for i in range(size)] for e in range(n)]


def test_every_epoch_is_all_packed_sequences_once_in_another_order():
  epochs = [tuple(b['token_BT'].tobytes() for b in epoch) for epoch in epochs_of(make(batch_size=1, packing='pack'))]
  assert len(set(epochs)) == 4 and len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_every_epoch_is_one_round_of_the_stream_cut_elsewhere_in_another_order():
  batches = make(batch_size=1, packing='concat')
  reader, size, n = batches.readers[0], batches.sizes[0], batches.readers[0].store.n_tokens
  tokens = np.asarray(reader.store.tokens, np.int32)
  start_ST = np.arange(size)[:, None] * reader.length + np.arange(reader.length + 1)
  shifts = []
  for epoch in epochs_of(batches):
    seen = collections.Counter((b['token_BT'].tobytes(), b['target_BT'].tobytes()) for b in epoch)
    def cut_at(shift):
      return collections.Counter((w[:-1].tobytes(), w[1:].tobytes()) for w in tokens[(start_ST + shift) % n])
    starts = {tokens_ for tokens_, _ in seen}
    shifts.append([shift for shift in range(n) if tokens[(shift + start_ST[0, :-1]) % n].tobytes() in starts
                   and cut_at(shift) == seen])
    assert all(b['mask_BT'].all() for b in epoch)
  assert all(shifts) and 0 in shifts[0] and len(set(map(tuple, shifts))) == 4, shifts


def test_a_sequence_over_the_end_of_a_stream_goes_on_at_its_start():
  reader = make(packing='concat').readers[0]
  store = reader.store
  (start, stop), (first, end) = reader.ranges(0, store.n_tokens - 5)
  assert (start, stop, first, end) == (store.n_tokens - 5, store.n_tokens, 0, reader.length + 1 - 5)
  batch = reader.read(np.array([0]), np.array([store.n_tokens - 5]))
  assert (batch['token_BT'][0] == np.concatenate([store.tokens[-5:], store.tokens])[:reader.length]).all()


def test_a_late_step_costs_what_an_early_one_costs():
  batches = make(**mixture_of('pack'))

  def seconds(first):
    times = []
    for step in range(first, first + 30):
      start = time.perf_counter()
      batches(step)
      times.append(time.perf_counter() - start)
    return np.median(times)
  seconds(0)
  assert seconds(10**7) < 3 * seconds(10)
  assert seconds(10**12) < 3 * seconds(10)


def test_concat_is_the_stream_in_windows():
  batches = make(batch_size=4)
  tokens = batches.readers[0].store.tokens
  windows = {tuple(tokens[i * 64:i * 64 + 65].tolist()) for i in range((len(tokens) - 1) // 64)}
  for step in range(5):
    batch = batches(step)
    for x, y in zip(batch['token_BT'].tolist(), batch['target_BT'].tolist()):
      assert (*x, y[-1]) in windows and y[:-1] == x[1:]


@pytest.mark.parametrize('length', [16, 64, 500])
def test_packed_segments_are_documents_and_nothing_crosses(length):
  batches = make(batch_size=1, packing='pack', length=length)
  documents = {(BOS, *p.read_bytes()) for p in text_folder().iterdir()}
  trained = batches.readers[0].store
  pieces, predicted = collections.Counter(), 0
  for i in range(batches.sizes[0]):
    batch = {name: x[0] for name, x in batches.readers[0].read(np.array([i])).items()}
    padding = batch['segment_BT'] == 0
    assert not batch['mask_BT'][padding].any() and not batch['position_BT'][padding].any()
    assert not padding[:(~padding).sum()].any()                     # padding at the end only
    for segment in range(1, batch['segment_BT'].max() + 1):
      at = np.flatnonzero(batch['segment_BT'] == segment)
      tokens, targets = batch['token_BT'][at], batch['target_BT'][at]
      np.testing.assert_array_equal(batch['position_BT'][at], np.arange(len(at)))
      np.testing.assert_array_equal(targets[:-1], tokens[1:])
      pieces[tuple(tokens.tolist())] += 1
      assert batch['mask_BT'][at].all()                             # bytes: bos is also the end, so all is predicted
      predicted += len(at)
      if length == 500:                                             # no document is cut: the target after it is the end
        assert tuple(tokens.tolist()) in documents and targets[-1] == BOS
  assert predicted == trained.n_tokens
  expected = collections.Counter()
  for i in range(trained.n_docs):
    ids = trained.tokens[trained.offsets[i]:trained.offsets[i + 1]].tolist()
    expected.update(tuple(ids[j:j + length]) for j in range(0, len(ids), length))
  assert pieces == expected


def test_packed_targets_that_cross_documents_carry_no_loss_where_no_end_is_known():
  data, stores = stores_of(packing='pack')
  ids = objectives.Ids(BYTE.vocab_size, BOS, None, 0, None, ())
  from llm_jax.data.batches import Packed
  packed = Packed(stores.train[0], 64, ids)
  batch = packed.read(np.arange(packed.all))
  last = (np.diff(batch['segment_BT'], axis=1, append=0) != 0) & (batch['segment_BT'] > 0)
  ends = set((stores.train[0].offsets[1:] - 1).tolist())
  assert (batch['mask_BT'][~last & (batch['segment_BT'] > 0)] == 1).all()
  assert (batch['mask_BT'][last] == 0).sum() == len(ends)            # cut pieces go on; only true ends have no target


def test_prefix_is_read_both_ways_and_carries_no_loss():
  for packing in ('concat', 'pack'):
    causal, prefix = make('causal', packing=packing)(3), make('prefix', packing=packing)(3)
    np.testing.assert_array_equal(causal['token_BT'], prefix['token_BT'])
    segment_BT = causal.get('segment_BT', np.ones((8, 64), int))
    lengths = []
    for row in range(8):
      for s in range(1, segment_BT[row].max() + 1):
        at = np.flatnonzero(segment_BT[row] == s)
        p = prefix['prefix_BT'][row, at]
        n = p.sum()
        lengths.append(n)
        assert p[:n].all() and n < len(at)
        # The token before the first predicted one is the last of the prefix, where there is one.
        np.testing.assert_array_equal(prefix['mask_BT'][row, at], causal['mask_BT'][row, at] *
                                      (np.arange(len(at)) >= n - 1))
    assert len(set(lengths)) > 3
    assert not prefix['prefix_BT'][segment_BT == 0].any()


def test_masked_hides_15_percent_as_bert_does():
  for packing in ('concat', 'pack'):
    masked, causal = make('masked', batch_size=512, packing=packing)(0), make(batch_size=512, packing=packing)(0)
    chosen = masked['mask_BT'] > 0
    text = (causal['token_BT'] != BOS) & (causal.get('segment_BT', 1) > 0)
    np.testing.assert_array_equal(masked['target_BT'], causal['token_BT'])
    np.testing.assert_array_equal(masked['token_BT'][~chosen], causal['token_BT'][~chosen])
    assert not chosen[~text].any()
    assert abs(chosen.sum() / text.sum() - 0.15) < 0.01
    hidden, kept = masked['token_BT'][chosen] == BYTE.mask_id, masked['token_BT'][chosen] == causal['token_BT'][chosen]
    assert abs(hidden.mean() - 0.8) < 0.02 and abs(kept.mean() - 0.1) < 0.02
    assert (masked['token_BT'][:256] != masked['token_BT'][256:]).any()


@settings(deadline=None, max_examples=20)
@given(st.integers(12, 300), st.integers(0, 1000))
def test_span_corruption_can_be_put_together_again(length, step):
  batches = make('span', batch_size=3, length=length)
  raw = batches.readers[0].length
  causal = batches.readers[0].store.tokens
  around = np.concatenate([causal, causal[:raw]])                    # a later epoch goes on at the start
  windows = {tuple(around[i:i + raw].tolist()) for i in range(len(causal))}
  batch = batches(step)
  sentinels = list(BYTE.sentinel_ids)
  for token, target, mask, prefix in zip(*(batch[k] for k in ('token_BT', 'target_BT', 'mask_BT', 'prefix_BT'))):
    n = prefix.sum()
    assert prefix[:n].all() and not mask[:n - 1].any() and mask[n - 1]
    answer = target[mask > 0].tolist()
    np.testing.assert_array_equal(token[n:n + len(answer) - 1], answer[:-1])
    spans, current = {}, None
    for t in answer:
      if t in sentinels:
        current = spans.setdefault(t, [])
      else:
        current.append(t)
    used = [t for t in token[:n].tolist() if t in sentinels]
    assert used == sentinels[:len(used)] and list(spans) == sentinels[:len(used) + 1] and not spans[list(spans)[-1]]
    again = [u for t in token[:n].tolist() for u in (spans[t] if t in sentinels else [t])]
    assert tuple(again) in windows
    assert len(again) - n + len(used) == max(round(raw * 0.15), 1)
  assert raw >= length - 2 * len(sentinels) - 1


def test_objectives_that_a_tokenizer_or_packing_cannot_do_are_refused():
  data, stores = stores_of()
  char = tokenizer_lib.build(config_lib.Tokenizer(kind='char'), ['abc'])
  for objective in ('masked', 'span'):
    with pytest.raises(ConfigError, match=f"config.train.objective: '{objective}' needs a tokenizer"):
      Batches(stores.train, stores.weights, data, config_lib.Train(objective=objective), char)
  with pytest.raises(ConfigError, match="config.data.packing: objective 'span' needs 'concat'"):
    make('span', packing='pack')


def test_a_tiny_store_fills_batches_and_a_shorter_one_says_what_to_lower():
  batches = make(batch_size=300, length=500)
  assert batches.sizes[0] < 300
  assert batches(0)['token_BT'].shape == (300, 500) and batches(10**6)['mask_BT'].all()
  tokens = batches.readers[0].store.n_tokens
  assert make(length=tokens - 1).sizes == [1]
  with pytest.raises(ConfigError, match=f'config.data.length: .* lower it to at most {tokens - 1}') as e:
    make(length=tokens)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('packing', ['concat', 'pack'])
@pytest.mark.parametrize('batch_size', [1, 7, 1000])
def test_evaluation_predicts_every_held_out_token_once(packing, batch_size):
  data, stores = stores_of(packing=packing)
  valid = stores.valid[0]
  evaluation = EvalBatches(valid, data, batch_size, BYTE)
  predicted, shapes = collections.Counter(), set()
  for batch in evaluation:
    predicted.update(batch['target_BT'][batch['mask_BT'] > 0].tolist())
    shapes.add(batch['token_BT'].shape)
  expected = collections.Counter(valid.tokens[1:].tolist())
  if packing == 'pack':
    expected[BOS] += 1                                  # the end of the last document, not stored
  assert predicted == expected and shapes == {(batch_size, 64)}
  assert evaluation.total_bytes == sum(n for t, n in expected.items() if t < 256)
  assert_equal(evaluation[0], EvalBatches(valid, data, batch_size, BYTE)[0])
  halves = [EvalBatches(valid, data, batch_size, BYTE, rows=r)[len(evaluation) - 1] for r in
            ((0, batch_size // 2), (batch_size // 2, batch_size))]
  assert_equal(evaluation[len(evaluation) - 1], {k: np.concatenate([h[k] for h in halves]) for k in halves[0]})


def test_evaluation_of_a_store_shorter_than_a_sequence():
  data, stores = stores_of(length=100_000)
  batch, = EvalBatches(stores.valid[0], data, 2, BYTE)
  assert batch['mask_BT'].sum() == stores.valid[0].n_tokens - 1
  for packing, objective in OBJECTIVES:
    data, stores = stores_of(packing=packing)
    assert sum(b['mask_BT'].sum() for b in EvalBatches(stores.valid[0], data, 4, BYTE, objective)) > 0
  with pytest.raises(ConfigError, match='config.data.length: .*held-out text'):
    EvalBatches(stores.valid[0], stores_of(length=100_000)[0], 4, BYTE, 'span')


@pytest.mark.parametrize('packing', ['concat', 'pack'])
def test_names_are_those_of_the_documents_in_the_batch(packing):
  batches = make(packing=packing)
  names, batch = batches.names(7), batches(7)
  assert batches.names(7, (2, 5)) == names[2:5]
  for row, found in enumerate(names):
    starts = np.flatnonzero(batch['token_BT'][row] == BOS)
    texts = [(text_folder() / name).read_bytes() for name in found]
    assert all(bytes(batch['token_BT'][row, s + 1:s + 2].tolist()) in [t[:1] for t in texts] for s in starts[:-1])
    if packing == 'pack':
      assert len(found) >= batch['segment_BT'][row].max()           # a document's pieces may share a row


def test_threads_give_the_same_batches_and_tell_the_wait():
  batches = make(**mixture_of('pack'))
  with batches.prefetch(10**6, rows=(2, 7)) as prefetched:
    for step in range(10**6, 10**6 + 20):
      got, batch = next(prefetched)
      assert got == step
      assert_equal(batch, batches(step, (2, 7)))
    waited = prefetched.waited
    assert 0 < waited < 60
    time.sleep(0.3)
    next(prefetched)
    assert prefetched.waited - waited < 0.2                         # what was ready is not waited for
  with pytest.raises(ValueError, match='closed'):
    next(prefetched)


def test_an_error_in_a_thread_reaches_the_loop():
  batches = make()
  batches.readers[0].read = lambda *_: 1 / 0
  with batches.prefetch(0) as prefetched, pytest.raises(ZeroDivisionError):
    next(prefetched)


def test_T11_workers_give_the_same_batches_and_a_killed_one_is_an_error_that_names_it():
  batches = make('masked', packing='pack')
  with batches.prefetch(40, workers=2, buffer=2) as prefetched:
    for step in range(40, 46):
      got, batch = next(prefetched)
      assert got == step
      assert_equal(batch, batches(step))
    victim = sorted(prefetched._workers)[0]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f'data worker process {victim} died .SIGKILL') as e:
      for _ in range(100):
        next(prefetched)
    assert time.monotonic() - start < 5 and '\n' not in str(e.value)


SCRIPT = '''
import sys
sys.path.insert(0, 'tests')
import batches_test as t
if {guard}:
  with t.make().prefetch(0, workers=1) as prefetched:
    for _ in range(3):
      step, batch = next(prefetched)
    t.assert_equal(batch, t.make()(step))
    print('fine', step)
'''


@pytest.mark.slow
@pytest.mark.parametrize('how', ['script', 'stdin', 'command', 'no guard'])
def test_workers_start_from_scripts_notebooks_and_the_command_line(tmp_path, how):
  code = textwrap.dedent(SCRIPT).format(guard='1' if how in ('no guard', 'stdin') else "__name__ == '__main__'")
  (tmp_path / 'script.py').write_text(code)
  args = {'stdin': ['-'], 'command': ['-c', code]}.get(how, [str(tmp_path / 'script.py')])
  root = pathlib.Path(__file__).resolve().parents[1]
  done = subprocess.run([sys.executable, *args], input=code, capture_output=True, text=True, timeout=120, cwd=root,
                        env={**os.environ, 'PYTHONPATH': str(root)})
  assert done.stdout.strip() == 'fine 2', done.stderr
