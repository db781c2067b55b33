"""Any model by path: a run directory or checkpoint of ours, a Hugging Face directory, a .gguf file, or hf:org/name.

Weights stream from the files to the devices that hold them: a leaf's buffers are filled tensor by tensor and become its
array, so the host never holds more than the model once and one tensor.
"""
import collections
import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax import paths
from llm_jax import sharding as sharding_lib
from llm_jax.config import ConfigError
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.interop import families, gguf, gguf_model, hf, layout, vocabulary
from llm_jax.models.attention import compute_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A model from anywhere. params: nested dict of arrays, as training keeps them; dtype: what its files hold."""
  config: config_lib.Config
  tokenizer: tokenizer_lib.Tokenizer = dataclasses.field(repr=False)
  chat_template: str | None = dataclasses.field(repr=False)    # Jinja, where the model came with one
  family: str                   # of Hugging Face's names; '' for a model of ours
  dtype: str
  origin: str                   # where from, and what was verified, in words
  params: dict | None = dataclasses.field(repr=False)          # None: not read yet
  read: Callable[..., dict] | None = dataclasses.field(repr=False, default=None)        # mesh -> params
  figures: dict = dataclasses.field(default_factory=dict)      # the last evaluation of a run of ours, by its names

  @property
  def shape(self) -> config_lib.Model:
    """config.model with nothing left to derive."""
    return config_lib.derive(self.config.model, self.tokenizer.vocab_size, self.config.data.length)


def load(path, *, step: int | None = None, ema: bool = False, dtype: str | None = None, verify: bool = True,
         mesh=None) -> Loaded:
  """The model at `path`, on the mesh (default: the one set by jax.set_mesh, or one device).

  step, ema, verify: of our own checkpoints (checkpoint.find). dtype: 'float32' or 'bfloat16' to compute in, instead of
  the model's. Raises ConfigError for what is no model, or cannot be run exactly.
  """
  found = find(path, step=step, ema=ema, dtype=dtype, verify=verify)
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  return dataclasses.replace(found, params=found.read(None if mesh.empty else mesh), read=None)


def find(path, *, step: int | None = None, ema: bool = False, dtype: str | None = None, verify: bool = True) -> Loaded:
  """`load` without the weights: `read(mesh)` gives them (mesh None: on one device)."""
  if isinstance(path, checkpoint_lib.Step):
    return _own(path, step, ema, dtype, verify)
  kind, place = kind_of(path)
  if kind == 'own':
    try:
      return _own(place, step, ema, dtype, verify)
    except Exception as e:           # of a bucket's client, in many classes
      if isinstance(e, ConfigError) or '://' not in str(path):
        raise
      raise ConfigError(f'{path}: cannot be read ({type(e).__name__}: {" ".join(str(e).split())[:160]}); check the '
                        'address and the credentials') from e
  if step is not None or ema:
    raise ConfigError(f'{path}: {"step" if step is not None else "ema"} is of run directories; this is a model alone')
  return _hf(place, dtype) if kind == 'hf' else _gguf(place, dtype)


def group(path) -> ConfigDict:
  """The config.model group of the model at `path`: for a config file, as `--config.model=PATH` is on a command line."""
  return ConfigDict(vars(find(path, verify=False).shape))


def kind_of(path) -> tuple[str, object]:
  """('own' | 'hf' | 'gguf', where it lies). Raises ConfigError saying what was expected."""
  if str(path).startswith('hf:'):
    from llm_jax.interop import hub
    path = hub.download(str(path).removeprefix('hf:'))
  if '://' in str(path):
    return 'own', paths.open_path(path)
  try:
    path = pathlib.Path(path).expanduser()
    path.exists()
  except (OSError, RuntimeError, TypeError, ValueError) as e:
    raise ConfigError(f'{ascii(path)[:100]}: expected the path of a model ({str(e)[:100]})') from e
  if path.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl'):
    raise ConfigError(f'{path}: can run any program when it is read; convert it in a place you trust, with '
                      'AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) of the transformers library')
  if path.is_file():
    with path.open('rb') as f:
      if path.suffix.lower() == '.gguf' or f.read(4) == b'GGUF':
        return 'gguf', path
    raise ConfigError(f'{path}: expected a directory or a GGUF file; of a Hugging Face model give the directory')
  if not path.is_dir() or (path / 'checkpoints').is_dir() or (path / 'meta.json').is_file():
    return 'own', paths.open_path(path)
  ggufs = sorted(path.glob('*.gguf'))
  if (path / 'config.json').is_file() and not (ggufs and not list(path.glob('*.safetensors'))):
    return 'hf', path
  if len(ggufs) == 1:
    return 'gguf', ggufs[0]
  if ggufs:
    raise ConfigError(f'{path}: has {len(ggufs)} GGUF files; give one of them, such as {ggufs[0].name}')
  return 'own', paths.open_path(path)


def _own(path, step, ema, dtype, verify) -> Loaded:
  found = checkpoint_lib.find(path, step, ('params', 'ema') if ema else ('params',), verify)
  config = _computing_in(checkpoint_lib.config_of(found), dtype)
  return Loaded(config, tokenizer_lib.load(found.tokenizer), found.extra.get('chat_template'),
                found.extra.get('family', ''), 'float32', f'step {found.step}, {found.verified}', None,
                lambda mesh: checkpoint_lib.restore_params(found, mesh=mesh, ema=ema), _figures(found))


def _figures(found: checkpoint_lib.Step) -> dict:
  """The last evaluation of the run that wrote this step, up to it; {} where its metrics are not beside it."""
  path, last = found.folder.parent.parent / 'metrics.jsonl', {}
  for row in paths.read_jsonl(path):
    if 'loss/valid' in row and row['step'] <= found.step:
      last = {name: x for name, x in row.items() if name == 'step' or name.startswith(('loss/valid', 'eval/'))}
  return last


def _hf(folder: pathlib.Path, dtype) -> Loaded:
  said = hf.read_json(folder / 'config.json')
  family, model = families.model_of(said, str(folder / 'config.json'))
  weights = hf.Weights(folder)
  output, embedding = ({n for n in weights.shapes if n in names} for names in (OUTPUTS, EMBEDDINGS))
  if model.tied_embeddings and len(output) == len(embedding) == 1 and not weights.same(*output, *embedding):
    model = dataclasses.replace(model, tied_embeddings=False)        # as transformers does: the files win
  tokenizer = tokenizer_lib.load(folder / 'tokenizer') if (folder / 'tokenizer/meta.json').is_file() else (
      vocabulary.from_folder(folder))
  if tokenizer is None:
    raise ConfigError(f'{folder}: no tokenizer.json, tokenizer.model, vocab.json with merges.txt or *.tiktoken')
  older = family.name == 'falcon' and not said.get('new_decoder_architecture', False)
  links = list(layout.hf_links(family.name, model, shared_norm=older and model.parallel_residual))
  if family.name == 'falcon' and older and not model.parallel_residual:
    links = [dataclasses.replace(link, name=link.name.replace('ln_attn', 'input_layernorm').replace(
        'ln_mlp', 'post_attention_layernorm')) for link in links]
  links = match(links, weights.shapes, str(folder))
  config = config_of(model, dtype)
  kinds = {link.name: weights.shapes[link.name][1] for link in links}
  stored = stored_in({np.dtype(kinds[link.name]).name for link in links if len(link.shape) > 1})
  return Loaded(config, tokenizer, hf.chat_template(folder), family.name, stored,
                f'{folder.name}: {family.architecture}, {stored}',
                None, lambda mesh: place(links, weights.read, kinds, config.model, mesh))


def stored_in(kinds: set[str]) -> str:
  """The dtype that holds matrices of these dtypes exactly."""
  return kinds.pop() if len(kinds) == 1 and kinds <= {'bfloat16', 'float16'} else 'float32'


def config_of(model: config_lib.Model, dtype: str | None) -> config_lib.Config:
  """A Config around a foreign model, with which it can be trained further."""
  return _computing_in(config_lib.Config(model=model, data=config_lib.Data(length=min(model.max_length, 256))), dtype)


def _computing_in(config: config_lib.Config, dtype: str | None) -> config_lib.Config:
  """fp8 is for training: its scales would make a row depend on those beside it."""
  model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype, fp8=False)
  return config_lib.check(dataclasses.replace(config, model=model))


OUTPUTS = {'lm_head.weight', 'embed_out.weight', 'output.weight'}
EMBEDDINGS = {f'{prefix}{name}.weight' for prefix in ('', 'transformer.', 'model.', 'gpt_neox.')
              for name in ('wte', 'embed_tokens', 'embed_in', 'word_embeddings')}
# What files hold beside the parameters: constants, and copies of tied ones.
BUFFERS = ('.rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias', '.attention.bias', '.attention.masked_bias',
           'rope_freqs.weight')


def match(links: list[layout.Link], there: dict, where: str) -> list[layout.Link]:
  """The links, with names as the file has them. Raises ConfigError for what is missing, unknown or of another shape."""
  for prefix in ('transformer.', 'model.', 'gpt_neox.'):
    if not any(name.startswith(prefix) for name in there):                 # GPT-2's first files name the inner model
      links = [dataclasses.replace(link, name=link.name.removeprefix(prefix)) for link in links]
  wanted = {link.name: link for link in links}
  missing = [name for name in wanted if name not in there]
  unknown = [name for name in there if name not in wanted and not name.endswith(BUFFERS)]
  unknown = [name for name in unknown if name not in OUTPUTS or OUTPUTS & wanted.keys()]
  wrong = [f'{name} {list(there[name][0])}, expected {list(link.shape)}' for name, link in wanted.items()
           if name in there and tuple(there[name][0]) != tuple(link.shape)]
  for what, names in dict(missing=missing, unknown=unknown).items():
    if names:
      raise ConfigError(f'{where}: tensors {what}: {", ".join(names[:6])}{" ..." if len(names) > 6 else ""} '
                        f'({len(names)}); it does not fit its config.json')
  if wrong:
    raise ConfigError(f'{where}: {"; ".join(wrong[:4])}; it does not fit its config.json')
  return links


def place(links: list[layout.Link], read: Callable[[str], np.ndarray], kinds: dict[str, np.dtype],
          model: config_lib.Model, mesh) -> dict:
  """The nested dict of parameters. Matrices stay in bfloat16 where the file has them so and the model computes in it;
  everything else is float32, which holds the rest of what files have exactly."""
  half, shapes = compute_dtype(model.dtype) == 'bfloat16', layout.leaf_shapes(model)
  counts = collections.Counter(part.leaf for link in links for part in link.parts)
  order = {leaf: i for i, leaf in enumerate(counts)}
  tree = checkpoint_lib.nest({leaf: jax.ShapeDtypeStruct(shape, np.float32) for leaf, shape in shapes.items()})
  if mesh is None:
    shardings = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  else:
    shardings = checkpoint_lib.flat(sharding_lib.named(mesh, sharding_lib.param_specs(tree, mesh)))
  buffers, out = {}, {}
  for link in sorted(links, key=lambda link: min(order[part.leaf] for part in link.parts)):      # leaf after leaf
    keep = half and kinds[link.name] == hf.DTYPES['BF16']
    for part, piece in zip(link.parts, link.split(read(link.name))):
      if part.leaf not in buffers:
        matrix = len(part.shape) > 1 and not part.leaf.rpartition('/')[2].startswith(('scale', 'b_', 'w_router'))
        buffers[part.leaf] = Shards(shapes[part.leaf], hf.DTYPES['BF16'] if keep and matrix else np.float32,
                                    shardings[part.leaf])
      buffers[part.leaf].fill(part.place, piece)
      counts[part.leaf] -= 1
      if not counts[part.leaf]:
        out[part.leaf] = buffers.pop(part.leaf).array()
  return checkpoint_lib.nest(out)


class Shards:
  """An array in the making: the host's buffers of the shards that this process's devices hold."""

  def __init__(self, shape, dtype, sharding):
    self.shape, self.sharding = shape, sharding
    self.where = sharding.addressable_devices_indices_map(shape)
    self.buffers = {}
    for index in map(_key, self.where.values()):
      if index not in self.buffers:
        size = [len(range(*slice(*s).indices(n))) for s, n in zip(index, shape)]
        self.buffers[index] = aligned(size, dtype)

  def fill(self, place: tuple[int, ...], piece: np.ndarray) -> None:
    """Writes what belongs at [*place] of the whole."""
    for index, buffer in self.buffers.items():
      ranges = [range(*slice(*s).indices(n)) for s, n in zip(index, self.shape)]
      if all(i in r for i, r in zip(place, ranges)):
        inner = tuple(slice(r.start, r.stop) for r in ranges[len(place):])
        buffer[tuple(i - r.start for i, r in zip(place, ranges))] = piece[inner]

  def array(self) -> jax.Array:
    each = [jax.device_put(self.buffers[_key(index)], device, may_alias=True) for device, index in self.where.items()]
    return jax.make_array_from_single_device_arrays(self.shape, self.sharding, each)


def _key(index) -> tuple:
  return tuple((s.start, s.stop) for s in index)


def aligned(shape, dtype) -> np.ndarray:
  """Uninitialised memory that a CPU device takes over without a copy (it asks for 64 bytes)."""
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start:start + size].view(dtype).reshape(shape)


def _gguf(path: pathlib.Path, dtype) -> Loaded:
  file = gguf.read(path)
  if file.fields.get('split.count', 1) not in (0, 1):
    raise ConfigError(f'{path}: is one part of {file.fields["split.count"]}; join them first, with '
                      'llama-gguf-split --merge')
  family, model = families.model_of(gguf_model.config_of(file), str(path))
  tokenizer = vocabulary.from_gguf(file.fields)
  shared = family.name == 'falcon' and 'blk.0.attn_norm_2.weight' not in file.tensors
  links = list(gguf_model.links(family.name, model, shared))
  there = {name: (tensor.shape, np.dtype(hf.DTYPES.get(tensor.kind, np.float32)))
           for name, tensor in file.tensors.items()}
  links = match(links, there, str(path))
  config = config_of(model, dtype)
  kinds = {link.name: there[link.name][1] for link in links}
  found = sorted({tensor.kind for tensor in file.tensors.values()})
  stored = stored_in({kinds[link.name].name for link in links if len(link.shape) > 1})
  return Loaded(config, tokenizer, file.fields.get('tokenizer.chat_template'), family.name, stored,
                f'{path.name}: GGUF of {family.name}, {", ".join(found)}', None,
                lambda mesh: place(links, file.array, kinds, config.model, mesh))
