"""bench decode: one stream and many, beside a sweep over the weights, and transformers."""
import math
import os
import pathlib
import statistics
import tempfile

from llm_jax.bench import alternate, hardware, import_torch, seconds_of
from llm_jax.config import ConfigError


def decode(flags) -> None:
  """Prints tokens per second of one stream and of many, of a bare sweep over the same weights (what reading them once a
  token allows), and of transformers' generate; with --text, what few bits do to a text's perplexity."""
  from llm_jax.generate import engine
  from llm_jax.generate.options import Options
  from llm_jax.interop import load
  if not flags.model:
    raise ConfigError('--model: expected the path of a model to decode with')
  found = load.load(flags.model, dtype=None if flags.dtype == 'auto' else flags.dtype)
  prompt = found.tokenizer.encode('The capital of France is').tolist()

  def streams(n, ahead=0):
    made = engine.Engine(found.shape, found.params, slots=n, vocab_size=found.tokenizer.vocab_size, ahead=ahead,
                         length=min(found.shape.max_length, 512), weights=flags.weights, cache=flags.cache)
    def run():
      requests = [engine.Request(prompt, Options(max_tokens=flags.new), salt=str(i)) for i in range(n)]
      for request in requests:
        made.submit(request)
      seconds = seconds_of(made.run)
      return sum(len(request.tokens) for request in requests) / seconds
    return made, run

  made, one = streams(1)
  if flags.text:
    perplexity(made, found.tokenizer, flags)
  runs = {'llm_jax': one} if flags.weights else {'sweep': sweep(made, flags.new), 'llm_jax': one}
  runs[f'llm_jax, {flags.streams} streams'] = streams(flags.streams)[1]
  if flags.peer == 'torch':
    runs |= torch_generate(found, prompt, flags.new)
  for run in runs.values():
    run(), run()
  rates = alternate(runs, flags.rounds)
  print(f'decode {os.path.basename(flags.model)}, {flags.new} tokens after {len(prompt)}, '
        f'{flags.weights or found.shape.dtype}, {flags.rounds} rounds, medians; {hardware()}')
  for name, rate in rates.items():
    ratio = statistics.median(ours / this for ours, this in zip(rates['llm_jax'], rate))
    print(f'{name:>24}  {statistics.median(rate):>8.1f} tok/s  one stream/this {ratio:.2f}x')


def perplexity(made, tokenizer, flags) -> None:
  """Prints the perplexity of a text's first 16 windows of 512 tokens, read through the engine's weights and cache."""
  import numpy as np

  from llm_jax.generate import engine, programs, score
  from llm_jax.models import attention, quantize
  dtype = attention.compute_dtype(made.cfg.dtype)
  W, T, part = 16, 512, engine.CHUNKS[-1]
  with open(flags.text, encoding='utf-8') as f:
    ids = tokenizer.encode(f.read(W * T * 20))[:W * T]
  if len(ids) < W * T:
    raise ConfigError(f'--text: {flags.text} has {len(ids)} tokens, expected at least {W * T}')
  made.state = programs.empty_state(made.plan, len(made.slots), T, made.stops, 0)
  total = 0.0
  for window in ids.reshape(W, 1, T):
    for start in range(0, T, part):
      token_BT = window[:, start:start + part]
      x_BTD = made.through(made.cfg, made.weights, 'cache', token_BT, np.zeros(1, np.int32),
                           np.full(1, start, np.int32), np.full(1, T, np.int32))
      after = np.append(token_BT[:, 1:], window[:, start + part:start + part + 1], 1)
      logp, *_ = score.next_tokens(made.weights[0], np.pad(after, ((0, 0), (0, part - after.shape[1]))), x_BTD)
      total += float(np.asarray(logp, np.float64)[:after.shape[1]].sum())
  print(f'perplexity {math.exp(-total / (W * (T - 1))):.3f} of {W} x {T} tokens of {os.path.basename(flags.text)}; '
        f'weights {flags.weights or dtype}, {quantize.nbytes(made.weights) / 1e6:.0f} MB; cache '
        f'{flags.cache or dtype}')
  made.state = None


def sweep(made, tokens: int):
  """A function that multiplies a vector with every matrix of the model, as often as there are tokens, and returns how
  often a second."""
  import jax
  import jax.numpy as jnp

  from llm_jax.models import layers
  model, blocks = made.weights
  names = ('w_q', 'w_k', 'w_v', 'w_o', 'w_up', 'w_gate', 'w_down')
  flat = [(str(path), x) for block in blocks for path, x in jax.tree_util.tree_leaves_with_path(block)]
  matrices = [x.reshape(-1, x.shape[-1]) if 'w_o' in path else x.reshape(x.shape[0], -1) for path, x in flat
              if x.ndim > 1 and any(name in path for name in names)]
  matrices.append(model.unembed_DV[...] if hasattr(model, 'unembed_DV') else model.embed_VD[...].T)

  def run(matrices):
    def token(_, s):
      for w in matrices:
        s = 1 + 1e-9 * layers.settle(layers.settle(jnp.full((1, w.shape[0]), s, w.dtype)) @ w).max()
      return s.astype(jnp.float32)
    return jax.lax.fori_loop(0, tokens, token, jnp.float32(1))
  compiled = jax.jit(run, compiler_options=layers.compiler_options()).lower(matrices).compile()
  return lambda: tokens / seconds_of(lambda: compiled(matrices).block_until_ready())


def torch_generate(found, prompt, tokens: int) -> dict:
  """{name: tokens per second} of transformers with the same weights, in float32 and bfloat16."""
  torch = import_torch()
  import transformers

  from llm_jax.interop import save
  transformers.utils.logging.set_verbosity_error()
  with tempfile.TemporaryDirectory() as folder:
    save.to_hf(found, pathlib.Path(folder) / 'x', 'float32')
    models = {dtype: transformers.AutoModelForCausalLM.from_pretrained(
        pathlib.Path(folder) / 'x', dtype=getattr(torch, dtype)).eval() for dtype in ('float32', 'bfloat16')}
  ids = torch.tensor([prompt])

  def run(model):
    with torch.no_grad():
      return tokens / seconds_of(lambda: model.generate(
          ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
          pad_token_id=0))
  return {f'transformers, {dtype}': lambda model=model: run(model) for dtype, model in models.items()}
