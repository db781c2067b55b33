"""A trained model in a few lines: `m = llm_jax.load(path)`, then m.logits, m.generate, m.attention, m.activations."""
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.generate import beam, engine, sampling
from llm_jax.interop import load as interop
from llm_jax.models import transformer


class Model(interop.Loaded):
  """A model to use."""

  def logits(self, token_BT) -> jax.Array:
    """float32 [B, T, V]: what follows each token. Raises ConfigError for anything but rows of ids of the vocabulary."""
    token_BT = self._tokens(token_BT)
    return transformer.logits(self.shape, self.params, fill_rows(token_BT))[:len(token_BT)]

  def generate(self, prompts: str | list[str], max_tokens: int = 64, temperature: float = 0.0, **options) -> list[str]:
    """Continuations, without the prompts. options: top_k, top_p, min_p, repetition_penalty, stop, seed, n (then n texts
    for each prompt, in order) and more; see generate/options.py."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    results = sampling.generate(self.shape, self.params, self.tokenizer, prompts, max_tokens=max_tokens,
                                temperature=temperature, **options)
    return [result.text for result in results]

  def beam_search(self, prompt: str, beams: int = 4, max_tokens: int = 64, length_penalty: float = 1.0) -> list[tuple]:
    """[(text, score), ...]: the likeliest continuations found, the best first; see generate/beam.py."""
    ids, = sampling.encode(self.shape, self.tokenizer, [prompt])
    stops = self.tokenizer.stop_ids
    found = beam.search(self.shape, self.params, ids, beams=beams, max_tokens=max_tokens, stop_ids=stops,
                        length_penalty=length_penalty, vocab_size=self.tokenizer.vocab_size)
    return [(self.tokenizer.decode([t for t in tokens if t not in stops]), score) for tokens, score in found]

  def attention(self, token_BT) -> jax.Array:
    """Attention weights float32 [L, B, N, T, S]: how much query position t of each head reads from position s."""
    names = [f'layer{i}/attention_weights' for i in range(self.shape.layers)]
    found = self.activations(token_BT, names)
    return jnp.stack([found[name] for name in names])

  def activations(self, token_BT, names) -> dict[str, jax.Array]:
    """{name: array} of 'layerI/attention', 'layerI/mlp' and 'layerI/residual' ([B, T, D]: what the sublayers add, and
    the stream after the layer) and 'layerI/attention_weights' ([B, N, T, S]). Raises ConfigError for other names."""
    kinds = ('attention', 'mlp', 'residual', 'attention_weights')
    known = [f'layer{i}/{kind}' for i in range(self.shape.layers) for kind in kinds]
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
      if name not in known:
        raise ConfigError(f'activations: no {name!r}{config_lib.nearest(name, known)}; there are layer0 to '
                          f'layer{self.shape.layers - 1}, each with {", ".join(kinds)}')
    token_BT = self._tokens(token_BT)
    found = _activations(self.shape, tuple(names), self.params, fill_rows(token_BT))
    return {name: found[name][:len(token_BT)] for name in names}

  def _tokens(self, token_BT) -> np.ndarray:
    try:
      token_BT = np.asarray(token_BT)
    except ValueError as e:
      raise ConfigError('token_BT: expected rows of token ids, all of one length; got rows of several lengths') from e
    if token_BT.ndim != 2 or token_BT.dtype.kind not in 'iu' or not token_BT.size:
      raise ConfigError(f'token_BT: expected rows of token ids, int [B, T], got {token_BT.dtype} {token_BT.shape}')
    if token_BT.shape[1] > self.shape.max_length:
      raise ConfigError(f'token_BT: {token_BT.shape[1]} tokens a row, the model reads at most {self.shape.max_length}')
    vocab_size = min(self.tokenizer.vocab_size, self.shape.vocab_size)
    if not 0 <= token_BT.min() <= token_BT.max() < vocab_size:
      raise ConfigError(f'token_BT: ids {token_BT.min()} to {token_BT.max()}, expected 0 to {vocab_size - 1}')
    return token_BT.astype(np.int32)


def fill_rows(token_BT: np.ndarray) -> np.ndarray:
  """Rows of zeros added, up to a number that the mesh's batch axes divide."""
  return np.pad(token_BT, ((0, engine.row_count(len(token_BT)) - len(token_BT)), (0, 0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activations(shape, names, params, token_BT):
  taps = {}
  transformer.bind(shape, params).hidden(token_BT, taps=taps)
  return {name: taps[name].astype(jnp.float32) for name in names}


def load(path, step: int | None = None, ema: bool = False, dtype: str | None = None, verify: bool = True) -> Model:
  """The model at `path`: a run directory (newest sound step, or `step`), one of its checkpoints/STEP folders, a Hugging
  Face directory, a .gguf file, or hf:org/name.

  ema: the parameters' moving average, where the run keeps one. dtype: 'float32' or 'bfloat16' to compute in, instead of
  the config's. verify: False does not compare a run's files with their hashes, for speed. Placed on the mesh set by
  jax.set_mesh, or on one device. Raises ConfigError for what is none of these.
  """
  return Model(**vars(interop.load(path, step=step, ema=ema, dtype=dtype, verify=verify)))


def spread(fsdp: int, tensor: int):
  """A context in which a model is spread over the first fsdp x tensor devices; none is needed for one."""
  if fsdp == tensor == 1:
    return contextlib.nullcontext()
  if fsdp < 1 or tensor < 1 or fsdp * tensor > jax.device_count():
    raise ConfigError(f'--fsdp={fsdp} --tensor={tensor}: expected positive numbers whose product is at most the '
                      f'{jax.device_count()} devices here')
  return jax.set_mesh(sharding.make_mesh(config_lib.Mesh(fsdp=fsdp, tensor=tensor), jax.devices()[:fsdp * tensor]))
