"""Where each of our parameters lies in a checkpoint of Hugging Face, tensor by tensor, in both directions.

Theirs are [out, in] matrices, one per layer (and expert); ours are [in, out] with the axes of the legend, stacked over
layers. A Link says which of ours one tensor of theirs holds. Three ways to fuse exist: queries, keys and values below
each other; the same per kv head (GPT-NeoX, Falcon); gate and up below each other (Phi-3).
"""
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax.config import ConfigError, Model
from llm_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Part:
  """One of our leaves ('blocks0/attention/w_q_DNH'), the place in it (layer of the stack, expert), its shape there."""
  leaf: str
  place: tuple[int, ...]
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Link:
  """A tensor of theirs. split: it -> arrays of the parts' shapes; join: the inverse."""
  name: str
  shape: tuple[int, ...]
  parts: tuple[Part, ...]
  split: Callable[[np.ndarray], list[np.ndarray]]
  join: Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Style:
  """How a format stores what the rest store plainly."""
  grouped: bool = False         # fused queries, keys and values lie per kv head
  transposed: bool = False      # matrices are [in, out] (GPT-2's Conv1D)
  interleaved: bool = False     # rotary pairs of queries and keys lie side by side (GGUF's llama)
  shift: float = 0.0            # what is added to the scales of norms (GGUF's gemma)


# Tensors of a layer, under the layer's prefix: theirs -> ours. A '+' joins what a tensor of theirs holds; {e}: expert.
SEPARATE = {'self_attn.q_proj.weight': 'attention/w_q_DNH', 'self_attn.k_proj.weight': 'attention/w_k_DKH',
            'self_attn.v_proj.weight': 'attention/w_v_DKH', 'self_attn.o_proj.weight': 'attention/w_o_NHD'}
BIASES = {'self_attn.q_proj.bias': 'attention/b_q_NH', 'self_attn.k_proj.bias': 'attention/b_k_KH',
          'self_attn.v_proj.bias': 'attention/b_v_KH', 'self_attn.o_proj.bias': 'attention/b_o_D'}
MLP = {'mlp.gate_proj.weight': 'mlp/w_gate_DF', 'mlp.up_proj.weight': 'mlp/w_up_DF',
       'mlp.down_proj.weight': 'mlp/w_down_FD'}
EXPERTS = {'mlp.gate.weight': 'mlp/w_router_DE', 'mlp.experts.{e}.gate_proj.weight': 'mlp/w_gate_EDF',
           'mlp.experts.{e}.up_proj.weight': 'mlp/w_up_EDF', 'mlp.experts.{e}.down_proj.weight': 'mlp/w_down_EFD'}
MIXTRAL = {'block_sparse_moe.gate.weight': 'mlp/w_router_DE',
           'block_sparse_moe.experts.{e}.w1.weight': 'mlp/w_gate_EDF',
           'block_sparse_moe.experts.{e}.w3.weight': 'mlp/w_up_EDF',
           'block_sparse_moe.experts.{e}.w2.weight': 'mlp/w_down_EFD'}
NORMS = {'input_layernorm': 'norm_attention', 'post_attention_layernorm': 'norm_mlp'}
QK_NORMS = {'self_attn.q_norm.weight': 'attention/norm_q/scale_{q}',
            'self_attn.k_norm.weight': 'attention/norm_k/scale_{k}'}
QKV = 'attention/{}_q_{}NH+attention/{}_k_{}KH+attention/{}_v_{}KH'
QKV_W, QKV_B = QKV.format('w', 'D', 'w', 'D', 'w', 'D'), QKV.format('b', '', 'b', '', 'b', '')


def names(family: str, m: Model) -> tuple[str, dict[str, str], str, dict[str, str]]:
  """(prefix of the rest, {theirs: ours} of what is there once, prefix of layer {i}, {theirs: ours} of a layer)."""
  both = lambda norms: {f'{theirs}.{part}': f'{ours}/{kind}_D' for theirs, ours in norms.items()
                        for part, kind in dict(weight='scale', bias='bias').items()}
  if family == 'gpt2':
    once = {'wte.weight': 'embed_VD', 'wpe.weight': 'position_embed_SD'} | both({'ln_f': 'norm_final'})
    return 'transformer.', once, 'transformer.h.{i}.', both({'ln_1': 'norm_attention', 'ln_2': 'norm_mlp'}) | {
        'attn.c_attn.weight': QKV_W, 'attn.c_attn.bias': QKV_B, 'attn.c_proj.weight': 'attention/w_o_NHD',
        'attn.c_proj.bias': 'attention/b_o_D', 'mlp.c_fc.weight': 'mlp/w_up_DF', 'mlp.c_fc.bias': 'mlp/b_up_F',
        'mlp.c_proj.weight': 'mlp/w_down_FD', 'mlp.c_proj.bias': 'mlp/b_down_D'}
  dense = {'mlp.dense_h_to_4h.weight': 'mlp/w_up_DF', 'mlp.dense_h_to_4h.bias': 'mlp/b_up_F',
           'mlp.dense_4h_to_h.weight': 'mlp/w_down_FD', 'mlp.dense_4h_to_h.bias': 'mlp/b_down_D'}
  fused = lambda name: {f'{name}.query_key_value.weight': QKV_W, f'{name}.query_key_value.bias': QKV_B,
                        f'{name}.dense.weight': 'attention/w_o_NHD', f'{name}.dense.bias': 'attention/b_o_D'}
  if family == 'gpt_neox':
    return 'gpt_neox.', {'embed_in.weight': 'embed_VD'} | both({'final_layer_norm': 'norm_final'}), (
        'gpt_neox.layers.{i}.'), both(NORMS) | fused('attention') | dense
  if family == 'falcon':
    return 'transformer.', {'word_embeddings.weight': 'embed_VD'} | both({'ln_f': 'norm_final'}), (
        'transformer.h.{i}.'), both({'ln_attn': 'norm_attention', 'ln_mlp': 'norm_mlp'}) | (
            fused('self_attention') | dense)
  norms, attention, mlp = dict(NORMS), SEPARATE | BIASES, MLP
  if m.norm_position == 'after':
    norms = {'post_attention_layernorm': 'norm_attention_out', 'post_feedforward_layernorm': 'norm_mlp_out'}
  if m.norm_position == 'both':
    norms = {'input_layernorm': 'norm_attention', 'post_attention_layernorm': 'norm_attention_out',
             'pre_feedforward_layernorm': 'norm_mlp', 'post_feedforward_layernorm': 'norm_mlp_out'}
  if family == 'phi3':
    attention = {'self_attn.qkv_proj.weight': QKV_W, 'self_attn.o_proj.weight': 'attention/w_o_NHD'}
    mlp = {'mlp.gate_up_proj.weight': 'mlp/w_gate_DF+mlp/w_up_DF', 'mlp.down_proj.weight': 'mlp/w_down_FD'}
  if family == 'starcoder2':
    mlp = {'mlp.c_fc.weight': 'mlp/w_up_DF', 'mlp.c_fc.bias': 'mlp/b_up_F', 'mlp.c_proj.weight': 'mlp/w_down_FD',
           'mlp.c_proj.bias': 'mlp/b_down_D'}
  if family == 'mixtral':
    mlp = MIXTRAL
  elif m.experts:
    mlp = EXPERTS
  if m.qk_norm != 'none':
    q, k = dict(head=('H', 'H'), full=('NH', 'KH'))[m.qk_norm]
    attention = attention | {theirs: ours.format(q=q, k=k) for theirs, ours in QK_NORMS.items()}
  return 'model.', {'embed_tokens.weight': 'embed_VD'} | both({'norm': 'norm_final'}), 'model.layers.{i}.', (
      both(norms) | attention | mlp)


def hf_links(family: str, m: Model, shared_norm: bool = False) -> Iterator[Link]:
  """Every tensor of a model of this family in Hugging Face's files. shared_norm: Falcon's older decoder (and always
  StableLM's parallel layers), where one norm feeds attention and mlp, so that both of ours are the same."""
  prefix, once, layer_prefix, each = names(family, m)
  if shared_norm or family == 'stablelm' and m.parallel_residual:
    each = {theirs: ours for theirs, ours in each.items() if not theirs.startswith(('ln_', 'post_attention_layernorm'))}
    each |= {f'input_layernorm.{part}': f'norm_attention/{kind}_D+norm_mlp/{kind}_D'
             for part, kind in dict(weight='scale', bias='bias').items()}
  once = {prefix + theirs: ours for theirs, ours in once.items()}
  once |= {'embed_out.weight' if family == 'gpt_neox' else 'lm_head.weight': 'unembed_DV'}
  style = Style(grouped=family in ('gpt_neox', 'falcon'), transposed=family == 'gpt2')
  return links(m, style, once, layer_prefix, each)


def links(m: Model, style: Style, once: dict[str, str], layer_prefix: str, each: dict[str, str]) -> Iterator[Link]:
  """The tensors of these tables that this model has: {theirs: ours} of what is there once, and of every layer."""
  shapes = leaf_shapes(m)
  for theirs, ours in once.items():
    if ours in shapes:
      yield _link(m, style, theirs, [ours], (), shapes)
  for i, (stack, place) in enumerate(places(m)):
    for theirs, ours in each.items():
      leaves = [f'{stack}/{leaf}' for leaf in ours.split('+')]
      if leaves[0] not in shapes:                        # a bias that this model does not have
        continue
      for e in range(m.experts) if '{e}' in theirs else (None,):
        name = layer_prefix.format(i=i) + theirs.replace('{e}', str(e))
        yield _link(m, style, name, leaves, (place,) if e is None else (place, e), shapes)


def places(m: Model) -> list[tuple[str, int]]:
  """(stack, index in it) of each layer, in order of depth."""
  stacks = transformer.stacks(m)
  body, tail = [s for s in stacks if s[0].startswith('blocks')], [s for s in stacks if s[0].startswith('tail')]
  return [(name, r) for r in range(body[0][2] if body else 0) for name, _, _ in body] + [(name, 0) for name, *_ in tail]


@functools.lru_cache
def leaf_shapes(m: Model) -> dict[str, tuple[int, ...]]:
  """{'blocks0/attention/w_q_DNH': [L, D, N, H]} of all of this model's parameters."""
  tree = jax.eval_shape(lambda: transformer.init(m, jax.random.key(0)))
  return {name: x.shape for name, x in checkpoint.flat(tree).items()}


def _link(m: Model, style: Style, name: str, leaves: list[str], place: tuple[int, ...], shapes) -> Link:
  parts = tuple(Part(leaf, place, shapes[leaf][len(place):]) for leaf in leaves)
  kind = leaves[0].rsplit('/', 1)[-1]
  table, matrix = kind in ('embed_VD', 'position_embed_SD'), kind.startswith(('w_', 'unembed'))
  stacked = kind.endswith(('EDF', 'EFD')) and len(parts[0].shape) == 3                  # all experts in one tensor
  inner = math.prod(parts[0].shape[:-1] if kind.startswith('w_o') else parts[0].shape[:1]) if matrix else 1
  rows = [math.prod(p.shape) // inner for p in parts]
  twins = len(parts) == 2 and kind.startswith(('scale', 'bias'))
  grouped, transposed = style.grouped and len(parts) == 3, style.transposed and matrix and kind != 'unembed_DV'
  shift = style.shift if kind.startswith('scale') else 0.0
  paired = [style.interleaved and p.leaf.rsplit('/', 1)[-1].startswith(('w_q', 'w_k', 'b_q', 'b_k')) for p in parts]
  G, K, H = m.heads // m.kv_heads, m.kv_heads, m.head_dim

  def split(a):
    a = a.T if transposed else a - np.asarray(shift, a.dtype) if shift else a
    if twins:
      return [a, a]
    if stacked:
      return [a.swapaxes(1, 2)]
    if grouped:
      a = a.reshape(K, G + 2, H, *a.shape[1:])
      pieces = [x.reshape(-1, *a.shape[3:]) for x in (a[:, :G], a[:, G], a[:, G + 1])]
    else:
      pieces = np.split(a, np.cumsum(rows)[:-1]) if len(parts) > 1 else [a]
    pieces = [_apart(x, H) if p else x for x, p in zip(pieces, paired)]
    return [(x.T if matrix else x).reshape(p.shape) for x, p in zip(pieces, parts)]

  def join(arrays):
    if twins and not np.array_equal(*arrays):
      raise ConfigError(f'{name}: this format stores one norm where the model has two, and they differ')
    if twins:
      return arrays[0]
    if stacked:
      return arrays[0].swapaxes(1, 2)
    pieces = [x.reshape(inner, -1).T if matrix else x if table else x.reshape(-1) for x in arrays]
    pieces = [_side_by_side(x, H) if p else x for x, p in zip(pieces, paired)]
    if grouped:
      heads = np.concatenate([x.reshape(K, -1, H, *x.shape[1:]) for x in pieces], 1)
      pieces = [heads.reshape(-1, *heads.shape[3:])]
    joined = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    return joined.T if transposed else joined + np.asarray(shift, joined.dtype) if shift else joined

  shape = parts[0].shape if table else (sum(rows), inner) if matrix else (rows[0] if twins else sum(rows),)
  shape = (parts[0].shape[0], *parts[0].shape[:0:-1]) if stacked else shape
  return Link(name, shape[::-1] if transposed else shape, parts, split, join)


def _apart(rows, H):
  """Rows of heads whose rotary pairs lie side by side (GPT-J's order) to the half-split order, and back."""
  return rows.reshape(-1, H // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _side_by_side(rows, H):
  return rows.reshape(-1, 2, H // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
