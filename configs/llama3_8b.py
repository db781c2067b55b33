"""Llama 3 8B (arXiv 2407.21783) at 8,192 tokens of context.

  python -m llm_jax.main --config=configs/llama3_8b.py --workdir=/mnt/BUCKET/llama3_8b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/llama3/tokenizer.json

Hardware: a TPU v5p-128 slice (64 chips), fsdp 64: 256 sequences, 2.1 million tokens a step. On 8 x H100 add
--config.mesh.distributed=False --config.train.batch_size=64 --config.train.accumulate=8. Not run here: no figures.
"""
import base


def get_config(shape: str = 'llama3_8b'):
  config = base.get_config()
  config.model = base.preset(shape)
  config.data.source, config.data.path, config.data.length = 'parquet', 'web/*.parquet', 8192
  config.data.packing, config.data.valid_fraction = 'pack', 0.0001
  config.tokenizer.kind, config.tokenizer.path = 'hf', 'llama3/tokenizer.json'
  config.train.steps, config.train.minutes, config.train.batch_size = 500_000, 0.0, 256
  config.train.loss_chunk = 1024                   # 128,256 logits per position: never all at once
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 3e-4, 'cosine'
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 2000, 0.1
  config.mesh.distributed = True
  config.checkpoint.every, config.checkpoint.keep, config.eval.every = 1000, 3, 1000
  config.eval.prompts, config.eval.samples, config.eval.python = ('The meaning of life is',), 0, False
  return config
