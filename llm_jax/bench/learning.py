"""bench learn: what a recipe makes of a text in so many steps, beside nanoGPT's model and recipe in PyTorch."""
import os
import statistics
import tempfile
import time

from llm_jax import config as config_lib
from llm_jax.bench import hardware, import_torch
from llm_jax.config import ConfigError

CONFIG = 'configs/shakespeare_char.py'


def learn(flags) -> None:
  """Prints the loss of the whole held-out text after the last step, and the time of all steps, for as many seeds as
  there are rounds: of each recipe, and of the peer."""
  if not flags.text:
    raise ConfigError('--text: expected a file, such as tiny Shakespeare; its last tenth is held out')
  cfg = lambda recipe, seed: config_of(recipe, flags.text, seed, flags.learn_steps)
  recipes = flags.recipe.split(',')
  runs = {recipe: lambda seed, recipe=recipe: ours(cfg(recipe, seed)) for recipe in recipes}
  if flags.peer == 'torch':
    runs['nanoGPT, torch'] = lambda seed: peer(cfg(recipes[0], seed), flags.compiled)
  found = {name: [] for name in runs}
  for seed in range(flags.rounds):
    for name, run in runs.items():
      found[name].append(run(seed))
      print(f'seed {seed}  {name:>16}  loss {found[name][-1][0]:.4f}  {found[name][-1][1]:.1f} s', flush=True)
  print(f'learn {os.path.basename(flags.text)}, {flags.rounds} seeds; {hardware()}')
  for name, pairs in found.items():
    losses, seconds = zip(*pairs)
    print(f'{name:>24}  loss {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})  '
          f'{statistics.median(seconds):.1f} s')


def config_of(recipe: str, text: str, seed: int, steps: int) -> config_lib.Config:
  """That of configs/shakespeare_char.py:recipe on a text, whose last tenth is held out; nothing is shown or kept."""
  wanted = {'data.source': 'text', 'data.path': os.path.abspath(text), 'data.valid': 'tail', 'train.seed': seed,
            'train.steps': steps, 'eval.every': 0, 'eval.prompts': '()', 'checkpoint.every': 0, 'log.every': 1000,
            'log.progress': 'lines', 'log.tensorboard': False}
  flags = [f'--config={CONFIG}:{recipe}', *(f'--config.{name}={value}' for name, value in wanted.items())]
  return config_lib.from_flags(flags, {})[0]


def ours(cfg: config_lib.Config) -> tuple[float, float]:
  """(loss of the held-out text, seconds of all steps) of a run; compiling is not counted."""
  import contextlib
  import io

  from llm_jax.train import clock, loop
  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    figures = loop.train(cfg, folder)
    parts = clock.read(folder)['parts']
  return figures['validation loss'], parts['step'] + parts['input']


def peer(cfg: config_lib.Config, compiled: bool) -> tuple[float, float]:
  """(loss of the held-out text, seconds of all steps but the first) of nanoGPT's way with the same sizes, steps and
  tokens: AdamW, 1e-3 to 1e-4 by a cosine after 100 steps, weights drawn with a deviation of 0.02, random windows
  (github.com/karpathy/nanoGPT)."""
  import math
  import pathlib

  import numpy as np

  from llm_jax.bench import torch_peer
  torch = import_torch()
  text = pathlib.Path(cfg.data.path).read_text()
  alphabet, ids = np.unique(np.frombuffer(text.encode('utf-32-le'), np.uint32), return_inverse=True)
  cut, T, B = int(0.9 * len(ids)), cfg.data.length, cfg.train.batch_size
  torch.manual_seed(cfg.train.seed)
  rng = np.random.default_rng(cfg.train.seed)
  shape = config_lib.derive(config_lib.Model(vocab_size=len(alphabet), layers=cfg.model.layers, width=cfg.model.width,
                                             heads=cfg.model.heads, max_length=T, dropout=cfg.model.dropout))
  model = torch_peer.gpt(shape)
  for name, p in model.named_parameters():
    into_stream = name.endswith(('out.weight', 'down.weight'))
    if p.ndim == 2:
      torch.nn.init.normal_(p, std=0.02 * ((2 * shape.layers) ** -0.5 if into_stream else 1))
  groups = lambda model: [dict(params=[p for p in model.parameters() if (p.ndim > 1) == decayed],
                               weight_decay=0.1 * decayed) for decayed in (True, False)]
  step = torch_peer.Step(model, groups, cfg.model.dtype, compiled)
  window = np.arange(T + 1)[None]
  start = time.perf_counter()
  for i in range(cfg.train.steps):
    share = max(i - 100, 0) / max(cfg.train.steps - 100, 1)
    for group in step.optimizer.param_groups:
      group['lr'] = 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * share))
    loss = step.update(torch.from_numpy(ids[rng.integers(0, cut - T - 1, B)[:, None] + window]))
    start = time.perf_counter() if i == 0 else start           # which compiled
  loss.item()                                  # which waits for the device
  seconds = time.perf_counter() - start
  model.eval()
  held = ids[cut:]
  total = count = 0
  with torch.no_grad():
    for first in range(0, len(held) - 1, T * 256):
      part = held[first:first + T * 256 + 1]
      n = (len(part) - 1) // T
      if n:
        rows = np.stack([part[i * T:i * T + T + 1] for i in range(n)])
        total, count = total + float(step.loss(torch.from_numpy(rows))) * n * T, count + n * T
  return total / count, seconds
