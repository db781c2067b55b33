"""What a config.json of Hugging Face says, as config.Model, and back: one Family for each architecture that runs here.

Reading consumes keys: one that is left over, unless it is known not to change what is computed, is an error by name.
Writing needs no trust: the Model read back from what was written must be the Model (`family_for`).
Source: the configuration classes of the transformers library, whose defaults are spelled out here.
"""
import dataclasses
from collections.abc import Callable

from llm_jax import config as config_lib
from llm_jax.config import ConfigError, Model, nearest

# Keys that change nothing in a forward pass: ids, training, names, caches.
HARMLESS = frozenset('''
    architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id unk_token_id initializer_range attention_dropout hidden_dropout attn_pdrop
    embd_pdrop resid_pdrop embedding_dropout residual_dropout classifier_dropout router_aux_loss_coef
    output_router_logits router_jitter_noise summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj task_specific_params _name_or_path auto_map pretraining_tp gradient_checkpointing
    n_ctx is_decoder is_encoder_decoder cache_implementation id2label label2id _attn_implementation
    _sliding_window_pattern is_llama_config output_attentions output_hidden_states return_dict transformers.js_config
    _flash_attn_2_enabled problem_type max_window_layers eos_token_ids chunk_size_feed_forward trainer tokenizer_class
    attention_implementation _commit_hash unsloth_version unsloth_fixed license attention_probs_dropout_prob
    hidden_dropout_prob'''.split())
# Keys that change nothing where they are False, in files of families that do not read them.
OFF = frozenset('''
    attention_bias mlp_bias use_mrope rope_interleaved use_sliding_window add_cross_attention tie_encoder_decoder
    torchscript use_bfloat16 is_composition qk_layernorm alibi use_qkv_bias output_scores return_dict_in_generate
    tf_legacy_loss'''.split())

LAYERS = 10_000           # more than any model has: a hostile number ends here


class Keys:
  """A config.json whose keys are taken one by one."""

  def __init__(self, values: dict, where: str):
    self.left, self.where = dict(values), where

  def __call__(self, name: str, *default):
    """The value of a key, which is then done with; its default, where it is missing or null."""
    value = self.left.pop(name, None)
    if value is None and not default:
      raise ConfigError(f'{self.where}: no key {name!r}; expected what transformers writes for this architecture')
    if value is None or not default or default[0] is None:
      return default[0] if value is None else value
    kinds = (int, float) if isinstance(default[0], float) else type(default[0])
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default[0], bool):
      raise ConfigError(f'{self.where}: {name}: expected {type(default[0]).__name__}, got {short(value)}')
    return value

  def integer(self, name: str, *default, most: int = 2**31 - 1) -> int:
    """From 1 on; 0 only where that is the default."""
    value = self(name, *default)
    if type(value) is not int or not (0 if default == (0,) else 1) <= value <= most:
      raise ConfigError(f'{self.where}: {name}: expected a whole number up to {most}, got {short(value)}')
    return value

  def only(self, name: str, value, *default):
    """Refuses any value but one."""
    if (got := self(name, *(default or (value,)))) != value:
      raise ConfigError(f'{self.where}: {name}={short(got)} cannot be run; only {value!r} is known')

  def finish(self) -> None:
    for name, value in self.left.items():
      if name not in HARMLESS and value not in (None, {}, []) and not (value is False and name in OFF):
        raise ConfigError(f'{self.where}: {short(name)}={short(value)} is not understood and may change what is '
                          'computed; delete the key if it does not')


def short(value) -> str:
  """A value as it may stand in a message of one line."""
  return ascii(value)[:60]


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture. read: config.json -> fields of Model; write: the inverse."""
  name: str                              # model_type
  architecture: str                      # class in transformers
  gguf: str                              # general.architecture
  read: Callable[[Keys], dict]
  write: Callable[[Model], dict]


def model_of(config: dict, where: str) -> tuple[Family, Model]:
  """The family and the (derived) Model of a config.json. Raises ConfigError for what cannot be run exactly."""
  name = config.get('model_type')
  if name in ('gemma3', 'llava', 'mistral3') and isinstance(config.get('text_config'), dict):
    raise ConfigError(f'{where}: {name} reads images too; only text models are known, such as gemma3_text')
  if not isinstance(name, str) or name not in FAMILIES:
    raise ConfigError(f'{where}: architecture {short(name)} cannot be run{nearest(str(name)[:60], FAMILIES)}')
  if config.get('quantization_config'):
    raise ConfigError(f'{where}: its weights are quantised (quantization_config); take the original model, or a GGUF')
  family, keys = FAMILIES[name], Keys(config, where)
  try:
    keys.only('is_causal', True), keys('quantization_config', None)
    fields = family.read(keys)
    keys.finish()
  except ConfigError:
    raise
  except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as e:
    raise ConfigError(f'{where}: holds a value of another kind than transformers writes ({short(str(e))})') from e
  try:
    model = config_lib.derive(Model(**fields))
    config_lib.check(config_lib.Config(model=model, data=config_lib.Data(length=1)))
  except (ConfigError, TypeError, ArithmeticError) as e:
    raise ConfigError(f'{where}: {e}') from e
  return family, model


def family_for(model: Model, prefer: str = '') -> tuple[Family, dict]:
  """The family that computes what `model` does, and its config.json. Raises ConfigError where there is none."""
  model = computed(model)
  names = [prefer] * (prefer in FAMILIES) + [name for name in FAMILIES if name != prefer]
  closest, differs = '', None
  for name in names:
    family = FAMILIES[name]
    written = dict(architectures=[family.architecture], model_type=name) | family.write(model)
    try:
      read = computed(model_of(written, name)[1])
    except ConfigError:
      continue
    different = [f.name for f in dataclasses.fields(Model) if getattr(read, f.name) != getattr(model, f.name)]
    if not different:
      return family, written
    if differs is None or len(different) < len(differs):
      closest, differs = name, different
  raise ConfigError(f'this model has no counterpart among Hugging Face architectures; nearest: {closest}, which '
                    f'differs in model.{", model.".join(differs or ["positions"])}')


def computed(model: Model) -> Model:
  """The model with what does not change a forward pass set aside."""
  plain = Model()
  same = {name: getattr(plain, name) for name in (
      'dtype', 'fp8', 'kernel', 'remat', 'unroll', 'init_scale', 'embedding_init', 'zero_init', 'dropout',
      'expert_capacity', 'expert_exchange', 'expert_buffer')}
  if not model.experts:
    same |= {name: getattr(plain, name) for name in (
        'experts_per_token', 'expert_dim', 'shared_experts', 'router', 'router_normalize', 'router_scale')}
  else:
    same |= dict(mlp_dim=0)                  # no layer has a dense one
  if model.rope_scaling == 'none':
    same |= dict(rope_factor=1.0)
  if model.rope_scaling not in ('yarn', 'llama3'):
    same |= dict(rope_original_length=0)
  scale = model.attention_scale
  windows = period([model.windows[i % len(model.windows)] for i in range(model.layers)])
  same |= dict(attention_scale=0.0 if abs(scale - model.head_dim**-0.5) < 1e-9 else scale, windows=windows)
  return dataclasses.replace(model, **same)


def period(windows: list[int]) -> tuple[int, ...]:
  """The shortest pattern that, repeated and cut off, gives the windows of all layers."""
  n = next(n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
  return tuple(windows[:n])


# Shared parts ---------------------------------------------------------------------------------------------------------

def sizes(k: Keys) -> dict:
  heads = k.integer('num_attention_heads')
  return dict(vocab_size=k.integer('vocab_size'), width=k.integer('hidden_size'),
              layers=k.integer('num_hidden_layers', most=LAYERS), heads=heads,
              kv_heads=k.integer('num_key_value_heads', heads), head_dim=k.integer('head_dim', 0),
              max_length=k.integer('max_position_embeddings'))


def write_sizes(m: Model, head_dim: bool = True) -> dict:
  return dict(vocab_size=m.vocab_size, hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads,
              num_key_value_heads=m.kv_heads, max_position_embeddings=m.max_length, intermediate_size=m.mlp_dim,
              tie_word_embeddings=m.tied_embeddings, **(dict(head_dim=m.head_dim) if head_dim else {}))


def rope(k: Keys, base: float = 10_000.0, fraction: float | None = None, length: int = 0) -> dict:
  """Rotary fields, from rope_parameters (transformers 5) or from rope_theta and rope_scaling (before), which win where
  both are there. fraction: the default of what is rotated; None: this family rotates all."""
  said = {'rope_theta': k('rope_theta', base)} | (k('rope_parameters', None) or {}) | (k('rope_scaling', None) or {})
  part = Keys(said, f'{k.where}: rope_parameters')
  if fraction is None:
    part.only('partial_rotary_factor', 1.0, k('partial_rotary_factor', 1.0))
  fraction = part('partial_rotary_factor', k('partial_rotary_factor', fraction or 1.0))
  out = dict(rope_base=float(part('rope_theta', base)), rope_fraction=float(fraction))
  kind, old = part('rope_type', ''), part('type', 'default')
  kind = kind or old
  if said.get('rope_type') == 'default' and old != 'default':
    kind = old                                             # rope_scaling of old beside rope_parameters
  if kind == 'linear':
    out |= dict(rope_scaling='linear', rope_factor=float(part('factor')))
  elif kind == 'llama3':
    out |= dict(rope_scaling='llama3', rope_factor=float(part('factor')), rope_low_freq=float(part('low_freq_factor')),
                rope_high_freq=float(part('high_freq_factor')),
                rope_original_length=part.integer('original_max_position_embeddings'))
  elif kind == 'yarn':
    part.only('truncate', True)
    out |= dict(rope_scaling='yarn', rope_factor=float(part('factor')), rope_beta_fast=float(part('beta_fast', 32.0)),
                rope_beta_slow=float(part('beta_slow', 1.0)),
                rope_attention_factor=float(part('attention_factor', 0.0)),
                rope_original_length=part.integer('original_max_position_embeddings', length))
  elif kind != 'default':
    raise ConfigError(f'{k.where}: rotary scaling {short(kind)} cannot be run; known: default, linear, llama3, yarn')
  part('original_max_position_embeddings', None)            # without effect on the others
  part.finish()
  return out


def write_rope(m: Model) -> dict:
  scaled = dict(rope_type='default' if m.rope_scaling == 'none' else m.rope_scaling)
  if m.rope_scaling != 'none':
    scaled |= dict(factor=m.rope_factor)
  if m.rope_scaling in ('llama3', 'yarn'):
    scaled |= dict(original_max_position_embeddings=m.rope_original_length)
  if m.rope_scaling == 'llama3':
    scaled |= dict(low_freq_factor=m.rope_low_freq, high_freq_factor=m.rope_high_freq)
  if m.rope_scaling == 'yarn':
    scaled |= dict(beta_fast=m.rope_beta_fast, beta_slow=m.rope_beta_slow)
    scaled |= dict(attention_factor=m.rope_attention_factor) if m.rope_attention_factor else {}
  # Both spellings: releases before 5 read rope_theta and rope_scaling.
  old = {} if m.rope_scaling == 'none' else dict(rope_scaling=scaled)
  partial = {} if m.rope_fraction == 1 else dict(partial_rotary_factor=m.rope_fraction)
  now = dict(rope_theta=m.rope_base, **scaled, **partial)
  return dict(rope_theta=m.rope_base, rope_parameters=now, **old, **partial)


def windows(k: Keys, layers: int, otherwise: Callable[[int], bool] = lambda layer: True) -> tuple[int, ...]:
  """Each layer's window: of those that layer_types calls sliding_attention or, without it, `otherwise` picks."""
  window, types = k('sliding_window', None), k('layer_types', None)
  sliding = [window is not None and otherwise(i) for i in range(layers)] if types is None else [
      t == 'sliding_attention' for t in types]
  if types is not None and (len(types) != layers or set(types) - {'sliding_attention', 'full_attention'}):
    raise ConfigError(f'{k.where}: layer_types: expected full_attention or sliding_attention for each of {layers} '
                      f'layers, got {short(types)}')
  if any(sliding) and (type(window) is not int or window < 1):
    raise ConfigError(f'{k.where}: sliding_window: expected a positive number, got {short(window)}')
  return period([window if s else 0 for s in sliding])


def write_windows(m: Model) -> dict:
  each = [m.windows[i % len(m.windows)] for i in range(m.layers)]
  return dict(sliding_window=max(each) or None,
              layer_types=['sliding_attention' if w else 'full_attention' for w in each])


ACTIVATIONS = {'gelu': 'gelu_exact', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu',
               'relu': 'relu', 'relu2': 'relu2'}
WRITTEN = {'gelu_exact': 'gelu', 'gelu': 'gelu_pytorch_tanh', 'relu': 'relu', 'relu2': 'relu2'}


def activation(k: Keys, key: str, default: str) -> str:
  if (name := k(key, default)) not in ACTIVATIONS:
    raise ConfigError(f'{k.where}: {key}={short(name)} cannot be run; known: {", ".join(ACTIVATIONS)}')
  return ACTIVATIONS[name]


# The families ---------------------------------------------------------------------------------------------------------

def gpt2(k: Keys) -> dict:
  for name in ('scale_attn_by_inverse_layer_idx', 'reorder_and_upcast_attn', 'add_cross_attention'):
    k.only(name, False)
  k.only('scale_attn_weights', True)
  width = k.integer('n_embd')
  return dict(vocab_size=k.integer('vocab_size'), width=width, layers=k.integer('n_layer', most=LAYERS),
              heads=k.integer('n_head'), max_length=k.integer('n_positions'), mlp_dim=k.integer('n_inner', 0),
              norm='layer', norm_bias=True, norm_eps=k('layer_norm_epsilon', 1e-5), positions='learned',
              attention_bias=True, attention_out_bias=True, mlp_bias=True,
              mlp=activation(k, 'activation_function', 'gelu_new'), tied_embeddings=k('tie_word_embeddings', True))


def write_gpt2(m: Model) -> dict:
  return dict(vocab_size=m.vocab_size, n_embd=m.width, n_layer=m.layers, n_head=m.heads, n_positions=m.max_length,
              n_inner=m.mlp_dim, layer_norm_epsilon=m.norm_eps, tie_word_embeddings=m.tied_embeddings,
              activation_function='gelu_new' if m.mlp == 'gelu' else WRITTEN.get(m.mlp, 'silu'))


def gated(k: Keys, eps: float = 1e-6, fraction: float | None = None) -> dict:
  """What Llama and its descendants share."""
  k.only('hidden_act', 'silu')
  out = sizes(k)
  return out | rope(k, fraction=fraction, length=out['max_length']) | dict(
      mlp_dim=k.integer('intermediate_size'), norm_eps=float(k('rms_norm_eps', eps)), mlp='swiglu',
      tied_embeddings=k('tie_word_embeddings', False))


def write_gated(m: Model) -> dict:
  return write_sizes(m) | write_rope(m) | dict(rms_norm_eps=m.norm_eps, hidden_act='silu')


def llama(k: Keys) -> dict:
  k.only('mlp_bias', False)
  bias = k('attention_bias', False)
  return gated(k) | dict(attention_bias=bias, attention_out_bias=bias)


def mistral(k: Keys) -> dict:
  k.left.setdefault('sliding_window', 4096)
  return windowed(k)


def windowed(k: Keys, fraction: float | None = None) -> dict:
  out = gated(k, fraction=fraction)
  return out | dict(windows=windows(k, out['layers']))


def experts(k: Keys, count: str, dim: str, per_token: int, normalize: bool | None) -> dict:
  n = k.integer(count, 0) or k.integer('num_local_experts')
  k.left.pop('num_local_experts', None)
  return dict(experts=n, experts_per_token=k.integer('num_experts_per_tok', per_token), expert_dim=k.integer(dim),
              router_normalize=k('norm_topk_prob', False) if normalize is None else normalize)


def mixtral(k: Keys) -> dict:
  dim = k.integer('intermediate_size')
  k.left |= dict(moe_intermediate_size=dim, intermediate_size=dim)
  return windowed(k) | experts(k, 'num_local_experts', 'moe_intermediate_size', 2, True)


def qwen2(k: Keys) -> dict:
  first = k('max_window_layers', 28) if k('use_sliding_window', False) else 10**9
  out = gated(k)
  return out | dict(attention_bias=True, windows=windows(k, out['layers'], lambda layer: layer >= first))


def write_qwen(m: Model) -> dict:
  return write_gated(m) | write_windows(m) | dict(use_sliding_window=any(m.windows))


def qwen3(k: Keys) -> dict:
  bias, head_dim = k('attention_bias', False), k.integer('head_dim', 128)
  return qwen2(k) | dict(attention_bias=bias, attention_out_bias=bias, head_dim=head_dim, qk_norm='head')


def qwen3_moe(k: Keys) -> dict:
  k.only('decoder_sparse_step', 1), k.only('mlp_only_layers', [])
  k.left.setdefault('head_dim', k.left['hidden_size'] // k.left['num_attention_heads'])
  k.left['max_window_layers'] = 0                          # here all layers have the window, or none
  return qwen3(k) | experts(k, 'num_experts', 'moe_intermediate_size', 8, None)


def write_qwen3_moe(m: Model) -> dict:
  written = write_qwen(m)
  del written['layer_types']
  return written | dict(num_experts=m.experts, num_experts_per_tok=m.experts_per_token,
                        attention_bias=m.attention_bias, moe_intermediate_size=m.expert_dim,
                        norm_topk_prob=m.router_normalize, decoder_sparse_step=1, mlp_only_layers=[],
                        intermediate_size=m.mlp_dim or m.expert_dim)


def gemma(k: Keys, also: tuple[str, ...] = ('gelu',)) -> dict:
  for name in ('hidden_activation', 'hidden_act'):         # Gemma 1 was published with 'gelu', and computes tanh's
    if (act := k(name, 'gelu_pytorch_tanh')) not in ('gelu_pytorch_tanh', *also):
      raise ConfigError(f'{k.where}: {name}={short(act)} cannot be run; only gelu_pytorch_tanh is known')
  bias = k('attention_bias', False)
  k.only('use_bidirectional_attention', False)
  out = sizes(k)
  return out | dict(
      head_dim=out['head_dim'] or 256, mlp_dim=k.integer('intermediate_size'), norm_eps=float(k('rms_norm_eps', 1e-6)),
      norm_unit_offset=True, mlp='geglu', embedding_scale=True, tied_embeddings=k('tie_word_embeddings', True),
      attention_bias=bias, attention_out_bias=bias)


def write_gemma(m: Model) -> dict:
  return write_sizes(m) | write_rope(m) | dict(rms_norm_eps=m.norm_eps, hidden_act='gelu_pytorch_tanh',
                                               hidden_activation='gelu_pytorch_tanh', attention_bias=m.attention_bias)


def gemma2(k: Keys) -> dict:
  k.left = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0) | k.left
  return _gemma2(k, lambda layer: layer % 2 == 0, rope(k))


def _gemma2(k: Keys, sliding, rotary: dict) -> dict:
  out = gemma(k, also=()) | rotary
  k.left.setdefault('sliding_window', 4096)
  return out | dict(
      norm_position='both', attention_scale=float(k('query_pre_attn_scalar', 256))**-0.5,
      attention_softcap=float(k('attn_logit_softcapping', 0.0)), logit_softcap=float(k('final_logit_softcapping', 0.0)),
      windows=windows(k, out['layers'], sliding))


def write_gemma2(m: Model) -> dict:
  scalar = round((m.attention_scale or m.head_dim**-0.5)**-2, 6)
  return write_gemma(m) | write_windows(m) | dict(
      query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar, sliding_window=max(m.windows) or 4096,
      attn_logit_softcapping=m.attention_softcap or None, final_logit_softcapping=m.logit_softcap or None)


def gemma3(k: Keys) -> dict:
  both = k('rope_parameters', None)
  every = k.integer('sliding_window_pattern', 6)
  if both is None:
    rotary, local = rope(k, 1e6), k('rope_local_base_freq', 10_000.0)
  else:
    if not {'full_attention', 'sliding_attention'} <= both.keys():
      raise ConfigError(f'{k.where}: rope_parameters: expected full_attention and sliding_attention, got {[*both]}')
    k.left['rope_parameters'] = both['full_attention']
    rotary, part = rope(k, 1e6), Keys(both['sliding_attention'], f'{k.where}: rope_parameters')
    part.only('rope_type', 'default')
    local = part('rope_theta', 10_000.0)
    part.finish()
    k('rope_local_base_freq', None)
  k.only('attn_logit_softcapping', None, None)             # transformers reads it, and does not apply it
  rotary |= dict(rope_base_local=float(local), qk_norm='head')
  return _gemma2(k, lambda layer: (layer + 1) % every > 0, rotary)


def write_gemma3(m: Model) -> dict:
  full, local = write_rope(m)['rope_parameters'], dict(rope_type='default', rope_theta=m.rope_base_local)
  return write_gemma2(m) | dict(rope_local_base_freq=m.rope_base_local,
                                rope_parameters=dict(full_attention=full, sliding_attention=local))


def phi3(k: Keys) -> dict:
  length = k.integer('original_max_position_embeddings', 4096)
  out = windowed(k, 1.0)
  return out | (dict(rope_original_length=length) if out.get('rope_scaling') == 'yarn' else {})


def olmo2(k: Keys) -> dict:
  k.only('clip_qkv', None, None)
  bias = k('attention_bias', False)
  return gated(k, 1e-5) | dict(qk_norm='full', norm_position='after', attention_bias=bias, attention_out_bias=bias)


def olmoe(k: Keys) -> dict:
  dim = k.integer('intermediate_size')
  k.left |= dict(moe_intermediate_size=dim, intermediate_size=dim)
  return olmo2(k) | experts(k, 'num_experts', 'moe_intermediate_size', 8, None) | dict(norm_position='before')


def stablelm(k: Keys) -> dict:
  k.only('qk_layernorm', False), k.only('hidden_act', 'silu')
  out = sizes(k)
  return out | rope(k, fraction=0.25) | dict(
      mlp_dim=k.integer('intermediate_size'), norm='layer', norm_bias=True, norm_eps=float(k('layer_norm_eps', 1e-5)),
      mlp='swiglu', attention_bias=k('use_qkv_bias', False), parallel_residual=k('use_parallel_residual', False),
      tied_embeddings=k('tie_word_embeddings', False))


def write_stablelm(m: Model) -> dict:
  return write_sizes(m, head_dim=False) | write_rope(m) | dict(
      layer_norm_eps=m.norm_eps, hidden_act='silu', use_qkv_bias=m.attention_bias,
      use_parallel_residual=m.parallel_residual, partial_rotary_factor=m.rope_fraction, qk_layernorm=False)


def gpt_neox(k: Keys) -> dict:
  k.only('attention_bias', True)
  k.left['rope_theta'] = k('rotary_emb_base', k.left.get('rope_theta', 10_000.0))
  out = sizes(k) | rope(k, fraction=k('rotary_pct', 0.25))
  return out | dict(mlp_dim=k.integer('intermediate_size'), norm='layer', norm_bias=True,
                    norm_eps=float(k('layer_norm_eps', 1e-5)), mlp=activation(k, 'hidden_act', 'gelu'), mlp_bias=True,
                    attention_bias=True, attention_out_bias=True,
                    parallel_residual=k('use_parallel_residual', True),
                    tied_embeddings=k('tie_word_embeddings', False))


def write_gpt_neox(m: Model) -> dict:
  written = write_sizes(m, head_dim=False) | write_rope(m)
  del written['num_key_value_heads'], written['rope_theta']
  return written | dict(layer_norm_eps=m.norm_eps, hidden_act=WRITTEN.get(m.mlp, 'silu'),
                        use_parallel_residual=m.parallel_residual, rotary_pct=m.rope_fraction,
                        partial_rotary_factor=m.rope_fraction, rotary_emb_base=m.rope_base, attention_bias=True)


def falcon(k: Keys) -> dict:
  k.only('alibi', False), k.only('apply_residual_connection_post_layernorm', False)
  for old, new in dict(n_layer='num_hidden_layers', n_head='num_attention_heads', n_embed='hidden_size').items():
    k.left.setdefault(new, k.left.pop(old, None))
  k.left.setdefault('max_position_embeddings', 2048)
  grouped, parallel, bias = k('new_decoder_architecture', False), k('parallel_attn', True), k('bias', False)
  norms, shared, kv_heads = k('num_ln_in_parallel_attn', None), k('multi_query', True), k('num_kv_heads', None)
  out = sizes(k) | rope(k)
  if grouped and norms == 1:
    raise ConfigError(f'{k.where}: num_ln_in_parallel_attn=1 with new_decoder_architecture cannot be run')
  out['kv_heads'] = (kv_heads or out['heads']) if grouped else 1 if shared else out['heads']
  return out | dict(mlp_dim=k.integer('ffn_hidden_size', 4 * out['width']), norm='layer', norm_bias=True,
                    norm_eps=float(k('layer_norm_epsilon', 1e-5)), mlp=activation(k, 'activation', 'gelu'),
                    mlp_bias=bias, attention_bias=bias, attention_out_bias=bias, parallel_residual=grouped or parallel,
                    tied_embeddings=k('tie_word_embeddings', True))


def write_falcon(m: Model) -> dict:
  """The new decoder's spelling: two norms, grouped heads."""
  written = write_sizes(m, head_dim=False) | write_rope(m)
  del written['num_key_value_heads'], written['intermediate_size']
  return written | dict(num_kv_heads=m.kv_heads, ffn_hidden_size=m.mlp_dim, new_decoder_architecture=True,
                        num_ln_in_parallel_attn=2, multi_query=True, parallel_attn=True,
                        layer_norm_epsilon=m.norm_eps, activation=WRITTEN.get(m.mlp, 'silu'), bias=m.mlp_bias,
                        alibi=False)


def starcoder2(k: Keys) -> dict:
  k.only('norm_type', 'layer_norm'), k.only('mlp_type', 'default')
  for unread in ('activation_function', 'attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32',
                 'scale_attn_weights', 'layer_norm_epsilon'):       # in published files, and read by no code there
    k(unread, None)
  bias, out = k('use_bias', True), sizes(k)
  return out | rope(k) | dict(
      mlp_dim=k.integer('intermediate_size'), norm='layer', norm_bias=True, norm_eps=float(k('norm_epsilon', 1e-5)),
      mlp=activation(k, 'hidden_act', 'gelu_pytorch_tanh'), mlp_bias=bias, attention_bias=bias, attention_out_bias=bias,
      tied_embeddings=k('tie_word_embeddings', True),
      windows=windows(k, out['layers']))


def write_starcoder2(m: Model) -> dict:
  return write_sizes(m, head_dim=m.head_dim * m.heads != m.width) | write_rope(m) | dict(
      norm_epsilon=m.norm_eps, hidden_act=WRITTEN.get(m.mlp, 'silu'), use_bias=m.mlp_bias,
      sliding_window=max(m.windows) or None)


def with_window(write):
  return lambda m: write(m) | dict(sliding_window=max(m.windows) or None)


def with_bias(write):
  return lambda m: write(m) | dict(attention_bias=m.attention_bias)


FAMILIES = {family.name: family for family in (
    Family('llama', 'LlamaForCausalLM', 'llama', llama,
           with_bias(lambda m: write_gated(m) | dict(mlp_bias=False))),
    Family('mistral', 'MistralForCausalLM', 'llama', mistral, with_window(write_gated)),
    Family('mixtral', 'MixtralForCausalLM', 'llama', mixtral, with_window(lambda m: write_gated(m) | dict(
        num_local_experts=m.experts, num_experts_per_tok=m.experts_per_token, intermediate_size=m.expert_dim))),
    Family('qwen2', 'Qwen2ForCausalLM', 'qwen2', qwen2, write_qwen),
    Family('qwen3', 'Qwen3ForCausalLM', 'qwen3', qwen3, with_bias(write_qwen)),
    Family('qwen3_moe', 'Qwen3MoeForCausalLM', 'qwen3moe', qwen3_moe, write_qwen3_moe),
    Family('gemma', 'GemmaForCausalLM', 'gemma', lambda k: gemma(k) | rope(k), write_gemma),
    Family('gemma2', 'Gemma2ForCausalLM', 'gemma2', gemma2, write_gemma2),
    Family('gemma3_text', 'Gemma3ForCausalLM', 'gemma3', gemma3, write_gemma3),
    Family('phi3', 'Phi3ForCausalLM', 'phi3', phi3, with_window(write_gated)),
    Family('olmo2', 'Olmo2ForCausalLM', 'olmo2', olmo2, with_bias(write_gated)),
    Family('olmoe', 'OlmoeForCausalLM', 'olmoe', olmoe, with_bias(lambda m: write_gated(m) | dict(
        num_experts=m.experts, num_experts_per_tok=m.experts_per_token, intermediate_size=m.expert_dim,
        norm_topk_prob=m.router_normalize))),
    Family('stablelm', 'StableLmForCausalLM', 'stablelm', stablelm, write_stablelm),
    Family('gpt2', 'GPT2LMHeadModel', 'gpt2', gpt2, write_gpt2),
    Family('gpt_neox', 'GPTNeoXForCausalLM', 'gptneox', gpt_neox, write_gpt_neox),
    Family('falcon', 'FalconForCausalLM', 'falcon', falcon, write_falcon),
    Family('starcoder2', 'Starcoder2ForCausalLM', 'starcoder2', starcoder2, write_starcoder2),
)}
