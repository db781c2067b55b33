"""Qwen3 0.6B (arXiv 2505.09388).

  python -m llm_jax.main --config=configs/qwen3_0_6b.py --config.data.path='/data/web/*.parquet' \
      --config.tokenizer.path=/data/qwen3/tokenizer.json

Hardware: one 8 x H100 node, fsdp 8: 128 sequences of 4,096 tokens a step. On one H100 add
--config.train.accumulate=16. Not run here: no figures of ours.
"""
import base


def get_config():
  config = base.get_config()
  config.model = base.preset('qwen3_0_6b', remat='dots')
  config.data.source, config.data.path, config.data.length = 'parquet', 'web/*.parquet', 4096
  config.data.valid_fraction = 0.0005
  config.tokenizer.kind, config.tokenizer.path = 'hf', 'qwen3/tokenizer.json'
  config.train.steps, config.train.minutes, config.train.batch_size = 50_000, 0.0, 128
  config.train.loss_chunk = 18_992
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 6e-4, 'cosine'
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 1000, 0.1
  config.checkpoint.every, config.eval.every = 1000, 1000
  config.eval.prompts, config.eval.samples, config.eval.python = ('The meaning of life is',), 0, False
  return config
