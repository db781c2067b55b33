"""A model written as a Hugging Face directory, a GGUF file or a run directory of ours, then read back.

A model from load.find, whose parameters are not read yet, is in memory once: it is let go before it is read back.
"""
import dataclasses
import json
import pathlib
import typing

import jax
import numpy as np

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax import sharding as sharding_lib
from llm_jax.config import ConfigError
from llm_jax.interop import card, families, gguf, gguf_model, hf, layout, vocabulary
from llm_jax.interop.load import Loaded, load
from llm_jax.models import transformer

PROBE = 64                                    # tokens of the sequence whose logits are compared


class Saved(typing.NamedTuple):
  """What writing did. error: the largest difference of a logit, read back; notes: lines for the user."""
  path: pathlib.Path
  error: float
  notes: list[str]


def to_hf(model: Loaded, folder: pathlib.Path, dtype: str = '') -> Saved:
  """config.json, safetensors in `dtype` (default: what its files held), tokenizer, chat template, model card. Raises
  ConfigError where no architecture there computes the same, or where what was written does not give the same logits."""
  family, config = families.family_for(model.shape, model.family)
  folder, model = _fresh(folder), _whole(model)
  t = model.tokenizer
  ids = dict(bos_token_id=t.bos_id, eos_token_id=list(t.stop_ids) if t.more_stops else t.eos_id, pad_token_id=t.pad_id)
  links = {link.name: link for link in layout.hf_links(family.name, model.shape)}
  dtype = dtype or model.dtype
  note = hf.write_tokenizer(folder, model.tokenizer, model.chat_template, model.shape.max_length)
  read = Reader(model, links, dict.fromkeys(links, dtype))
  hf.write(folder, config | ids, {name: link.shape for name, link in links.items()}, read, dtype)
  hf.write_text(folder / 'generation_config.json', json.dumps(ids, indent=1))
  hf.write_text(folder / 'README.md', card.text(model, family.architecture, dtype))
  probe, notes, exact = Probe(model), [*[note] * bool(note), *read.notes(dtype)], not read.rounded
  del model, read
  return Saved(folder, probe.error(folder, exact), notes)


def to_orbax(model: Loaded, folder: pathlib.Path) -> Saved:
  """A run directory with one step, 0, that training (config.init_from), sampling and everything else read."""
  folder, model = _fresh(folder), _whole(model)
  model.tokenizer.save(folder / 'tokenizer')
  extra = dict(chat_template=model.chat_template, family=model.family)
  with checkpoint_lib.Checkpointer(folder, 1, config_lib.to_dict(model.config)) as writer:
    writer.save(0, dict(params=jax.tree.map(lambda x: x.astype(np.float32), model.params)), extra)
  probe = Probe(model)
  del model, writer
  return Saved(folder, probe.error(folder, True), [])


def to_gguf(model: Loaded, path: pathlib.Path, kind: str = '') -> Saved:
  """One file that llama.cpp reads. kind: bfloat16, float16, float32, q8_0 or q4_0 (default: what its files held)."""
  path = pathlib.Path(path).expanduser()
  if path.suffix != '.gguf' or path.exists():
    raise ConfigError(f'{path}: expected the name of a new file that ends in .gguf')
  family, _ = families.family_for(model.shape, model.family)
  path.parent.mkdir(parents=True, exist_ok=True)
  model = _whole(model)
  kind = dict(float32='F32', float16='F16', bfloat16='BF16').get(kind or model.dtype, kind.upper())
  links = {link.name: link for link in gguf_model.links(family.name, model.shape)}
  fields = gguf_model.fields_of(family, model.shape) | {
      'general.name': path.stem, 'general.file_type': gguf_model.FILE_TYPES[kind], 'general.quantization_version': 2}
  fields |= vocabulary.gguf_fields(model.tokenizer, model.shape.vocab_size)
  fields |= {'tokenizer.chat_template': model.chat_template} if model.chat_template else {}
  tensors = {name: (link.shape, gguf_model.kind_of(link, kind)) for name, link in links.items()}
  halves = dict(F32='float32', F16='float16', BF16='bfloat16')
  read = Reader(model, links, {name: halves.get(kind) for name, (_, kind) in tensors.items()})
  if (factors := gguf_model.rope_freqs(model.shape)) is not None:
    tensors['rope_freqs.weight'], read.constants['rope_freqs.weight'] = (factors.shape, 'F32'), factors
  gguf.write(path, fields, tensors, read)
  try:
    again = families.computed(families.model_of(gguf_model.config_of(gguf.read(path)), 'read back')[1])
    differs = [name for name, value in vars(again).items() if value != getattr(families.computed(model.shape), name)]
    why = f'model.{", model.".join(differs)}' if differs else ''
  except ConfigError as e:
    why = f'all of this model ({e})'
  if why:
    path.unlink()
    raise ConfigError(f'{path}: a GGUF file of {family.gguf} cannot say {why}; use --to=hf')
  probe, notes, exact = Probe(model), read.notes(kind), not read.rounded
  del model, read
  return Saved(path, probe.error(path, exact), notes)


def _fresh(folder) -> pathlib.Path:
  folder = pathlib.Path(folder).expanduser()
  if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
    raise ConfigError(f'{folder}: is there already; name a new directory, or delete it')
  folder.mkdir(parents=True, exist_ok=True)
  return folder


class Reader:
  """name -> the tensor as that format has it, from our leaves. rounded: those that its dtype (None: quantised) does not
  hold exactly."""

  def __init__(self, model: Loaded, links: dict[str, layout.Link], dtypes: dict[str, str | None]):
    self.links, self.dtypes, self.rounded, self.constants = links, dtypes, [], {}
    self.flat = {jax.tree_util.keystr(path, simple=True, separator='/'): x
                 for path, x in jax.tree_util.tree_leaves_with_path(model.params)}

  def __call__(self, name: str) -> np.ndarray:
    if name in self.constants:
      return self.constants[name]
    link, dtype = self.links[name], self.dtypes[name]
    array = link.join([np.asarray(self.flat[part.leaf][part.place]) for part in link.parts])
    with np.errstate(over='ignore'):
      if dtype is None or dtype != 'float32' and not np.array_equal(array.astype(dtype).astype(array.dtype), array):
        self.rounded.append(name)
    return array

  def notes(self, kind: str) -> list[str]:
    if not self.rounded:
      return []
    return [f'{len(self.rounded)} of {len(self.links)} tensors are rounded: {kind} does not hold them exactly']


def _whole(model: Loaded) -> Loaded:
  """The model with its parameters."""
  mesh = jax.sharding.get_mesh()
  return model if model.params is not None else dataclasses.replace(model, params=model.read(
      None if mesh.empty else mesh))


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

  def error(self, path, exact: bool) -> float:
    """The largest difference of what `path` holds. exact: it must be no more than rounding."""
    after = self._logits(load(path, dtype=self.dtype, mesh=self.mesh or jax.sharding.get_mesh()))
    error, scale = float(np.abs(self.before - after).max()), float(np.abs(self.before).max())
    if not np.isfinite(after).all() or exact and error > 1e-5 * max(scale, 1.0):
      raise ConfigError(f'{path}: read back, its logits differ by up to {error:.2g} (largest {scale:.2g}); do not use '
                        'it')
    return error
