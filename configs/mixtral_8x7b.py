"""Mixtral 8x7B (arXiv 2401.04088) at 4,096 tokens of context, on a TPU v5p-64 slice (32 chips): 8 experts on 8 devices
of each group, 4 groups.

  python -m llm_jax.main --config=configs/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral_8x7b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/mixtral/tokenizer.json

What it needs and could reach, by `python -m llm_jax.plan`: docs/benchmarks.md. Not run here: no figures of a run.
"""
import base
import llama3_8b


def get_config():
  config = llama3_8b.llama3('llama3_8b')
  config.model = base.preset('mixtral_8x7b')
  config.model.expert_capacity, config.model.expert_buffer = 1.25, 2.0
  config.data.length = 4096
  config.train.batch_size, config.train.balance_loss = 128, 0.02
  config.mesh.expert = 8
  return config
