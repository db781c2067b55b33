"""A model directory of Hugging Face: config.json, safetensors, tokenizer and chat template, read and written.

Weights are read and written one tensor at a time, by plain reads (a mapped file would count as this process's memory).
Nothing is ever unpickled.
"""
import json
import math
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

from llm_jax.config import ConfigError
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.hf import HuggingFace
from llm_jax.interop import pieces

DTYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16)
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
SHARD = 5 * 10**9         # bytes of a file, as transformers writes them


class Weights:
  """The tensors of a directory's safetensors files. shapes: {name: (shape, dtype)}."""

  def __init__(self, folder: pathlib.Path):
    self.shapes, self._places = {}, {}
    for file, names in files(folder).items():
      start, header = read_header(file)
      wanted = header.keys() - {'__metadata__'} if names is None else names
      for name in wanted:
        if name not in header:
          raise ConfigError(f'{file}: no tensor {name!r}, which the index says is there; download it again')
        entry = header[name]
        if entry['dtype'] in DTYPES:
          self.shapes[name] = tuple(entry['shape']), np.dtype(DTYPES[entry['dtype']])
        else:
          self.shapes[name] = tuple(entry['shape']), entry['dtype']          # refused where it is needed
        self._places[name] = file, start + entry['data_offsets'][0]

  def read(self, name: str) -> np.ndarray:
    shape, dtype = self.shapes[name]
    if not isinstance(dtype, np.dtype):
      raise ConfigError(f'{self._places[name][0]}: {name} is {dtype}; expected one of {", ".join(DTYPES)}: take the '
                        'model that was not quantised')
    file, offset = self._places[name]
    with file.open('rb') as f:
      array = np.fromfile(f, dtype, math.prod(shape), offset=offset)
    if array.size != math.prod(shape):
      raise ConfigError(f'{file}: ends inside {name}; download it again')
    return array.reshape(shape)

  def same(self, a: str, b: str) -> bool:
    """Whether two tensors are equal, compared some MB at a time."""
    (shape, dtype), size = self.shapes[a], 1 << 24
    if self.shapes[b] != (shape, dtype) or not isinstance(dtype, np.dtype):
      return False
    (one, at), (other, there) = self._places[a], self._places[b]
    with one.open('rb') as f, other.open('rb') as g:
      f.seek(at), g.seek(there)
      left = math.prod(shape) * dtype.itemsize
      while left > 0 and (data := f.read(min(size, left))) == g.read(min(size, left)) and data:
        left -= len(data)
    return left <= 0


def files(folder: pathlib.Path) -> dict[pathlib.Path, set | None]:
  """{safetensors file: names in it, or None for all}. Raises ConfigError where there is none, naming what there is."""
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    found = {}
    where = read_json(index).get('weight_map')
    for name, file in where.items() if isinstance(where, dict) else ():
      if not isinstance(file, str) or pathlib.PurePath(file).name != file or len(file) > 200:
        raise ConfigError(f'{index}: {name[:60]!r} is in {str(file)[:60]!r}; expected the name of a file beside it')
      if not (folder / file).is_file():
        raise ConfigError(f'{index}: {file} is missing; download it too')
      found.setdefault(folder / file, set()).add(name)
    if not found:
      raise ConfigError(f'{index}: expected a weight_map, found none')
    return found
  there = sorted(folder.glob('*.safetensors'))
  if len(there) > 1:
    there = [file for file in there if file.name == 'model.safetensors']
  if there:
    return {there[0]: None}
  pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in ('.bin', '.pt', '.pth', '.ckpt')]
  if pickled:
    raise ConfigError(f'{folder}: {pickled[0]} can run any program when it is read; convert it in a place you trust: '
                      'AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW), from the transformers library')
  raise ConfigError(f'{folder}: no model.safetensors beside config.json')


def read_header(file: pathlib.Path) -> tuple[int, dict]:
  """(offset of the first tensor, header), checked by the safetensors library: sizes, offsets, overlaps, dtypes."""
  import safetensors
  try:
    with safetensors.safe_open(file, 'numpy'):
      pass
    with file.open('rb') as f:
      size = int.from_bytes(f.read(8), 'little')
      return 8 + size, json.loads(f.read(size))
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as e:
    raise ConfigError(f'{file}: no sound safetensors file ({" ".join(str(e).split())[:160]}); download it again') from e


def read_json(path: pathlib.Path) -> dict:
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise ConfigError(f'{path}: expected JSON ({str(e)[:100]}); download it again') from e
  if not isinstance(found, dict):
    raise ConfigError(f'{path}: expected a JSON object, got {type(found).__name__}')
  return found


def chat_template(folder: pathlib.Path) -> str | None:
  """The Jinja template of the directory: chat_template.jinja, or in tokenizer_config.json (the one named default)."""
  if (file := folder / 'chat_template.jinja').is_file():
    try:
      return file.read_text()
    except UnicodeDecodeError as e:
      raise ConfigError(f'{file}: expected UTF-8, got {e}; download it again, or delete it') from e
  path = folder / 'tokenizer_config.json'
  found = read_json(path).get('chat_template') if path.is_file() else None
  if isinstance(found, list):
    named = {t['name']: t['template'] for t in found if isinstance(t, dict) and {'name', 'template'} <= t.keys()}
    found = named.get('default')
  return found if isinstance(found, str) else None


def write(folder: pathlib.Path, config: dict, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray],
          dtype: str) -> None:
  """config.json and safetensors files of at most SHARD bytes, with an index where there are several. read: a tensor by
  name, called once for each, in order."""
  kind = np.dtype(DTYPES[{'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[dtype]])
  shards, size = [[]], 0
  for name, shape in shapes.items():
    if shards[-1] and size + math.prod(shape) * kind.itemsize > SHARD:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += math.prod(shape) * kind.itemsize
  several, where = len(shards) > 1, {}
  for n, names in enumerate(shards):
    file = f'model-{n + 1:05d}-of-{len(shards):05d}.safetensors' if several else 'model.safetensors'
    write_safetensors(folder / file, {name: shapes[name] for name in names}, read, kind)
    where |= dict.fromkeys(names, file)
  if several:
    total = sum(math.prod(s) for s in shapes.values()) * kind.itemsize
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(metadata=dict(total_size=total), weight_map=where), indent=1))
  (folder / 'config.json').write_text(json.dumps(config | dict(torch_dtype=dtype), indent=1, sort_keys=True))


def write_safetensors(path: pathlib.Path, shapes: dict, read, kind: np.dtype) -> None:
  """One file, without ever holding more than a tensor."""
  header, at = {'__metadata__': dict(format='pt')}, 0          # transformers refuses a file without this
  for name, shape in shapes.items():
    size = math.prod(shape) * kind.itemsize
    header[name] = dict(dtype=NAMES[kind], shape=list(shape), data_offsets=[at, at + size])
    at += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name in shapes:
      with np.errstate(over='ignore'):
        array = np.ascontiguousarray(read(name)).astype(kind)
      if not np.isfinite(array).all():
        raise ConfigError(f'{path}: {name} is not finite in {kind}; write it in bfloat16 or float32')
      array.tofile(f)


def write_tokenizer(folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer, template: str | None, length: int) -> str:
  """The tokenizer as transformers reads it, and one of ours also as we do, in tokenizer/. Returns a note where
  transformers cannot read it, or ''."""
  said = dict(model_max_length=length, clean_up_tokenization_spaces=False)
  if template:
    (folder / 'chat_template.jinja').write_text(template)
  ours = pieces.as_json(tokenizer)
  if ours or getattr(tokenizer, 'own', False):
    tokenizer.save(folder / 'tokenizer')                 # what we read: exact on any text
  if ours:
    ours.adds_bos, tokenizer = tokenizer.adds_bos, ours
  if isinstance(tokenizer, HuggingFace):
    (folder / 'tokenizer.json').write_bytes(pieces.beginning_with_bos(tokenizer))
    said |= {f'{role}_token': token for role, token in tokenizer.roles.items()}
    said |= dict(tokenizer_class='PreTrainedTokenizerFast')
  elif not tokenizer.own:
    (folder / 'tokenizer.model').write_bytes(tokenizer.model)
    ids = dict(bos=tokenizer.bos_id, eos=tokenizer.eos_id)
    said |= {f'{role}_token': tokenizer.piece(i) for role, i in ids.items() if i is not None}
    said |= dict(tokenizer_class='LlamaTokenizer', legacy=False, add_bos_token=tokenizer.adds_bos)
  else:
    return 'a unigram tokenizer of ours has no counterpart there: it lies in tokenizer/, which llm_jax reads'
  (folder / 'tokenizer_config.json').write_text(json.dumps(said, indent=1))
  return ''
