"""What a GGUF header says, as the config.json of the same model, and back; and where its tensors hold our parameters.

llama.cpp keeps some facts of an architecture in its code, not in the file (Gemma's windows, experts' normalisation);
they are spelled out here. Source: llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""
from collections.abc import Iterator

import numpy as np

from llm_jax.config import ConfigError, Model, nearest
from llm_jax.interop import families, layout
from llm_jax.interop.gguf import File
from llm_jax.models import layers

EPS = dict(gpt2='layer_norm_epsilon', falcon='layer_norm_epsilon', gpt_neox='layer_norm_eps', stablelm='layer_norm_eps',
           starcoder2='norm_epsilon')                  # the others: rms_norm_eps
FILE_TYPES = dict(F32=0, F16=1, Q4_0=2, Q8_0=7, BF16=32)
# Fields that change nothing here, and those that change nothing while they have this value.
HARMLESS = {'vocab_size', 'context_length', 'tensor_data_layout', 'rope.scaling.finetuned', 'rope.dimension_count',
            'rope.scaling.original_context_length', 'attention.layer_norm_epsilon', 'attention.layer_norm_rms_epsilon'}
OFF = {'attention.causal': True, 'attention.clamp_kqv': 0.0, 'attention.max_alibi_bias': 0.0, 'logit_scale': 1.0,
       'embedding_scale': 1.0, 'residual_scale': 1.0, 'expert_weights_scale': 1.0, 'expert_shared_count': 0,
       'leading_dense_block_count': 0, 'attn_logit_softcapping': 0.0, 'final_logit_softcapping': 0.0,
       'attention.sliding_window': 0, 'expert_count': 0, 'expert_used_count': 0}


class Header:
  """The fields of one architecture."""

  def __init__(self, file: File):
    self.fields, self.where = file.fields, str(file.path)
    self.arch = file.fields.get('general.architecture')
    self.read = set()

  def finish(self) -> None:
    """Raises ConfigError for a field that was not read and may change what is computed."""
    for name, value in self.fields.items():
      key = name.removeprefix(f'{self.arch}.')
      if key != name and key not in self.read and key not in HARMLESS and OFF.get(key) != value:
        raise ConfigError(f'{self.where}: {families.short(name)}={families.short(value)} is not understood and may '
                          'change what is computed; take another file of this model')

  def __call__(self, key: str, *default, kind=(int, float)):
    self.read.add(key)
    value = self.fields.get(f'{self.arch}.{key}', *default or (None,))
    if value is None and not default:
      raise ConfigError(f'{self.where}: no field {self.arch}.{key}; convert the model again with a current llama.cpp')
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
      raise ConfigError(f'{self.where}: {self.arch}.{key}: expected one number for all layers, got {str(value)[:60]}')
    return float(str(np.float32(value))) if isinstance(value, float) else value      # 1e-06, not 9.99999997e-07


def config_of(file: File) -> dict:
  """The config.json of the model in a GGUF file, for families.model_of. Raises ConfigError for other architectures."""
  get = Header(file)
  out = _config_of(file, get)
  get.finish()
  return out


def _config_of(file: File, get: Header) -> dict:
  tensors, name = file.tensors, _family(get, file.tensors)
  if (embed := tensors.get('token_embd.weight')) is None or len(embed.shape) != 2:
    raise ConfigError(f'{get.where}: expected a matrix token_embd.weight, found none')
  heads, width = get('attention.head_count', kind=int), get('embedding_length', kind=int)
  if not heads or not width:
    raise ConfigError(f'{get.where}: expected heads and a width above 0, got {heads} and {width}')
  head_dim = get('attention.key_length', width // heads, kind=int)
  if get('attention.value_length', head_dim) != head_dim:
    raise ConfigError(f'{get.where}: keys and values of different lengths cannot be run')
  eps = get('attention.layer_norm_epsilon' if name in EPS else 'attention.layer_norm_rms_epsilon')
  tied, depth = 'output.weight' not in tensors, get('block_count', kind=int)
  out = dict(model_type=name, vocab_size=embed.shape[0], hidden_size=width, num_hidden_layers=depth,
             num_attention_heads=heads, num_key_value_heads=get('attention.head_count_kv', heads, kind=int),
             max_position_embeddings=get('context_length', kind=int), tie_word_embeddings=tied)
  out[EPS.get(name, 'rms_norm_eps')] = eps
  expert_dim = get('expert_feed_forward_length', None, kind=int)
  out['intermediate_size'] = get('feed_forward_length', expert_dim, kind=int) or expert_dim
  biased = 'blk.0.attn_q.bias' in tensors
  if name == 'gpt2':
    return dict(model_type='gpt2', vocab_size=embed.shape[0], n_embd=width, n_layer=depth, n_head=heads,
                n_positions=out['max_position_embeddings'], n_inner=out['intermediate_size'], layer_norm_epsilon=eps,
                activation_function='gelu_new', tie_word_embeddings=tied)
  out['rope_parameters'] = _rope(get, file, head_dim)
  if name not in ('gpt_neox', 'stablelm', 'starcoder2', 'falcon') or head_dim != width // heads:
    out['head_dim'] = head_dim
  if name in ('llama', 'gemma', 'qwen3', 'olmo2', 'olmoe'):
    out['attention_bias'] = biased
  window = get('attention.sliding_window', 0, kind=int) or None
  if name in ('mistral', 'mixtral', 'phi3', 'starcoder2', 'gemma2'):
    out['sliding_window'] = window
  if name in ('mixtral', 'qwen3_moe', 'olmoe'):
    out |= {'num_local_experts' if name == 'mixtral' else 'num_experts': get('expert_count', kind=int),
            'num_experts_per_tok': get('expert_used_count', kind=int)}
    if name != 'mixtral':
      out |= dict(norm_topk_prob=name == 'qwen3_moe')            # llama.cpp's, whatever the model was trained with
    if name == 'qwen3_moe':
      out |= dict(moe_intermediate_size=get('expert_feed_forward_length', kind=int))
    else:
      out['intermediate_size'] = expert_dim or out['intermediate_size']
  if name in ('gemma2', 'gemma3_text'):
    by_width = depth == dict(gemma2=46, gemma3_text=62)[name]          # the 27B of each
    out |= dict(query_pre_attn_scalar=width // heads if by_width else head_dim,
                attn_logit_softcapping=get('attn_logit_softcapping', 50.0 if name == 'gemma2' else None) or None,
                final_logit_softcapping=get('final_logit_softcapping', 30.0 if name == 'gemma2' else None))
  if name == 'gemma3_text':
    local = dict(rope_type='default', rope_theta=float(get('rope.freq_base_swa', 10_000.0)))
    out |= dict(sliding_window=window, rope_parameters=dict(full_attention=out['rope_parameters'],
                                                            sliding_attention=local))
  if name in ('gpt_neox', 'stablelm'):
    out['use_parallel_residual'] = get('use_parallel_residual', True, kind=bool)
  if name == 'gpt_neox':
    del out['num_key_value_heads']
  if name == 'stablelm':
    out['use_qkv_bias'] = biased
  if name == 'starcoder2':
    out |= dict(use_bias=biased, hidden_act='gelu_pytorch_tanh')
  if name == 'falcon':
    new = 'blk.0.attn_norm_2.weight' in tensors
    out |= dict(new_decoder_architecture=new, multi_query=not new, num_kv_heads=out.pop('num_key_value_heads'),
                ffn_hidden_size=out.pop('intermediate_size'), parallel_attn=True, bias='blk.0.attn_qkv.bias' in tensors)
  return out


def _family(get: Header, tensors) -> str:
  known = {f.gguf: name for name, f in reversed(families.FAMILIES.items())}
  if get.arch not in known:
    raise ConfigError(f'{get.where}: architecture {get.arch!r} cannot be run{nearest(str(get.arch), known)}')
  if get.arch == 'llama' and get('expert_count', 0, kind=int):
    return 'mixtral'
  if get.arch == 'llama' and get('attention.sliding_window', 0, kind=int):
    return 'mistral'
  return known[get.arch]


def _rope(get: Header, file: File, head_dim: int) -> dict:
  out = dict(rope_theta=float(get('rope.freq_base', 10_000.0)), rope_type='default')
  rotated = get('rope.dimension_count', head_dim, kind=int)
  out['partial_rotary_factor'] = rotated / head_dim
  kind = get('rope.scaling.type', 'linear', kind=str)           # llama.cpp's default, without effect for a factor of 1
  factor = get('rope.scaling.factor', get('rope.scale_linear', 0.0)) or 0.0
  if kind not in ('none', 'linear', 'yarn'):
    raise ConfigError(f'{get.where}: rotary scaling {kind!r} cannot be run; known: none, linear, yarn')
  if kind == 'yarn' or kind == 'linear' and factor not in (0.0, 1.0):
    out |= dict(rope_type=kind, factor=float(factor))
  if kind == 'yarn':
    out |= dict(original_max_position_embeddings=get('rope.scaling.original_context_length', kind=int))
    out |= {ours: float(get(f'rope.scaling.{theirs}')) for ours, theirs in dict(
        beta_fast='yarn_beta_fast', beta_slow='yarn_beta_slow', attention_factor='attn_factor').items()
            if f'{get.arch}.rope.scaling.{theirs}' in get.fields}
  if 'rope_freqs.weight' in file.tensors:
    out |= _llama3(get, file, out['rope_theta'], rotated)
  return out


def _llama3(get, file, base, rotated) -> dict:
  """Llama 3.1's scaling is in the file as what each pair's frequency is divided by: the constants of the published
  models must give exactly that."""
  found = np.asarray(file.array('rope_freqs.weight'), np.float64)
  published = Model(head_dim=rotated, rope_base=base, rope_scaling='llama3', rope_factor=float(found.max()),
                    rope_low_freq=1.0, rope_high_freq=4.0, rope_original_length=8192)
  if found.shape != (rotated // 2,) or not np.allclose(found, rope_freqs(published), rtol=1e-4):
    raise ConfigError(f'{get.where}: rope_freqs.weight is not the scaling of Llama 3.1 or 3.2, and cannot be run')
  return families.write_rope(published)['rope_scaling']


def links(family: str, m: Model, shared_norm: bool = False) -> Iterator[layout.Link]:
  """Every tensor of a GGUF file of this family; shared_norm as in layout.hf_links."""
  both = lambda theirs, ours: {f'{theirs}.weight': f'{ours}/scale_D', f'{theirs}.bias': f'{ours}/bias_D'}
  once = {'token_embd.weight': 'embed_VD', 'position_embd.weight': 'position_embed_SD', 'output.weight': 'unembed_DV'}
  norms = {'before': dict(attn_norm='norm_attention', ffn_norm='norm_mlp'),
           'after': dict(post_attention_norm='norm_attention_out', post_ffw_norm='norm_mlp_out')}
  norms['both'] = norms['before'] | norms['after']
  names, shared_norm = norms[m.norm_position], shared_norm or family == 'stablelm' and m.parallel_residual
  if shared_norm:
    names = dict(attn_norm='norm_attention')
  elif family == 'falcon':
    names = dict(attn_norm_2='norm_attention', attn_norm='norm_mlp')
  each = {theirs: ours for pair in names.items() for theirs, ours in both(*pair).items()}
  if shared_norm:
    each = {theirs: f'{ours}+{ours.replace("attention", "mlp")}' for theirs, ours in each.items()}
  if family in ('gpt2', 'gpt_neox', 'falcon', 'phi3'):
    each |= {'attn_qkv.weight': layout.QKV_W, 'attn_qkv.bias': layout.QKV_B}
  else:
    each |= {'attn_q.weight': 'attention/w_q_DNH', 'attn_k.weight': 'attention/w_k_DKH',
             'attn_v.weight': 'attention/w_v_DKH', 'attn_q.bias': 'attention/b_q_NH', 'attn_k.bias': 'attention/b_k_KH',
             'attn_v.bias': 'attention/b_v_KH'}
  each |= {'attn_output.weight': 'attention/w_o_NHD', 'attn_output.bias': 'attention/b_o_D'}
  if m.qk_norm != 'none':
    q, k = dict(head=('H', 'H'), full=('NH', 'KH'))[m.qk_norm]
    each |= {'attn_q_norm.weight': f'attention/norm_q/scale_{q}', 'attn_k_norm.weight': f'attention/norm_k/scale_{k}'}
  if m.experts:
    each |= {'ffn_gate_inp.weight': 'mlp/w_router_DE', 'ffn_gate_exps.weight': 'mlp/w_gate_EDF',
             'ffn_up_exps.weight': 'mlp/w_up_EDF', 'ffn_down_exps.weight': 'mlp/w_down_EFD'}
  elif family == 'phi3':
    each |= {'ffn_up.weight': 'mlp/w_gate_DF+mlp/w_up_DF', 'ffn_down.weight': 'mlp/w_down_FD'}
  else:
    each |= {'ffn_gate.weight': 'mlp/w_gate_DF', 'ffn_up.weight': 'mlp/w_up_DF', 'ffn_down.weight': 'mlp/w_down_FD',
             'ffn_up.bias': 'mlp/b_up_F', 'ffn_down.bias': 'mlp/b_down_D'}
  style = layout.Style(interleaved=families.FAMILIES[family].gguf == 'llama', shift=float(m.norm_unit_offset))
  return layout.links(m, style, once | both('output_norm', 'norm_final'), 'blk.{i}.', each)


def fields_of(family: families.Family, m: Model) -> dict:
  """The header's fields of a model, without those of its tokenizer."""
  eps = 'layer_norm_epsilon' if family.name in EPS else 'layer_norm_rms_epsilon'
  rotated = int(m.head_dim * m.rope_fraction)
  out = {'context_length': m.max_length, 'embedding_length': m.width, 'block_count': m.layers,
         'feed_forward_length': m.expert_dim if family.name in ('mixtral', 'olmoe') else m.mlp_dim,
         'attention.head_count': m.heads, 'attention.head_count_kv': m.kv_heads, f'attention.{eps}': m.norm_eps,
         'vocab_size': m.vocab_size}
  if m.positions == 'rotary':
    out |= {'rope.freq_base': m.rope_base, 'rope.dimension_count': rotated, 'attention.key_length': m.head_dim,
            'attention.value_length': m.head_dim}
  if m.rope_scaling in ('linear', 'yarn'):
    out |= {'rope.scaling.type': m.rope_scaling, 'rope.scaling.factor': m.rope_factor}
  if m.rope_scaling == 'yarn':
    out |= {'rope.scaling.original_context_length': m.rope_original_length,
            'rope.scaling.yarn_beta_fast': m.rope_beta_fast, 'rope.scaling.yarn_beta_slow': m.rope_beta_slow}
    out |= {'rope.scaling.attn_factor': m.rope_attention_factor} if m.rope_attention_factor else {}
  if any(m.windows):
    out |= {'attention.sliding_window': max(m.windows)}
  if m.experts:
    out |= {'expert_count': m.experts, 'expert_used_count': m.experts_per_token}
  if family.name == 'qwen3_moe':
    out |= {'expert_feed_forward_length': m.expert_dim}
  if m.attention_softcap or m.logit_softcap:
    out |= {'attn_logit_softcapping': m.attention_softcap, 'final_logit_softcapping': m.logit_softcap}
  if family.name in ('gpt_neox', 'stablelm'):
    out |= {'use_parallel_residual': m.parallel_residual}
  return {'general.architecture': family.gguf} | {f'{family.gguf}.{key}': value for key, value in out.items()}


def rope_freqs(m: Model) -> np.ndarray | None:
  """What Llama 3.1's scaling divides each pair's frequency by, which is how these files say it; None for others."""
  if m.rope_scaling != 'llama3':
    return None
  plain, scaled = (layers.rope_frequencies(m, m.rope_base, scaled)[0] for scaled in (False, True))
  return (plain / scaled).astype(np.float32)


def kind_of(link: layout.Link, kind: str) -> str:
  """How a tensor is stored in a file of this kind: vectors, routers and positions in full, the vocabulary's matrices
  in Q8_0 at least, and rows that no block divides in half precision."""
  leaf = link.parts[0].leaf.rsplit('/', 1)[-1]
  if kind == 'F32' or len(link.shape) == 1 or leaf in ('w_router_DE', 'position_embed_SD'):
    return 'F32'
  if kind.startswith('Q') and link.shape[-1] % 32:
    return 'F16'
  return 'Q8_0' if kind == 'Q4_0' and 'embed' in leaf else kind
