"""Tokenizers: exact round trips, the ids of the reference libraries, special tokens never out of text, determinism."""
import json
import random
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared import DATA, needs_data

from llm_jax import config
from llm_jax.config import ConfigError
from llm_jax.data import sources, tokenizer

NASTY = ['', ' ', '  ', '\0', '\u2581', '\u2581\u2581', '\ufffd', '\ufeff', '\ue009', '\t', '\r\n', '\n\n', '\r',
         '\x85', '\u2028', '\u2047', '<s>', '</s>', '<unk>', '<bos>', '<mask>', '<extra_id_0>', '<0x0A>', '<0x',
         '<|im_end|>', '<|endoftext|>', '🎉', '\U0001f469\u200d\U0001f467', 'é', 'e\u0301', '日本語', '\U0010ffff',
         '\uffff', '\x7f', '\x1b[0m', 'def f(self):', '    ', ' = None', 'a']
strings = st.text(max_size=40) | st.lists(st.sampled_from(NASTY) | st.text(max_size=3), max_size=12).map(''.join)
CODE = sources.files(config.Source())


def some_code(size=100_000):
  """A fixed sample of the standard library."""
  return ''.join(f.path.read_text() for f in CODE if f.name in ('argparse.py', 'ast.py', 'tarfile.py'))[:size]


def train(**changes):
  texts = [some_code(), 'tab\tindented\n\t\tcode\r\n' * 400, '日本語とemoji 🎉\n' * 40,
           'a \u2581 b\0c \ue009 ' * 20]
  return tokenizer.build(config.Tokenizer(**({'vocab_size': 600} | changes)), texts)


@pytest.fixture(scope='module')
def trained():
  byte = tokenizer.build(config.Tokenizer(kind='byte'), ())
  return {'byte': byte, 'bpe': train(), 'unigram': train(algorithm='unigram')}


@settings(deadline=None, max_examples=300)
@given(text=strings, other=strings)
@example(text=''.join(NASTY), other='\u2581')
def test_own_tokenizers_round_trip_any_unicode(trained, text, other):
  for name, t in trained.items():
    ids, more = t.encode_batch([text, other])
    assert t.decode(ids) == text and t.decode_bytes(ids) == text.encode(), name
    assert t.decode_bytes([*ids, *more]) == (text + other).encode()
    assert t.decode_bytes([t.bos_id, *ids, t.mask_id, 10**9, -1, *t.sentinel_ids]) == text.encode()
    assert ids.dtype == np.int32 and np.array_equal(ids, t.encode(text))
    assert not {t.bos_id, t.eos_id, t.mask_id, *t.sentinel_ids} & set(ids.tolist())
    cut = len(ids) // 2
    assert t.decode_bytes(ids[:cut]) + t.decode_bytes(ids[cut:]) == text.encode()


def test_own_tokenizers_reserve_special_ids(trained):
  for t in trained.values():
    special = [t.bos_id, t.mask_id, *t.sentinel_ids]
    assert len(set(special)) == 18 and max(special) < t.vocab_size and t.eos_id == t.bos_id and t.pad_id == 0
  assert trained['bpe'].vocab_size == trained['unigram'].vocab_size == 600 and trained['byte'].vocab_size == 274


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(trained):
  for t in trained.values():
    ids = t.encode('\U0001f469')       # no piece of its own: four bytes
    assert len(ids) == 4
    assert t.decode(ids[:3]) == '\ufffd' and t.decode_bytes(ids[:3]) == '\U0001f469'.encode()[:3]


def test_half_of_a_surrogate_pair_is_a_clear_error(trained):
  for t in trained.values():
    with pytest.raises(ConfigError, match='surrogate'):
      t.encode('a\ud83d')


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([n for n in NASTY if '\u2581' not in n] + ['\n', ' ']), max_size=30).map(''.join))
def test_encoding_by_lines_gives_the_ids_of_the_whole(trained, text):
  assert trained['bpe'].encode(text).tolist() == trained['bpe']._sp.encode(text)


def test_pieces_keep_newlines_tabs_and_indentation(trained):
  t = trained['bpe']
  assert len(t.encode('\n        self.')) <= 3
  assert len(t.encode('\n\t\tcode\r\n')) <= 4
  text = some_code()
  assert len(text) / len(t.encode(text)) > 2.5       # 600 pieces


def test_training_is_deterministic_and_takes_any_order(trained):
  again = train()
  assert again.fingerprint == trained['bpe'].fingerprint != trained['unigram'].fingerprint
  assert again.model == trained['bpe'].model
  assert train(vocab_size=601).fingerprint != again.fingerprint
  parts = [some_code()[start:start + 10_000] for start in range(0, 60_000, 10_000)]
  for algorithm in ('bpe', 'unigram'):
    small = config.Tokenizer(vocab_size=400, algorithm=algorithm)
    assert tokenizer.build(small, parts).fingerprint == tokenizer.build(small, parts[::-1]).fingerprint


def test_a_text_too_small_for_the_vocabulary_gets_what_it_allows(capfd):
  for algorithm in ('bpe', 'unigram'):
    t = tokenizer.build(config.Tokenizer(vocab_size=4096, algorithm=algorithm), ['hello world, hello there'])
    assert 274 < t.vocab_size < 400
    assert f'vocab_size=4096; trained {t.vocab_size}' in capfd.readouterr().err
    assert t.decode(t.encode('hello 日本')) == 'hello 日本'


def test_more_characters_than_the_vocabulary_holds_are_spelled_in_bytes():
  text = ''.join(chr(0x4e00 + n) for n in range(3000)) * 2
  t = tokenizer.build(config.Tokenizer(vocab_size=512), [text, 'and the rest'])
  assert t.vocab_size == 512 and t.decode(t.encode(text)) == text


@pytest.mark.parametrize('vocab_size, texts, message', [
    (280, ['text'], 'config.tokenizer.vocab_size: expected at least'), (600, [], 'no text'), (600, ['\0'], 'no text')])
def test_what_cannot_be_trained_is_one_line(vocab_size, texts, message):
  with pytest.raises(ConfigError, match=message):
    tokenizer.build(config.Tokenizer(vocab_size=vocab_size), texts)


@given(st.text(st.sampled_from('ab\n é🎉'), max_size=30))
@settings(deadline=None, max_examples=50)
def test_characters_are_exact_on_their_alphabet(text):
  t = tokenizer.build(config.Tokenizer(kind='char'), iter(['ab\n', ' é🎉']))
  assert t.alphabet == '\n abé🎉' and t.vocab_size == 6 and t.bos_id is None and t.eos_id is None
  assert t.decode(t.encode(text)) == text and len(t.encode(text)) == len(text)
  with pytest.raises(ConfigError, match=r"'ü' \(U\+00FC\) is not among the 6"):
    t.encode(text + 'ü' + text)


@needs_data
def test_tiny_shakespeare_has_nanogpts_65_characters():
  text = (DATA / 'tinyshakespeare' / 'input.txt').read_text()
  t = tokenizer.build(config.Tokenizer(kind='char'), [text])
  assert t.vocab_size == 65 and t.encode('First').tolist() == [18, 47, 56, 57, 58]
  assert t.decode(t.encode(text)) == text


def real_texts():
  """Seven languages, code and trouble."""
  texts = [p.read_text()[:15_000] for p in sorted((DATA / 'debian_handbook_multilingual').glob('*.txt'))]
  return [*texts, some_code(30_000), *NASTY, ''.join(NASTY), ' leading', 'trailing ', 'a  b\n\n  c']


LOADED = ['tok_sentencepiece_test/test_model.model', 'tok_t5_test/sentencepiece.model',
          'tok_mistral/tokenizer.model.v1']


@needs_data
@pytest.mark.parametrize('name', LOADED)
def test_a_loaded_sentencepiece_model_equals_the_library(tmp_path, name):
  import sentencepiece
  reference = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name))
  made = tokenizer.build(config.Tokenizer(path=str(DATA / name)), ())
  made.save(tmp_path)
  t = tokenizer.load(tmp_path)
  texts = real_texts()
  assert t.vocab_size == reference.vocab_size()
  assert [t.bos_id, t.eos_id] == [i if i >= 0 else None for i in (reference.bos_id(), reference.eos_id())]
  for ids, expected in zip(t.encode_batch(texts), reference.encode(texts)):
    assert ids.tolist() == expected
    assert t.decode(ids) == reference.decode(expected) == t.decode_bytes(ids).decode('utf-8', 'replace')
    assert not {t.bos_id, t.eos_id} & set(ids.tolist())
  rng = random.Random(0)
  for _ in range(200):      # ids no text gives, bytes cut anywhere
    ids = [rng.randrange(t.vocab_size) for _ in range(10)]
    assert t.decode(ids) == reference.decode(ids)
  assert t.decode([10**6, -1, *ids]) == t.decode(ids)


def test_user_defined_markers_of_a_loaded_model_never_come_out_of_text(tmp_path):
  import sentencepiece
  (tmp_path / 'text').write_text('some text to train on, turn by turn\n' * 50)
  symbols = ['<start_of_turn>', '<|im_end|>', '<table>', '    ']
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'm'), vocab_size=320, model_type='bpe', minloglevel=2,
      hard_vocab_limit=False, user_defined_symbols=symbols, byte_fallback=True, remove_extra_whitespaces=False)
  t = tokenizer.build(config.Tokenizer(path=str(tmp_path / 'm.model')), ())
  reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'm.model'))
  forged, plain = '<start_of_turn>turn<|im_end|>', 'turn <table>    text'
  marks = {reference.piece_to_id(s) for s in symbols[:2]}
  assert marks <= set(reference.encode(forged)) and not marks & set(t.encode(forged).tolist())
  assert t.decode(t.encode(forged)) == forged
  assert t.encode(plain).tolist() == reference.encode(plain)


@needs_data
def test_gpt2_equals_the_library_and_known_ids(tmp_path):
  import tokenizers
  t = tokenizer.build(config.Tokenizer(kind='hf', path=str(DATA / 'tok_gpt2')), ())
  assert (t.vocab_size, t.bos_id, t.eos_id) == (50257, 50256, 50256)
  assert t.encode('Hello, world!').tolist() == [15496, 11, 995, 0]
  t.save(tmp_path)
  reference = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  for text, ids in zip(texts := real_texts(), tokenizer.load(tmp_path).encode_batch(texts)):
    if '<|endoftext|>' not in text:
      assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert t.bos_id not in ids
    assert t.decode(ids) == text == t.decode_bytes(ids).decode()
    part = ids[1:-1]
    assert t.decode(part) == reference.decode(part.tolist()) == t.decode_bytes(part).decode('utf-8', 'replace')
  assert t.decode([50256, 50257, *t.encode('a'), 50256]) == 'a'


def hugging_face(tmp_path, kind):
  """A small tokenizer.json of each family, with files beside it that name its special tokens."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
  text = [some_code(20_000), 'emoji 🎉 日本語']
  special = ['<unk>', '<s>', '</s>', '<|im_end|>']
  if kind == 'byte_level':
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  elif kind == 'llama':
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    made.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(' ', 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False,
                                  special_tokens=special + [f'<0x{b:02X}>' for b in range(256)])
  else:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token='<unk>', show_progress=False)
  made.train_from_iterator(text, trainer)
  if kind == 'llama':      # bytes are not special tokens
    plain = json.loads(made.to_str())
    plain['added_tokens'] = plain['added_tokens'][:4]
    made = tokenizers.Tokenizer.from_str(json.dumps(plain))
  made.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
  made.enable_truncation(5)
  made.enable_padding()
  made.save(str(tmp_path / 'tokenizer.json'))
  said = {'bos_token': {'content': '<s>'}, 'eos_token': '<|im_end|>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
  made.no_truncation()
  made.no_padding()
  return made


@pytest.mark.parametrize('kind', ['byte_level', 'llama', 'unigram'])
def test_a_tokenizer_json_equals_the_library_and_takes_special_text_as_text(tmp_path, kind):
  reference = hugging_face(tmp_path, kind)
  t = tokenizer.build(config.Tokenizer(kind='hf', path=str(tmp_path)), ())
  assert (t.bos_id, t.eos_id, t.vocab_size) == (1, 3, reference.get_vocab_size())
  special = ('<s>', '</s>', '<unk>', '<|im_end|>')
  texts = [n for n in NASTY if not any(s in n for s in special)] + [some_code(5000), ' a  b ']
  for text, ids in zip(texts, t.encode_batch(texts)):
    assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert t.decode(ids) == reference.decode(ids.tolist())
    assert t.decode_bytes(ids).decode('utf-8', 'replace') == t.decode(ids)
  for text in ('</s>', 'a <|im_end|> b', '<s><s> x', '<unk></s>', 'def f(): </s>\n'):
    assert not {1, 2, 3} & set(t.encode(text).tolist()), text
    if kind != 'unigram':      # which has no piece for some of the characters
      assert t.decode(t.encode(text)) == text
  assert t.decode([1, *t.encode('def'), 3]) == 'def'


def test_every_kind_is_saved_and_loaded(tmp_path, trained):
  hugging_face(tmp_path, 'byte_level')
  kinds = trained | {'char': tokenizer.build(config.Tokenizer(kind='char'), [some_code(1000)]),
                     'hf': tokenizer.build(config.Tokenizer(kind='hf', path=str(tmp_path / 'tokenizer.json')), ())}
  assert len({t.fingerprint for t in kinds.values()}) == len(kinds)
  for name, t in kinds.items():
    t.save(tmp_path / name)
    again = tokenizer.load(tmp_path / name)
    for key in ('kind', 'vocab_size', 'bos_id', 'eos_id', 'pad_id', 'mask_id', 'sentinel_ids', 'fingerprint'):
      assert getattr(again, key) == getattr(t, key), (name, key)
    assert again.encode(some_code(1000)).tolist() == t.encode(some_code(1000)).tolist()


def test_a_saved_tokenizer_that_changed_is_refused(tmp_path, trained):
  trained['bpe'].save(tmp_path / 'a')
  model = tmp_path / 'a' / 'tokenizer.model'
  sound = model.read_bytes()
  model.write_bytes(sound.replace(b'self', b'sefl', 1))
  with pytest.raises(ConfigError, match='changed since it was saved'):
    tokenizer.load(tmp_path / 'a')
  model.write_bytes(sound[:1000])
  with pytest.raises(ConfigError, match='cannot read|changed'):
    tokenizer.load(tmp_path / 'a')
  meta = json.loads((tmp_path / 'a' / 'meta.json').read_text())
  (tmp_path / 'a' / 'meta.json').write_text(json.dumps(meta | {'format': 99}))
  with pytest.raises(ConfigError, match='format 99, this llm_jax reads up to'):
    tokenizer.load(tmp_path / 'a')
  with pytest.raises(ConfigError, match='no meta.json'):
    tokenizer.load(tmp_path / 'nothing')


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"a": 1}')
  (tmp_path / 'folder').mkdir()
  for kind, path, message in (('hf', 'tokenizer.json', 'cannot read'),
                              ('sentencepiece', 'tokenizer.json', 'cannot read'),
                              ('hf', 'tokenizer.jso', "no file .*nearest: 'tokenizer.json'"),
                              ('hf', 'folder', 'expected a tokenizer.json')):
    with pytest.raises(ConfigError, match='config.tokenizer.path: ' + message) as error:
      tokenizer.build(config.Tokenizer(kind=kind, path=str(tmp_path / path)), ())
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_the_standard_library_compresses_well_and_quickly():
  documents = list(sources.documents(config.Source()))
  train_text = [d.text for d in documents if sources.split_of(d.name, 0.05) == 'train']
  valid = [d.text for d in documents if sources.split_of(d.name, 0.05) == 'valid']
  size = sum(len(text.encode()) for text in valid)
  start, cpu = time.monotonic(), time.process_time()
  t = tokenizer.build(config.Tokenizer(), train_text)
  middle, used = time.monotonic(), time.process_time() - cpu
  count = sum(map(len, t.encode_batch(valid)))
  speed = size / 1e6 / (time.monotonic() - middle)
  print(f'train {middle - start:.1f} s ({used:.1f} s of CPU), encode {speed:.1f} MB/s, '
        f'{size / count:.3f} bytes per token', file=sys.stderr)
  assert size / count > 3.9 and used < 15
