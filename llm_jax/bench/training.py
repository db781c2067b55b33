"""bench train: the step that training runs, beside the same model in PyTorch and the machine's limit."""
import dataclasses
import statistics
import time

from llm_jax import config as config_lib
from llm_jax.bench import hardware, import_torch
from llm_jax.config import ConfigError


def model_of(flags) -> config_lib.Model:
  """nanoGPT's model: pre-norm LayerNorm without bias, learned positions, GELU, tied embeddings."""
  return config_lib.derive(config_lib.Model(
      vocab_size=flags.vocab, layers=flags.layers, width=flags.width, heads=flags.width // 64, max_length=flags.length,
      norm='layer', norm_eps=1e-5, positions='learned', mlp='gelu_exact', dtype=flags.dtype, remat=flags.remat,
      fp8=flags.fp8))


def optimizer_of() -> config_lib.Optimizer:
  return config_lib.Optimizer(learning_rate=1e-3, b2=0.99, schedule='constant', warmup_steps=0)


class Ours:
  """The step that training runs, on a fixed random batch."""
  name = 'llm_jax'

  def __init__(self, flags, token_BT):
    import jax

    from llm_jax import hardware as machine
    from llm_jax.models import attention, layers, transformer
    from llm_jax.train import optimizer as optimizer_lib
    from llm_jax.train import remat as remat_lib
    from llm_jax.train import step as step_lib
    machine.keep_memory()
    model = model_of(flags)
    cfg = config_lib.Config(model=model, data=config_lib.Data(length=flags.length), optimizer=optimizer_of(),
                            train=config_lib.Train(batch_size=flags.batch))
    kernel, self.note = attention.choose(model, jax.default_backend(), attention.compute_dtype(model.dtype),
                                         flags.length, False)
    tx = optimizer_lib.make(cfg.optimizer, jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))))
    self.state = jax.jit(lambda key: step_lib.init_state(cfg, model, tx, key))(jax.random.key(0))
    self.batch = dict(token_BT=token_BT[:, :-1], target_BT=token_BT[:, 1:], mask_BT=token_BT[:, 1:] * 0.0 + 1.0)
    self.batch = jax.device_put({k: v.astype('float32' if k == 'mask_BT' else 'int32') for k, v in self.batch.items()})

    def compiled(remat):
      start = time.perf_counter()
      step = step_lib.make_train_step(cfg, dataclasses.replace(model, remat=remat), tx, kernel,
                                      step_lib.microbatches(cfg, 1))
      lowered = jax.jit(step, donate_argnums=0,
                        compiler_options=layers.compiler_options()).lower(self.state, self.batch)
      self.lower_s = time.perf_counter() - start
      step = lowered.compile()
      self.compile_s = time.perf_counter() - start
      return step

    self.step, self.remat, self.remat_why = remat_lib.lightest(compiled, model.remat)

  def run(self, steps: int) -> float:
    """Loss after some steps; returns when they are done."""
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
    return float(metrics['loss/train'])


class Torch:
  """The same model and optimizer in PyTorch, eager or compiled, with its fused attention and AdamW."""

  def __init__(self, flags, token_BT, compiled: bool):
    torch = import_torch()
    self.torch, self.name = torch, f'torch {torch.__version__} {"compiled" if compiled else "eager"}'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    self.dtype = torch.bfloat16 if device == 'cuda' and flags.dtype != 'float32' else torch.float32
    self.device, self.model = device, torch_gpt(torch, model_of(flags)).to(device)
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
                                       fused=True)
    token_BT = torch.from_numpy(token_BT).long().to(device)
    self.inputs, self.targets = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()
    self.forward = torch.compile(self.model) if compiled else self.model
    start = time.perf_counter()
    self.run(1)
    self.compile_s = time.perf_counter() - start

  def run(self, steps: int) -> float:
    torch = self.torch
    for _ in range(steps):
      with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
        logits = self.forward(self.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      self.optimizer.step()
    return loss.item()


def torch_gpt(torch, cfg: config_lib.Model):
  """The bench's model as torch modules; cfg.dropout where nanoGPT has it."""
  nn, functional = torch.nn, torch.nn.functional

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      D = cfg.width
      self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
      self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
      self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
      self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x):
      B, T, D = x.shape
      q, k, v = (y.view(B, T, cfg.heads, -1).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(D, -1))
      y = functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                  dropout_p=cfg.dropout if self.training else 0.0)
      x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, D)))
      return x + self.drop(self.down(functional.gelu(self.up(self.norm_2(x)))))

  class Gpt(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed, self.position = nn.Embedding(cfg.vocab_size, cfg.width), nn.Embedding(cfg.max_length, cfg.width)
      self.blocks = nn.ModuleList(Block() for _ in range(cfg.layers))
      self.norm, self.drop = nn.LayerNorm(cfg.width, bias=False), nn.Dropout(cfg.dropout)
      nn.init.normal_(self.embed.weight, std=0.02)
      nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, token):
      x = self.drop(self.embed(token) + self.position.weight[:token.shape[1]])
      for block in self.blocks:
        x = block(x)
      return self.norm(x) @ self.embed.weight.T

  return Gpt()


def train(flags) -> None:
  """Prints training tokens per second of ours, the peers and the machine's limit."""
  import jax
  import numpy as np

  from llm_jax.train import metrics
  if flags.width % 64:
    raise ConfigError(f'--width: expected a multiple of 64 (the width of a head), got {flags.width}')
  token_BT = np.random.default_rng(0).integers(0, flags.vocab, (flags.batch, flags.length + 1), dtype=np.int32)
  runs = [Ours(flags, token_BT)]
  if flags.peer == 'torch':
    runs += [Torch(flags, token_BT, compiled) for compiled in ((False, True) if flags.compiled else (False,))]
  peak = metrics.peak_flops()
  flops = metrics.flops_per_token(model_of(flags), flags.length)
  for run in runs:
    run.run(2)
  seconds = {run.name: [] for run in runs}
  for _ in range(flags.rounds):
    for run in runs:
      start = time.perf_counter()
      run.run(flags.steps)
      seconds[run.name].append(time.perf_counter() - start)
  tokens = flags.steps * flags.batch * flags.length
  print(f'train {flags.layers} x {flags.width}, {flags.batch} x {flags.length} tokens, {flags.rounds} rounds of '
        f'{flags.steps} steps, medians; {hardware()}, jax {jax.__version__}; remat {runs[0].remat} '
        f'({runs[0].remat_why})')
  ours = seconds[runs[0].name]
  for run in runs:
    rate = tokens / statistics.median(seconds[run.name])
    ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds[run.name], ours))
    print(f'{run.name:>24}  {rate:>9,.0f} tok/s  MFU {rate * flops["causal"] / peak.flops:.1%} '
          f'({rate * flops["full"] / peak.flops:.1%} uncausal)  '
          f'ours/this {ratio:.2f}x  compile {run.compile_s:.1f} s')
  if flags.explain:
    print_explained(runs[0], flags.steps)
  print(f'{"limit":>24}  {peak.flops / flops["causal"]:>9,.0f} tok/s  ({peak.source})')


def print_explained(run: Ours, steps: int) -> None:
  """Where the time of a step goes, by part, beside each part's roofline."""
  import tempfile

  import jax

  from llm_jax.train import explain
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      start = time.perf_counter()
      run.run(steps)
      seconds = (time.perf_counter() - start) / steps
    explained = explain.read(folder, run.step.as_text(), steps, seconds, 0.0, *explain.limits())
  for part, spent, share, least in explain.rows(explained):
    print(f'{part:>24}  {spent:>12}  {share:>6}' + (f'  roofline {least}' if least else ''))
