"""Llama 3 405B (arXiv 2407.21783) at 8,192 tokens of context, on a TPU v5p-1024 slice (512 chips):

  python -m llm_jax.main --config=configs/llama3_405b.py --workdir=gs://BUCKET/llama3_405b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/llama3/tokenizer.json

What it needs and could reach, by `python -m llm_jax.plan`: docs/benchmarks.md. Not run here: no figures of a run.
"""
import llama3_8b


def get_config():
  config = llama3_8b.llama3('llama3_405b')
  config.train.batch_size = 512
  config.optimizer.learning_rate = 8e-5
  return config
