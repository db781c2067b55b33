"""Tokenizers out of model files: the ids of tiktoken, tokenizers and sentencepiece, GGUF and back, broken files."""
import base64
import copy
import gzip
import json
import os
import pathlib

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared import DATA, needs_data
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax import config
from llm_jax.config import ConfigError
from llm_jax.data import tokenizer
from llm_jax.data.hf import HuggingFace
from llm_jax.interop import vocabulary

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
MADE = ['def f(x):\n    return x + 12345\n' * 20, 'the cat sat on the mat; the Hat\'s 1,024 hats\n' * 20,
        'Füße, 日本語 и русский текст 🎉 ½²\n' * 20]
CODE = (pathlib.Path(os.__file__).parent / 'argparse.py').read_text()[:30_000]


def texts(size=6_000):
  """Seven languages where the data is, and 20 files of the standard library."""
  folder = pathlib.Path(os.__file__).parent
  code = [folder / f'{name}.py' for name in (
      'abc argparse ast bisect calendar codecs copy csv datetime dis enum functools gzip heapq inspect json/decoder '
      'locale os re/_parser textwrap').split()]
  files = [*sorted((DATA / 'debian_handbook_multilingual').glob('*.txt')), *filter(pathlib.Path.is_file, code)]
  assert len(files) >= 18
  return [*MADE, *(f.read_text()[:size] for f in files)]


def same(a, b, on):
  assert [ids.tolist() for ids in a.encode_batch(on)] == [ids.tolist() for ids in b.encode_batch(on)]


def trained(pre, size=400):
  """A small byte-level BPE as a tokenizers.Tokenizer."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
  made.train_from_iterator([*MADE, CODE], trainers.BpeTrainer(
      vocab_size=size, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return made


def byte_level(**kwargs):
  return pre_tokenizers.ByteLevel(add_prefix_space=False, **kwargs)


def split(regex):
  return pre_tokenizers.Split(tokenizers.Regex(regex), 'isolated')


def smollm():
  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


def header(made, pre):
  """GGUF fields of a tokenizers BPE, written independently of gguf_fields."""
  model = json.loads(made.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre, 'tokenizer.ggml.tokens': tokens,
          'tokenizer.ggml.merges': merges, 'tokenizer.ggml.token_type': [3 if t in SPECIAL else 1 for t in tokens],
          'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.padding_token_id': 2}


def llama(tmp_path, **options):
  """A small SentencePiece model's bytes."""
  import sentencepiece
  (tmp_path / 'text').write_text(''.join([*MADE, CODE]))
  sentencepiece.SentencePieceTrainer.train(**dict(
      input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'm'), vocab_size=400, model_type='bpe', minloglevel=2,
      byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False,
      hard_vocab_limit=False, user_defined_symbols=['<|im_end|>', '<table>']) | options)
  return (tmp_path / 'm.model').read_bytes()


@pytest.fixture(scope='module')
def small():
  return vocabulary.from_gguf(header(trained(smollm()), 'smollm'))


PRES = {'gpt-2': byte_level(), 'smollm': smollm(),
        'qwen2': pre_tokenizers.Sequence([split(vocabulary.QWEN), byte_level(use_regex=False)]),
        'llama-bpe': pre_tokenizers.Sequence([split(vocabulary.LLAMA3), byte_level(use_regex=False)]),
        'falcon': pre_tokenizers.Sequence([pre_tokenizers.Punctuation('contiguous'), byte_level(),
                                           pre_tokenizers.Digits(), split('[0-9][0-9][0-9]')])}


@pytest.mark.parametrize('name', PRES)
def test_a_gguf_vocabulary_equals_hugging_faces_spelling_of_its_pre_tokenizer(name):
  made = trained(PRES[name])
  t = vocabulary.from_gguf(header(made, name))
  assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id) == (400, 1, 2, 2)
  for text, ids in zip(texts(), t.encode_batch(texts())):
    assert ids.tolist() == made.encode(text, add_special_tokens=False).ids
    assert t.decode(ids) == text
  assert t.decode([1, *t.encode('the 12'), 2]) == 'the 12'


@pytest.mark.parametrize('name', [name for name in PRES if name != 'falcon'])
def test_a_byte_level_tokenizer_goes_through_gguf(name):
  made = trained(PRES[name])
  said = json.loads(made.to_str())
  said['added_tokens'].append(said['added_tokens'][0] | dict(id=400, content='<tool>', special=False))
  said['model']['ignore_merges'] = name in ('qwen2', 'llama-bpe')     # Qwen's changes nothing: merging reaches all
  t = HuggingFace(json.dumps(said).encode(), dict(bos='<|im_start|>', eos='<|im_end|>'))
  fields = vocabulary.gguf_fields(t, 512)
  assert fields['tokenizer.ggml.pre'] == name and len(fields['tokenizer.ggml.tokens']) == 512
  assert fields['tokenizer.ggml.tokens'][399:402] == [made.id_to_token(399), '<tool>', '[PAD401]']
  assert fields['tokenizer.ggml.token_type'] == [3] * 3 + [1] * 397 + [4] + [5] * 111
  assert 'tokenizer.ggml.padding_token_id' not in fields
  back = vocabulary.from_gguf(fields)
  assert (back.vocab_size, back.bos_id, back.eos_id, back.pad_id) == (401, 1, 2, 0)
  same(t, back, [*texts(), 'a <tool>b', '[PAD401]'])
  assert back.encode('a <tool>b')[-2] == 400


def test_what_gguf_cannot_name_is_refused(tmp_path, small):
  numbers = pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level()])
  for pre in (numbers, pre_tokenizers.ByteLevel(add_prefix_space=True),
              pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level()])):
    t = HuggingFace(trained(pre).to_str().encode(), {})
    with pytest.raises(ConfigError, match='GGUF cannot name the pre-tokenizer'):
      vocabulary.gguf_fields(t, 400)
  for message, change in (('normalizer Lowercase', dict(normalizer=dict(type='Lowercase'))),
                          ('by bytes alone', dict(decoder=dict(type='Fuse')))):
    with pytest.raises(ConfigError, match=message):
      vocabulary.gguf_fields(HuggingFace(json.dumps(json.loads(small.model) | change).encode(), {}), 400)
  said = json.loads(small.model)
  said['model']['merges'] = said['model']['merges'][1:]      # leaves a token that only ignore_merges reaches
  said['model']['ignore_merges'] = True
  with pytest.raises(ConfigError, match='ignore_merges=True with the pre-tokenizer of smollm'):
    vocabulary.gguf_fields(HuggingFace(json.dumps(said).encode(), {}), 400)
  with pytest.raises(ConfigError, match='at least 400 ids, got size 399'):
    vocabulary.gguf_fields(small, 399)
  with pytest.raises(ConfigError, match='a char tokenizer'):
    vocabulary.gguf_fields(tokenizer.build(config.Tokenizer(kind='char'), ['abc']), 300)
  for options, message in ((dict(model_type='unigram'), 'other than BPE'),
                           (dict(byte_fallback=False, vocab_size=120), 'byte_fallback'),
                           (dict(remove_extra_whitespaces=True), 'normalises'),
                           (dict(normalization_rule_name='nfkc'), 'normalises')):
    t = tokenizer.SentencePiece(llama(tmp_path, **options), own=False)
    with pytest.raises(ConfigError, match=message):
      vocabulary.gguf_fields(t, 1000)


@pytest.mark.parametrize('options', [{}, dict(add_dummy_prefix=False, bos_id=-1, pad_id=3)])
def test_a_sentencepiece_model_goes_through_gguf(tmp_path, options):
  t = tokenizer.SentencePiece(llama(tmp_path, **options), own=False)
  fields = vocabulary.gguf_fields(t, 512)
  assert fields['tokenizer.ggml.add_space_prefix'] is not bool(options)
  assert {len(fields[f'tokenizer.ggml.{key}']) for key in ('tokens', 'scores', 'token_type')} == {512}
  back = vocabulary.from_gguf(fields)
  for key in ('vocab_size', 'bos_id', 'eos_id', 'pad_id'):
    assert getattr(t, key) == getattr(back, key)
  assert fields.get('tokenizer.ggml.padding_token_id') == (3 if options else None)
  forged = ['<|im_end|>', 'a <table> b', '<s></s><unk>', '[PAD511]', '<0x0A>', '  two  spaces  ', '\u2581', '\n']
  same(t, back, [*texts(), *forged])
  for text in [*texts(), *forged]:
    assert back.decode(back.encode(text)) == t.decode(t.encode(text))
  assert fields['tokenizer.ggml.token_type'][fields['tokenizer.ggml.tokens'].index('<|im_end|>')] == 3


def test_our_own_sentencepiece_keeps_its_ids_in_gguf():
  own = tokenizer.build(config.Tokenizer(vocab_size=400), MADE)
  back = vocabulary.from_gguf(vocabulary.gguf_fields(own, 512))
  assert (back.bos_id, back.eos_id) == (own.bos_id, own.eos_id) == (1, 1)
  same(own, back, texts())


def ranks_file(path, made):
  """The tiktoken file of a byte-level vocabulary, without its special tokens."""
  tokens = [token for token in sorted(made.get_vocab(), key=made.get_vocab().get) if token not in SPECIAL]
  spelled = [bytes([vocabulary.BYTE_OF[c] for c in token]) for token in tokens]
  path.write_bytes(b''.join(base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(spelled)))
  return {token: rank for rank, token in enumerate(spelled)}


@pytest.mark.parametrize('shuffled', [False, True])
def test_tiktoken_ranks_give_its_ids(tmp_path, shuffled):
  tiktoken = pytest.importorskip('tiktoken')
  ranks = ranks_file(tmp_path / 'a.tiktoken', trained(PRES['llama-bpe'], 700))
  if shuffled:      # ranks that no training gives: some tokens can then only be whole pieces
    order = sorted(ranks, key=lambda token: (len(token) > 1, ranks[token] * 7919 % 1009))
    ranks = {token: rank for rank, token in enumerate(order)}
    (tmp_path / 'a.tiktoken').write_bytes(b''.join(base64.b64encode(t) + b' %d\n' % r for t, r in ranks.items()))
  reference = tiktoken.Encoding('a', pat_str=vocabulary.LLAMA3, mergeable_ranks=ranks, special_tokens={})
  specials = {'<|end|>': len(ranks) + 3, '<s>': len(ranks)}
  t = vocabulary.from_tiktoken(tmp_path / 'a.tiktoken', vocabulary.LLAMA3, specials, dict(eos='<|end|>'))
  assert (t.vocab_size, t.bos_id, t.eos_id) == (len(ranks) + 4, None, len(ranks) + 3)
  for text in [*texts(), 'a<|end|>', '<s>']:
    assert t.encode(text).tolist() == reference.encode_ordinary(text)
    assert t.decode(t.encode(text)) == text


def test_llama_3s_own_file_gets_the_special_tokens_that_meta_has_in_code(tmp_path, monkeypatch):
  n = len(ranks_file(tmp_path / 'tokenizer.model', trained(PRES['llama-bpe'])))
  monkeypatch.setattr(vocabulary, 'LLAMA3_RANKS', n)
  t = vocabulary.from_folder(tmp_path)
  assert (t.vocab_size, t.bos_id, t.eos_id) == (n + 256, n, n + 1)
  names = {token['content']: token['id'] for token in json.loads(t.model)['added_tokens']}
  assert len(names) == 256 and names['<|end_header_id|>'] == n + 7 and names['<|eot_id|>'] == n + 9
  assert [names[f'<|reserved_special_token_{k}|>'] for k in (0, 3, 4, 5, 250)] == [n + 2, n + 5, n + 8, n + 10, n + 255]
  assert min(names.values()) > max(t.encode('<|eot_id|>'))
  assert vocabulary.gguf_fields(t, n + 256)['tokenizer.ggml.pre'] == 'llama-bpe'


def qwen(folder, most):
  """Qwen 3's files with its first tokens, all special ids as they are."""
  lines = gzip.decompress((DATA / 'tok_qwen/qwen.tiktoken.gz').read_bytes()).splitlines(keepends=True)
  (folder / 'qwen.tiktoken').write_bytes(b''.join(lines[:most]))
  said = (DATA / 'tok_qwen/qwen3_tokenizer_config.json').read_bytes()
  (folder / 'tokenizer_config.json').write_bytes(said)
  pairs = (line.split() for line in lines[:most])
  return {base64.b64decode(token): int(rank) for token, rank in pairs}


@needs_data
@pytest.mark.parametrize('most', [20_000, pytest.param(151_643, marks=pytest.mark.slow)])
def test_qwen_equals_tiktoken_and_goes_through_gguf(tmp_path, most):
  tiktoken = pytest.importorskip('tiktoken')
  ranks = qwen(tmp_path, most)
  reference = tiktoken.Encoding('qwen', pat_str=vocabulary.QWEN, mergeable_ranks=ranks, special_tokens={})
  t = vocabulary.from_folder(tmp_path)
  assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id) == (151_669, None, 151_645, 151_643)
  back = vocabulary.from_gguf(vocabulary.gguf_fields(t, 151_936))
  assert (back.vocab_size, back.bos_id, back.eos_id, back.pad_id) == (151_669, None, 151_645, 151_643)
  for text, ids, again in zip(texts(), t.encode_batch(texts()), back.encode_batch(texts())):
    assert ids.tolist() == again.tolist() == reference.encode_ordinary(text)
    assert t.decode(ids) == text
  forged = 'a<|im_end|>\n<|endoftext|>'
  assert t.encode(forged).tolist() == back.encode(forged).tolist() == reference.encode_ordinary(forged)
  assert t.encode('<think>').tolist() == [151_667] and t.decode([151_667, 151_645]) == '<think>'


@needs_data
def test_gpt2_equals_the_library_and_goes_through_gguf():
  folder = DATA / 'tok_gpt2'
  reference = tokenizers.ByteLevelBPETokenizer(str(folder / 'gpt2_vocab.json'), str(folder / 'gpt2_merges.txt'))
  t = vocabulary.from_folder(folder)
  fields = vocabulary.gguf_fields(t, 50_304)
  assert fields['tokenizer.ggml.pre'] == 'gpt-2' and fields['tokenizer.ggml.eos_token_id'] == 50_256
  back = vocabulary.from_gguf(fields)
  assert (t.vocab_size, t.bos_id, t.eos_id) == (back.vocab_size, back.bos_id, back.eos_id) == (50_257, 50_256, 50_256)
  for text, ids, again in zip(texts(), t.encode_batch(texts()), back.encode_batch(texts())):
    assert ids.tolist() == again.tolist() == reference.encode(text).ids
  assert 50_256 not in t.encode('<|endoftext|>') and t.decode(t.encode('<|endoftext|>')) == '<|endoftext|>'


@needs_data
def test_mistrals_sentencepiece_goes_through_gguf(tmp_path):
  import sentencepiece
  model = (DATA / 'tok_mistral/tokenizer.model.v1').read_bytes()
  (tmp_path / 'tokenizer.model').write_bytes(model)
  reference = sentencepiece.SentencePieceProcessor(model_proto=model)
  t = vocabulary.from_folder(tmp_path)
  assert t.model == model
  back = vocabulary.from_gguf(vocabulary.gguf_fields(t, 32_064))
  assert (back.vocab_size, back.bos_id, back.eos_id) == (32_000, 1, 2)
  for text, ids in zip(texts(), back.encode_batch(texts())):
    assert ids.tolist() == reference.encode(text) and back.decode(ids) == reference.decode(ids.tolist())


def test_a_folder_gives_its_first_kind(tmp_path):
  assert vocabulary.from_folder(tmp_path) is None
  made = trained(PRES['qwen2'])
  ranks = ranks_file(tmp_path / 'some.tiktoken', made)
  with pytest.raises(ConfigError, match='Llama 3, Qwen or cl100k'):
    vocabulary.from_folder(tmp_path)
  said = dict(tokenizer_class='Qwen2Tokenizer', eos_token='<|im_end|>', bos_token=None, added_tokens_decoder={
      str(len(ranks) + i): dict(content=name, special=name != '<tool>') for i, name in enumerate([*SPECIAL, '<tool>'])})
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
  from_ranks = vocabulary.from_folder(tmp_path)
  (tmp_path / 'some.tiktoken').rename(tmp_path / 'tokenizer.model')
  from_model = vocabulary.from_folder(tmp_path)      # as Llama 3's original
  (tmp_path / 'tokenizer.model').unlink()
  model = json.loads(made.to_str())['model']
  ids = {token: i - 3 if i >= 3 else len(ranks) + i for token, i in model['vocab'].items()}
  (tmp_path / 'vocab.json').write_text(json.dumps({token: i for token, i in ids.items() if token not in SPECIAL}))
  pairs = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *pairs, '']))
  from_merges = vocabulary.from_folder(tmp_path)
  for t in (from_ranks, from_model, from_merges):
    assert (t.vocab_size, t.bos_id, t.eos_id) == (len(ranks) + 4, None, len(ranks) + 2)
    same(t, from_merges, MADE)
    assert t.encode('<tool>').tolist() == [len(ranks) + 3] and not {*range(len(ranks), len(ranks) + 3)} & {
        *t.encode(''.join(SPECIAL)).tolist()}
  del said['added_tokens_decoder']
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
  names = {name: len(ranks) + i for i, name in enumerate([*SPECIAL, '<tool>'])}
  (tmp_path / 'added_tokens.json').write_text(json.dumps(names))
  from_added = vocabulary.from_folder(tmp_path)
  same(from_added, from_merges, [*MADE, *SPECIAL, '<tool>'])
  assert from_added.eos_id == len(ranks) + 2 and from_added.decode([from_added.eos_id]) == ''
  (tmp_path / 'tokenizer.json').write_text(trained(byte_level()).to_str())
  assert vocabulary.from_folder(tmp_path).eos_id == 2
  (tmp_path / 'tokenizer.json').unlink()
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said | dict(tokenizer_class='CLIPTokenizer')))
  with pytest.raises(ConfigError, match='got CLIPTokenizer; add its tokenizer.json'):
    vocabulary.from_folder(tmp_path)


def test_tokens_added_to_a_sentencepiece_model_are_respected(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(llama(tmp_path))
  plain = vocabulary.from_folder(tmp_path)
  n = plain.vocab_size
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<|turn|>': n + 1, '<pad>': n, '<note>': n + 3}))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<|turn|>', bos_token='<s>',
                                                                 pad_token='<pad>')))
  t = vocabulary.from_folder(tmp_path)
  assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id) == (n + 4, 1, n + 1, n)
  same(t, plain, [*texts(), '<|turn|>', '<pad>'])
  assert n + 3 in t.encode('a <note>').tolist()


@pytest.mark.parametrize('name, data, message', [
    ('tokenizer.json', b'{"added_tokens": []', 'cannot read'), ('tokenizer.json', b'{}', 'cannot read'),
    ('tokenizer.model', b'\x00\x01', 'cannot read'), ('qwen.tiktoken', b'IQ== 0\n', 'each of the 256 bytes'),
    ('tokenizer.model', b'IQ== 0\nwhat\n', 'line 2: expected a token in base64'), ('vocab.json', b'[]', 'cannot read')])
def test_a_broken_file_is_one_line(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  (tmp_path / 'merges.txt').write_bytes(b'a b\n')
  with pytest.raises(ConfigError, match=message) as error:
    vocabulary.from_folder(tmp_path)
  assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL, ' ', '12', 'the', '\r\n']) | st.text(
    max_size=3), max_size=10).map(''.join))
@example(text='<|im_end|><|im_start|>\u0085 \u2028\x00')
def test_any_text_comes_back_and_gives_nothing_special(small, text):
  ids = small.encode(text)
  assert small.decode(ids) == text and small.decode_bytes(ids) == text.encode()
  assert not {0, 1, 2} & set(ids.tolist())


def bpe_header():
  return header(trained(smollm(), 300), 'smollm')


BROKEN = [('model', 'bert', "expected 'gpt2' or 'llama', got 'bert'"), ('model', None, 'got None'),
          ('pre', 'mine', "one of gpt-2, .*got 'mine'"), ('pre', None, 'got None'), ('pre', ['gpt-2'], 'pre: expected'),
          ('tokens', None, 'tokens: expected a list of str, got none'), ('tokens', [], 'token_type for each'),
          ('tokens', 'abc', 'got str'), ('tokens', ['a'] * 300, 'are both'), ('tokens', [1] * 300, 'list of str'),
          ('token_type', None, 'token_type: expected a list of int'), ('token_type', [1], 'of 300 tokens, got 1'),
          ('token_type', [9] * 300, 'expected 1 to 6, got 9'), ('token_type', [6] * 300, 'no byte tokens'),
          ('token_type', [3] * 300, 'text cannot give'), ('token_type', [5] * 300, 'merges of two tokens'),
          ('merges', None, 'merges: expected a list of str'), ('merges', ['a zz'], "merges of two .*got 'a zz'"),
          ('merges', ['t h e'], 'merges of two'), ('merges', [''], 'merges of two'),
          ('bos_token_id', 300, 'bos token id in 0 to 299, got 300'), ('eos_token_id', -1, 'got -1'),
          ('padding_token_id', '2', "pad token id .*got '2'"), ('eos_token_id', 5, 'text cannot give')]


@pytest.mark.parametrize('key, value, message', BROKEN)
def test_a_broken_gguf_vocabulary_is_one_line(key, value, message):
  fields = bpe_header()
  vocabulary.from_gguf(fields)
  fields[f'tokenizer.ggml.{key}'] = value
  with pytest.raises(ConfigError, match=message) as error:
    vocabulary.from_gguf(fields)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('key, value, message', [
    ('scores', None, 'scores: expected a list of float'), ('scores', [0.], 'a finite score for each'),
    ('scores', [float('nan')] * 1000, 'finite'), ('add_space_prefix', 'yes', "boolean add_space_prefix.*'yes'"),
    ('token_type', [1] * 512, 'one unknown token'), ('tokens', ['a'] * 512, 'cannot read')])
def test_a_broken_gguf_sentencepiece_is_one_line(tmp_path, key, value, message):
  t = tokenizer.SentencePiece(llama(tmp_path), own=False)
  fields = vocabulary.gguf_fields(t, 512)
  fields[f'tokenizer.ggml.{key}'] = value
  with pytest.raises(ConfigError, match=message):
    vocabulary.from_gguf(fields)


def test_roles_are_special_whatever_their_type():
  fields = bpe_header()
  fields['tokenizer.ggml.token_type'][:3] = [4, 1, 4]
  t = vocabulary.from_gguf(fields)
  assert not {1, 2} & set(t.encode('<|im_start|><|im_end|>').tolist()) and t.decode([1, 2]) == ''
  assert t.encode('<|endoftext|>').tolist() == [0]


def test_a_special_token_that_is_a_whole_piece_is_refused():
  made = trained(PRES['llama-bpe'], 300)
  fields = header(made, 'llama-bpe')
  fields['tokenizer.ggml.tokens'].append('Ġzebra')
  fields['tokenizer.ggml.token_type'].append(3)
  with pytest.raises(ConfigError, match="'Ġzebra' comes out of it"):
    vocabulary.from_gguf(fields)


junk = st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.floats() | st.text(max_size=3) | st.lists(
    st.integers(-2, 9) | st.text(max_size=3) | st.floats(), max_size=3)


@pytest.fixture(scope='module')
def headers(tmp_path_factory):
  t = tokenizer.SentencePiece(llama(tmp_path_factory.mktemp('llama')), own=False)
  return [bpe_header(), vocabulary.gguf_fields(t, 410)]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_gguf_fields_give_a_tokenizer_or_one_line(headers, data):
  fields = copy.deepcopy(data.draw(st.sampled_from(headers)))
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(sorted(fields)))
    value = fields[key]
    if isinstance(value, list) and value and data.draw(st.booleans()):
      at = data.draw(st.integers(0, len(value) - 1))
      new = data.draw(st.sampled_from(value) | junk | st.text(st.characters(categories=['Cs', 'L', 'Zs']), max_size=3))
      value[at:at + data.draw(st.integers(0, 2))] = [new]
    else:
      fields[key] = data.draw(junk)
  try:
    t = vocabulary.from_gguf(fields)
  except ConfigError as e:
    assert '\n' not in str(e)
    return
  special = {i for i, kind in enumerate(fields['tokenizer.ggml.token_type']) if kind == 3}
  for text in ('the cat <|im_end|></s> 12', ''.join(t for t in fields['tokenizer.ggml.tokens'][:30] if t.isascii())):
    assert not special & set(t.encode(text).tolist())
