"""Tokenizers out of model files, Hugging Face folders, tiktoken ranks and GGUF headers, and into GGUF headers.

Byte-level BPE becomes a tokenizer.json that the tokenizers library runs, SentencePiece a model of its library. From
GGUF come 'gpt2' and 'llama' vocabularies, not WordPiece ('bert'), Unigram ('t5') or RWKV. As in llama.cpp, a GGUF says
no normaliser: Qwen's NFC is lost there. Bytes that a vocabulary has no token for are dropped, as both libraries do.
"""
import base64
import json
import math
import pathlib
import re

from llm_jax.config import ConfigError
from llm_jax.data import hf
from llm_jax.data.hf import BYTE_OF, HuggingFace
from llm_jax.data.tokenizer import LOOKS_SPECIAL, Byte, SentencePiece, Tokenizer, readable
from llm_jax.interop import pieces
from llm_jax.interop.pieces import BYTE, BYTE_LEVEL, CONTROL, FLAGS, NORMAL, UNKNOWN, UNUSED, USER, added_token

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace('{1,3}', '')
PATTERNS = {'qwen': QWEN, 'llama3': LLAMA3, 'cl100k': LLAMA3}      # of tiktoken files

DIGIT, PUNCTUATION, THREE = r'\p{N}', r'[\p{P}$+<=>^~|`]+', '[0-9][0-9][0-9]'
# tokenizer.ggml.pre: the expressions that split text one after the other, and whether a whole piece in the vocabulary
# wins over merging (llama.cpp, src/llama-vocab.cpp, whose case-insensitive 's is ASCII only). Of several names for the
# same the first is written.
PRES = {name: (regexes, whole) for names, regexes, whole in (
    ('gpt-2 phi-2 mpt olmo jais gigachat mellum modern-bert exaone4 roberta-bpe jina-v2-code', (GPT2,), False),
    ('smollm starcoder refact command-r codeshell exaone minerva-7b', (DIGIT, GPT2), False),
    ('qwen2 stablelm2 megrez deepseek-r1-qwen', (QWEN,), False),
    ('llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2', (LLAMA3,), True),
    ('dbrx smaug-bpe glm4 chatglm-bpe', (LLAMA3,), False),
    ('falcon', (PUNCTUATION, GPT2, THREE), False),
    ('default', (PUNCTUATION.replace('`', ''), GPT2, r'\p{N}+', THREE), False)) for name in names.split()}
# Other spellings in Hugging Face files of what splits the same.
SAME = {GPT2.removesuffix(r'|\s+'): GPT2,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
        **{p.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"): p
           for p in (LLAMA3, QWEN)}}

CHAR_OF = {b: c for c, b in BYTE_OF.items()}
LLAMA3_RANKS = 128_000
# Which of PRES a folder with vocab.json and merges.txt means, by its tokenizer_class.
CLASSES = dict(GPT2Tokenizer='gpt-2', CodeGenTokenizer='gpt-2', Qwen2Tokenizer='qwen2')


def from_folder(folder: pathlib.Path) -> Tokenizer | None:
  """The tokenizer of a Hugging Face model's folder, None where it has none; prompts begin with bos, and texts
  end, as its files say. Raises ConfigError for a broken one, or one that cannot be told from its files."""
  made = _from_folder(pathlib.Path(folder))
  if isinstance(made, HuggingFace):
    made = _with_ids(pathlib.Path(folder), made)
    made.adds_bos = made.begins_with_bos()
  elif made is not None:
    made.adds_bos = _said(pathlib.Path(folder), {})[0].get('add_bos_token') is not False
  if made is not None:
    made.more_stops = _stops(pathlib.Path(folder), made)
  return made


def _with_ids(folder, tokenizer: HuggingFace) -> HuggingFace:
  """bos, eos and pad by the ids of config.json, where no file of the tokenizer names any."""
  if any((folder / name).is_file() for name in ('tokenizer_config.json', 'special_tokens_map.json')):
    return tokenizer
  with _readable(folder / 'config.json'):
    said = json.loads((folder / 'config.json').read_text()) if (folder / 'config.json').is_file() else {}
  names = {token['id']: token['content'] for token in json.loads(tokenizer.model)['added_tokens']}
  roles = {role: names[said[f'{role}_token_id']] for role in ('bos', 'eos', 'pad')
           if type(said.get(f'{role}_token_id')) is int and said[f'{role}_token_id'] in names}
  return HuggingFace(tokenizer.model, roles | tokenizer.roles) if roles else tokenizer


def _stops(folder, tokenizer) -> tuple[int, ...]:
  """The ids at which generation ends besides eos: generation_config.json's, or config.json's where there is none."""
  for name in ('generation_config.json', 'config.json'):
    with _readable(folder / name):
      found = json.loads((folder / name).read_text()).get('eos_token_id') if (folder / name).is_file() else None
    ids = found if isinstance(found, list) else [found]
    if found is not None:
      return tuple(i for i in ids if type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id)
  return ()


def _from_folder(folder):
  with _readable(folder):
    if (folder / 'tokenizer.json').is_file():
      return hf.load(folder)
    model, vocab, merges = folder / 'tokenizer.model', sorted(folder.glob('*vocab.json')), folder.glob('*merges.txt')
    if model.is_file():
      data = model.read_bytes()
      if not re.match(rb'[A-Za-z0-9+/]+=* \d+\r?\n', data):
        return SentencePiece(_extended(data, folder), own=False)
      return _tiktoken_folder(model)
    if vocab and (merges := sorted(merges)):
      return _vocab_and_merges(folder, vocab[0], merges[0])
    files = sorted(folder.glob('*.tiktoken'))
    return _tiktoken_folder(files[0]) if files else None


def from_tiktoken(path: pathlib.Path, pattern: str, specials: dict[str, int], roles: dict[str, str]) -> HuggingFace:
  """The BPE of a tiktoken file: lines of a token in base64 and its rank, which is its id. `pattern` splits text
  (PATTERNS has known ones); `roles` names bos, eos and pad. Ids of text are tiktoken's `encode_ordinary`."""
  with _readable(path):
    return _tiktoken(_ranks(path), pattern, [added_token(i, name, True) for name, i in specials.items()], roles)


def from_gguf(fields: dict) -> Tokenizer:
  """The tokenizer in the fields of a GGUF header. Unused tokens have no text. Raises ConfigError for what is broken or
  not supported."""
  kind = fields.get('tokenizer.ggml.model')
  if kind not in ('gpt2', 'llama'):
    raise ConfigError(f"tokenizer.ggml.model: expected 'gpt2' or 'llama', got {kind!r}; give a tokenizer of its own")
  tokens = _list(fields, 'tokens', str)
  types = _list(fields, 'token_type', int) if 'tokenizer.ggml.token_type' in fields else [NORMAL] * len(tokens)
  if len(types) != len(tokens):
    raise ConfigError(f'tokenizer.ggml: expected a token_type for each of {len(tokens)} tokens, got {len(types)}')
  if wrong := set(types) - set(range(NORMAL, BYTE + 1)):
    raise ConfigError(f'tokenizer.ggml.token_type: expected 1 to 6, got {min(wrong)}; the file is damaged')
  ids, types = _role_ids(fields, len(tokens)), list(types)
  for role, i in ids.items():
    if types[i] == UNUSED or (role != 'pad' and types[i] in (NORMAL, USER)):      # text must not give these
      types[i] = CONTROL
  while types and types[-1] == UNUSED:      # they fill up the embedding
    types.pop()
  tokens = tokens[:len(types)]
  with _readable('tokenizer.ggml'):
    made = (_gguf_bpe if kind == 'gpt2' else _gguf_sentencepiece)(fields, tokens, types, ids)
  usual = kind == 'llama' or fields.get('tokenizer.ggml.pre') in ('llama-bpe', 'llama3', 'llama-v3')    # llama.cpp's
  made.adds_bos = bool(fields.get('tokenizer.ggml.add_bos_token', usual))
  more = (fields.get(f'tokenizer.ggml.{name}_token_id') for name in ('eot', 'eom'))
  made.more_stops = tuple(i for i in more if type(i) is int and 0 <= i < made.vocab_size and i != made.eos_id)
  return made


def gguf_fields(tokenizer: Tokenizer, size: int) -> dict:
  """What from_gguf reads, for a GGUF with `size` rows of embedding: byte-level BPE or SentencePiece BPE. Raises
  ConfigError for a tokenizer that GGUF cannot name."""
  if size < tokenizer.vocab_size:
    raise ConfigError(f'expected an embedding of at least {tokenizer.vocab_size} ids, got size {size}: a GGUF file has '
                      'a row for each token; write the Hugging Face format')
  if isinstance(tokenizer, (HuggingFace, Byte)):
    fields = _bpe_fields(pieces.as_json(tokenizer) or tokenizer, size)
  elif isinstance(tokenizer, SentencePiece):
    fields = _sentencepiece_fields(tokenizer, size)
  else:
    raise _unnamed(f'a {tokenizer.kind} tokenizer')
  pad = tokenizer.pad_id if tokenizer.pads else None
  for role, i in (('bos', tokenizer.bos_id), ('eos', tokenizer.eos_id), ('padding', pad),
                  *zip(('eot', 'eom'), tokenizer.more_stops)):
    if i is not None:
      fields[f'{role}_token_id'] = i
  fields['add_bos_token'] = bool(tokenizer.adds_bos and tokenizer.bos_id is not None)
  return {f'tokenizer.ggml.{key}': value for key, value in fields.items() if value != []}


def _gguf_bpe(fields, tokens, types, ids):
  pre = fields.get('tokenizer.ggml.pre', 'default')            # as llama.cpp takes files from before it
  if not isinstance(pre, str) or pre not in PRES:
    raise ConfigError(f'tokenizer.ggml.pre: expected one of {", ".join(PRES)}, got {pre!r}; give a tokenizer '
                      f'of its own')
  if BYTE in types:
    raise ConfigError(f'tokenizer.ggml.token_type: expected no byte tokens in a gpt2 vocabulary, token '
                      f'{types.index(BYTE)} is one')
  there = 'tokenizer.ggml.merges' in fields or len(tokens) > 2 * len(BYTE_OF)       # none are left out
  merges = [tuple(merge.split(' ')) for merge in (_list(fields, 'merges', str) if there else ())]
  vocab, added = {}, []
  for i, (token, kind) in enumerate(zip(tokens, types)):
    if kind != UNUSED and vocab.setdefault(token, i) != i:
      raise ConfigError(f'tokenizer.ggml.tokens: expected different tokens, {vocab[token]} and {i} are both {token!r}')
    if kind in (UNKNOWN, CONTROL, USER):
      added.append(added_token(i, token, kind != USER))
  return _byte_level(vocab, merges, *PRES[pre], added, {role: tokens[i] for role, i in ids.items()})


def _byte_level(vocab, merges, regexes, whole, added, roles):
  """A HuggingFace of tokens spelled in BYTE_OF's characters, with ids, their merges, and the added tokens with theirs,
  which must not come out of merging if they are special."""
  for token in added:
    if not token['content'] or vocab.setdefault(token['content'], token['id']) != token['id']:
      raise ConfigError(f'expected a name of its own for added token {token["id"]}, got {token["content"]!r}')
  names = {token['content'] for token in added}
  by_id = {i: token for token, i in vocab.items()}
  if len(by_id) < len(vocab) or not all(type(i) is int and 0 <= i < 1 << 24 for i in by_id):
    raise ConfigError('expected a different id, a small integer, for each token of the vocabulary')
  for token, i in vocab.items():
    if token not in names and (not token or not BYTE_OF.keys() >= set(token)):
      raise ConfigError(f'expected token {i} to be spelled in the 256 byte characters of GPT-2, got {token!r}')
  for merge in merges:
    if len(merge) != 2 or not (merge[0] in vocab and merge[1] in vocab and ''.join(merge) in vocab):
      raise ConfigError(f'expected merges of two tokens to a third of the vocabulary, got {" ".join(merge)!r}')
  special = {token['content'] for token in added if token['special']}
  if made := sorted(special & {*(''.join(merge) for merge in merges), *BYTE_OF}):
    raise ConfigError(f'expected special tokens that text cannot give, {made[0]!r} comes out of it')
  splits = [dict(type='Split', pattern=dict(Regex=r), behavior='Isolated', invert=False) for r in regexes]
  made = pieces.built(
      dict(type='BPE', ignore_merges=whole, vocab=vocab, merges=merges), sorted(added, key=lambda token: token['id']),
      dict(type='Sequence', pretokenizers=[*splits, BYTE_LEVEL]), BYTE_LEVEL, roles)
  for token in sorted(special if whole else ()):
    if BYTE_OF.keys() >= set(token):
      text = bytes([BYTE_OF[c] for c in token]).decode('utf-8', 'ignore')
      if vocab[token] in made.encode(text):
        raise ConfigError(f'expected special tokens that text cannot give, {token!r} comes out of it')
  return made


def _gguf_sentencepiece(fields, tokens, types, ids):
  from sentencepiece import sentencepiece_model_pb2
  scores, space = _list(fields, 'scores', float), fields.get('tokenizer.ggml.add_space_prefix', True)
  if len(scores) < len(tokens) or not all(map(math.isfinite, scores)) or type(space) is not bool:
    raise ConfigError(f'tokenizer.ggml: expected a finite score for each token and a boolean add_space_prefix, got '
                      f'{len(scores)} scores for {len(tokens)} tokens and {space!r}')
  if types.count(UNKNOWN) != 1:
    raise ConfigError(f'tokenizer.ggml.token_type: expected one unknown token (type 2), got {types.count(UNKNOWN)}')
  proto = sentencepiece_model_pb2.ModelProto()
  for token, score, kind in zip(tokens, scores, types):
    proto.pieces.add(piece=token, score=score, type=kind)
  spec, unknown = proto.trainer_spec, types.index(UNKNOWN)
  spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, True, len(tokens)
  spec.unk_id, spec.unk_piece = unknown, tokens[unknown]
  for role in ('bos', 'eos', 'pad'):      # the library knows them by name; the unknown token stands for none
    setattr(spec, f'{role}_id', ids.get(role, -1))
    setattr(spec, f'{role}_piece', tokens[ids.get(role, unknown)])
  normal = proto.normalizer_spec
  normal.name, normal.add_dummy_prefix, normal.remove_extra_whitespaces = 'identity', space, False
  normal.escape_whitespaces = True
  return SentencePiece(proto.SerializeToString(deterministic=True), own=False)


def _bpe_fields(tokenizer, size):
  if found := pieces.as_pieces(tokenizer, size):
    return dict(model='llama', pre='default') | found
  whole = json.loads(tokenizer.model)
  model, normal = whole['model'], (whole['normalizer'] or {}).get('type')
  vocab, added = dict(model['vocab']), {token['id']: token for token in whole['added_tokens']}
  regexes = _regexes(whole['pre_tokenizer'] or {})
  byte_level = model['type'] == 'BPE' and (whole['decoder'] or {}).get('type') == 'ByteLevel'
  if not byte_level or normal not in (None, 'NFC') or any(
      model.get(key) for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')):
    raise _unnamed(f'a {model["type"]} with normalizer {normal}, or not by bytes alone,')
  if model.get('unk_token') and not vocab.keys() >= BYTE_OF.keys():
    raise _unnamed('an unknown token for bytes without a token')
  for token in added.values():
    if not token['special'] and (token['lstrip'] or token['rstrip'] or token['single_word']):
      raise _unnamed(f'{token["content"]!r}, which looks at what is around it,')
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  if any(merge.count(' ') != 1 for merge in merges):
    raise _unnamed('a merge of tokens with spaces')
  names = [name for name, (splits, _) in PRES.items() if splits == regexes or not merges]
  if not names:
    raise _unnamed(f'the pre-tokenizer {json.dumps(whole["pre_tokenizer"])[:300]}')
  ignores = bool(model.get('ignore_merges'))
  name = next((name for name in names if PRES[name][1] == ignores), None)
  if name is None and not _all_merged(vocab, merges, added):
    raise _unnamed(f'ignore_merges={ignores} with the pre-tokenizer of {names[0]}')
  by_id = {i: token for token, i in vocab.items()} | {i: token['content'] for i, token in added.items()}
  types = {i: NORMAL for i in by_id} | {i: CONTROL if token['special'] else USER for i, token in added.items()}
  return dict(model='gpt2', pre=name or names[0], tokens=[by_id.get(i, f'[PAD{i}]') for i in range(size)],
              token_type=[types.get(i, UNUSED) for i in range(size)], merges=merges)


def _regexes(pre):
  """The expressions that a pre_tokenizer of a tokenizer.json splits by, None for another kind."""
  steps = pre.get('pretokenizers', [pre])
  last = steps[-1] if steps else {}
  if last.get('type') != 'ByteLevel' or last['add_prefix_space']:
    return None
  found = []
  for step in steps[:-1]:
    if step['type'] == 'Digits':
      found.append(DIGIT if step['individual_digits'] else r'\p{N}+')
    elif step['type'] == 'Split' and step['behavior'] == 'Isolated' and 'Regex' in step['pattern']:
      found.append(SAME.get(step['pattern']['Regex'], step['pattern']['Regex']))
    elif step['type'] == 'Punctuation' and step.get('behavior') == 'Contiguous':
      found.append(PUNCTUATION)
    else:
      return None
  return (*found, *([GPT2] if last.get('use_regex', True) else []))


def _all_merged(vocab, merges, added):
  """Whether merging alone reaches every token, so that ignore_merges changes nothing."""
  import tokenizers
  model = tokenizers.models.BPE(vocab=vocab, merges=[tuple(merge.split(' ')) for merge in merges])
  return all(i in added or len(model.tokenize(token)) == 1 for token, i in vocab.items())


def _sentencepiece_fields(tokenizer, size):
  from sentencepiece import sentencepiece_model_pb2
  proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
  spec, normal = proto.trainer_spec, proto.normalizer_spec
  if spec.model_type != spec.BPE or not spec.byte_fallback or spec.treat_whitespace_as_suffix:
    raise _unnamed('a SentencePiece model other than BPE with byte_fallback')
  if normal.precompiled_charsmap or normal.remove_extra_whitespaces or not normal.escape_whitespaces:
    raise _unnamed('a SentencePiece model that normalises text')
  for i in range(len(proto.pieces), size):
    proto.pieces.add(piece=f'[PAD{i}]', score=0., type=UNUSED)
  # The class takes these for control tokens, which text cannot give.
  types = [CONTROL if p.type == USER and LOOKS_SPECIAL.fullmatch(p.piece) else p.type for p in proto.pieces]
  return dict(model='llama', pre='default', tokens=[p.piece for p in proto.pieces], token_type=types,
              scores=[p.score for p in proto.pieces], add_space_prefix=normal.add_dummy_prefix,
              unknown_token_id=types.index(UNKNOWN))


def _unnamed(what):
  return ConfigError(f'GGUF cannot name {what} of this tokenizer; write the Hugging Face format')


def _list(fields, name, kind):
  value, kinds = fields.get(f'tokenizer.ggml.{name}'), (int, float) if kind is float else (kind,)
  if not isinstance(value, list) or not all(type(v) in kinds for v in value):
    got = 'none' if value is None else type(value).__name__
    raise ConfigError(f'tokenizer.ggml.{name}: expected a list of {kind.__name__}, got {got}; the file is not whole')
  return value


def _role_ids(fields, size):
  ids = {role: fields.get(f'tokenizer.ggml.{name}_token_id') for role, name in
         (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))}
  for role, i in ids.items():
    if i is not None and (type(i) is not int or not 0 <= i < size):
      raise ConfigError(f'tokenizer.ggml: expected a {role} token id in 0 to {size - 1}, got {i!r}')
  return {role: i for role, i in ids.items() if i is not None}


def _tiktoken(ranks, pattern, added, roles):
  spell = {token: ''.join([CHAR_OF[b] for b in token]) for token in ranks}
  pairs = [_last_pair(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
  vocab = {spell[token]: rank for token, rank in ranks.items()}
  return _byte_level(vocab, [(spell[a], spell[b]) for a, b in filter(None, pairs)], (pattern,), True, added, roles)


def _ranks(path):
  ranks = {}
  for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
    parts = line.split()
    try:
      if parts:
        token, rank = parts
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as e:
      raise ConfigError(f'{path}, line {number}: expected a token in base64 and its rank, got {line[:80]!r}') from e
  if not ranks.keys() >= {bytes([b]) for b in range(256)}:
    raise ConfigError(f'{path}: expected a rank for each of the 256 bytes; the file is not whole')
  return ranks


def _last_pair(token, ranks):
  """The two tokens that merging by rank joins last to give `token`; None where it does not get there. How text around
  it merges does not matter: no merge crosses the ends of a token that comes out."""
  parts = [token[i:i + 1] for i in range(len(token))]
  costs = [ranks.get(token[i:i + 2], math.inf) for i in range(len(token) - 1)]
  while len(parts) > 2:
    i = costs.index(best := min(costs))
    if best == math.inf:
      return None
    parts[i:i + 2] = [parts[i] + parts[i + 1]]
    del costs[i]
    for j in (i - 1, i):
      if 0 <= j < len(costs):
        costs[j] = ranks.get(parts[j] + parts[j + 1], math.inf)
  return parts


def _tiktoken_folder(path):
  ranks, (said, added) = _ranks(path), _said(path.parent, {})
  name = (path.name + ' ' + str(said.get('tokenizer_class'))).lower()
  llama3 = len(ranks) == LLAMA3_RANKS
  known = 'llama3' if llama3 else next((known for known in ('qwen', 'cl100k') if known in name), None)
  if known is None or not (added or llama3):
    raise ConfigError(f'{path}: expected a tiktoken file of Llama 3, Qwen or cl100k with its added tokens in '
                      f'tokenizer_config.json beside it; give a tokenizer.json, or call from_tiktoken')
  if not added:      # Meta's files leave them to its code; as in Llama 3.0, 3.1 gave some reserved ones a name
    names = ['<|begin_of_text|>', '<|end_of_text|>', *(f'<|reserved_special_token_{i}|>' for i in range(251))]
    names[6:6] = ['<|start_header_id|>', '<|end_header_id|>']
    names.insert(9, '<|eot_id|>')
    added = [added_token(LLAMA3_RANKS + i, name, True) for i, name in enumerate(names)]
    return _tiktoken(ranks, LLAMA3, added, dict(bos=names[0], eos=names[1]))
  return _tiktoken(ranks, PATTERNS[known], added, hf.roles_of(path.parent, added))


def _vocab_and_merges(folder, vocab_file, merges_file):
  vocab = json.loads(vocab_file.read_text())
  lines = merges_file.read_text().split('\n')      # not splitlines: tokens may have other separators
  merges = [tuple(line.rstrip('\r').split(' ')) for line in lines if line.strip() and not line.startswith('#version')]
  said, added = _said(folder, vocab)
  kind = str(said.get('tokenizer_class', 'GPT2Tokenizer')).removesuffix('Fast')
  if kind not in CLASSES or said.get('add_prefix_space'):
    raise ConfigError(f'{folder}: expected vocab.json and merges.txt of {", ".join(CLASSES)} without add_prefix_space, '
                      f'got {kind}; add its tokenizer.json')
  roles = hf.roles_of(folder, added) if said else {}
  if not said and '<|endoftext|>' in vocab:
    roles = dict(bos='<|endoftext|>', eos='<|endoftext|>')
  return _byte_level(vocab, merges, *PRES[CLASSES[kind]], added, roles)


def _said(folder, vocab):
  """What the configurations beside a vocabulary say, and the tokens that they add to it or find special in it."""
  read = lambda name: json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
  said = read('special_tokens_map.json') | read('tokenizer_config.json')
  plain = lambda token: token['content'] if isinstance(token, dict) else token
  special = {plain(token) for token in [said.get(f'{role}_token') for role in ('bos', 'eos', 'pad', 'unk')]
             + (said.get('additional_special_tokens') or [])} | {'<|endoftext|>'}
  added = {i: added_token(i, name, name in special or bool(LOOKS_SPECIAL.fullmatch(name)))
           for name, i in (read('added_tokens.json') | {s: vocab[s] for s in special if s in vocab}).items()}
  for i, token in said.get('added_tokens_decoder', {}).items():
    flags = {key: bool(token.get(key)) for key in (*FLAGS, 'special')}
    added[int(i)] = added_token(int(i), token['content'], False) | flags
  return said, list(added.values())


def _extended(data, folder):
  """A SentencePiece model with the added tokens of its folder that lie after its pieces."""
  from sentencepiece import sentencepiece_model_pb2
  proto = sentencepiece_model_pb2.ModelProto.FromString(data)
  said, added = _said(folder, {})
  more = {token['id']: token for token in added if token['id'] >= len(proto.pieces)}
  if not more:
    return data
  if max(more) > len(proto.pieces) + (1 << 16):
    raise ConfigError(f'{folder}: expected added tokens right after the {len(proto.pieces)} pieces, got id {max(more)}')
  for i in range(len(proto.pieces), max(more) + 1):
    kind = UNUSED if i not in more else CONTROL if more[i]['special'] else USER
    proto.pieces.add(piece=more[i]['content'] if i in more else f'[PAD{i}]', score=0., type=kind)
  for role, name in hf.roles_of(folder, added).items():
    setattr(proto.trainer_spec, f'{role}_piece', name)
  return proto.SerializeToString(deterministic=True)


def _readable(what):
  return readable(f'{what}: expected a sound tokenizer, cannot read it')
