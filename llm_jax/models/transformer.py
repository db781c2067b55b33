"""The Transformer: one decoder (or encoder-decoder) whose every variation is a field of config.Model.

Letters, in every tensor's name, every parameter's and every einsum: B batch, T query position, S key or source
position, D model width, N query heads, K kv heads, G queries per kv head, H head dim, F mlp dim, E experts,
V vocabulary, L layers. Layers of one position of the window pattern are stacked (`blocks0`, `blocks1`, ..., a leading
L) and run by one scan; what the depth leaves over is a second stack (`tail0`, ...).
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.models import layers, moe, quantize
from llm_jax.models.attention import Attention, View, compute_dtype
from llm_jax.sharding import PARAM, dims_of, shard


@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer of one forward pass shares."""
  view: View
  kernel: str = 'xla'
  rope: tuple | None = None           # of global layers
  rope_local: tuple | None = None     # of sliding-window layers
  embed_BTD: jax.Array | None = None  # for embedding skips
  memory_BSD: jax.Array | None = None     # the encoder's output
  memory_view: View | None = None
  key: jax.Array | None = None        # dropout; None: off
  taps: dict | None = None            # name -> array, filled where asked for
  training: bool = False              # experts drop what is past their capacity


class Block(nnx.Module):
  """Attention (self, and cross where there is an encoder) and an MLP, each with norms and a residual."""

  def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs, window: int = 0, cross: bool = False):
    self.cfg, self.window = cfg, window
    norm = lambda: layers.Norm(cfg, 'D', cfg.width)
    self.attention = Attention(cfg, rngs, window)
    self.mlp = moe.Moe(cfg, rngs) if cfg.experts else layers.Mlp(cfg, rngs)
    if cfg.norm_position in ('before', 'both'):
      self.norm_attention, self.norm_mlp = norm(), norm()
    if cfg.norm_position != 'before':
      self.norm_attention_out, self.norm_mlp_out = norm(), norm()
    if cross:
      self.cross_attention = Attention(dataclasses.replace(cfg, positions='none', value_skips=False), rngs)
      if cfg.norm_position in ('before', 'both'):
        self.norm_cross = norm()
      if cfg.norm_position != 'before':
        self.norm_cross_out = norm()
    if cfg.embedding_skips:
      self.skip_x_D = nnx.Param(jnp.ones(cfg.width))
      self.skip_embed_D = nnx.Param(jnp.zeros(cfg.width))

  def __call__(self, x_BTD, first_v_BTKH, context: Context, layer, cache=None):
    """One layer. layer: its index (traced in a scan). cache: (k_BKHS, v_BKSH, start_B) to extend, or None.
    Returns x_BTD, the first layer's values, the extended (k_BKHS, v_BKSH) or None, and moe.statistics or None."""
    cfg = self.cfg
    key = None if context.key is None else jax.random.fold_in(context.key, layer)
    tap = None if context.taps is None else functools.partial(_tap, context.taps, layer)
    if cfg.embedding_skips:
      x_BTD = (_channels(self.skip_x_D, x_BTD) * x_BTD + _channels(self.skip_embed_D, x_BTD) * context.embed_BTD)

    h_BTD = self.norm_attention(x_BTD) if hasattr(self, 'norm_attention') else x_BTD
    rope = context.rope_local if self.window and context.rope_local is not None else context.rope
    with jax.named_scope('attention'):
      q_BTNH, k_BSKH, v_BSKH = self.attention.heads(h_BTD, rope)
    if cfg.value_skips:
      first_v_BTKH = v_BSKH if first_v_BTKH is None else jnp.where(layer == 0, v_BSKH, first_v_BTKH)
      v_BSKH = self.attention.mix_values(v_BSKH, first_v_BTKH)
    if cache is not None:
      cache = layers.settle(extend(cache, k_BSKH, v_BSKH))         # or the carried one and the one read are two
      k_BSKH = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), quantize.cached(cache[0], 2))
      v_BSKH = jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), quantize.cached(cache[1], 3))
    with jax.named_scope('attention'):
      a_BTD = self.attention(q_BTNH, k_BSKH, v_BSKH, context.view, context.kernel, tap)
    start_BTD = x_BTD
    x_BTD = self._residual(x_BTD, a_BTD, 'norm_attention_out', key, 0)
    if hasattr(self, 'cross_attention'):
      x_BTD = self._cross(x_BTD, context, key)
    h_BTD = start_BTD if cfg.parallel_residual else x_BTD  # parallel: both read the same input (GPT-J, PaLM)
    h_BTD, routed = self.norm_mlp(h_BTD) if hasattr(self, 'norm_mlp') else h_BTD, None
    with jax.named_scope('mlp'):
      if cfg.experts:
        m_BTD, routed = self.mlp(h_BTD, context.view.segment_BT, context.training)
      else:
        m_BTD = self.mlp(h_BTD)
    x_BTD = self._residual(x_BTD, m_BTD, 'norm_mlp_out', key, 1)
    if tap is not None:
      for name, value in dict(attention=a_BTD, mlp=m_BTD, residual=x_BTD).items():
        tap(name, value)
    return x_BTD, first_v_BTKH, cache, routed

  def _cross(self, x_BTD, context, key):
    h_BTD = self.norm_cross(x_BTD) if hasattr(self, 'norm_cross') else x_BTD
    with jax.named_scope('cross_attention'):
      heads = self.cross_attention.heads(h_BTD, None, context.memory_BSD)
      c_BTD = self.cross_attention(*heads, context.memory_view, 'xla')
    return self._residual(x_BTD, c_BTD, 'norm_cross_out', key, 2)

  def _residual(self, x_BTD, y_BTD, norm: str, key, part: int):
    cfg = self.cfg
    y_BTD = layers.dropout(y_BTD, cfg.dropout, None if key is None else jax.random.fold_in(key, part))
    if cfg.norm_position == 'post':
      return shard(getattr(self, norm)(x_BTD + y_BTD), 'BTD')
    if cfg.norm_position in ('after', 'both'):
      y_BTD = getattr(self, norm)(y_BTD)
    return shard(layers.settle(x_BTD + y_BTD), 'BTD')


def _channels(w_D, x_BTD):
  return w_D[...].astype(x_BTD.dtype)[None, None, :]


def _tap(taps, layer, name, value):
  taps[f'layer{layer}/{name}'] = value


def extend(cache, k_BTKH, v_BTKH):
  """The cache (k_BKHS, v_BKSH: as the two products of attention read them) with T new keys and values in the slots that
  start at start_B of each row."""
  k_BKHS, v_BKSH, start_B = cache
  B, T = k_BTKH.shape[:2]
  row_BT = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
  slot_BT = start_B[:, None] + jnp.arange(T)[None]
  options = dict(mode='drop', unique_indices=True)
  return (jax.tree.map(lambda old, new: old.at[row_BT, ..., slot_BT].set(new, **options), k_BKHS,
                       quantize.positions(k_BTKH, k_BKHS)),
          jax.tree.map(lambda old, new: old.at[row_BT, :, slot_BT].set(new, **options), v_BKSH,
                       quantize.positions(v_BTKH, v_BKSH)))


class Transformer(nnx.Module):
  """Decoder, or encoder-decoder where encoder_layers > 0. cfg must be derived (config.derive): no field left at 0."""

  def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
    self.cfg = cfg
    self.embed_VD = layers.normal(rngs, cfg.vocab_size, cfg.width, std=cfg.embedding_init)
    if not cfg.tied_embeddings:
      self.unembed_DV = layers.normal(rngs, cfg.width, cfg.vocab_size, std=out_init(cfg))
    if cfg.positions == 'learned':
      self.position_embed_SD = layers.normal(rngs, cfg.max_length, cfg.width, std=cfg.embedding_init)
    if cfg.embedding_norm:
      self.norm_embed = layers.Norm(cfg, 'D', cfg.width)
    if cfg.norm_position != 'post':
      self.norm_final = layers.Norm(cfg, 'D', cfg.width)
    for name, window, repeats in stacks(cfg):
      block = functools.partial(Block, cfg, window=window, cross=cfg.encoder_layers > 0)
      setattr(self, name, nnx.vmap(block)(rngs.split(repeats)))
    if cfg.encoder_layers:
      encoder = dataclasses.replace(cfg, value_skips=False, embedding_skips=False)
      self.encoder_blocks0 = nnx.vmap(functools.partial(Block, encoder))(rngs.split(cfg.encoder_layers))
      if cfg.norm_position != 'post':
        self.norm_encoder = layers.Norm(cfg, 'D', cfg.width)

  def __call__(self, token_BT, **inputs):
    """token_BT int32 [B, T] -> logits float32 [B, T, V]; inputs as for `hidden`."""
    return self.logits(self.hidden(token_BT, **inputs))

  def hidden(self, token_BT, **inputs):
    """Final hidden states [B, T, D], after the last norm; inputs as for `forward`."""
    return self.forward(token_BT, **inputs)[0]

  def forward(self, token_BT, *, position_BT=None, segment_BT=None, prefix_BT=None, source_BS=None,
              source_segment_BS=None, key=None, kernel='xla', taps=None, training=False):
    """Final hidden states [B, T, D], after the last norm, and {name of a stack: moe.statistics of its layers}.

    position_BT: restarts at each packed document (None: 0..T-1). segment_BT: document of each token, 0 for padding
    (None: one document per row). prefix_BT: tokens every query of the document sees (attention='prefix'). source_BS,
    source_segment_BS: the encoder's tokens and their segments (0: padding). key: dropout key, None for no dropout.
    taps: a dict to fill with 'layerI/attention_weights|attention|mlp|residual' arrays; layers then run unstacked.
    training: experts keep to their capacity.
    """
    cfg = self.cfg
    if (source_BS is not None) != bool(cfg.encoder_layers):
      raise ConfigError(f'config.model.encoder_layers: {cfg.encoder_layers}; a source (source_BS) must be given '
                        f'exactly where it is above 0, and was {"missing" if source_BS is None else "given"}')
    memory_BSD = None if source_BS is None else self.encode(source_BS, source_segment_BS, key, kernel)
    x_BTD = self.embed(token_BT, position_BT, None if key is None else jax.random.fold_in(key, 2**31 - 1))
    view = View(cfg.attention, segment_BT=segment_BT, key_segment_BS=segment_BT, prefix_BS=prefix_BT)
    context = self.context(view, position_BT, token_BT.shape[1], kernel, x_BTD, key, taps, training)
    if memory_BSD is not None:
      context = dataclasses.replace(context, memory_BSD=memory_BSD,
                                    memory_view=memory_view(token_BT, segment_BT, source_segment_BS))
    routed = {}
    if taps is not None:
      x_BTD, _ = self.run_layers(self.layers(), x_BTD, context)
    else:
      x_BTD, routed = self._scan(x_BTD, context, stacks(cfg))
    return self.finish(x_BTD), routed

  def finish(self, x_BTD):
    """The last norm, where there is one."""
    return self.norm_final(x_BTD) if self.cfg.norm_position != 'post' else x_BTD

  def embed(self, token_BT, position_BT, key=None):
    """Embeddings [B, T, D] in the compute dtype, with absolute positions where the config has them."""
    cfg, dtype = self.cfg, compute_dtype(self.cfg.dtype)
    # Gather D first: SPMD rematerialises a lookup into a table whose D is sharded.
    table_VD = shard(self.embed_VD[...].astype(dtype), 'VD', dict(V=PARAM['V']))
    x_BTD = shard(table_VD[token_BT], 'BTD')
    if cfg.embedding_scale:
      x_BTD = x_BTD * jnp.asarray(cfg.width**0.5, dtype)
    if position_BT is None:
      position_BT = jnp.arange(token_BT.shape[1])[None]
      if cfg.positions == 'learned' and token_BT.shape[1] > cfg.max_length:      # a lookup past the end would clamp
        raise ConfigError(f'config.model.max_length: {token_BT.shape[1]} tokens are more than its {cfg.max_length} '
                          'learned positions; give fewer')
    if cfg.positions == 'learned':
      table_SD = shard(self.position_embed_SD[...].astype(dtype), 'SD', {})
      x_BTD = x_BTD + table_SD[position_BT]
    if cfg.positions == 'sinusoidal':
      x_BTD = x_BTD + layers.sinusoids(position_BT, cfg.width).astype(dtype)
    if cfg.embedding_norm:
      x_BTD = self.norm_embed(x_BTD)
    return layers.dropout(x_BTD, cfg.dropout, key)

  def context(self, view: View, position_BT, T: int, kernel: str, embed_BTD=None, key=None, taps=None,
              training=False) -> Context:
    """The Context of a pass whose queries are at position_BT (None: 0..T-1)."""
    cfg = self.cfg
    rope = rope_local = None
    if cfg.positions == 'rotary':
      position_BT = jnp.arange(T)[None] if position_BT is None else position_BT
      rope = layers.rope_table(cfg, position_BT, cfg.rope_base)
      if cfg.rope_base_local:
        rope_local = layers.rope_table(cfg, position_BT, cfg.rope_base_local, scaled=False)
    return Context(view, kernel, rope, rope_local, embed_BTD if cfg.embedding_skips else None, key=key, taps=taps,
                   training=training)

  def encode(self, source_BS, source_segment_BS=None, key=None, kernel='xla'):
    """The encoder's output [B, S, D]: every source token sees every other of its segment."""
    cfg = self.cfg
    key = None if key is None else jax.random.fold_in(key, 2**31 - 2)
    x_BSD = self.embed(source_BS, None, key)
    view = View('bidirectional', segment_BT=source_segment_BS, key_segment_BS=source_segment_BS)
    context = self.context(view, None, source_BS.shape[1], kernel, key=key)
    x_BSD, _ = self._scan(x_BSD, context, [('encoder_blocks0', 0, cfg.encoder_layers)])
    return self.norm_encoder(x_BSD) if cfg.norm_position != 'post' else x_BSD

  def unembed_VD(self):
    """The output matrix, by rows of the vocabulary."""
    return self.embed_VD[...] if self.cfg.tied_embeddings else self.unembed_DV[...].swapaxes(0, 1)

  def logits(self, x_BTD, part_VD=None):
    """float32 [B, T, V] from final hidden states, soft-capped where the config says so; part_VD: of some of the
    rows of unembed_VD only."""
    cfg = self.cfg
    with jax.named_scope('logits'):
      if part_VD is not None:
        logits_BTV = self._products(x_BTD, part_VD)
      elif cfg.tied_embeddings:
        logits_BTV = self._products(x_BTD, self.embed_VD[...])
      else:
        logits_BTV = quantize.einsum('BTD,DV->BTV', x_BTD, self.unembed_DV[...], jnp.float32)
      if cfg.logit_softcap:
        logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
      return shard(logits_BTV, 'BTV')

  def _products(self, x_BTD, w_VD):
    w_VD = shard(w_VD.astype(x_BTD.dtype), 'VD', dict(V=PARAM['V']))         # gather D
    return quantize.einsum('BTD,VD->BTV', x_BTD, w_VD, jnp.float32)

  def _scan(self, x_BTD, context: Context, names):
    """Runs the stacks in order: one scan over the repeats of the window pattern, one over what is left. Returns x_BTD
    and {name: moe.statistics}, with a leading L."""
    cfg, start, routed = self.cfg, 0, {}
    period = len({name for name, _, _ in names if not name.startswith('tail')})
    first_v_BTKH = None
    if cfg.value_skips and names[0][0] != 'encoder_blocks0':
      first_v_BTKH = self.no_values(x_BTD)
    for group in (names[:period], names[period:]):
      if not group:
        continue
      layer = start + len(group) * jnp.arange(group[0][2])
      stacked = tuple(getattr(self, name) for name, _, _ in group)
      (x_BTD, first_v_BTKH), statistics = run_stack(cfg, stacked, layer, (x_BTD, first_v_BTKH), context)
      routed |= {name: of for (name, _, _), of in zip(group, statistics) if of is not None}
      start += len(group) * group[0][2]
    return x_BTD, routed

  def no_values(self, x_BTD):
    """What stands for the first layer's values before it."""
    return jnp.zeros((*x_BTD.shape[:2], self.cfg.kv_heads, self.cfg.head_dim), x_BTD.dtype)

  def layers(self) -> list[Block]:
    """The decoder's blocks in order of depth, each with its own weights. Take them once, outside a decoding loop: a
    slice of stacked weights inside it is copied at every step."""
    groups = {}
    for name, _, repeats in stacks(self.cfg):
      groups.setdefault((name.startswith('tail'), repeats), []).append(getattr(self, name))
    out = []
    for (_, repeats), blocks in groups.items():
      for r in range(repeats):
        out += [jax.tree.map(lambda w, r=r: w[r], block) for block in blocks]
    return out

  def run_layers(self, blocks, x_BTD, context: Context, cache=None):
    """Unstacked layers one after another -> x_BTD and, with a cache (list of (k, v, start_B)), its extension."""
    first_v, out = None, []
    for i, block in enumerate(blocks):
      x_BTD, first_v, kv, _ = block(x_BTD, first_v, context, i, None if cache is None else cache[i])
      out.append(kv)
    return x_BTD, out

  def decode(self, blocks, token_BT, start_B, cache, prefix_BS=None, memory=None):
    """T further tokens per row, the first at slot start_B, over a cache: list of (k_BKHS, v_BKSH) per layer.

    Returns hidden states [B, T, D] and the new cache. A slot's index is its position; slots past a row's newest token
    are never seen. prefix_BS marks slots every query sees; memory is (memory_BSD, source_segment_BS).
    """
    cfg = self.cfg
    B, T = token_BT.shape
    position_BT = start_B[:, None] + jnp.arange(T)[None]
    x_BTD = self.embed(token_BT, position_BT)
    kind = 'causal' if prefix_BS is None else cfg.attention
    context = self.context(View(kind, position_BT=position_BT, prefix_BS=prefix_BS), position_BT, T, 'xla', x_BTD)
    if memory is not None:
      context = with_memory(context, *memory, T)
    x_BTD, cache = self.run_layers(blocks, x_BTD, context, [(k, v, start_B) for k, v in cache])
    return self.finish(x_BTD), cache


def run_stack(cfg: config_lib.Model, stacked, layer_L, carry, context: Context):
  """One scan over layers: stacked is a tuple of blocks (one per position of the window pattern), each with a leading
  L; layer_L the index of the first of each. carry: (x_BTD, first_v_BTKH). Returns carry, and a tuple of moe.statistics
  (None for a dense model) with a leading L."""
  def body(carry, xs):
    blocks, layer = xs
    routed = []
    carry = jax.tree.map(lambda x: checkpoint_name(x, 'layer_input'), carry)
    for i, block in enumerate(blocks):
      x_BTD, first_v_BTKH, _, statistics = block(*carry, context, layer + i)
      carry = x_BTD, first_v_BTKH
      routed.append(statistics)
    return carry, tuple(routed)

  if cfg.remat not in ('none', 'auto'):            # auto: train/remat.py has not chosen yet
    policies = jax.checkpoint_policies
    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['layer_input'], offload_src='device',
        offload_dst='pinned_host')
    policy = dict(full=None, dots=policies.dots_with_no_batch_dims_saveable, offload=offload)[cfg.remat]
    body = jax.checkpoint(body, policy=policy, prevent_cse=cfg.unroll)
  return jax.lax.scan(body, carry, (stacked, layer_L), unroll=len(layer_L) if cfg.unroll else 1)


def with_memory(context: Context, memory_BSD, source_segment_BS, T: int) -> Context:
  """The context of T queries per row that also see an encoder's output."""
  token_BT = jnp.zeros((memory_BSD.shape[0], T), jnp.int32)
  return dataclasses.replace(context, memory_BSD=memory_BSD,
                             memory_view=memory_view(token_BT, None, source_segment_BS))


def memory_view(token_BT, segment_BT, source_segment_BS) -> View:
  """Cross-attention's view: every source token of the row's segment; padding (segment 0) is never seen."""
  if source_segment_BS is None:
    return View('bidirectional')
  segment_BT = jnp.ones_like(token_BT) if segment_BT is None else segment_BT
  return View('bidirectional', segment_BT=segment_BT, key_segment_BS=source_segment_BS)


def out_init(cfg: config_lib.Model) -> float:
  """Initial deviation of an untied output matrix: zero with zero_init, so that training starts at uniform logits."""
  return 0.0 if cfg.zero_init else cfg.init_scale * cfg.width**-0.5


def stacks(cfg: config_lib.Model) -> list[tuple[str, int, int]]:
  """[(name, window, repeats)] of the stacked layers, e.g. 26 layers of 6 windows: blocks0..5 x 4, tail0..1 x 1."""
  windows = cfg.windows if len(set(cfg.windows)) > 1 else cfg.windows[:1]
  repeats, rest = divmod(cfg.layers, len(windows))
  out = [(f'blocks{i}', w, repeats) for i, w in enumerate(windows) if repeats]
  return out + [(f'tail{i}', windows[i], 1) for i in range(rest)]


@functools.lru_cache
def definition(cfg: config_lib.Model):
  """The graph definition of this model: everything but its arrays."""
  return nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0))))[0]


def init(cfg: config_lib.Model, key) -> dict:
  """Parameters as a plain nested dict of float32 arrays. Jit it with out_shardings to create them in place."""
  return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(key))))


def bind(cfg: config_lib.Model, params: dict) -> Transformer:
  """The model with these parameters: matrices in the compute dtype (cast once, before any gather), vectors as they
  are, also those over several axes, such as the scale_NH of a norm over all heads, and the router (arXiv 2101.03961,
  2.4)."""
  dtype = jnp.dtype(compute_dtype(cfg.dtype))
  def cast(path, w):
    dims = dims_of(path).removeprefix('L')
    return w.astype(dtype) if len(dims) > 1 and 'D' in dims and dims != 'DE' else w
  return nnx.merge(definition(cfg), jax.tree_util.tree_map_with_path(cast, params))


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg: config_lib.Model, params: dict, token_BT):
  """float32 [B, T, V] of whole sequences, compiled once per shape. By a scan: an unrolled one takes four times as long
  to compile, and copies every layer's weights."""
  return bind(dataclasses.replace(cfg, unroll=False), params)(token_BT)


def count(params) -> int:
  """Number of parameters."""
  return sum(x.size for x in jax.tree.leaves(params))
