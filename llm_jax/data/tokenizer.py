"""Text to token ids and back: byte, character, SentencePiece, Hugging Face. Special ids never come out of text.

Every tokenizer has kind, vocab_size, bos_id, eos_id, pad_id, mask_id, sentinel_ids and fingerprint, and encode,
encode_batch, decode, decode_bytes and save. `build` trains or loads what a config says; `load` reads what `save` wrote.
"""
import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable

import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError, nearest

FORMAT = 1
SPECIALS = ('<mask>', *(f'<extra_id_{k}>' for k in range(16)))    # after <bos> in our own vocabularies
SPACE = '\u2581'                                                  # what SentencePiece writes for ' '

# What one piece of our own SentencePiece may span: a line from its newline on. Words are not kept apart, because pieces
# such as '\n        self.' and ' = None' give 8 to 19% more bytes per token on Python than pieces within words.
# No piece has a newline but at its start, so encoding line by line, which is twice as fast, gives the ids of the whole
# (in unigram another choice among equally likely ones, at times).
SPAN = {'bpe': re.compile(r'[\r\n]+[^\r\n]{0,40}|[^\r\n]{1,40}'),
        # Unigram considers every substring of a span: lines would take many minutes.
        'unigram': re.compile(r'[\r\n]+[ \t]*| ?\w{1,32}[^\w\s]{0,8}| ?[^\w\s]{1,32}|[ \t]+|\s')}
LINE = re.compile(rf'{SPACE}|[\r\n]+[^\r\n{SPACE}]*|[^\r\n{SPACE}]+')
TAB = '\ue009'                                                    # a tab in training, whose input is tab-separated
UNTRAINABLE = re.compile(rf'[\0{SPACE}{TAB}\ud800-\udfff]')


class Tokenizer:
  """What all kinds share. Ids are int32; an id that is special or out of range decodes to nothing."""
  kind: str
  vocab_size: int
  bos_id: int | None = None
  adds_bos = True                  # prompts begin with bos, as our documents do; False for some models from elsewhere
  eos_id: int | None = None
  more_stops: tuple[int, ...] = () # what else ends a text or a turn, of models from elsewhere
  pad_id: int = 0
  pads = False                     # whether pad_id is a token of its own
  mask_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  fingerprint: str                 # sha256 of everything that decides the ids
  model_file = ''                  # of the saved folder; its content is `model`
  model = b''

  @property
  def specials(self) -> dict[str, int]:
    """{name: id} of the tokens that no text gives."""
    return {}

  @property
  def role_names(self) -> dict[str, str]:
    """{'bos_token': '<s>', ...}: what chat templates call them; '' for what there is not."""
    names = {i: name for name, i in self.specials.items()}
    return dict(bos_token=names.get(self.bos_id, ''), eos_token=names.get(self.eos_id, ''))

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """What generation ends at: eos, and what else the model's files name."""
    return tuple(dict.fromkeys(i for i in (self.eos_id, *self.more_stops) if i is not None))

  def encode(self, text: str) -> np.ndarray:
    """Ids of ordinary text, int32 [tokens]; neither bos nor eos is added. Raises ConfigError for what has no ids."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    """`encode` of several texts, on all cores where the library can."""
    try:
      for text in texts:
        text.encode()      # the libraries name nothing in their own errors
    except UnicodeEncodeError as e:
      raise ConfigError(f'expected Unicode text, got half of a surrogate pair, {e.object[e.start]!r}') from e
    return self._encode_batch(texts)

  def decode(self, ids) -> str:
    """Text of ids; bytes that are not UTF-8 become U+FFFD."""
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids) -> bytes:
    """Exactly the bytes of ids, which may end inside a character."""
    return b''.join([self._bytes[i] for i in self._known(ids)])

  def _known(self, ids):
    return [i for i in np.asarray(ids, np.int64).reshape(-1).tolist() if 0 <= i < self.vocab_size]

  def save(self, folder: pathlib.Path) -> None:
    """Writes a self-contained folder for `load`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self.model_file:
      (folder / self.model_file).write_bytes(self.model)
    meta = dict(format=FORMAT, kind=self.kind, fingerprint=self.fingerprint, adds_bos=self.adds_bos,
                more_stops=self.more_stops, **self._meta())
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1))

  def _meta(self):
    return {}

  def _sign(self, *parts):
    self.fingerprint = hashlib.sha256(json.dumps([self.kind, FORMAT, *parts]).encode() + self.model).hexdigest()


class Byte(Tokenizer):
  """UTF-8 bytes are ids 0 to 255; then <bos>, <mask> and the sentinels."""
  kind = 'byte'
  bos_id = eos_id = 256
  mask_id = 257
  sentinel_ids = tuple(range(258, 274))
  vocab_size = 274

  def __init__(self):
    self._sign()

  @property
  def specials(self):
    return {name: 256 + i for i, name in enumerate(('<bos>', *SPECIALS))}

  def _encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  def decode_bytes(self, ids):
    return bytes([i for i in self._known(ids) if i < 256])


class Char(Tokenizer):
  """One id per character of an alphabet, in its order; no special ids."""
  kind = 'char'

  def __init__(self, alphabet: str):
    self.alphabet, self.vocab_size = alphabet, len(alphabet)
    self._bytes = [c.encode() for c in alphabet]
    self._ids = np.full(sys.maxunicode + 1, -1, np.int32)
    self._ids[np.frombuffer(alphabet.encode('utf-32-le'), np.uint32)] = np.arange(len(alphabet))
    self._sign(alphabet)

  def _encode_batch(self, texts):
    found = [self._ids[np.frombuffer(text.encode('utf-32-le'), np.uint32)] for text in texts]
    for text, ids in zip(texts, found):
      if len(ids) and ids.min() < 0:
        c = text[int(ids.argmin())]
        raise ConfigError(f'character {c!r} (U+{ord(c):04X}) is not among the {self.vocab_size} of the character '
                          f'tokenizer; leave it out, or train with config.tokenizer.kind=byte')
    return found

  def _meta(self):
    return dict(alphabet=self.alphabet)


class SentencePiece(Tokenizer):
  """A SentencePiece model: one of ours (`own`), exact on any Unicode string, or one from elsewhere, whose ids and text
  are those of the sentencepiece library. (Kudo and Richardson 2018, arXiv 1808.06226.)"""
  kind = 'sentencepiece'
  model_file = 'tokenizer.model'

  def __init__(self, model: bytes, own: bool):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    self.model, self.own = model, own
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
      if piece.type == piece.USER_DEFINED and LOOKS_SPECIAL.fullmatch(piece.piece):
        piece.type = piece.CONTROL      # user-defined pieces come out of text; these would let text forge a turn
    self._adds_space = proto.normalizer_spec.add_dummy_prefix
    self._drops_spaces = proto.normalizer_spec.remove_extra_whitespaces
    self._text_ids = {i for i, p in enumerate(proto.pieces) if p.type in (p.NORMAL, p.USER_DEFINED)}
    self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    self.vocab_size = self._sp.vocab_size()
    self._bytes = [_piece_bytes(p, proto.trainer_spec.unk_surface) for p in proto.pieces]
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.CONTROL}
    self._specials = ids
    self.mask_id = ids.get('<mask>')
    self.sentinel_ids = tuple(ids[s] for s in SPECIALS[1:] if s in ids)
    bos, eos, pad = self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id()
    self.bos_id = None if bos < 0 else bos
    self.eos_id = self.bos_id if own else None if eos < 0 else eos
    self.pad_id, self.pads = max(pad, 0), pad >= 0
    if own:
      self._space = np.array([self._sp.piece_to_id(f'<0x{b:02X}>') for b in SPACE.encode()], np.int32)
    self._sign(own)

  def _encode_batch(self, texts):
    threads = os.cpu_count() or 1
    if not self.own:
      return [np.array(ids, np.int32) for ids in self._sp.encode(texts, out_type=int, num_threads=threads)]
    lines = [LINE.findall(text) for text in texts]
    ids = iter(self._sp.encode(list(itertools.chain.from_iterable(lines)), out_type=int, num_threads=threads))
    # The library takes U+2581 in text for a space: as bytes it stays itself.
    found = ((self._space if line == SPACE else next_ids for line, next_ids in zip(part, ids)) for part in lines)
    return [np.fromiter(itertools.chain.from_iterable(part), np.int32) for part in found]

  @property
  def specials(self):
    return self._specials

  def piece(self, i: int) -> str:
    return self._sp.id_to_piece(i)

  def decode(self, ids):
    return super().decode(ids) if self.own else self._sp.decode(self._known(ids))

  def decode_bytes(self, ids):
    ids = self._known(ids)
    parts = [self._bytes[i] for i in ids]
    for n, i in enumerate(ids if self._adds_space or self._drops_spaces else ()):
      dropped = i in self._text_ids and parts[n].startswith(b' ')     # the space put before the text comes off again
      parts[n] = parts[n][dropped:]
      if parts[n] or (dropped and not self._drops_spaces):
        break
    return b''.join(parts)

  def _meta(self):
    return dict(own=self.own)


# Markers that some models list as user-defined pieces though only the program may write them.
LOOKS_SPECIAL = re.compile(r'<\|.*\|>|<(start|end)_of_\w+>|\[/?INST\]|<</?SYS>>|</?s>|<(bos|eos|pad|unk|mask|sep|cls)>')


def _piece_bytes(piece, unknown):
  if piece.type in (piece.NORMAL, piece.USER_DEFINED):
    return piece.piece.replace(SPACE, ' ').encode()
  if piece.type == piece.BYTE:
    return bytes([int(piece.piece[3:5], 16)])
  return unknown.encode() if piece.type == piece.UNKNOWN else b''


def train_sentencepiece(tokenizer: config_lib.Tokenizer, texts: Iterable[str]) -> SentencePiece:
  """Trains on all of `texts`; the same texts give the same ids. Where they have too few different strings for
  vocab_size, the vocabulary is as large as they allow, and a line on stderr says so."""
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2
  reserved = 2 + len(SPECIALS) + 256     # <unk>, <bos>, specials, bytes
  if tokenizer.vocab_size < reserved + 16:
    raise ConfigError(f'config.tokenizer.vocab_size: expected at least {reserved + 16} ({reserved} are bytes and '
                      f'special ids), got {tokenizer.vocab_size}')
  counts = collections.Counter()
  for text in texts:
    counts.update(SPAN[tokenizer.algorithm].findall(text))
  spans = _covered({s.replace('\t', TAB): n for s, n in counts.items() if not UNTRAINABLE.search(s)},
                   (tokenizer.vocab_size - reserved) // 2)
  if not spans:
    raise ConfigError('config.tokenizer: no text to train the tokenizer on')
  made = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(f'{span}\t{n}' for span, n in sorted(spans.items())), input_format='tsv',
      model_writer=made, minloglevel=2, num_threads=4, hard_vocab_limit=False, max_sentence_length=1 << 20,
      model_type=tokenizer.algorithm, vocab_size=tokenizer.vocab_size, character_coverage=1.0, byte_fallback=True,
      normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True, split_by_whitespace=False, split_by_unicode_script=False,
      split_by_number=False, max_sentencepiece_length=32,
      unk_id=0, bos_id=1, eos_id=-1, pad_id=-1, bos_piece='<bos>', control_symbols=list(SPECIALS))
  proto = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())
  for piece in proto.pieces:
    piece.piece = piece.piece.replace(TAB, '\t')
  if len(proto.pieces) < tokenizer.vocab_size:
    print(f'tokenizer: the text has too few different strings for vocab_size={tokenizer.vocab_size}; trained '
          f'{len(proto.pieces)}', file=sys.stderr)
  return SentencePiece(proto.SerializeToString(deterministic=True), own=True)


def _covered(spans, most):
  """Spans, cut at characters too rare for a piece of their own, which are spelled in bytes: the last 0.05% of the text,
  and all but `most` (Chinese in a small vocabulary)."""
  alike = collections.defaultdict(list)
  for span, n in spans.items():
    alike[n].append(span)
  counts = collections.Counter()
  for n, several in alike.items():
    counts.update({c: n * m for c, m in collections.Counter(''.join(several)).items()})
  frequent = sorted(counts, key=lambda c: (-counts[c], c))[:most]
  before = itertools.accumulate((counts[c] for c in frequent), initial=0)
  kept = {c for c, n in zip(frequent, before) if n < 0.9995 * counts.total()}
  covered = {span: n for span, n in spans.items() if kept.issuperset(span)}
  for span in spans.keys() - covered.keys():
    for is_kept, run in itertools.groupby(span, kept.__contains__):
      if is_kept:
        part = ''.join(run)
        covered[part] = covered.get(part, 0) + spans[span]
  return covered


def build(tokenizer: config_lib.Tokenizer, texts: Iterable[str]) -> Tokenizer:
  """The tokenizer a config asks for: loaded from tokenizer.path, or trained on all of `texts`."""
  path = pathlib.Path(tokenizer.path).expanduser()
  if tokenizer.path and not path.exists():
    beside = sorted(p.name for p in path.parent.iterdir())[:20] if path.parent.is_dir() else []
    raise ConfigError(f'config.tokenizer.path: no file {str(path)!r}{nearest(path.name, beside) if beside else ""}')
  with readable(f'config.tokenizer.path: cannot read {tokenizer.path!r}'):
    if tokenizer.kind == 'hf':
      from llm_jax.data import hf
      return hf.load(path)
    if tokenizer.kind == 'sentencepiece' and tokenizer.path:
      return SentencePiece(path.read_bytes(), own=False)
  if tokenizer.kind == 'sentencepiece':
    return train_sentencepiece(tokenizer, texts)
  if tokenizer.kind == 'char':
    alphabet = set()
    for text in texts:
      alphabet.update(text)
    if not alphabet:
      raise ConfigError('config.tokenizer: no text to take the alphabet of the character tokenizer from')
    return Char(''.join(sorted(alphabet)))
  return Byte()


def load(folder: pathlib.Path) -> Tokenizer:
  """Reads what `save` wrote. Raises ConfigError where it is incomplete, changed or of a newer format."""
  folder = pathlib.Path(folder)
  if not (folder / 'meta.json').is_file():
    raise ConfigError(f'{folder}: expected a tokenizer saved by llm_jax, found no meta.json')
  with readable(f'config.tokenizer.path: cannot read {str(folder)!r}'):
    meta = json.loads((folder / 'meta.json').read_text())
    if meta['format'] > FORMAT:
      raise ConfigError(f'{folder}: tokenizer of format {meta["format"]}, this llm_jax reads up to {FORMAT}; update it')
    if meta['kind'] == 'byte':
      made = Byte()
    elif meta['kind'] == 'char':
      made = Char(meta['alphabet'])
    elif meta['kind'] == 'sentencepiece':
      made = SentencePiece((folder / SentencePiece.model_file).read_bytes(), meta['own'])
    else:
      from llm_jax.data.hf import HuggingFace
      made = HuggingFace((folder / HuggingFace.model_file).read_bytes(), meta['roles'])
  if made.fingerprint != meta['fingerprint']:
    raise ConfigError(f'{folder}: changed since it was saved: its fingerprint is not the one in meta.json')
  made.adds_bos = meta.get('adds_bos', True)         # a folder from before these keys is of a model of ours
  made.more_stops = tuple(meta.get('more_stops', ()))
  return made


@contextlib.contextmanager
def readable(what: str):
  """Turns whatever the libraries raise on a broken file (even bare Exception) into one line that names it."""
  try:
    yield
  except (ConfigError, OSError):
    raise
  except Exception as e:
    raise ConfigError(f'{what}: {" ".join(str(e).split())[:200]}') from e
