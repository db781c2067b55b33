"""Llama 3 70B (arXiv 2407.21783) at 8,192 tokens of context.

  python -m llm_jax.main --config=configs/llama3_70b.py --workdir=/mnt/BUCKET/llama3_70b \
      --config.data.path='/data/web/*.parquet' --config.tokenizer.path=/data/llama3/tokenizer.json

Hardware: a TPU v5p-512 slice (256 chips), fsdp 64 x tensor 4: 512 sequences, 4.2 million tokens a step.
Not run here: no figures of ours.
"""
import llama3_8b


def get_config():
  config = llama3_8b.get_config('llama3_70b')
  config.train.batch_size, config.train.accumulate = 512, 2
  config.optimizer.learning_rate = 1.5e-4
  config.mesh.tensor = 4
  return config
