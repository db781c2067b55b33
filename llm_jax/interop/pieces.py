"""Our own tokenizers as a tokenizer.json, which transformers reads, and Llama's tokenizer.json as GGUF's pieces.

SentencePiece's BPE joins the pair whose piece has the best score, the tokenizers library the pair of the first merge:
with every way to make a piece as a merge, in the order of the pieces' scores, both give the same ids.
"""
import json
import re

from llm_jax.data.hf import BYTE_OF, HuggingFace
from llm_jax.data.tokenizer import LINE, SPACE, SPECIALS, Byte, Char, SentencePiece, Tokenizer

BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)         # SentencePiece's types of pieces, and GGUF's
BYTE_LEVEL = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)          # of an added token


def as_json(tokenizer: Tokenizer) -> HuggingFace | None:
  """A tokenizer of ours with the same ids, run by the tokenizers library; None for unigram, where ties may differ."""
  if isinstance(tokenizer, Byte):
    names = ('<bos>', *SPECIALS)
    vocab = {c: b for c, b in BYTE_OF.items()} | {name: 256 + i for i, name in enumerate(names)}
    return _ours(dict(type='BPE', vocab=vocab, merges=[]), names, BYTE_LEVEL, BYTE_LEVEL)
  if isinstance(tokenizer, Char):
    vocab = {c: i for i, c in enumerate(tokenizer.alphabet)}
    split = dict(type='Split', pattern=dict(Regex=r'[\s\S]'), behavior='Isolated', invert=False)
    return _ours(dict(type='WordLevel', vocab=vocab, unk_token='<unk>'), (), split, dict(type='Fuse'))
  if isinstance(tokenizer, SentencePiece) and tokenizer.own:
    return _sentencepiece(tokenizer.model)
  return None


def _sentencepiece(model: bytes) -> HuggingFace | None:
  from sentencepiece import sentencepiece_model_pb2
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
    return None
  # With plain spaces, so that U+2581 in a text is no piece and falls back to bytes, as it does with us.
  vocab = {p.piece.replace(SPACE, ' '): i for i, p in enumerate(proto.pieces)}
  scores = {p.piece.replace(SPACE, ' '): p.score for p in proto.pieces if p.type == p.NORMAL}
  names = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
  split = dict(type='Split', pattern=dict(Regex=LINE.pattern), behavior='Isolated', invert=False)
  decoder = dict(type='Sequence', decoders=[dict(type='ByteFallback'), dict(type='Fuse')])
  return _ours(dict(type='BPE', vocab=vocab, merges=merges_of(scores), byte_fallback=True, unk_token='<unk>'), names,
               split, decoder)


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
  """Every pair of pieces that makes a third, best score of that first, then the longer left one."""
  found = []
  for n, (piece, score) in enumerate(scores.items()):
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    found += [(-score, n, pair) for pair in pairs if pair[0] in scores and pair[1] in scores]
  return [pair for *_, pair in sorted(found, key=lambda entry: entry[:2])]


def _ours(model, names, pre_tokenizer, decoder) -> HuggingFace:
  added = [added_token(model['vocab'][name], name, True) for name in names]
  return built(model, added, pre_tokenizer, decoder, dict(bos='<bos>', eos='<bos>') if '<bos>' in names else {})


def added_token(i: int, content: str, special: bool) -> dict:
  return dict(id=i, content=content, special=special) | FLAGS


def built(model: dict, added: list[dict], pre_tokenizer: dict, decoder: dict, roles: dict[str, str]) -> HuggingFace:
  """The tokenizer of these parts of a tokenizer.json; a BPE says only what is not as usual."""
  plain = dict(dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
               byte_fallback=False, ignore_merges=False) if model['type'] == 'BPE' else {}
  return HuggingFace(json.dumps(dict(
      version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None, pre_tokenizer=pre_tokenizer,
      post_processor=None, decoder=decoder, model=dict(type=model['type']) | plain | model)).encode(), roles)


def beginning_with_bos(tokenizer: HuggingFace) -> bytes:
  """The tokenizer.json whose users begin a text with bos, as prompts of this model do."""
  if not tokenizer.adds_bos or tokenizer.bos_id is None or tokenizer.begins_with_bos():
    return tokenizer.model
  whole, bos = json.loads(tokenizer.model), tokenizer.roles['bos']
  sequence = lambda name, kind: dict(Sequence=dict(id=name, type_id=kind))
  first = dict(SpecialToken=dict(id=bos, type_id=0))
  template = dict(type='TemplateProcessing', single=[first, sequence('A', 0)],
                  pair=[first, sequence('A', 0), sequence('B', 1)],
                  special_tokens={bos: dict(id=bos, ids=[tokenizer.bos_id], tokens=[bos])})
  before = whole.get('post_processor')
  whole['post_processor'] = template if before is None else dict(type='Sequence', processors=[before, template])
  return json.dumps(whole, ensure_ascii=False).encode()


def as_pieces(tokenizer: HuggingFace, size: int) -> dict | None:
  """tokens, token_type, scores (`size` of each) and add_space_prefix of GGUF's 'llama' vocabulary for a tokenizer.json
  of BPE over U+2581 and bytes (Llama 2, Mistral, Gemma); None for one that SentencePiece would not read the same."""
  whole = json.loads(tokenizer.model)
  model, added = whole['model'], {token['id']: token for token in whole['added_tokens']}
  space = _adds_space(whole['normalizer'], whole['pre_tokenizer'])
  if model['type'] != 'BPE' or not model.get('byte_fallback') or space is None or model.get('ignore_merges'):
    return None
  vocab = dict(model['vocab']) | {token['content']: i for i, token in added.items()}
  merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in model['merges']]
  rank = {}
  for n, merge in enumerate(merges):
    rank.setdefault(''.join(merge), n)
  plain = [t for t, i in sorted(vocab.items(), key=lambda item: item[1]) if i not in added and not BYTE_PIECE.match(t)]
  scores = {t: -float(rank.get(t, len(merges))) for t in plain}
  made = [''.join(merge) for merge in merges]
  if set(merges) != set(merges_of(scores)) or made != sorted(made, key=rank.get):
    return None                                     # SentencePiece joins whatever makes a piece
  if (unknown := vocab.get(model.get('unk_token') or '<unk>')) is None:
    return None
  by_id, ids = {i: token for token, i in vocab.items()}, range(size)
  types = {i: BYTE if BYTE_PIECE.fullmatch(token) else NORMAL for i, token in by_id.items()}
  types |= {i: CONTROL if token['special'] else USER for i, token in added.items()} | {unknown: UNKNOWN}
  return dict(tokens=[by_id.get(i, f'[PAD{i}]') for i in ids], token_type=[types.get(i, UNUSED) for i in ids],
              scores=[scores.get(by_id.get(i), 0.0) for i in ids], add_space_prefix=space, unknown_token_id=unknown)


def _adds_space(normalizer, pre_tokenizer) -> bool | None:
  """Whether a U+2581 comes before a text, where spaces become U+2581 and nothing else happens; else None."""
  steps = (normalizer or {}).get('normalizers', [normalizer] * bool(normalizer))
  first = pre_tokenizer or {}
  replaced = [s for s in steps if s['type'] == 'Replace' and s['pattern'] == dict(String=' ') and s['content'] == SPACE]
  prepended = [s for s in steps if s['type'] == 'Prepend' and s['prepend'] == SPACE]
  if len(replaced) + len(prepended) != len(steps):
    return None
  if first.get('type') == 'Metaspace' and first.get('replacement') == SPACE and not steps and not first.get('split'):
    return first.get('prepend_scheme', 'always') != 'never'
  whole_words = first.get('type') == 'Split' and first['pattern'] == dict(String=' ')     # Gemma's: there are none left
  return bool(prepended) if replaced and (not first or whole_words) else None
