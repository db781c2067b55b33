"""Muon and NorMuon: momentum, orthogonalised, for the matrices of the layers (train/optimizer.py says which)."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from llm_jax import sharding

# Of Newton-Schulz iterations a x + b x^3 + c x^5: each brings what the ones before made of [0.001, 1] nearest to 1
# (Polar Express, arXiv 2505.16932). MARGIN, also from there: where products are rounded to bfloat16 or TF32 a singular
# value above the interval would grow with every further iteration.
COEFFICIENTS = ((8.4703, -25.1082, 18.6294), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074), (2.2737, -1.6447, 0.4162), (1.8887, -1.2652, 0.3765))
MARGIN = 1.01
TOGETHER = 2**22         # arrays of at most so many elements are orthogonalised together where their shapes are alike


def matrix_axes(dims):
  """(axes in, axes out) of a matrix between D and NH, KH or F, one per layer and expert; None for anything else."""
  letters = dims.lstrip('LE')
  if letters.strip('D') not in ('NH', 'KH', 'F') or letters.count('D') != 1:
    return None
  d = dims.index('D')
  other = tuple(i for i in range(len(dims) - len(letters), len(dims)) if i != d)
  return ((d,), other) if letters[0] == 'D' else (other, (d,))


def scale_by_muon(beta: float, steps: int, b2: float, eps: float) -> optax.GradientTransformation:
  """Nesterov momentum, orthogonalised per layer, times sqrt(max(1, out / in)) (kellerjordan.github.io/posts/muon); with
  b2 the outputs of a matrix move alike (NorMuon, arXiv 2510.05491)."""
  def scale(path, update):
    fan_in, fan_out = (np.prod([update.shape[i] for i in axes]) for axes in matrix_axes(sharding.dims_of(path)))
    return update * float(np.sqrt(max(1, fan_out / fan_in)))

  return optax.chain(
      orthogonal_momentum(beta, steps, eps), *([outputs_alike(b2, eps)] if b2 else []),
      optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)))


def orthogonal_momentum(beta: float, steps: int, eps: float) -> optax.GradientTransformation:
  """optax.contrib.scale_by_muon with `orthogonalise`; the state is its own, so that checkpoints of it go on (its
  coefficients are kept for that alone)."""
  def init(params):
    return optax.contrib.MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params),
                                   jnp.asarray((3.4445, -4.7750, 2.0315)))

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    mu = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, updates)
    share, share_next = 1 - beta**count, 1 - beta ** (count + 1)          # of a moving average that started at zero
    nesterov = jax.tree.map(lambda m, g: beta * m / share_next + (1 - beta) * g / share, mu, updates)
    return orthogonalise(nesterov, steps, eps), state._replace(count=count, mu=mu)

  return optax.GradientTransformation(init, update)


def orthogonalise(updates, steps: int, eps: float):
  """Each matrix U S V^T as about U V^T. Small arrays of one shape, on a mesh also of one placement, go through the
  iteration together: four products of 128 x 128 take two CPU cores hardly longer than one. On accelerators it is in
  bfloat16, as Muon's author has it."""
  iterate = lambda dtype: lambda x: newton_schulz(x, steps, eps, dtype)
  mesh = jax.sharding.get_abstract_mesh()
  leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
  groups = {}
  for i, (path, x) in enumerate(leaves):
    dims = sharding.dims_of(path)
    axes_in, axes_out = matrix_axes(dims)
    x_IO = x.reshape(*x.shape[:min(axes_in + axes_out)], int(np.prod([x.shape[axis] for axis in axes_in])), -1)
    tall = x_IO.shape[-2] > x_IO.shape[-1]
    wide = x_IO.swapaxes(-1, -2) if tall else x_IO
    placed = '' if mesh.empty or mesh.size == 1 else dims
    groups.setdefault((wide.shape, placed) if x.size <= TOGETHER else i, []).append((i, wide, tall))
  out = [None] * len(leaves)
  for group in groups.values():
    together = jax.lax.platform_dependent(jnp.stack([wide for _, wide, _ in group]), cpu=iterate(None),
                                          default=iterate(jnp.bfloat16))
    for (i, _, tall), x in zip(group, together):
      out[i] = (x.swapaxes(-1, -2) if tall else x).reshape(leaves[i][1].shape)
  return jax.tree.unflatten(treedef, out)


def newton_schulz(x, steps: int, eps: float, dtype=None):
  """x [..., m, n], m <= n, with its singular values near 1: those from 0.001 of its Frobenius norm on differ from it in
  exact arithmetic by at most 0.87 after 3 steps, 0.57 after 4, 0.15 after 5, 0.01 after 6. dtype: of the iteration."""
  given = x.dtype
  x = (x / (MARGIN * jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True)) + eps)).astype(dtype or given)
  for i, (a, b, c) in enumerate(COEFFICIENTS[:steps]):
    margin = MARGIN if i < steps - 1 else 1.0
    a, b, c = a / margin, b / margin**3, c / margin**5
    square = x @ x.swapaxes(-1, -2)
    x = a * x + (b * square + c * (square @ square)) @ x
  return x.astype(given)


class OutputsState(NamedTuple):
  count: jax.Array
  nu: optax.Updates        # like the parameters, but 1 along the axes that a matrix sums over


def outputs_alike(b2: float, eps: float) -> optax.GradientTransformation:
  """Divides what an update does to each output by the root of its mean square, a moving average, and scales each matrix
  back to the norm it had: orthogonalised updates still differ much between outputs."""
  def mean_square(path, update):
    return jnp.square(update).mean(matrix_axes(sharding.dims_of(path))[0], keepdims=True)

  def init(params):
    return OutputsState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.zeros_like(mean_square(path, w)), params))

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    now = jax.tree_util.tree_map_with_path(mean_square, updates)
    nu = jax.tree.map(lambda old, new: b2 * old + (1 - b2) * new, state.nu, now)

    def scale(path, update, now, nu):
      out = matrix_axes(sharding.dims_of(path))[1]
      alike = 1 / (jnp.sqrt(nu / (1 - b2**count)) + eps)
      before, after = now.sum(out, keepdims=True), (now * alike**2).sum(out, keepdims=True)
      return update * (alike * jnp.sqrt(before / (after + eps)))
    return jax.tree_util.tree_map_with_path(scale, updates, now, nu), OutputsState(count, nu)

  return optax.GradientTransformation(init, update)
