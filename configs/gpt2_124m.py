"""GPT-2 124M (Radford et al. 2019) on web text, 10 billion tokens.

  python -m llm_jax.main --config=configs/gpt2_124m.py --config.data.path='/data/fineweb/*.parquet' \
      --config.tokenizer.path=/data/gpt2/tokenizer.json

Hardware: one 8 x H100 node, fsdp 8 (set by -1), 480 sequences of 1,024 tokens a step: 20,000 steps are 9.8 billion
tokens. On one GPU add --config.train.accumulate=8. Not run here yet: no figures of ours.
"""
import base


def get_config():
  config = base.get_config()
  config.model = base.preset('gpt2_124m', vocab_size=50_304)       # padded, so that a tensor axis divides it
  config.data.source, config.data.path, config.data.length = 'parquet', 'fineweb/*.parquet', 1024
  config.data.valid_fraction = 0.0005
  config.tokenizer.kind, config.tokenizer.path = 'hf', 'gpt2/tokenizer.json'
  config.train.steps, config.train.minutes, config.train.batch_size = 20_000, 0.0, 480
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = 'adamw', 6e-4, 'cosine'
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 700, 0.1
  config.checkpoint.every, config.eval.every, config.eval.batches = 1000, 500, 20
  config.eval.prompts, config.eval.samples, config.eval.python = ('The meaning of life is',), 0, False
  return config
