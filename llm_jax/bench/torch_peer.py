"""The bench's model and training step in PyTorch: eager or compiled, fused attention and AdamW, bfloat16 on a GPU."""
import time

from llm_jax import config as config_lib
from llm_jax.bench import import_torch


class Step:
  """A model's training step, on a GPU where there is one. compiled: torch.compile of the forward pass and the loss."""

  def __init__(self, model, groups, dtype: str, compiled: bool):
    self.torch = torch = import_torch()
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.half = self.device == 'cuda' and dtype != 'float32' and torch.cuda.get_device_capability()[0] >= 8   # as ours
    self.model = model.to(self.device)
    self.optimizer = torch.optim.AdamW(groups(self.model), lr=1e-3, betas=(0.9, 0.99), fused=True)
    self.compiled = torch.compile(self._loss_of) if compiled else self._loss_of
    if self.device == 'cuda':
      torch.set_float32_matmul_precision('high')             # TF32, as XLA by default
    if self.half:                                            # flash attention or cuDNN's, or an error
      torch.backends.cuda.enable_math_sdp(False)
      torch.backends.cuda.enable_mem_efficient_sdp(False)

  def _loss_of(self, inputs, targets):
    logits = self.model(inputs)
    return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

  def loss(self, rows, training: bool = False):
    """Mean nats per token of [B, T + 1] tokens, on the device."""
    rows = rows.to(self.device)
    with self.torch.autocast(self.device, dtype=self.torch.bfloat16, enabled=self.half):
      return (self.compiled if training else self._loss_of)(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

  def update(self, rows):
    """One step; returns its loss."""
    loss = self.loss(rows, training=True)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    return loss


class Torch:
  """The step on a fixed random batch."""

  def __init__(self, model: config_lib.Model, token_BT, compiled: bool):
    torch = import_torch()
    self.name = f'torch {torch.__version__} {"compiled" if compiled else "eager"}'
    torch.manual_seed(0)
    groups = lambda model: [dict(params=list(model.parameters()), weight_decay=0.1)]
    self.step = Step(gpt(model), groups, model.dtype, compiled)
    self.rows = torch.from_numpy(token_BT).long().to(self.step.device)
    start = time.perf_counter()
    self.run(1)
    self.compile_s = time.perf_counter() - start

  def run(self, steps: int) -> float:
    """Loss after some steps; returns when they are done."""
    for _ in range(steps):
      loss = self.step.update(self.rows)
    return loss.item()


def gpt(cfg: config_lib.Model):
  """nanoGPT's model as torch modules, with cfg.dropout where it has it."""
  torch = import_torch()
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
