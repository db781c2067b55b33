"""The parts every block is made of: normalisation, position codes and the MLP. The letters are the legend's in
transformer.py; matrices are used in the dtype they arrive in, norms and rotations are computed in float32."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax import config as config_lib
from llm_jax.models import fp8 as fp8_lib
from llm_jax.models import quantize
from llm_jax.sharding import shard


def normal(rngs: nnx.Rngs, *shape: int, std: float) -> nnx.Param:
  """A float32 parameter drawn from N(0, std^2)."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape))


class Norm(nnx.Module):
  """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last len(dims) axes."""

  def __init__(self, cfg: config_lib.Model, dims: str, *shape: int):
    self.layer, self.eps, self.axes = cfg.norm == 'layer', cfg.norm_eps, tuple(range(-len(dims), 0))
    self.offset, self.scale, self.bias = float(cfg.norm_unit_offset), f'scale_{dims}', f'bias_{dims}'
    if cfg.norm_learned:
      setattr(self, self.scale, nnx.Param(jnp.full(shape, 1.0 - self.offset, jnp.float32)))
    if cfg.norm_learned and cfg.norm_bias:
      setattr(self, self.bias, nnx.Param(jnp.zeros(shape)))

  def __call__(self, x):
    scale = getattr(self, self.scale)[...] + self.offset if hasattr(self, self.scale) else None
    y = normalise(self.layer, self.eps, self.axes, x, None if scale is None else _trailing(scale, x.ndim))
    if hasattr(self, self.bias):
      y = y + _trailing(getattr(self, self.bias)[...], y.ndim)
    return settle(y.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normalise(layer: bool, eps: float, axes: tuple[int, ...], x, scale):
  """x in float32 over the root of its mean square along the last axes, where `layer` less its mean before; times scale.

  The backward pass reads x itself and two numbers for each position: derived from the lines below it would keep three
  arrays in float32 for every norm, half of all that a layer keeps in bfloat16."""
  return _normalise_fwd(layer, eps, axes, x, scale)[0]


def _normalise_fwd(layer, eps, axes, x, scale):
  y = x.astype(jnp.float32)
  mean = y.mean(axes, keepdims=True) if layer else 0.0
  y = y - mean if layer else y
  root = jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + eps)
  y = y * root
  return y if scale is None else y * scale, (x, scale, mean, root)


def _normalise_bwd(layer, eps, axes, saved, g):
  x, scale, mean, root = saved
  y = (x.astype(jnp.float32) - mean) * root
  dscale = None if scale is None else (g * y).sum(tuple(range(g.ndim - len(axes))), keepdims=True)
  g = g if scale is None else g * scale
  dx = g - y * (g * y).mean(axes, keepdims=True)
  dx = dx - g.mean(axes, keepdims=True) if layer else dx
  return (dx * root).astype(x.dtype), dscale


normalise.defvjp(_normalise_fwd, _normalise_bwd)


def compiler_options(platform: str = '') -> dict | None:
  """Options to compile a step with (platform: default, this one): on a CPU, XLA keeps settle's barriers until after
  fusion."""
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  return {'xla_disable_hlo_passes': 'cse_barrier_expander'} if on_cpu else None


def settle(x):
  """x itself; on XLA:CPU also a place where fusion stops, which otherwise computes the elementwise chain behind an
  array again for each of its readers (of the residual stream: all layers so far). Needs compiler_options."""
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _trailing(w, ndim):
  """Leading axes of size 1, so that nothing depends on implicit rank promotion."""
  return w.reshape((1,) * (ndim - w.ndim) + w.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(spec: str, fp8: bool, x, *ws):
  """[einsum(spec, x, w) for w in ws]: an activation and the weights that read it, e.g. 'BTD,DF->BTF'. fp8: in float8,
  but for quantised weights.

  On one CPU device they are one product of two matrices, with weights joined and transposed ahead (a loop over
  microbatches does that once), and in the backward pass first the weights' gradient, then the input's: two products at
  once on the same cores are slower than one after the other.
  """
  return _project_fwd(spec, fp8, x, *ws)[0]


def _project_fwd(spec, fp8, x, *ws):
  if fp8 and not any(isinstance(w, quantize.Quantized) for w in ws):
    x_8, ws_8 = fp8_lib.scaled(x), [fp8_lib.scaled(w) for w in ws]
    return [fp8_lib.einsum(spec, x_8, w_8, x.dtype) for w_8 in ws_8], (x_8, ws_8)
  if not on_one_cpu():
    return [quantize.einsum(spec, x, w) for w in ws], (x, ws)
  # Quantised weights multiplied as they are would be by one core.
  wide = [settle(w.astype(x.dtype)) if isinstance(w, quantize.Quantized) else w for w in ws]
  return _products(x, wide), (x, ws)


def _project_bwd(spec, fp8, saved, gs):
  x, ws = saved
  inputs, out = spec.split('->')
  in_x, in_w = inputs.split(',')
  if fp8:
    gs_8 = [fp8_lib.scaled(g, jnp.float8_e5m2) for g in gs]
    einsum = functools.partial(fp8_lib.einsum, dtype=gs[0].dtype, precision=jax.lax.Precision.HIGHEST)
    dx = sum(einsum(f'{out},{in_w}->{in_x}', g, w) for g, w in zip(gs_8, ws))
    return dx, *(einsum(f'{in_x},{out}->{in_w}', x, g) for g in gs_8)
  if on_one_cpu():
    return _products_bwd(x, ws, gs)
  dx = sum(jnp.einsum(f'{out},{in_w}->{in_x}', g, w) for g, w in zip(gs, ws))
  return dx, *(jnp.einsum(f'{in_x},{out}->{in_w}', x, g) for g in gs)


project.defvjp(_project_fwd, _project_bwd)


def on_one_cpu() -> bool:
  """Whether this is a program for a single CPU device."""
  mesh = jax.sharding.get_abstract_mesh()        # on a mesh joined weights would be split otherwise than each alone
  return jax.default_backend() == 'cpu' and (mesh.empty or mesh.size == 1)


def _products(x_BTI, ws):
  """x [B, T, ...] and weights whose leading axes are x's last ones."""
  B, T, *inner = x_BTI.shape
  if B * T < 128:                                # decoding: joining would copy the weights for every token
    x_MI = settle(x_BTI.reshape(B * T, -1))      # fused with anything else, a product runs on one core, slowly
    return [settle(x_MI @ settle(_join([w], len(inner)))).reshape(B, T, *w.shape[len(inner):]) for w in ws]
  y_MO = x_BTI.reshape(B * T, -1) @ settle(_join(ws, len(inner)))
  return [y.reshape(B, T, *w.shape[len(inner):]) for y, w in zip(_split(y_MO, ws, len(inner)), ws)]


def _products_bwd(x_BTI, ws, gs):
  B, T, *inner = x_BTI.shape
  g_MO, x_MI = settle((_join(gs, 2), x_BTI.reshape(B * T, -1)))
  dw_IO, g_MO = settle((settle(x_MI.T) @ g_MO, g_MO))
  dx_MI = g_MO @ settle(_join(ws, len(inner)).T)
  return dx_MI.reshape(x_BTI.shape), *(dw.reshape(w.shape) for dw, w in zip(_split(dw_IO, ws, len(inner)), ws))


def _join(arrays, axis):
  """Each as a matrix whose rows are its axes before `axis`, side by side."""
  return jnp.concatenate([a.reshape(math.prod(a.shape[:axis]), -1) for a in arrays], 1)


def _split(joined, ws, axis):
  return jnp.split(joined, np.cumsum([math.prod(w.shape[axis:]) for w in ws])[:-1], 1)


def add_bias(x, bias):
  """x + bias over the trailing axes, in x's dtype."""
  return x + _trailing(bias[...].astype(x.dtype), x.ndim)


class Mlp(nnx.Module):
  """Two matrices around a nonlinearity, or three for the gated kinds (arXiv 2002.05202); relu2 is arXiv 2109.08668."""

  def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs, mlp_dim: int = 0):
    D, F = cfg.width, mlp_dim or cfg.mlp_dim
    self.kind, self.fp8 = cfg.mlp, cfg.fp8
    self.w_up_DF = normal(rngs, D, F, std=cfg.init_scale * D**-0.5)
    if cfg.mlp in ('geglu', 'swiglu'):
      self.w_gate_DF = normal(rngs, D, F, std=cfg.init_scale * D**-0.5)
    self.w_down_FD = normal(rngs, F, D, std=out_std(cfg, F))
    if cfg.mlp_bias:
      self.b_up_F = nnx.Param(jnp.zeros(F))
      self.b_down_D = nnx.Param(jnp.zeros(D))

  def __call__(self, x_BTD):
    w_gate = [self.w_gate_DF[...]] if hasattr(self, 'w_gate_DF') else []
    h_BTF, *gate = project('BTD,DF->BTF', self.fp8, x_BTD, self.w_up_DF[...], *w_gate)
    if hasattr(self, 'b_up_F'):
      h_BTF = add_bias(h_BTF, self.b_up_F)
    h_BTF = gated(self.kind, h_BTF, *gate) if gate else settle(ACTIVATIONS[self.kind](h_BTF))
    y_BTD, = project('BTF,FD->BTD', self.fp8, shard(h_BTF, 'BTF'), self.w_down_FD[...])
    return add_bias(y_BTD, self.b_down_D) if hasattr(self, 'b_down_D') else y_BTD


def _saves_slope(f):
  """f with its derivative computed in the forward pass: on a CPU erf and tanh cost more than reading an array."""
  saving = jax.custom_vjp(f)
  saving.defvjp(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)), lambda slope, g: (slope * g,))
  return saving


gelu_tanh = _saves_slope(lambda x: jax.nn.gelu(x))
gelu_exact = _saves_slope(lambda x: x * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5))))   # jax.nn's erfc is twice as slow
ACTIVATIONS = dict(
    gelu=gelu_tanh, gelu_exact=gelu_exact, geglu=gelu_tanh, swiglu=jax.nn.silu,
    relu2=lambda x: jnp.square(jax.nn.relu(x)), relu=jax.nn.relu)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated(kind: str, h, gate):
  """h * activation(gate), whose backward pass reads these two and keeps nothing in between."""
  return h * ACTIVATIONS[kind](gate)


def out_std(cfg: config_lib.Model, fan_in: int) -> float:
  """Initial deviation of a projection into the residual stream: smaller with depth (GPT-2), or zero."""
  return 0.0 if cfg.zero_init else cfg.init_scale * fan_in**-0.5 * (2 * cfg.layers)**-0.5


def dropout(x, rate: float, key):
  """Inverted dropout. Threefry draws by global position, so no mesh changes the mask."""
  if rate == 0 or key is None:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros_like(x))


# Positions ----------------------------------------------------------------------------------------------------------

def sinusoids(position_BT, width: int):
  """[B, T, width] float32: sines, then cosines, of geometrically spaced frequencies (arXiv 1706.03762; there they
  alternate, which is the same code up to an order of the channels)."""
  freqs = jnp.asarray(10_000.0 ** (-np.arange(width // 2) / (width / 2)), jnp.float32)
  angle = position_BT[..., None].astype(jnp.float32) * freqs[None, None, :]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def alibi_slopes(heads: int) -> np.ndarray:
  """[N] slopes of ALiBi (arXiv 2108.12409), with the paper's rule for numbers of heads that are no power of two."""
  power = 2 ** math.floor(math.log2(heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  extra = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
  return np.asarray(slopes + extra, np.float32)


def rope_frequencies(cfg: config_lib.Model, base: float, scaled: bool = True) -> tuple[np.ndarray, float]:
  """Radians per position of each rotated pair, and the factor on sine and cosine (YaRN's attention temperature).

  RoFormer arXiv 2104.09864; linear arXiv 2306.15595; YaRN arXiv 2309.00071; llama3 as in the Llama 3.1 reference code.
  """
  rotated = int(cfg.head_dim * cfg.rope_fraction)
  exponent = np.arange(0, rotated, 2) / rotated
  freq = base ** -exponent
  if not scaled or cfg.rope_scaling == 'none':
    return freq, 1.0
  if cfg.rope_scaling == 'linear':
    return freq / cfg.rope_factor, 1.0
  if cfg.rope_scaling == 'llama3':
    turns = cfg.rope_original_length * freq / (2 * math.pi)          # rotations over the original context
    keep = (turns - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)
    keep = np.clip(keep, 0, 1)
    return freq * (keep + (1 - keep) / cfg.rope_factor), 1.0
  pair = lambda turns: rotated * math.log(cfg.rope_original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
  low = max(math.floor(pair(cfg.rope_beta_fast)), 0)
  high = min(math.ceil(pair(cfg.rope_beta_slow)), rotated - 1)
  ramp = np.clip((np.arange(rotated // 2) - low) / max(high - low, 1e-3), 0, 1)
  temperature = cfg.rope_attention_factor or 0.1 * math.log(cfg.rope_factor) + 1
  return freq * (1 - ramp + ramp / cfg.rope_factor), temperature


def rope_table(cfg: config_lib.Model, position_BT, base: float, scaled: bool = True):
  """(sin, cos), each float32 [B, T, 1, pairs], for `rotate`."""
  freq, temperature = rope_frequencies(cfg, base, scaled)
  angle = position_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)[None, None, None, :]
  return jnp.sin(angle) * temperature, jnp.cos(angle) * temperature


def rotate(x_BTNH, table):
  """Rotary embedding of queries or keys: pair i is channels i and i + pairs (the half-split order of GPT-NeoX and
  Hugging Face Llama); channels past 2 x pairs stay as they are (partial rotation)."""
  sin, cos = table
  pairs = sin.shape[-1]
  first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
  out = [first * cos - second * sin, second * cos + first * sin] + ([rest] if rest.shape[-1] else [])
  return jnp.concatenate(out, -1).astype(x_BTNH.dtype)
