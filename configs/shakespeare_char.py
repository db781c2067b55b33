"""nanoGPT's two character models of tiny Shakespeare (github.com/karpathy/nanoGPT): its sizes, batches, steps,
optimizer and schedule; the initial weights are drawn as everywhere here, not all with its deviation of 0.02.

  python -m llm_jax.main --config=configs/shakespeare_char.py          size cpu: 4 x 128, 2,000 steps of 12 x 64
  python -m llm_jax.main --config=configs/shakespeare_char.py:gpu      size gpu: 6 x 384, 5,000 steps of 64 x 256
  ... :cpu_ours, :gpu_ours       the same sizes and tokens, base.py's model with SwiGLU, and NorMuon; on a CPU all heads
                                 share a key, and every other layer sees 8 characters

The text comes from tfds (tiny_shakespeare, downloaded once), or from a file, split 90/10 as nanoGPT does:
  --config.data.source=text --config.data.path=input.txt --config.data.valid=tail
nanoGPT's validation losses: 1.88 (cpu), 1.4697 (gpu). Here, means of 3 seeds: 1.7799 (cpu), 1.5392 (cpu_ours, in 0.92
of the time of nanoGPT's recipe in PyTorch); with a tenth of the gpu size's steps once 1.7394 (gpu) and 1.4739
(gpu_ours). All its steps were not run. On a CPU give it train.accumulate=16: with dropout the automatic number is 1.
`python -m llm_jax.bench learn --text=input.txt --recipe=cpu,cpu_ours --peer=torch` compares them.
"""
import base


def get_config(recipe: str = 'cpu'):
  size, _, whose = recipe.partition('_')
  if size not in ('cpu', 'gpu') or whose not in ('', 'ours'):
    raise base.ConfigError("--config=configs/shakespeare_char.py:RECIPE: expected cpu, gpu, cpu_ours or gpu_ours, got "
                           f'{recipe!r}')
  config = base.get_config()
  config.data.source, config.data.path = 'tfds', 'tiny_shakespeare'
  config.data.valid, config.data.valid_path = 'given', 'validation'
  config.data.valid_fraction = 0.1
  config.tokenizer.kind = 'char'
  if whose:
    config.model.update(vocab_size=0, max_length=0, layers=4, width=128, heads=4, kv_heads=1, windows=(8, 0),
                        mlp='swiglu', mlp_dim=344)
    config.optimizer.update(matrix_learning_rate=0.025, momentum=0.9, muon_steps=3, muon_b2=0.95, decay_fraction=1.0,
                            weight_decay=0.0)
  else:
    config.model = base.preset(
        'gpt2_124m', vocab_size=0, max_length=0, layers=4, width=128, heads=4, norm_bias=False, attention_bias=False,
        attention_out_bias=False, mlp_bias=False, mlp='gelu_exact')
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.b2 = 'adamw', 1e-3, 0.99
    config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.final_fraction = 'cosine', 100, 0.1
    config.optimizer.weight_decay = 0.1
  config.data.length = 64
  config.train.batch_size, config.train.steps, config.train.minutes = 12, 2000, 0.0
  config.eval.every, config.eval.batches, config.eval.batch_size = 250, 200, 0
  config.eval.prompts, config.eval.samples, config.eval.python = ('\n',), 0, False
  if size == 'gpu':
    config.model.layers, config.model.width, config.model.heads, config.model.dropout = 6, 384, 6, 0.2
    config.model.kv_heads, config.model.windows, config.model.mlp_dim = 0, (0,), 1024 if whose else 0
    config.data.length, config.train.batch_size, config.train.steps = 256, 64, 5000
    if whose:
      config.optimizer.update(matrix_learning_rate=0.03, muon_steps=5)
  return config
