"""Llama 3 8B (arXiv 2407.21783) at 8,192 tokens of context, on a TPU slice named by the argument:

  python -m llm_jax.main --config=configs/llama3_8b.py:v5e-64 --workdir=gs://BUCKET/llama3_8b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/llama3/tokenizer.json

What each needs and could reach, by `python -m llm_jax.plan`: docs/benchmarks.md. Not run here: no figures of a run.
On 8 x H100 add --config.mesh.distributed=False --config.train.batch_size=64 --config.train.accumulate=8.
"""
import base

PODS = {
    'v5p-128': dict(batch_size=256),                 # 64 chips: 2.1 million tokens a step
    'v5e-64': dict(batch_size=64),                   # 64 chips
    'v6e-16': dict(batch_size=64, accumulate=4),     # 16 chips
}


def get_config(pod: str = 'v5p-128'):
  config = llama3('llama3_8b')
  if pod not in PODS:
    raise base.ConfigError(f'configs/llama3_8b.py: no {pod!r}; there are {", ".join(PODS)}')
  config.train.update(PODS[pod])
  return config


def llama3(shape: str):
  config = base.get_config()
  config.model = base.preset(shape)
  config.data.source, config.data.path, config.data.length = 'parquet', 'web/*.parquet', 8192
  config.data.packing, config.data.valid_fraction = 'pack', 0.0001
  config.tokenizer.kind, config.tokenizer.path = 'hf', 'llama3/tokenizer.json'
  config.train.steps, config.train.minutes = 500_000, 0.0
  config.train.loss_chunk = 8192                   # of 128,256 entries: logits never exist all at once
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 3e-4, 'cosine'
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 2000, 0.1
  config.mesh.distributed = True
  config.checkpoint.every, config.checkpoint.keep, config.eval.every = 1000, 3, 1000
  config.eval.prompts, config.eval.samples, config.eval.python = ('The meaning of life is',), 0, False
  return config
