"""config.json as models on hubs carry it: the keys and spellings of each family's first releases, with tiny sizes."""
import json

import numpy as np
import pytest
from theirs import CASES, IDS, V, logits, theirs

from llm_jax.config import ConfigError
from llm_jax.interop import hf, load

SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256)
GROUPED = SIZES | dict(num_key_value_heads=2)
COMMON = dict(initializer_range=0.02, use_cache=True, torch_dtype='bfloat16', transformers_version='4.40.0',
              bos_token_id=1, eos_token_id=2)
# {case: (what makes the weights, the keys of the published file)}
PUBLISHED = {
    'gpt2': ('gpt2', dict(
        architectures=['GPT2LMHeadModel'], activation_function='gelu_new', attn_pdrop=0.1, embd_pdrop=0.1, n_ctx=256,
        layer_norm_epsilon=1e-5, n_embd=32, n_head=4, n_layer=3, n_positions=256, resid_pdrop=0.1, vocab_size=V,
        summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type='cls_index',
        summary_use_proj=True, task_specific_params={'text-generation': dict(do_sample=True, max_length=50)})),
    'llama': ('llama', GROUPED | dict(
        architectures=['LlamaForCausalLM'], hidden_act='silu', pretraining_tp=1, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=10000.0, tie_word_embeddings=False)),
    'llama 3.1': ('llama, llama3', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, hidden_act='silu', mlp_bias=False, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, rope_scaling=dict(
            factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
            rope_type='llama3'))),
    'smollm2': ('llama', GROUPED | dict(
        hidden_act='silu', is_llama_config=True, rope_interleaved=False, rms_norm_eps=1e-5, rope_theta=100000,
        rope_scaling=None, tie_word_embeddings=False, attention_bias=False, pad_token_id=2,
        **{'transformers.js_config': dict(kv_cache_dtype=dict(q4f16='float16'))})),
    'mistral': ('mistral', GROUPED | dict(
        hidden_act='silu', rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=16, tie_word_embeddings=False)),
    'mixtral': ('mixtral', GROUPED | dict(
        attention_dropout=0.0, hidden_act='silu', num_experts_per_tok=2, num_local_experts=4, rms_norm_eps=1e-5,
        output_router_logits=False, rope_theta=1e6, router_aux_loss_coef=0.02, sliding_window=None,
        tie_word_embeddings=False)),
    'qwen2.5': ('qwen2', GROUPED | dict(
        attention_dropout=0.0, hidden_act='silu', max_window_layers=21, rms_norm_eps=1e-6, rope_theta=1e6,
        sliding_window=32768, tie_word_embeddings=False, use_mrope=False, use_sliding_window=False)),
    'qwen3': ('qwen3', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, head_dim=16, hidden_act='silu', max_window_layers=28,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=False,
        use_sliding_window=False)),
    'qwen3 moe': ('qwen3_moe', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, decoder_sparse_step=1, head_dim=8, hidden_act='silu',
        max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=24, norm_topk_prob=True, num_experts=4,
        num_experts_per_tok=2, output_router_logits=False, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
        router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False)),
    'gemma': ('gemma', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, head_dim=8, hidden_act='gelu', rms_norm_eps=1e-6, pad_token_id=0,
        rope_scaling=None, rope_theta=10000.0)),
    'gemma 1.1': ('gemma', GROUPED | dict(
        head_dim=8, hidden_act='gelu_pytorch_tanh', hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
        rope_theta=10000.0)),
    'gemma2': ('gemma2', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0, cache_implementation='hybrid',
        final_logit_softcapping=30.0, head_dim=8, hidden_act='gelu_pytorch_tanh',
        hidden_activation='gelu_pytorch_tanh', query_pre_attn_scalar=8, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=16, pad_token_id=0)),
    'gemma3': ('gemma3', GROUPED | dict(
        num_hidden_layers=7, attention_bias=False, attn_logit_softcapping=None, cache_implementation='hybrid',
        eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=8, hidden_activation='gelu_pytorch_tanh',
        query_pre_attn_scalar=8, rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
        sliding_window=16, sliding_window_pattern=6)),
    'phi3': ('phi3', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, hidden_act='silu', resid_pdrop=0.0,
        original_max_position_embeddings=256, pad_token_id=0, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
        auto_map=dict(AutoConfig='configuration_phi3.Phi3Config'), sliding_window=16, tie_word_embeddings=False)),
    'olmo2': ('olmo2', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, hidden_act='silu', pad_token_id=0, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=500000, tie_word_embeddings=False)),
    'olmoe': ('olmoe', GROUPED | dict(
        attention_bias=False, attention_dropout=0.0, clip_qkv=None, hidden_act='silu', norm_topk_prob=False,
        num_experts=4, num_experts_per_tok=2, output_router_logits=False, pad_token_id=1, rms_norm_eps=1e-5,
        rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.01, tie_word_embeddings=False)),
    'stablelm': ('stablelm', GROUPED | dict(
        attention_dropout=0.0, hidden_act='silu', hidden_dropout=0.0, layer_norm_eps=1e-5, partial_rotary_factor=0.5,
        qk_layernorm=False, rope_scaling=None, rope_theta=10000, tie_word_embeddings=False,
        use_parallel_residual=False, use_qkv_bias=True)),
    'pythia': ('gpt_neox', SIZES | dict(
        architectures=['GPTNeoXForCausalLM'], hidden_act='gelu', layer_norm_eps=1e-5, rotary_emb_base=10000,
        rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True)),
    'gpt-neox-20b': ('gpt_neox', SIZES | dict(
        attention_probs_dropout_prob=0, hidden_act='gelu_fast', hidden_dropout_prob=0, layer_norm_eps=1e-5,
        rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True)),
    'falcon-7b': ('falcon, one kv head', dict(
        alibi=False, apply_residual_connection_post_layernorm=False, attention_dropout=0.0, bias=False,
        hidden_dropout=0.0, hidden_size=32, layer_norm_epsilon=1e-5, multi_query=True, new_decoder_architecture=False,
        num_attention_heads=4, num_hidden_layers=3, parallel_attn=True, vocab_size=V)),
    'falcon-40b': ('falcon', dict(
        alibi=False, attention_dropout=0.0, bias=False, hidden_dropout=0.0, hidden_size=32, layer_norm_epsilon=1e-5,
        new_decoder_architecture=True, num_attention_heads=4, num_hidden_layers=3, num_kv_heads=2, parallel_attn=True,
        vocab_size=V)),
    'starcoder2': ('starcoder2', GROUPED | dict(
        activation_function='gelu', attention_dropout=0.1, attention_softmax_in_fp32=True, embedding_dropout=0.1,
        hidden_act='gelu_pytorch_tanh', layer_norm_epsilon=1e-5, mlp_type='default', norm_epsilon=1e-5,
        norm_type='layer_norm', residual_dropout=0.1, rope_theta=999999.44, scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True, sliding_window=16, use_bias=True)),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(name, tmp_path, tokenizer_json):
  case, said = PUBLISHED[name]
  _, torch = theirs(case, tmp_path, tokenizer_json)
  import transformers
  kind = dict(model_type=CASES[case][0])
  (tmp_path / 'config.json').write_text(json.dumps(COMMON | kind | said))
  reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager',
                                                                dtype=torch.float32)
  with torch.no_grad():
    expected = reference(torch.tensor(IDS)).logits.numpy()
  np.testing.assert_allclose(logits(load.load(tmp_path), IDS), expected, atol=2e-5, rtol=0)


def test_gpt2_files_of_the_first_release(tmp_path, tokenizer_json):
  """They name the inner model, without 'transformer.', and hold each layer's causal mask."""
  theirs('gpt2', tmp_path, tokenizer_json)
  weights = hf.Weights(tmp_path)
  before = logits(load.load(tmp_path), IDS)
  arrays = {name.removeprefix('transformer.'): weights.read(name) for name in weights.shapes}
  arrays |= {f'h.{i}.attn.bias': np.tril(np.ones((1, 1, 256, 256), np.float32)) for i in range(3)}
  hf.write_safetensors(tmp_path / 'model.safetensors', {k: x.shape for k, x in arrays.items()}, arrays.get,
                       np.dtype(np.float32))
  assert 'wte.weight' in hf.Weights(tmp_path).shapes
  np.testing.assert_array_equal(logits(load.load(tmp_path), IDS), before)


@pytest.mark.parametrize('case, changes', [
    ('stablelm', dict(qk_layernorm=True)), ('olmoe', dict(clip_qkv=8.0)), ('starcoder2', dict(norm_type='rms_norm')),
    ('falcon', dict(alibi=True)), ('qwen3_moe', dict(mlp_only_layers=[1])), ('gpt_neox', dict(attention_bias=False)),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True)), ('gemma3', dict(use_bidirectional_attention=True)),
    ('phi3', dict(rope_parameters=None, rope_scaling=dict(type='longrope', short_factor=[1.0], long_factor=[1.0]))),
    ('llama', dict(rope_parameters=None, rope_scaling=dict(type='dynamic', factor=2.0)))], ids=str)
def test_a_key_that_changes_the_arithmetic_is_run_or_refused_by_name(case, changes, tmp_path, tokenizer_json):
  """Never ignored."""
  theirs(case, tmp_path, tokenizer_json)
  said = json.loads((tmp_path / 'config.json').read_text()) | changes
  (tmp_path / 'config.json').write_text(json.dumps(said))
  with pytest.raises(ConfigError) as e:
    load.load(tmp_path)
  assert next(iter(changes.get('rope_scaling', changes))) in str(e.value) or list(changes)[0] in str(e.value) or (
      changes['rope_scaling']['type'] in str(e.value))
