"""Hugging Face's tokenizer.json (and GPT-2's vocab.json with merges.txt), run by the tokenizers library."""
import json
import pathlib
import re

import numpy as np

from llm_jax.config import ConfigError
from llm_jax.data.tokenizer import SPACE, SPECIALS, Tokenizer

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The characters that stand for bytes in byte-level tokens (GPT-2).
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class HuggingFace(Tokenizer):
  """Ids and text are the library's, with add_special_tokens=False and special tokens in text taken as text."""
  kind = 'hf'
  model_file = 'tokenizer.json'

  def __init__(self, model: bytes, roles: dict[str, str]):
    """`roles` names the tokens for bos, eos and pad, each where there is one."""
    import tokenizers
    self.model, self.roles = model, roles
    self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
    self._tokenizer.encode_special_tokens = True     # '<|im_end|>' in text is text
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    added = self._tokenizer.get_added_tokens_decoder()
    self._special = {i: token.content for i, token in added.items() if token.special}
    self.bos_id, self.eos_id = vocab.get(roles.get('bos')), vocab.get(roles.get('eos'))
    self.pad_id, self.pads = vocab.get(roles.get('pad'), 0), roles.get('pad') in vocab
    self.mask_id = vocab.get('<mask>', vocab.get('[MASK]'))
    self.sentinel_ids = tuple(vocab[s] for s in SPECIALS[1:] if s in vocab)
    decoder = json.dumps(json.loads(model)['decoder'])
    self._bytes = _token_bytes(decoder, vocab, added, self.vocab_size)
    # Some put a space before the text and take it off again.
    self._first_space = '"Strip"' not in decoder and ('"Metaspace"' not in decoder or '"never"' in decoder)
    self._sign(roles)

  def _encode_batch(self, texts):
    found = [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return [np.array(self._as_text(text, ids) if any(s in text for s in self._special.values()) else ids, np.int32)
            for text, ids in zip(texts, found)]

  def _as_text(self, text, ids):
    """Spells out the special tokens that a model finds in its own vocabulary (Unigram and WordLevel do)."""
    if not self._special.keys() & set(ids):
      return ids
    encoding, spelled = self._tokenizer.encode(text, add_special_tokens=False), []
    for i, (start, end) in zip(encoding.ids, encoding.offsets):
      name = self._special.get(i)
      literal = name is not None and text[start:end].strip() == name
      spelled += [t.id for c in name for t in self._tokenizer.model.tokenize(c)] if literal else [i]
    return spelled

  @property
  def specials(self):
    return {name: i for i, name in self._special.items()}

  def begins_with_bos(self) -> bool:
    """Whether its own post-processor puts bos before a text."""
    return self.bos_id is not None and self._tokenizer.encode('', add_special_tokens=True).ids[:1] == [self.bos_id]

  def decode(self, ids):
    return self._tokenizer.decode(self._known(ids), skip_special_tokens=True)

  def decode_bytes(self, ids):
    if self._bytes is None:
      return self.decode(ids).encode()
    data = super().decode_bytes(ids)
    return data if self._first_space else data.removeprefix(b' ')

  def _meta(self):
    return dict(roles=self.roles)


def _token_bytes(decoder, vocab, added, size):
  """Bytes of each id where tokens stand for bytes (GPT-2) or U+2581 and <0xNN> (Llama); None for other decoders."""
  if '"ByteLevel"' in decoder:
    spell = lambda token: bytes([BYTE_OF[c] for c in token])
  elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
    spell = lambda t: bytes([int(t[3:5], 16)]) if re.fullmatch('<0x[0-9A-F]{2}>', t) else t.replace(SPACE, ' ').encode()
  else:
    return None
  table = [b''] * size
  for token, i in vocab.items():
    if i not in added:
      table[i] = spell(token)
    elif not added[i].special:
      table[i] = added[i].content.encode()
  return table


def load(path: pathlib.Path) -> HuggingFace:
  """A HuggingFace of a tokenizer.json, or of a folder with one or with GPT-2's vocab.json and merges.txt."""
  folder = path if path.is_dir() else path.parent
  file = path / 'tokenizer.json' if path.is_dir() else path
  if file.is_file():
    model = file.read_bytes()
    return HuggingFace(model, roles_of(folder, json.loads(model)['added_tokens']))
  vocab, merges = sorted(folder.glob('*vocab.json')), sorted(folder.glob('*merges.txt'))
  if not (path.is_dir() and vocab and merges):
    raise ConfigError(f'config.tokenizer.path: expected a tokenizer.json, or a folder with one or with vocab.json and '
                      f'merges.txt, got {str(path)!r}')
  import tokenizers
  made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab[0]), str(merges[0])))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(['<|endoftext|>'])
  return HuggingFace(made.to_str().encode(), dict(bos='<|endoftext|>', eos='<|endoftext|>'))


def roles_of(folder: pathlib.Path, added: list[dict]) -> dict[str, str]:
  """Which tokens are bos, eos and pad: as the files beside a tokenizer.json say, else by their usual names."""
  said = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (folder / name).is_file():
      said |= json.loads((folder / name).read_text())
  usual = dict(bos=('<s>', '<|begin_of_text|>', '<bos>'), pad=('<pad>', '<|pad|>', '[PAD]'),
               eos=('</s>', '<|end_of_text|>', '<eos>', '<|endoftext|>', '<|im_end|>'))
  there = {token['content'] for token in added}
  roles = {}
  for role, names in usual.items():
    token = said.get(role + '_token') if said else next((n for n in names if n in there), None)
    token = token['content'] if isinstance(token, dict) else token
    if token:
      roles[role] = token
  return roles
