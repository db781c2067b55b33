"""Attention: its kernels and the module with its weights. Who may see whom is in view.py.

Kernels: `xla` (plain einsums, everything supported, every backend), `cudnn` (GPU, flash), `triton` (GPU, flash, Pallas:
for packed documents), `splash` (TPU, Pallas), `ring` (positions split over `context`: ring.py).
`choose` names the one in use and why; a kernel that was asked for and cannot be used is an error, never a fallback.
"""
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.models import layers, quantize, ring
from llm_jax.models.view import View, scores
from llm_jax.sharding import ACT, per_device, shard, spec

BLOCK, BLOCKS = 128, 8     # queries per block of attend_causal, and blocks at most (compile time grows with them)


def attend_xla(q_BTNH, k_BSKH, v_BSKH, view: View, **options):
  """Softmax attention by einsums, in float32 from the scores to the weights: o_BTNH, and the weights [B, N, T, S].

  Queries share kv heads in groups (GQA, arXiv 2305.13245): head n reads kv head n // G. options: window; scale;
  softcap, Gemma 2's cap * tanh(scores / cap); slopes_N, ALiBi's.
  """
  B, T, N, _ = q_BTNH.shape
  o_BKGTH, weight_BKGTS = _attend(*_heads_first(q_BTNH, k_BSKH, v_BSKH), view, **options)
  return _heads_last(o_BKGTH), weight_BKGTS.reshape(B, N, T, -1)


def attend_causal(q_BTNH, k_BSKH, v_BSKH, view: View, *, window, **options):
  """attend_xla without most of the scores that a causal mask or a window throws away: each block of queries takes only
  the keys it can see. Where the pass is no plain causal one, attend_xla itself. Returns o_BTNH alone."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  plain = view.kind == 'causal' and view.position_BT is None and view.key_position_BS is None and T == S
  size = max(BLOCK, T // BLOCKS)
  if not plain or T % size or T == size:
    return attend_xla(q_BTNH, k_BSKH, v_BSKH, view, window=window, **options)[0]
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
  out = []
  for start in range(0, T, size):
    stop = start + size
    first = max(start - window + 1, 0) if window else 0
    segments = {} if view.segment_BT is None else dict(
        segment_BT=view.segment_BT[:, start:stop], key_segment_BS=view.key_segment_BS[:, first:stop])
    part = View('causal', jnp.arange(start, stop)[None], jnp.arange(first, stop)[None], **segments)
    out.append(_attend(q_BKGTH[..., start:stop, :], k_BKSH[:, :, first:stop], v_BKSH[:, :, first:stop], part,
                       window=window, **options)[0])
  return _heads_last(jnp.concatenate(out, 3))


def _attend(q_BKGTH, k_BKSH, v_BKSH, view: View, *, window, scale, softcap, slopes_N=None):
  """(o_BKGTH, weight_BKGTS). The softmax's sum divides the output, which is smaller than the weights, and the largest
  score is a constant to the gradient: both leave one pass over the weights fewer, as in arXiv 2205.14135."""
  score_BKGTS, mask = scores(q_BKGTH, k_BKSH, view, window=window, scale=scale, softcap=softcap, slopes_N=slopes_N)
  weight_BKGTS = jnp.exp(score_BKGTS - jax.lax.stop_gradient(score_BKGTS.max(-1, keepdims=True)))
  sum_BKGT1 = weight_BKGTS.sum(-1, keepdims=True)
  if view.kind == 'bidirectional' and view.key_segment_BS is not view.segment_BT:
    # Cross-attention: a document may have an empty source.
    weight_BKGTS = jnp.where(mask[:, None, None], weight_BKGTS, 0.0)
  o_BKGTH = quantize.einsum('BKGTS,BKSH->BKGTH', weight_BKGTS.astype(q_BKGTH.dtype), v_BKSH, jnp.float32) / sum_BKGT1
  return o_BKGTH.astype(q_BKGTH.dtype), weight_BKGTS / sum_BKGT1


def _heads_first(q_BTNH, k_BSKH, v_BSKH):
  """[B, K, G, T, H], [B, K, S, H] twice: what batched products read in place."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH = q_BTNH.swapaxes(1, 2).reshape(B, K, N // K, T, H)
  heads = q_BKGTH, *jax.tree.map(lambda x: x.swapaxes(1, 2), (k_BSKH, v_BSKH))
  return layers.settle(heads) if T > 1 else heads     # a decoding step would copy its whole cache


def _heads_last(o_BKGTH):
  B, K, G, T, H = o_BKGTH.shape
  return o_BKGTH.reshape(B, K * G, T, H).swapaxes(1, 2)


def attend_cudnn(q_BTNH, k_BSKH, v_BSKH, view: View, *, window, scale):
  """cuDNN's flash attention through jax.nn: half precision, a causal flag and a window instead of a mask."""
  if view.kind == 'prefix' or view.segment_BT is not None:
    raise ConfigError("config.model.kernel: 'cudnn' takes neither a prefix nor segments; set it to 'auto' or 'xla'")
  return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=view.kind == 'causal',
      local_window_size=(window - 1, 0) if window else None, implementation='cudnn')


def attend_splash(q_BTNH, k_BSKH, v_BSKH, view: View, *, window, scale, softcap, interpret=False):
  """Splash attention, the TPU's block-sparse flash kernel in Pallas, with segments and softcap. interpret=True runs it
  on a CPU, slowly."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  def local(q_BTNH, k_BSKH, v_BSKH, segment_BT):
    T, N = q_BTNH.shape[1:3]
    if window:
      ahead = window - 1 if view.kind == 'bidirectional' else 0
      mask = masks.LocalMask((T, T), window_size=(window - 1, ahead), offset=0)
    else:
      mask = masks.FullMask((T, T)) if view.kind == 'bidirectional' else masks.CausalMask((T, T))
    block = next(b for b in (1024, 512, 256, 128) if T % b == 0)
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
                              block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
    kernel = splash.make_splash_mha(masks.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1,
                                    q_seq_shards=1, attn_logits_soft_cap=softcap or None, interpret=interpret)
    groups = N // k_BSKH.shape[2]
    heads_first = lambda x, repeat: jnp.repeat(x.swapaxes(1, 2), repeat, axis=1)
    segments = None if segment_BT is None else splash.SegmentIds(segment_BT, segment_BT)
    o_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(
        heads_first(q_BTNH * scale, 1), heads_first(k_BSKH, groups), heads_first(v_BSKH, groups), segments)
    return o_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)

  return _by_rows_and_heads(local, q_BTNH, k_BSKH, v_BSKH, view.segment_BT)


def attend_triton(q_BTNH, k_BSKH, v_BSKH, view: View, *, scale, interpret=False):
  """FlashAttention-2 (arXiv 2307.08691) in Triton through Pallas, with segments, which cuDNN does not take as a mask.
  interpret=True runs it on a CPU, slowly."""
  from jax.experimental.pallas.ops.gpu import attention as flash
  block = 128 if q_BTNH.shape[-1] <= 64 else 64      # keys, values and queries of two stages: at most 80 KB of an SM
  sizes = flash.BlockSizes(block, block, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)

  def local(q_BTNH, k_BSKH, v_BSKH, segment_BT):
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    return flash.mha(q_BTNH, k_BSNH, v_BSNH, segment_BT, sm_scale=scale, causal=view.kind == 'causal',
                     block_sizes=sizes, interpret=interpret)

  return _by_rows_and_heads(local, q_BTNH, k_BSKH, v_BSKH, view.segment_BT)


def _by_rows_and_heads(local, q_BTNH, k_BSKH, v_BSKH, segment_BT):
  """local(q, k, v, segments or None) -> o of the rows and heads that each device has: by shard_map, since a Pallas call
  is opaque to the partitioner."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(q_BTNH, k_BSKH, v_BSKH, segment_BT)
  q_spec, k_spec = spec('BTNH', ACT, q_BTNH.shape, mesh), spec('BSKH', ACT, k_BSKH.shape, mesh)
  if q_spec[2] != k_spec[2]:                               # too few kv heads for the tensor axis: one per query head
    k_BSKH, v_BSKH = (jnp.repeat(x, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    k_spec = q_spec
  return per_device(local, (q_spec, k_spec, k_spec, P(ACT['B']) if segment_BT is not None else P()),
                    q_spec)(q_BTNH, k_BSKH, v_BSKH, segment_BT)


def unusable(kernel: str, cfg: config_lib.Model, platform: str, dtype: str, length: int, packed: bool) -> str:
  """Why a kernel cannot train this model here, in a few words; '' where it can."""
  if kernel == 'xla':
    return ''
  if cfg.positions == 'alibi':
    return 'it has no ALiBi bias'
  if cfg.attention == 'prefix':
    return 'it has no prefix mask'
  if cfg.encoder_layers:
    return 'it has no cross-attention here'
  if kernel in ('cudnn', 'triton'):
    if platform not in ('gpu', 'cuda'):
      return f'it needs an NVIDIA GPU, this is {platform}'
    if capability() < 8:
      return 'it needs an NVIDIA GPU of compute capability 8 (Ampere) or newer'
    if dtype != 'bfloat16':
      return f'it needs bfloat16, the compute dtype is {dtype}'
    if cfg.attention_softcap:
      return 'it has no softcap'
    if kernel == 'triton':
      return _unusable_by_triton(cfg, length)
    if packed:
      return 'packed documents would become a dense mask'
    if cfg.attention == 'bidirectional' and any(cfg.windows):
      return 'its window needs causal attention'
    most = 256 if capability() >= 9 else 128
    fits = cfg.head_dim % 8 == 0 and cfg.head_dim <= most
    return '' if fits else f'head_dim {cfg.head_dim} is no multiple of 8 up to {most}'
  if platform != 'tpu':
    return f'it needs a TPU, this is {platform}'
  if length % 128:
    return f'length {length} is no multiple of 128'
  return '' if cfg.head_dim % 128 == 0 else f'head_dim {cfg.head_dim} is no multiple of 128'


def _unusable_by_triton(cfg, length):
  if any(cfg.windows):
    return 'it has no windows'
  if length % 128:
    return f'length {length} is no multiple of 128'
  fits = cfg.head_dim % 16 == 0 and cfg.head_dim <= 128
  return '' if fits else f'head_dim {cfg.head_dim} is no multiple of 16 up to 128'


def choose(cfg: config_lib.Model, platform: str, dtype: str, length: int, packed: bool,
           context: int = 1) -> tuple[str, str]:
  """(kernel, reason) for the banner; context: ways that positions are split. Raises ConfigError where the kernel asked
  for cannot be used."""
  if context > 1:
    if cfg.kernel in ('cudnn', 'triton', 'splash'):
      raise ConfigError(f'config.model.kernel: {cfg.kernel!r} sees whole sequences, and mesh.context splits them in '
                        f"{context}; set kernel to 'auto' or context to 1")
    if length % (2 * context):
      raise ConfigError(f'config.data.length: {length} is no multiple of {2 * context}, twice mesh.context')
    return 'ring', f'positions split in {context}'
  if cfg.kernel != 'auto':
    reason = unusable(cfg.kernel, cfg, platform, dtype, length, packed)
    if reason:
      raise ConfigError(f"config.model.kernel: {cfg.kernel!r} cannot be used: {reason}; set it to 'auto' or 'xla'")
    return cfg.kernel, 'as configured'
  passed_over = []
  for kernel in {'tpu': ('splash',), 'gpu': ('cudnn', 'triton'), 'cuda': ('cudnn', 'triton')}.get(platform, ()):
    reason = unusable(kernel, cfg, platform, dtype, length, packed)
    if not reason:
      return kernel, '; '.join(passed_over) or f'the fastest on {platform}'
    passed_over.append(f'{kernel} not used: {reason}')
  return 'xla', '; '.join(passed_over) or f'the fastest on {platform}'


# Patterns of a program's text. A Triton call is __gpu$xla.gpu.triton or triton_kernel_call, by the version of jax.
MARKS = dict(cudnn=(r'__cudnn\$fmhaSoftmax\b', r'__cudnn\$fmhaSoftmaxBackward'),
             triton=(r'xla\.gpu\.triton|triton_kernel_call',),
             splash=('splash', 'tpu_custom_call'), ring=('collective-permute',))


def verify(kernel: str, step) -> None:
  """Raises RuntimeError where a compiled train step (or any program's text) does not hold the kernel that the banner
  names (cuDNN's forward and backward): it would train all the same, at half the speed."""
  if kernel not in MARKS:
    return
  text = step if isinstance(step, str) else step.as_text()
  missing = [mark for mark in MARKS[kernel] if not re.search(mark, text)]
  if missing:
    raise RuntimeError(f'the compiled step has no {" or ".join(missing)}, so attention does not run by {kernel!r}; '
                       "--config.model.kernel=xla trains without it; please report the versions of jax and jaxlib")


class Attention(nnx.Module):
  """Multi-head attention with grouped kv heads. Query scale is 1/sqrt(H) unless the config sets one."""

  def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs, window: int = 0):
    D, N, K, H = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim
    self.cfg, self.window = cfg, window
    self.w_q_DNH = layers.normal(rngs, D, N, H, std=cfg.init_scale * D**-0.5)
    self.w_k_DKH = layers.normal(rngs, D, K, H, std=cfg.init_scale * D**-0.5)
    self.w_v_DKH = layers.normal(rngs, D, K, H, std=cfg.init_scale * D**-0.5)
    self.w_o_NHD = layers.normal(rngs, N, H, D, std=layers.out_std(cfg, N * H))
    if cfg.attention_bias:
      self.b_q_NH = nnx.Param(jnp.zeros((N, H)))
      self.b_k_KH = nnx.Param(jnp.zeros((K, H)))
      self.b_v_KH = nnx.Param(jnp.zeros((K, H)))
    if cfg.attention_out_bias:
      self.b_o_D = nnx.Param(jnp.zeros(D))
    if cfg.qk_norm == 'head':
      self.norm_q, self.norm_k = layers.Norm(cfg, 'H', H), layers.Norm(cfg, 'H', H)
    if cfg.qk_norm == 'full':
      self.norm_q, self.norm_k = layers.Norm(cfg, 'NH', N, H), layers.Norm(cfg, 'KH', K, H)
    if cfg.value_skips:
      self.value_mix_K = nnx.Param(jnp.full(K, 0.5, jnp.float32))

  def heads(self, x_BTD, rope, memory_BSD=None):
    """q_BTNH, k_BSKH and v_BSKH, the last two of memory_BSD where it is given; rope is a layers.rope_table, or None."""
    w_q, w_k, w_v = self.w_q_DNH[...], self.w_k_DKH[...], self.w_v_DKH[...]
    if memory_BSD is None:
      q_BTNH, k_BSKH, v_BSKH = layers.project('BTD,DNH->BTNH', self.cfg.fp8, x_BTD, w_q, w_k, w_v)
    else:
      q_BTNH, = layers.project('BTD,DNH->BTNH', self.cfg.fp8, x_BTD, w_q)
      k_BSKH, v_BSKH = layers.project('BSD,DKH->BSKH', self.cfg.fp8, memory_BSD, w_k, w_v)
    if self.cfg.attention_bias:
      q_BTNH = layers.add_bias(q_BTNH, self.b_q_NH)
      k_BSKH, v_BSKH = layers.add_bias(k_BSKH, self.b_k_KH), layers.add_bias(v_BSKH, self.b_v_KH)
    if self.cfg.qk_norm != 'none':
      q_BTNH, k_BSKH = self.norm_q(q_BTNH), self.norm_k(k_BSKH)
    if rope is not None:
      q_BTNH, k_BSKH = layers.rotate(q_BTNH, rope), layers.rotate(k_BSKH, rope)
    return q_BTNH, k_BSKH, v_BSKH

  def mix_values(self, v_BSKH, first_BSKH):
    """Values mixed with the first layer's (value residual, arXiv 2410.17897); the mix starts at one half."""
    mix_K = self.value_mix_K[...].astype(v_BSKH.dtype)[None, None, :, None]
    return (1 - mix_K) * v_BSKH + mix_K * first_BSKH

  def __call__(self, q_BTNH, k_BSKH, v_BSKH, view: View, kernel: str, tap=None):
    """Attention of queries over keys and values -> [B, T, D]. tap(name, array) receives the weights."""
    cfg = self.cfg
    scale = cfg.attention_scale or cfg.head_dim**-0.5
    with jax.named_scope('attend'):
      o_BTNH = self.attend(q_BTNH, k_BSKH, v_BSKH, view, kernel, scale, tap)
    y_BTD, = layers.project('BTNH,NHD->BTD', cfg.fp8, shard(o_BTNH, 'BTNH'), self.w_o_NHD[...])
    return layers.add_bias(y_BTD, self.b_o_D) if cfg.attention_out_bias else y_BTD

  def attend(self, q_BTNH, k_BSKH, v_BSKH, view: View, kernel: str, scale: float, tap):
    """o_BTNH by a kernel."""
    cfg, common = self.cfg, dict(window=self.window, scale=scale)
    if kernel == 'cudnn':
      return attend_cudnn(q_BTNH, k_BSKH, v_BSKH, view, **common)
    if kernel == 'triton':
      return attend_triton(q_BTNH, k_BSKH, v_BSKH, view, scale=scale)
    if kernel == 'splash':
      return attend_splash(q_BTNH, k_BSKH, v_BSKH, view, softcap=cfg.attention_softcap, **common)
    slopes_N = layers.alibi_slopes(cfg.heads) if cfg.positions == 'alibi' else None
    options = dict(common, softcap=cfg.attention_softcap, slopes_N=slopes_N)
    if kernel == 'ring':
      return ring.attend_ring(q_BTNH, k_BSKH, v_BSKH, view, **options)
    if tap is None:
      return attend_causal(q_BTNH, k_BSKH, v_BSKH, view, **options)
    o_BTNH, weight_BNTS = attend_xla(q_BTNH, k_BSKH, v_BSKH, view, **options)
    tap('attention_weights', weight_BNTS)
    return o_BTNH


def compute_dtype(dtype: str) -> str:
  """'auto' resolved for the default backend: bfloat16 on TPU and GPU; float32 on a CPU and on GPUs before Ampere
  (Colab's T4), where XLA emulates bfloat16."""
  if dtype != 'auto':
    return dtype
  return 'float32' if jax.default_backend() == 'cpu' or capability() < 8 else 'bfloat16'


@functools.lru_cache
def capability() -> float:
  """CUDA compute capability of this machine's GPU, 0 for a GPU without one (AMD); 9 (Hopper) where there is no GPU, as
  when a program is compiled for a machine that is not here."""
  if jax.default_backend() != 'gpu':
    return 9.0
  text = str(jax.devices()[0].compute_capability)
  return float(text) if text.replace('.', '').isdigit() else 0.0
