"""A model written as a Hugging Face directory, a GGUF file or a run directory of ours, then read back.

A model from load.find, whose parameters are not read yet, is in memory once: it is let go before it is read back.
"""
import contextlib
import dataclasses
import json
import pathlib
import shutil
import typing

import jax
import numpy as np

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax import sharding as sharding_lib
from llm_jax.config import ConfigError
from llm_jax.interop import families, gguf, gguf_model, hf, layout, vocabulary
from llm_jax.interop.load import Loaded, load
from llm_jax.models import transformer

PROBE = 64                                    # tokens of the sequence whose logits are compared


class Saved(typing.NamedTuple):
  """What writing did. error, largest: the largest difference of a logit, read back, and logit."""
  path: pathlib.Path
  error: float
  largest: float
  notes: list[str]


def to_hf(model: Loaded, folder: pathlib.Path, dtype: str = '') -> Saved:
  """config.json, safetensors in `dtype` (default: what its files held, if that loses nothing), tokenizer, chat
  template, model card. Raises ConfigError where no architecture there computes the same, or what was written does
  not."""
  family, config = families.family_for(model.shape, model.family)

  def write(part, model):
    t = model.tokenizer
    ids = dict(bos_token_id=t.bos_id, eos_token_id=list(t.stop_ids) if t.more_stops else t.eos_id,
               pad_token_id=t.pad_id if t.pads else None)
    links = {link.name: link for link in layout.hf_links(family.name, model.shape)}
    stored = dtype or _lossless(model, links)
    notes = [hf.write_tokenizer(part, t, model.chat_template, model.shape.max_length)]
    read = Reader(model, links, dict.fromkeys(links, stored))
    hf.write(part, config | ids, {name: link.shape for name, link in links.items()}, read, stored)
    (part / 'generation_config.json').write_text(json.dumps(ids, indent=1))
    (part / 'README.md').write_text(card(model, family.architecture, stored))
    _check_rounded(read, hf.Weights(part).read, part)
    return [*filter(None, notes), *_renamed(model, family), *read.notes(stored)], not read.rounded
  return _written(model, folder, write)


def to_orbax(model: Loaded, folder: pathlib.Path) -> Saved:
  """A run directory with one step, 0, that training (config.init_from), sampling and everything else read."""
  def write(part, model):
    model.tokenizer.save(part / 'tokenizer')
    extra = dict(chat_template=model.chat_template, family=model.family)
    with checkpoint_lib.Checkpointer(part, 1, config_lib.to_dict(model.config)) as writer:
      writer.save(0, dict(params=jax.tree.map(lambda x: x.astype(np.float32), model.params)), extra)
    return [], True
  return _written(model, folder, write)


def to_gguf(model: Loaded, path: pathlib.Path, kind: str = '') -> Saved:
  """One file that llama.cpp reads. kind: bfloat16, float16, float32, q8_0 or q4_0 (default: what its files held)."""
  if pathlib.Path(path).suffix != '.gguf':
    raise ConfigError(f'{path}: expected the name of a new file that ends in .gguf')
  family, _ = families.family_for(model.shape, model.family)
  links = {link.name: link for link in gguf_model.links(family.name, model.shape)}
  fields = gguf_model.fields_of(family, model.shape) | vocabulary.gguf_fields(model.tokenizer, model.shape.vocab_size)
  fields |= {'tokenizer.chat_template': model.chat_template} if model.chat_template else {}

  def write(part, model):
    stored = dict(float32='F32', float16='F16', bfloat16='BF16').get(kind or model.dtype, kind.upper())
    said = fields | {'general.name': pathlib.Path(path).stem, 'general.file_type': gguf_model.FILE_TYPES[stored],
                     'general.quantization_version': 2}
    tensors = {name: (link.shape, gguf_model.kind_of(link, stored)) for name, link in links.items()}
    halves = dict(F32='float32', F16='float16', BF16='bfloat16')
    read = Reader(model, links, {name: halves.get(each) for name, (_, each) in tensors.items()})
    if (factors := gguf_model.rope_freqs(model.shape)) is not None:
      tensors['rope_freqs.weight'], read.constants['rope_freqs.weight'] = (factors.shape, 'F32'), factors
    gguf.write(part, said, tensors, read)
    _check_said(part, path, family, model.shape)
    notes = [*_renamed(model, family), *read.notes(stored)]
    if any(model.shape.windows) and family.gguf in ('llama', 'qwen2', 'phi3', 'starcoder2'):
      notes.append(f'llama.cpp has no sliding windows for {family.gguf}: beyond {max(model.shape.windows)} tokens it '
                   'computes something else')
    _check_rounded(read, gguf.read(part).array, part)
    return notes, not read.rounded
  return _written(model, path, write)


def _check_said(part, path, family, shape) -> None:
  """Raises ConfigError where the file's header says another model than it should."""
  try:
    again = families.computed(families.model_of(gguf_model.config_of(gguf.read(part)), 'read back')[1])
    differs = [name for name, value in vars(again).items() if value != getattr(families.computed(shape), name)]
    why = f'model.{", model.".join(differs)}' if differs else ''
  except ConfigError as e:
    why = f'all of this model ({e})'
  if why:
    raise ConfigError(f'{path}: a GGUF file of {family.gguf} cannot say {why}; use --to=hf')


def _renamed(model: Loaded, family) -> list[str]:
  if model.family in ('', family.name):
    return []
  return [f'what was {model.family} is written as {family.name}, which computes the same']


def _lossless(model: Loaded, links) -> str:
  """The dtype of its files' matrices, if it holds the vectors too."""
  vectors = {name: link for name, link in links.items() if len(link.shape) == 1}
  read = Reader(model, vectors, dict.fromkeys(vectors, model.dtype))
  for name in vectors:
    read(name)
  return 'float32' if read.rounded else model.dtype


# The largest share of a tensor that rounding may change (root of the mean square).
ROUNDING = dict(bfloat16=0.004, float16=0.004, none=0.12)


def _check_rounded(read, written, where) -> None:
  """Raises ConfigError where a tensor is not what it was, but for the rounding of its dtype."""
  for name in read.rounded:
    before, after = np.asarray(read(name), np.float32), np.asarray(written(name), np.float32)
    off = float(np.sqrt(np.square(after - before).mean(dtype=np.float64)))
    size = float(np.sqrt(np.square(before).mean(dtype=np.float64)))
    if not off <= ROUNDING[read.dtypes[name] or 'none'] * size + 1e-30:
      raise ConfigError(f'{where}: read back, {name} differs by {off / size:.1%} of its size, more than rounding')


def _written(model: Loaded, path, write) -> Saved:
  """Lets write(part, model) -> (notes, exact) make it in a place beside `path`, and reads it back: it becomes `path` in
  the end, or is removed where something fails."""
  if '://' in str(path):
    raise ConfigError(f'{path}: expected a local path; write the model there, then copy it')
  path = pathlib.Path(path).expanduser()
  if path.is_dir() and any(path.iterdir()) or path.exists() and not path.is_dir():
    raise ConfigError(f'{path}: is there already; name a new one, or delete it')
  part = path.with_name(f'{path.stem}.part{path.suffix}')
  try:
    _remove(part)
    part.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != '.gguf':
      part.mkdir()
    if model.params is None:
      mesh = jax.sharding.get_mesh()
      model = dataclasses.replace(model, params=model.read(None if mesh.empty else mesh))
    notes, exact = write(part, model)
    probe = Probe(model)
    del model
    error, largest = probe.error(part, exact)
    if path.is_dir():
      path.rmdir()
    part.rename(path)
  except OSError as e:
    raise ConfigError(f'{path}: cannot be written ({e.strerror or e})') from e
  finally:
    with contextlib.suppress(OSError):
      _remove(part)
  return Saved(path, error, largest, notes)


def _remove(part) -> None:
  if part.is_dir():
    shutil.rmtree(part)
  part.unlink(missing_ok=True)


class Reader:
  """name -> the tensor as that format has it, from our leaves. rounded: those that its dtype (None: quantised) does not
  hold exactly."""

  def __init__(self, model: Loaded, links: dict[str, layout.Link], dtypes: dict[str, str | None]):
    self.links, self.dtypes, self.rounded, self.constants = links, dtypes, [], {}
    self.flat = checkpoint_lib.flat(model.params)

  def __call__(self, name: str) -> np.ndarray:
    if name in self.constants:
      return self.constants[name]
    link, dtype = self.links[name], self.dtypes[name]
    array = link.join([np.asarray(self.flat[part.leaf][part.place]) for part in link.parts])
    with np.errstate(over='ignore'):
      if dtype is None or dtype != 'float32' and not np.array_equal(array.astype(dtype).astype(array.dtype), array):
        self.rounded = [*dict.fromkeys([*self.rounded, name])]
    return array

  def notes(self, kind: str) -> list[str]:
    if not self.rounded:
      return []
    return [f'{len(self.rounded)} of {len(self.links)} tensors are rounded: {kind} does not hold them exactly']


class Probe:
  """The logits of one made-up sequence, to be found again in what is written."""

  def __init__(self, model: Loaded):
    self.mesh = next((x.sharding.mesh for x in jax.tree.leaves(model.params) if hasattr(x.sharding, 'mesh')), None)
    self.dtype = model.config.model.dtype
    vocab_size = min(model.shape.vocab_size, model.tokenizer.vocab_size)
    rows = 1 if self.mesh is None else sharding_lib.axis_size(self.mesh, sharding_lib.ACT['B'])
    self.ids = np.random.default_rng(0).integers(0, vocab_size, (rows, min(PROBE, model.shape.max_length)), np.int32)
    self.before = self._logits(model)

  def _logits(self, model) -> np.ndarray:
    return np.asarray(transformer.logits(model.shape, model.params, self.ids))

  def error(self, path, exact: bool) -> tuple[float, float]:
    """The largest difference of what `path` holds, and the largest logit. exact: no more than rounding is allowed."""
    after = self._logits(load(path, dtype=self.dtype, mesh=self.mesh or jax.sharding.get_mesh()))
    error, scale = float(np.abs(self.before - after).max()), float(np.abs(self.before).max())
    if not np.isfinite(after).all() or exact and error > 1e-5 * max(scale, 1.0):
      raise ConfigError(f'{path}: read back, its logits differ by up to {error:.2g} (largest {scale:.2g}); do not use '
                        'it')
    return error, scale


def card(model: Loaded, architecture: str, dtype: str) -> str:
  """The model card: what it is, what it was trained on, what is known of its limits."""
  shape, config = model.shape, model.config
  trained = not model.family or bool(config.init_from)
  data = config.data
  sources = ', '.join(f'{s.source} {s.path} (weight {s.weight:g})'.replace('  ', ' ') for s in data.mixture) or (
      f'{data.source} {data.path}'.strip())
  parts = [
      '---', 'library_name: transformers', 'tags:', '- llm_jax', '---', '', '# Model card', '',
      f'{architecture} with {transformer.count(model.params):,} parameters, stored in {dtype}; written by llm_jax.', '']
  if trained:
    t, o = config.train, config.optimizer
    until = f'{t.minutes:g} minutes' if t.minutes else f'{t.steps:,} steps'
    parts += [
        '## Training data', '', f'* {sources}', f'* sequences of {data.length} tokens, packing `{data.packing}`; '
        f'held out: `{data.valid}`', f'* tokenizer: {model.tokenizer.kind}, {model.tokenizer.vocab_size:,} entries', '',
        '## Training', '', f'* {until}, batch of {t.batch_size}, {o.name}, learning rate {o.learning_rate:g}, '
        f'{o.schedule}, seed {t.seed}',
        *([f'* from the weights of {config.init_from}'] if config.init_from else []), f'* {model.origin}', '']
  else:
    parts += ['## Training data', '', 'Converted, not trained here: see the original, and its licence '
              f'({model.origin}).', '']
  parts += [
      '## Evaluation', '', *_evaluation(model, trained), '',
      '## Limits', '',
      '* It continues text; it states falsehoods fluently, and repeats what its data held, biases too.',
      f'* It reads at most {shape.max_length:,} tokens.',
      '* Nothing here was tested for a use; test it for yours.', '', '## Config', '', '```']
  plain, shape = config_lib.Model(), families.computed(shape)
  parts += [f'{name} = {value!r}' for name, value in vars(shape).items() if value != getattr(plain, name)]
  return '\n'.join([*parts, '```', ''])


FIGURES = {'loss/valid': 'loss per token, nats', 'eval/bits_per_byte': 'bits per byte',
           'eval/accuracy': 'next token right'}


def _evaluation(model: Loaded, trained: bool) -> list[str]:
  if not model.figures:
    return ['No evaluation was recorded.' if trained else 'See the original.']
  rows = [f'| {FIGURES.get(name, name)} | {value:.4f} |' for name, value in model.figures.items()
          if name != 'step' and isinstance(value, float)]
  return [f'On text held out from its training data, after step {model.figures["step"]:,}:', '',
          '| | |', '|---|---|', *rows, '',
          'Nothing else was measured: neither truthfulness, nor bias, nor how it follows instructions.']
