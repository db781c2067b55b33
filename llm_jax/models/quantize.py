"""Matrices and caches in few bits, for decoding, where reading memory is what takes time: symmetric integers with a
scale (weight-only quantisation as in arXiv 2208.07339, without its outliers)."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

KINDS = dict(int8=(jnp.int8, -127, 127), int4=(jnp.int4, -8, 7))
STEPS = (7, 7.5, 8, 8.5, 9)        # of int4: the largest of a group is put so many steps from 0, whatever is best
MATRICES = {'w_q', 'w_k', 'w_v', 'w_o', 'w_up', 'w_gate', 'w_down', 'unembed'}
GROUP = 32                 # inputs that share a scale in int4; in int8 all of an output's do


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """Integers times a scale, which has as many axes: each of one element, of as many, or of one for each group."""
  q: jax.Array
  scale: jax.Array         # float32

  @property
  def shape(self):
    return self.q.shape

  @property
  def grouped(self) -> bool:
    return any(1 < groups < n for n, groups in zip(self.q.shape, self.scale.shape))

  def __getitem__(self, key):
    """Itself: what a parameter is read with is [...]."""
    assert key is ...
    return self

  def astype(self, dtype):
    """The array that it stands for."""
    scale = self.scale.astype(dtype)
    for axis, (n, groups) in enumerate(zip(self.q.shape, scale.shape)):
      if 1 < groups < n:
        scale = jnp.repeat(scale, n // groups, axis)
    return self.q.astype(dtype) * scale


def quantize(x, axes: tuple[int, ...], kind: str = 'int8', group: int = 0) -> Quantized:
  """x rounded to integers with one scale over these axes or, with `group`, for each so many along the last of them."""
  dtype, low, high = KINDS[kind]
  shape = x.shape
  x = x.astype(jnp.float32)
  if group and shape[axes[-1]] % group == 0:
    axis = axes[-1]
    x = x.reshape(*shape[:axis], shape[axis] // group, group, *shape[axis + 1:])
    over = (axis + 1,)
  else:
    over = axes
  rounded = lambda scale: jnp.clip(jnp.round(x / scale), low, high)
  top, bottom = x.max(over, keepdims=True), x.min(over, keepdims=True)
  peak = jnp.where(jnp.abs(x).max(over, keepdims=True) < 1e-30, 1e-30, jnp.where(top > -bottom, top, bottom))
  scale = jnp.abs(peak) / high
  if kind == 'int4':
    scales = [peak / -k for k in STEPS]
    errors = [jnp.square(rounded(s) * s - x).sum(over, keepdims=True) for s in scales]
    best = jnp.argmin(jnp.stack(errors), 0)
    scale = jnp.choose(best, scales, mode='clip')
  q = rounded(scale).astype(dtype).reshape(shape)
  return Quantized(q, scale.squeeze(over) if over != axes else scale)


def einsum(spec: str, x, w, dtype=None):
  """jnp.einsum(spec, x, w) in x's dtype, or in `dtype`: where it can be, it is not the integers that are scaled but the
  product, or x, which are smaller."""
  dtype = jnp.dtype(dtype or x.dtype)
  if not isinstance(w, Quantized):
    w = w.astype(x.dtype)
    return jnp.einsum(spec, x, w) if dtype == x.dtype else _wide(spec, dtype, x, w)
  inputs, out = spec.split('->')
  of_x, of_w = inputs.split(',')
  several = {letter for letter, n in zip(of_w, w.scale.shape) if n > 1}
  along = lambda letters: w.scale.reshape([w.scale.shape[of_w.index(i)] if i in several else 1 for i in letters])
  if w.grouped or not (several <= set(out) or several <= set(of_x)):
    return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)
  if several <= set(out):
    y = jnp.einsum(spec, x, w.q.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * along(out)).astype(dtype)
  return jnp.einsum(spec, (x * along(of_x)).astype(x.dtype), w.q.astype(x.dtype), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide(spec: str, dtype, x, w):
  """The product in a wider dtype than its operands'. Those of its gradient read it in theirs: two of three products
  would else have operands in float32, whose peak on a GPU (TF32) is half."""
  return jnp.einsum(spec, x, w, preferred_element_type=dtype)


def _wide_fwd(spec, dtype, x, w):
  return _wide(spec, dtype, x, w), (x, w)


def _wide_bwd(spec, dtype, saved, g):
  x, w = saved
  inputs, out = spec.split('->')
  of_x, of_w = inputs.split(',')
  g = g.astype(x.dtype)
  return jnp.einsum(f'{out},{of_w}->{of_x}', g, w), jnp.einsum(f'{of_x},{out}->{of_w}', x, g)


_wide.defvjp(_wide_fwd, _wide_bwd)


def weights(module, kind: str) -> None:
  """Turns a module's matrices, those named w_..., into Quantized ones, but for a router; and the unembedding into int8,
  for in int4 it costs more than all others."""
  for name, value in list(vars(module).items()):
    prefix, _, dims = name.rpartition('_')
    if isinstance(value, nnx.Module):
      weights(value, kind)
    elif isinstance(value, nnx.Param) and prefix in MATRICES:
      inner = dims.replace('E', '')[:-1] if dims.endswith('D') else 'D'
      axes = tuple(i for i, letter in enumerate(dims) if letter in inner)
      of = 'int8' if prefix == 'unembed' else kind
      setattr(module, name, nnx.Param(quantize(value[...], axes, of, GROUP if of == 'int4' else 0)))


def positions(x_BTKH, like):
  """New keys or values as the cache they are put into: in int8 with a scale_BTK, where `like` is. (An axis of one entry
  at the end would take 128 times the memory on a TPU.)"""
  if not isinstance(like, Quantized):
    return x_BTKH.astype(like.dtype)
  found = quantize(x_BTKH, (3,))
  return Quantized(found.q, found.scale[..., 0])


def cached(x, axis: int):
  """A cache's keys or values, whose heads lie along `axis`, as what `einsum` multiplies with."""
  return Quantized(x.q, jnp.expand_dims(x.scale, axis)) if isinstance(x, Quantized) else x


def nbytes(tree) -> int:
  """Bytes in memory, where int4 takes half of one."""
  bits = lambda x: 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
  return sum(math.ceil(x.size * bits(x) / 8) for x in jax.tree.leaves(tree))
