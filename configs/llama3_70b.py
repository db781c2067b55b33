"""Llama 3 70B (arXiv 2407.21783) at 8,192 tokens of context, on a TPU slice named by the argument:

  python -m llm_jax.main --config=configs/llama3_70b.py:v6e-256 --workdir=gs://BUCKET/llama3_70b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/llama3/tokenizer.json

What each needs and could reach, by `python -m llm_jax.plan`: docs/benchmarks.md. Not run here: no figures of a run.
"""
import base
import llama3_8b

PODS = {
    'v5p-128': (dict(batch_size=64), dict()),                                   # 64 chips
    'v6e-256': (dict(batch_size=256), dict()),                                  # 256 chips
}


def get_config(pod: str = 'v5p-128'):
  if pod not in PODS:
    raise base.ConfigError(f'configs/llama3_70b.py: no {pod!r}; there are {", ".join(PODS)}')
  config = llama3_8b.llama3('llama3_70b')
  train, mesh = PODS[pod]
  config.train.update(train)
  config.mesh.update(mesh)
  config.optimizer.learning_rate = 1.5e-4
  return config
