"""The tokenizer of a run: what it learns from, that it is trained once, and that nothing stale is used."""
import dataclasses
import random

import pytest

from llm_jax import config as config_lib
from llm_jax.data import prepare, sources, store
from llm_jax.data import tokenizer as tokenizer_lib


def config(folder, data=(), **tokenizer):
  kind = dict(kind='sentencepiece', vocab_size=300, train_mb=0.05)
  return config_lib.Config(
      data=config_lib.Data(**{**dict(source='text', path=str(folder / 'data'), valid_fraction=0.3,
                                     cache_dir=str(folder / 'cache')), **dict(data)}),
      tokenizer=config_lib.Tokenizer(**{**kind, **tokenizer}))


@pytest.fixture
def folder(tmp_path):
  """40 files; the letters of file i come from no other, so that texts tell where they are from."""
  (tmp_path / 'data').mkdir()
  for i in range(40):
    rng = random.Random(i)
    words = [''.join(chr(0x4e00 + 50 * i + rng.randrange(30)) for _ in range(3)) for _ in range(20)]
    (tmp_path / 'data' / f'{i:02}.txt').write_text(' '.join(rng.choice(words) for _ in range(100)) + '\n')
  return tmp_path


@pytest.fixture
def built(monkeypatch):
  """Counts trainings: the list of what each was given."""
  build, calls = tokenizer_lib.build, []

  def counted(tokenizer, texts):
    texts = list(texts)
    calls.append(texts)
    return build(tokenizer, texts)
  monkeypatch.setattr(tokenizer_lib, 'build', counted)
  return calls


def pieces(cfg, budget):
  source = config_lib.Source(cfg.data.source, cfg.data.path)
  return prepare._spread(cfg, source, budget)


def test_trained_once_and_again_where_anything_that_decides_it_changes(folder, built):
  cfg = config(folder)
  first = prepare.tokenizer(cfg)
  assert prepare.tokenizer(cfg).fingerprint == first.fingerprint
  assert prepare.tokenizer(dataclasses.replace(cfg, train=config_lib.Train(seed=7))).fingerprint == first.fingerprint
  assert len(built) == 1
  for changed in (config(folder, vocab_size=310), config(folder, algorithm='unigram'), config(folder, train_mb=0.01),
                  config(folder, dict(valid_fraction=0.2)), config(folder, dict(valid='tail'))):
    prepare.tokenizer(changed)
  assert len(built) == 6
  path = folder / 'data' / '07.txt'
  path.write_text('something new ' * 500)
  assert prepare.tokenizer(cfg).fingerprint != first.fingerprint
  assert len(built) == 7
  names = [p.name for p in (folder / 'cache' / 'tokenizers').iterdir()]
  assert len(names) == 7 and not any(name.startswith('tmp') for name in names)


def test_a_killed_training_leaves_nothing_that_is_taken_for_a_tokenizer(folder, built, monkeypatch):
  save = tokenizer_lib.SentencePiece.save

  def killed(self, target):
    save(self, target)
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_lib.SentencePiece, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
      prepare.tokenizer(config(folder))
  prepare.tokenizer(config(folder))
  assert len(built) == 2


def test_bytes_and_loaded_tokenizers_read_no_data(tmp_path):
  assert prepare.tokenizer(config(tmp_path, kind='byte')).kind == 'byte'
  assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('valid', ['hash', 'tail'])
def test_no_held_out_text_is_learnt_from(folder, valid):
  """What the tokenizer sees and what the store holds out have no letter in common, but for the file that is cut."""
  cfg = config(folder, dict(valid=valid))
  seen = set(''.join(pieces(cfg, 10**6)))
  tokenizer = tokenizer_lib.build(config_lib.Tokenizer(kind='byte'), ())
  held_out, = store.prepare(cfg.data, tokenizer, progress='none').valid
  text = tokenizer.decode(held_out.tokens)
  assert len(text) > 1000
  shared = seen & set(text) - set(' \n')
  assert len({(ord(c) - 0x4e00) // 50 for c in shared}) <= (valid == 'tail')


@pytest.mark.parametrize('budget', [500, 3000, 9000, 10**6])
def test_a_sample_is_spread_evenly_within_its_budget(folder, budget, monkeypatch):
  monkeypatch.setattr(prepare, 'PIECE', 64)
  cfg = config(folder, dict(valid='given', valid_path='x'))
  everything = ''.join(d.text for d in sources.documents(config_lib.Source('text', cfg.data.path)))
  sample = pieces(cfg, budget)
  size = sum(map(len, sample))
  assert 0.7 * min(budget, len(everything)) <= size <= budget
  places = [everything.index(piece) for piece in sample]
  assert places == sorted(places)
  gaps = [b - a for a, b in zip([0, *places], [*places, len(everything)])]
  assert max(gaps) <= 3 * 64 * max(1, len(everything) / size)


def test_a_huge_source_is_not_read_to_its_end(folder, monkeypatch):
  monkeypatch.setattr(prepare, 'READ_AT_MOST', 3)
  read = []
  documents = sources.documents
  monkeypatch.setattr(sources, 'documents', lambda *a, **k: (read.append(d) or d for d in documents(*a, **k)))
  pieces(config(folder), 1000)
  assert 5 < len(read) < 20


def test_the_alphabet_covers_what_is_held_out(folder):
  """Both where it is a share of the documents and where it is given, with characters of its own."""
  (folder / 'other.txt').write_text('\U0001f600 held out\n')
  for data in (dict(valid='hash'), dict(valid='tail'), dict(valid='given', valid_path=str(folder / 'other.txt'))):
    cfg = config(folder, data, kind='char')
    tokenizer = prepare.tokenizer(cfg)
    stores = store.prepare(cfg.data, tokenizer, progress='none')
    assert stores.valid[0].n_tokens > 5
  (folder / 'other.txt').write_text('\U0001f601 another\n')       # and a changed one is not stale
  assert 0x1f601 in map(ord, prepare.tokenizer(cfg).alphabet)


def test_sources_of_a_mixture_count_by_their_weight(folder):
  for name, letter in (('a', 'a'), ('b', 'b')):
    (folder / name).mkdir()
    (folder / name / 'text.txt').write_text((letter * 99 + '\n') * 1000)
  mixture = (config_lib.Source('text', str(folder / 'a'), weight=3.0), config_lib.Source('text', str(folder / 'b')))
  cfg = config(folder, dict(source='mixture', path='', mixture=mixture, valid='tail', valid_fraction=0.01))
  text = ''.join(prepare.texts(cfg, [(s, 'train') for s in mixture]))
  assert 2 < text.count('a') / text.count('b') < 4
