"""One dial: the depth says how wide, how many heads, how large a batch, how long and at what rate.

  python -m llm_jax.main --config=configs/depth.py:4 [--config.data.source=...]

Width is 64 times the depth, heads have 64 (128 from depth 12 on). The horizon is compute-optimal by default: 20 tokens
for each parameter (arXiv 2203.15556), embeddings not counted. The batch grows as the tokens to the power of 0.4 (arXiv
2505.13738), from 2**19 tokens for 10 billion, but leaves a run 1,000 steps. The rates are base.py's, taken as width
128's; other widths follow by optimizer.tuned_width. `:DEPTH,TOKENS_PER_PARAMETER` trains longer or shorter.
On the standard library, bits per byte of all held-out text: depth 1 2.08 (base.py's model for the same compute 2.52),
depth 2 with a quarter of its tokens 1.70 (1.72). docs/log.md has the compute; deeper ones were not run to the end.
"""
import math

import base

LENGTH = 256             # up to depth 8; then 1,024
STEPS = 1000             # the batch is no larger than leaves so many, down to 8 sequences


def parameters(depth: int) -> int:
  """Without embeddings: 12 width**2 a layer."""
  return 12 * depth * (64 * depth)**2


def get_config(dial: str = '2'):
  depth, _, ratio = dial.partition(',')
  try:
    depth, ratio = int(depth), float(ratio or 20)
  except ValueError as e:
    raise base.ConfigError(f'--config=configs/depth.py:{dial}: expected DEPTH or DEPTH,TOKENS_PER_PARAMETER') from e
  if not 1 <= depth <= 128 or not 0 < ratio <= 10_000:
    raise base.ConfigError(f'--config=configs/depth.py:{dial}: expected a depth of 1 to 128, and up to 10,000 tokens')
  config = base.get_config()
  width = 64 * depth
  config.model.layers, config.model.width, config.model.heads = depth, width, width // (128 if depth >= 12 else 64)
  if width % 128 and depth >= 12:
    config.model.heads, config.model.head_dim = width // 128 + 1, 128
  config.data.length = LENGTH if depth <= 8 else 1024
  tokens = ratio * parameters(depth)
  rows = min(2**19 * (tokens / 1e10)**0.4, tokens / STEPS) / config.data.length
  config.train.batch_size = max(8, 2 ** round(math.log2(rows)))
  config.train.minutes = 0.0
  config.train.steps = max(100, round(tokens / (config.train.batch_size * config.data.length)))
  config.optimizer.tuned_width = 128
  config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.train.steps // 10)
  config.eval.every = config.checkpoint.every = max(config.train.steps // 5, 1)
  return config
