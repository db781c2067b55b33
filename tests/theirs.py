"""Tiny random models made by transformers (extra `parity`), for comparison, and the tokenizer they go with."""
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.models import transformer

V = 96
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
FALCON = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
ROPE = dict(rope_theta=10_000.0, original_max_position_embeddings=32, factor=4.0)
# {case: (model_type, its config)}; sequences are longer than every window and than the length before scaling.
CASES = {
    'gpt2': ('gpt2', dict(vocab_size=V, n_positions=256, n_embd=32, n_layer=3, n_head=4)),
    'llama': ('llama', SHAPE),
    'llama, biases, tied': ('llama', SHAPE | dict(attention_bias=True, tie_word_embeddings=True)),
    'llama, linear': ('llama', SHAPE | dict(rope_parameters=dict(ROPE, rope_type='linear'))),
    'llama, yarn': ('llama', SHAPE | dict(rope_parameters=dict(ROPE, rope_type='yarn'))),
    'llama, llama3': ('llama', SHAPE | dict(rope_parameters=dict(
        ROPE, rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0))),
    'mistral': ('mistral', SHAPE | dict(sliding_window=16)),
    'mixtral': ('mixtral', SHAPE | dict(num_local_experts=4, sliding_window=None)),
    'qwen2': ('qwen2', SHAPE),
    'qwen2, windows': ('qwen2', SHAPE | dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    'qwen3': ('qwen3', SHAPE | dict(head_dim=16)),
    'qwen3_moe': ('qwen3_moe', SHAPE | dict(head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
                                            norm_topk_prob=True)),
    'gemma': ('gemma', SHAPE | dict(head_dim=8)),
    'gemma2': ('gemma2', SHAPE | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8)),
    'gemma3': ('gemma3_text', SHAPE | dict(num_hidden_layers=7, head_dim=8, sliding_window=16,
                                           query_pre_attn_scalar=8)),
    'phi3': ('phi3', SHAPE | dict(pad_token_id=0, sliding_window=16)),
    'olmo2': ('olmo2', SHAPE),
    'olmoe': ('olmoe', SHAPE | dict(num_experts=4, num_experts_per_tok=2)),
    'stablelm': ('stablelm', SHAPE | dict(partial_rotary_factor=0.5, use_qkv_bias=True)),
    'stablelm, parallel': ('stablelm', SHAPE | dict(partial_rotary_factor=0.25, use_parallel_residual=True)),
    'gpt_neox': ('gpt_neox', {k: v for k, v in SHAPE.items() if k != 'num_key_value_heads'}),
    'gpt_neox, in turn': ('gpt_neox', {k: v for k, v in SHAPE.items() if k != 'num_key_value_heads'} | dict(
        use_parallel_residual=False)),
    'falcon': ('falcon', FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)),
    'falcon, one kv head': ('falcon', FALCON | dict(multi_query=True)),
    'falcon, in turn': ('falcon', FALCON | dict(multi_query=False, parallel_attn=False, bias=True)),
    'starcoder2': ('starcoder2', SHAPE | dict(sliding_window=16)),
}


def tokenizer_json() -> str:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  tokenizer.train_from_iterator(['the quick brown fox jumps over the lazy dog and runs away from it'] * 3,
                                trainers.BpeTrainer(vocab_size=V, show_progress=False,
                                                    initial_alphabet=[chr(c) for c in range(33, 113)]))
  assert tokenizer.get_vocab_size() == V             # an id without text is never sampled
  return tokenizer.to_str()


def theirs(case, folder, tokenizer_json):
  """A random model of the case by transformers, saved to folder."""
  torch = pytest.importorskip('torch', reason="the reference needs pip install '.[parity]'")
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  torch.manual_seed(0)
  kind, said = CASES[case]
  made = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None) | said
  model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(kind, **made), attn_implementation='eager').eval()
  with torch.no_grad():
    for p in model.parameters():
      p.normal_(0, 0.15) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(folder)
  (folder / 'tokenizer.json').write_text(tokenizer_json)
  return model, torch


def logits(model, ids):
  return np.asarray(transformer.logits(model.shape, model.params, ids))


def leaves(model):
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(model.params)}


IDS = np.random.default_rng(0).integers(0, V, (1, 64), np.int32)
