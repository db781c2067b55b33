"""llm_jax: a JAX/Flax codebase for large language models. `llm_jax.load(RUN_DIR)` is what notebooks use.

Importing this starts no device and imports no JAX.
"""
__version__ = '0.1.0'


def load(path, step: int | None = None, ema: bool = False, dtype: str | None = None):
  """A trained model by its run directory or one of its checkpoint steps; see llm_jax.api.load."""
  from llm_jax import api
  return api.load(path, step, ema, dtype)
