"""Gemma 3 1B (arXiv 2503.19786): five layers of sliding window for each global one, 262,144 tokens of vocabulary.

  python -m llm_jax.main --config=configs/gemma3_1b.py --config.data.path='/data/web/*.parquet' \
      --config.tokenizer.path=/data/gemma3/tokenizer.json

Hardware: a TPU v5e-16 slice, fsdp 16: 64 sequences of 4,096 tokens a step. Not run here: no figures of ours.
"""
import base


def get_config():
  config = base.get_config()
  config.model = base.preset('gemma3_1b')
  config.data.source, config.data.path, config.data.length = 'parquet', 'web/*.parquet', 4096
  config.data.packing, config.data.valid_fraction = 'pack', 0.0005
  config.tokenizer.kind, config.tokenizer.path = 'hf', 'gemma3/tokenizer.json'
  config.train.steps, config.train.minutes, config.train.batch_size = 100_000, 0.0, 64
  config.train.loss_chunk = 16_384
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 4e-4, 'cosine'
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 1000, 0.1
  config.mesh.distributed = True                   # a v5e-16 slice is four hosts
  config.checkpoint.every, config.eval.every = 1000, 1000
  config.eval.prompts, config.eval.samples, config.eval.python = ('The meaning of life is',), 0, False
  return config
