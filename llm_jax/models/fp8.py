"""Products of activations and weights in 8-bit floating point: E4M3 forward, E5M2 for gradients (arXiv 2209.05433),
each array scaled by its own largest value of the moment. A GPU that has them makes twice as many as in bfloat16."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.config import ConfigError

NEEDS = 8.9             # compute capability: Ada, Hopper


class Scaled(NamedTuple):
  """q * scale."""
  q: jax.Array
  scale: jax.Array      # float32 scalar


def scaled(x, dtype=jnp.float8_e4m3fn) -> Scaled:
  """x in float8, its largest value at the end of the range. dtype: float8_e5m2 for gradients, which have a wider range
  and are needed less exactly."""
  x = x.astype(jnp.float32)
  least = float(jnp.finfo(jnp.float32).tiny)         # so that zeros stay zeros
  scale = jnp.maximum(jnp.abs(x).max() / float(jnp.finfo(dtype).max), least)
  return Scaled((x / scale).astype(dtype), scale)


def einsum(spec: str, a: Scaled, b: Scaled, dtype, precision=None):
  """A product in dtype. precision: HIGHEST for gradients, so that Hopper adds up in float32 all the way; by default it
  keeps 14 bits (arXiv 2412.19437, 3.3.2)."""
  y = jnp.einsum(spec, a.q, b.q, preferred_element_type=dtype, precision=precision)
  return (y.astype(jnp.float32) * (a.scale * b.scale)).astype(dtype)


def check(platform: str, capability: float) -> None:
  """Raises ConfigError where this machine's accelerator has no products in float8; a CPU imitates them."""
  if platform == 'tpu' or platform == 'gpu' and capability < NEEDS:
    raise ConfigError(f'config.model.fp8: needs an NVIDIA GPU of compute capability {NEEDS} (Ada, Hopper) or newer, '
                      'or a CPU, slowly; set it to False')
