"""Optimizers and schedules. `make` gives updates at the peak learning rate, already negative; `schedule` gives a factor
in [0, 1], kept apart so that the number of steps can change while training (a wall-clock budget). The step does

  params + schedule(step, horizon) * updates

Who is decayed, who gets Muon and where a moment lies on the mesh all follow from the letters of the parameters' names.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from llm_jax import config, sharding
from llm_jax.train.muon import matrix_axes, scale_by_muon

ADAFACTOR_DECAY = 0.8            # second moment: 1 - t ** -0.8
ADAFACTOR_CLIP = 1.0             # RMS of an update, per array
ADAFACTOR_MIN_DIM = 128          # arrays whose second largest dim is smaller keep a full second moment


def schedule(cfg: config.Optimizer, step: jax.Array, horizon: jax.Array) -> jax.Array:
  """Learning rate at `step` (0 is the first) as a share of the peak: a float32 scalar in [0, 1].

  step, horizon: int32 scalars, both may be traced; horizon is the total number of steps. Warmup rises linearly over
  warmup_steps, from 1 / warmup_steps at step 0 to 1, and does not depend on the horizon unless it would take more than
  half of it: then it takes half (20 steps with warmup_steps=100 warm up over 10). Nor do inverse_sqrt (arXiv
  1706.03762; it has no end, so no final_fraction) and the stable phase of wsd (warmup-stable-decay, arXiv 2404.06395:
  the last decay_fraction of the horizon falls linearly). Past the horizon the factor stays at its end.
  """
  warmup = jnp.minimum(cfg.warmup_steps, horizon // 2)
  decay = {
      'constant': lambda: jnp.float32(1),
      'linear': lambda: _linear(cfg, _share(step, warmup, horizon)),
      'cosine': lambda: _linear(cfg, (1 - jnp.cos(jnp.pi * _share(step, warmup, horizon))) / 2),
      'inverse_sqrt': lambda: jax.lax.rsqrt(_ratio(jnp.maximum(step + 1, warmup), jnp.maximum(warmup, 1))),
      'wsd': lambda: _linear(cfg, _share(step, _wsd_start(cfg, warmup, horizon), horizon)),
  }[cfg.schedule]()
  return jnp.minimum(_ratio(step + 1, jnp.maximum(warmup, 1)), 1) * decay


def _ratio(a, b):
  return jnp.asarray(a, jnp.float32) / jnp.asarray(b, jnp.float32)


def _share(step, start, end):
  """How far step is from start to end, in [0, 1]."""
  return jnp.clip(_ratio(step - start, jnp.maximum(end - start, 1)), 0, 1)


def _linear(cfg, share):
  return 1 - (1 - cfg.final_fraction) * share


def _wsd_start(cfg, warmup, horizon):
  return jnp.maximum(warmup, jnp.round((1 - cfg.decay_fraction) * horizon).astype(jnp.int32))


def make(cfg: config.Optimizer, params) -> optax.GradientTransformation:
  """The optimizer, without its schedule; `params` (arrays or ShapeDtypeStructs) say who is decayed and who gets Muon.

  Updates are what to ADD to the parameters: -peak * (direction + weight_decay * parameter), after clipping gradients to
  clip_norm; only matrices and embeddings decay (see `decayed`), scaled by the parameter's own peak. Directions:
  adamw      arXiv 1711.05101.
  adafactor  arXiv 1804.04235 (b1, b2 and eps unused) without momentum and without scaling by parameter size (as in
             arXiv 2106.04560), so that learning_rate means what it means for AdamW. Factored over an array's two
             largest dims where both are at least 128.
  lion       arXiv 2302.06675; wants about a tenth of AdamW's learning rate.
  muon       train/muon.py with peak matrix_learning_rate, for the matrices of `muon_labels`; AdamW for the rest.
  With tuned_width, matrices that sum over the model's width have a peak of learning_rate * tuned_width / width (muP,
  arXiv 2203.03466: what an update changes of their outputs then does not grow with the width); muon's have it built in.
  """
  adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
  muon = scale_by_muon(cfg.momentum, cfg.muon_steps, cfg.muon_b2, cfg.eps)
  labels = muon_labels(params)
  rates = labels if cfg.name == 'muon' else jax.tree.map(lambda _: 'rest', labels)
  if cfg.tuned_width:
    rates = jax.tree_util.tree_map_with_path(
        lambda path, rate: 'wide' if rate == 'rest' and sums_over_width(sharding.dims_of(path)) else rate, rates)
  direction = {
      'adamw': adam,
      'adafactor': optax.chain(
          optax.scale_by_factored_rms(decay_rate=ADAFACTOR_DECAY, min_dim_size_to_factor=ADAFACTOR_MIN_DIM),
          optax.clip_by_block_rms(ADAFACTOR_CLIP)),
      'lion': optax.scale_by_lion(cfg.b1, cfg.b2),
      'muon': optax.partition({'matrix': muon, 'rest': adam}, labels),
  }[cfg.name]
  wide = cfg.learning_rate * (cfg.tuned_width or 1) / width_of(params)
  peaks = {name: optax.scale(-rate) for name, rate in dict(
      matrix=cfg.matrix_learning_rate, rest=cfg.learning_rate, wide=wide).items()}
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
      direction,
      optax.add_decayed_weights(cfg.weight_decay, mask=decayed(params)) if cfg.weight_decay else optax.identity(),
      optax.partition(peaks, rates) if len(set(jax.tree.leaves(rates))) > 1 else peaks['rest'])


def decayed(params):
  """True for the parameters that weight decay shrinks: the matrices and embeddings, which have D and another letter."""
  def is_decayed(path, _):
    dims = sharding.dims_of(path).lstrip('LE')
    return 'D' in dims and len(dims) > 1
  return jax.tree_util.tree_map_with_path(is_decayed, params)


def muon_labels(params):
  """'matrix' for each parameter that Muon orthogonalises, 'rest' for each that AdamW takes."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: 'matrix' if matrix_axes(sharding.dims_of(path)) else 'rest', params)


def sums_over_width(dims: str) -> bool:
  """Whether a matrix of these letters sums over D or over what grows with it, NH and F: all but the embeddings."""
  letters = dims.lstrip('LE')
  return letters == 'DV' or dims.lstrip('L') == 'DE' or matrix_axes(dims) is not None


def width_of(params) -> int:
  """D of a model's parameters."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if 'D' in (dims := sharding.dims_of(path)):
      return x.shape[dims.index('D')]
  return 1


def opt_state_specs(tx: optax.GradientTransformation, params, param_specs):
  """PartitionSpecs of tx.init(params), for its out_shardings: jit alone would leave every moment replicated.

  params: arrays or ShapeDtypeStructs; param_specs: their specs (sharding.param_specs). A moment has its parameter's
  spec, a factored moment (Adafactor's rows and columns) that spec without the reduced dim, one that was averaged over
  some dims (NorMuon's) that spec without their axes, the rest is replicated.
  """
  shapes = {_keys(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
  specs = {_keys(path): s for path, s in
           jax.tree_util.tree_leaves_with_path(param_specs, is_leaf=lambda s: isinstance(s, P))}

  def spec(path, leaf):
    keys = _keys(path)
    if keys not in shapes:
      return P()
    if leaf.shape == shapes[keys]:
      return specs[keys]
    if len(leaf.shape) == len(shapes[keys]):
      axes = list(specs[keys]) + [None] * (leaf.ndim - len(specs[keys]))
      return P(*(axis if n > 1 else None for axis, n in zip(axes, leaf.shape)))
    return _factored_spec(jax.tree_util.keystr(path), leaf.shape, shapes[keys], specs[keys])

  return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(tx.init, params))


def _keys(path):
  """The dict keys a path ends in: in an optimizer state these are the parameter's path."""
  own = [getattr(k, 'key', None) for k in path]
  last = max((i for i, key in enumerate(own) if not isinstance(key, str)), default=-1)
  return tuple(own[last + 1:])


def _factored_spec(name, shape, param_shape, param_spec):
  """Adafactor's mean over one dim. Optax reduces the largest for rows and the second largest for columns; of equal ones
  only its own order tells which, hence the same argsort."""
  if shape == (1,):
    return P()                       # what stands where there is no moment
  second, largest = np.argsort(param_shape)[-2:]
  axis = largest if '.v_row' in name else second
  if shape != tuple(np.delete(param_shape, axis)):
    raise ValueError(f'{name}: shape {shape} is not {param_shape} without dim {axis}')
  axes = list(param_spec) + [None] * (len(param_shape) - len(param_spec))
  del axes[axis]
  return P(*axes)


def ema_update(ema, params, decay: float, step: jax.Array):
  """The parameters' moving average after `step` (0 is the first): ema * d + params * (1 - d) in the ema's dtype, where
  d = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten."""
  d = jnp.minimum(decay, _ratio(step + 1, step + 10))
  return jax.tree.map(lambda e, p: (e + (1 - d) * (p - e)).astype(e.dtype), ema, params)
