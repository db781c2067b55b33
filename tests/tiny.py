"""Small models of every family for the tests: a preset's own fields, shrunk, with random parameters everywhere (a scale
of exactly 1 or a bias of exactly 0 would hide its absence)."""
import dataclasses
import functools

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax.models import presets, transformer


def _quick_options():
  """Compilation is what these tests spend; XLA's optimiser buys nothing on models this small."""
  options = {'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False}     # 3 times, 3 times more
  try:
    jax.jit(lambda: 0, compiler_options=options)()
  except jax.errors.JaxRuntimeError:                    # an XLA that no longer has the second
    options.popitem()
  return options


quick_jit = functools.partial(jax.jit, compiler_options=_quick_options())


def model(name='', **fields) -> config_lib.Model:
  """A derived Model: `name`'s preset (or the defaults) at 3 layers and width 32, windows of 3."""
  full = config_lib.Model(**presets.preset(name).to_dict()) if name else config_lib.Model()
  small = dict(
      vocab_size=61, layers=3, width=32, heads=4, kv_heads=min(full.kv_heads, 2), head_dim=8 if full.head_dim else 0,
      mlp_dim=48, max_length=32, windows=tuple(3 if w else 0 for w in full.windows), dropout=0.0, dtype='float32',
      encoder_layers=min(full.encoder_layers, 2), experts=min(full.experts, 6), expert_dim=24 if full.experts else 0,
      experts_per_token=min(full.experts_per_token, 3), unroll=False, remat='none')
  return config_lib.derive(dataclasses.replace(full, **small | fields))


def params(cfg: config_lib.Model, seed=0) -> dict:
  """Random parameters as NumPy arrays; scales lie around 1."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    one = path[-1].key.startswith('scale') and not cfg.norm_unit_offset
    return np.asarray(rng.normal(0, 0.25, leaf.shape) + one, np.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes(cfg))


def shapes(cfg: config_lib.Model) -> dict:
  """Parameters as ShapeDtypeStructs: nothing is computed."""
  return jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))


def tokens(seed, *shape, vocab=61):
  """Random ids."""
  return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)
