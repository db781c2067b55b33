"""Our tokenizers as transformers reads them, and Llama's tokenizer.json as GGUF's pieces: the same ids."""
import json
import pathlib
import sysconfig

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import DATA, needs_data
from vocabulary_test import texts

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.hf import HuggingFace
from llm_jax.interop import hf, pieces, vocabulary

LIBRARY = pathlib.Path(sysconfig.get_paths()['stdlib'])
ODD = [' a\u2581b\t\0\u00e9\n\n  x<bos>\r\n', '\u2581\u2581', '', '\n', ' ', '<mask><0x41>',
       '\U0001f389\u00bd' + ' ' * 50]


@pytest.fixture(scope='module')
def ours():
  """Of every kind; SentencePiece with a small vocabulary."""
  code = [path.read_text(errors='ignore') for path in sorted(LIBRARY.glob('[a-d]*.py'))]
  train = lambda **keys: tokenizer_lib.train_sentencepiece(config_lib.Tokenizer(vocab_size=700, **keys), code)
  alphabet = ''.join(sorted({c for text in [*ODD, *code] for c in text}))
  return dict(bpe=train(), unigram=train(algorithm='unigram'), byte=tokenizer_lib.Byte(),
              char=tokenizer_lib.Char(alphabet))


@pytest.mark.parametrize('kind', ['bpe', 'byte', 'char'])
def test_ours_by_the_tokenizers_library(ours, kind):
  mine, theirs = ours[kind], pieces.as_json(ours[kind])
  known = set(getattr(mine, 'alphabet', ()))
  some = [t if not known else ''.join(c for c in t if c in known) for t in [*ODD, *texts()]]
  for text, a, b in zip(some, mine.encode_batch(some), theirs.encode_batch(some)):
    assert a.tolist() == b.tolist(), text
    assert theirs.decode(b) == text and theirs.decode_bytes(b) == text.encode()
  assert (mine.bos_id, mine.eos_id, mine.mask_id) == (theirs.bos_id, theirs.eos_id, theirs.mask_id)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs'])) | st.text('a \t\n\u2581\u00e9<>0xbosef', max_size=60))
def test_any_text(ours, text):
  for kind in ('bpe', 'byte'):
    assert ours[kind].encode(text).tolist() == pieces.as_json(ours[kind]).encode(text).tolist()


@pytest.mark.parametrize('kind', ['bpe', 'byte', 'char', 'unigram'])
def test_exported_it_begins_with_bos_and_comes_back_exactly(ours, kind, tmp_path):
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  note = hf.write_tokenizer(tmp_path, ours[kind], None, 64)
  back = tokenizer_lib.load(tmp_path / 'tokenizer')
  assert back.fingerprint == ours[kind].fingerprint
  if kind == 'unigram':
    assert 'which llm_jax reads' in note
    return
  assert not note
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  bos = [] if ours[kind].bos_id is None else [ours[kind].bos_id]
  text = 'def f(x):\n    return x\n\n  a\u2581b'
  assert theirs(text)['input_ids'] == bos + ours[kind].encode(text).tolist()
  assert theirs.decode(ours[kind].encode(text)) == text
  assert theirs.bos_token_id == theirs.eos_token_id == ours[kind].bos_id


def test_bytes_go_through_gguf(ours):
  fields = vocabulary.gguf_fields(ours['byte'], 300)
  back = vocabulary.from_gguf(fields)
  for text in [*ODD, *texts()]:
    assert back.encode(text).tolist() == ours['byte'].encode(text).tolist()
  assert back.adds_bos and back.bos_id == 256


@needs_data
def test_mistrals_tokenizer_json_goes_through_gguf(tmp_path):
  """As transformers makes it of the published model; without one of its merges SentencePiece would differ."""
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  (tmp_path / 'tokenizer.model').write_bytes((DATA / 'tok_mistral/tokenizer.model.v1').read_bytes())
  transformers.LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True).save_pretrained(tmp_path / 'x')
  mine = vocabulary.from_folder(tmp_path / 'x')
  assert isinstance(mine, HuggingFace) and mine.adds_bos
  fields = vocabulary.gguf_fields(mine, 32_064)
  assert fields['tokenizer.ggml.model'] == 'llama'
  back = vocabulary.from_gguf(fields)
  assert (back.vocab_size, back.bos_id, back.eos_id, back.adds_bos) == (32_000, 1, 2, True)
  some = texts()
  for a, b in zip(mine.encode_batch(some), back.encode_batch(some)):
    assert a.tolist() == b.tolist()
    assert mine.decode_bytes(a).decode() == mine.decode(a)
  whole = json.loads(mine.model)
  whole['model']['merges'] = whole['model']['merges'][:-1]
  with pytest.raises(ConfigError, match='GGUF cannot name'):
    vocabulary.gguf_fields(HuggingFace(json.dumps(whole).encode(), mine.roles), 32_064)
