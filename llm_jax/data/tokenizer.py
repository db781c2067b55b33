"""Text to token ids and back: byte, character, SentencePiece, Hugging Face. Special ids never come out of text.

Every tokenizer has vocab_size, bos_id, eos_id, pad_id, mask_id, sentinel_ids, kind, fingerprint, and encode, encode_batch,
decode, decode_bytes, save. `build` trains or loads what the config says; `load` reads back what `save` wrote.
"""
import hashlib
import json
import pathlib

import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError, nearest

FORMAT = 1
SENTINELS = 16


class Tokenizer:
  """What all kinds share."""
  kind: str
  vocab_size: int
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int = 0
  mask_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """int32 [tokens]; no bos or eos."""
    return self.encode_batch([text])[0]

  def decode(self, ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')


class Byte(Tokenizer):
  kind = 'byte'
  bos_id = eos_id = 256
  mask_id = 257
  sentinel_ids = tuple(range(258, 258 + SENTINELS))
  vocab_size = 258 + SENTINELS
  fingerprint = hashlib.sha256(b'byte 1').hexdigest()

  def encode_batch(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

  def decode_bytes(self, ids) -> bytes:
    ids = np.asarray(ids, np.int64).reshape(-1)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

  def save(self, folder: pathlib.Path):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'meta.json').write_text(json.dumps(dict(format=FORMAT, kind=self.kind)))


class Char(Tokenizer):
  kind = 'char'

  def __init__(self, alphabet: str):
    self.alphabet = alphabet
    self.vocab_size = len(alphabet)
    self.fingerprint = hashlib.sha256(b'char 1' + alphabet.encode()).hexdigest()
    self._codes = np.frombuffer(alphabet.encode('utf-32-le'), np.uint32)
    self._table = np.full(0x110000, -1, np.int32)
    self._table[self._codes] = np.arange(len(alphabet))

  def encode_batch(self, texts):
    return [self._encode(t) for t in texts]

  def _encode(self, text):
    ids = self._table[np.frombuffer(text.encode('utf-32-le'), np.uint32)]
    if len(ids) and ids.min() < 0:
      raise ConfigError(f'character {text[int(ids.argmin())]!r} is not in the alphabet of the character tokenizer')
    return ids

  def decode_bytes(self, ids) -> bytes:
    return ''.join(self.alphabet[i] for i in ids if 0 <= i < len(self.alphabet)).encode()

  def save(self, folder: pathlib.Path):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'meta.json').write_text(json.dumps(dict(format=FORMAT, kind=self.kind, alphabet=self.alphabet)))


def build(tokenizer: config_lib.Tokenizer, texts) -> Tokenizer:
  """Trains on texts, or loads, what the config says."""
  if tokenizer.kind == 'byte':
    return Byte()
  if tokenizer.kind == 'char':
    return Char(''.join(sorted(set().union(*map(set, texts)))))
  raise ConfigError(f'config.tokenizer.kind: {tokenizer.kind!r} is not known{nearest(tokenizer.kind, ("byte", "char"))}')


def load(folder: pathlib.Path) -> Tokenizer:
  """Reads back what save wrote."""
  meta = json.loads((pathlib.Path(folder) / 'meta.json').read_text())
  return Byte() if meta['kind'] == 'byte' else Char(meta['alphabet'])
