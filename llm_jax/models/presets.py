"""Published model shapes, each as the fields of config.Model that differ from its defaults. `preset(name)` gives a
whole `config.model` group: in a config file `config.model = preset('llama3_8b')`, on the command line
`--config.model=llama3_8b`; single fields can then be overridden. Sources: the papers and published config.json files.
"""
import dataclasses

from ml_collections import ConfigDict

from llm_jax import config as config_lib

# Vaswani et al. 2017 (arXiv 1706.03762), base: post-norm, sinusoids, one shared embedding.
ORIGINAL = dict(layers=6, width=512, heads=8, mlp_dim=2048, vocab_size=37_000, max_length=512, norm='layer',
                norm_bias=True, norm_eps=1e-6, norm_position='post', positions='sinusoidal', mlp='relu', mlp_bias=True,
                embedding_scale=True, embedding_init=512**-0.5, dropout=0.1)
# Radford et al. 2019.
GPT2 = dict(vocab_size=50_257, max_length=1024, norm='layer', norm_bias=True, norm_eps=1e-5, positions='learned',
            attention_bias=True, attention_out_bias=True, mlp='gelu', mlp_bias=True)
# Touvron et al. 2023 (arXiv 2307.09288); Grattafiori et al. 2024 (arXiv 2407.21783).
LLAMA = dict(norm_eps=1e-5, mlp='swiglu', tied_embeddings=False)
LLAMA3 = dict(LLAMA, vocab_size=128_256, max_length=8192, kv_heads=8, rope_base=500_000.0)
# Allal et al. 2025 (arXiv 2502.02737).
SMOLLM = dict(LLAMA, vocab_size=49_152, tied_embeddings=True)
# arXiv 2412.15115 (2.5) and arXiv 2505.09388 (3).
QWEN25 = dict(mlp='swiglu', attention_bias=True, rope_base=1e6, max_length=32_768)
QWEN3 = dict(mlp='swiglu', qk_norm='head', rope_base=1e6, max_length=40_960, vocab_size=151_936, head_dim=128,
             kv_heads=8)
# arXiv 2408.00118 (2) and arXiv 2503.19786 (3).
GEMMA = dict(norm_position='both', norm_unit_offset=True, mlp='geglu', embedding_scale=True, head_dim=256)
GEMMA3 = dict(GEMMA, qk_norm='head', rope_base=1e6, rope_base_local=10_000.0)
# arXiv 2501.00656.
OLMO2 = dict(vocab_size=100_352, max_length=4096, norm_position='after', qk_norm='full', mlp='swiglu',
             rope_base=500_000.0, tied_embeddings=False)

DEEP = dict(unroll=False, remat='full')    # from about a billion parameters on: compile time and memory first

PRESETS = {
    'transformer': ORIGINAL,
    'transformer_encoder_decoder': dict(ORIGINAL, encoder_layers=6),
    'gpt2_124m': dict(GPT2, layers=12, width=768, heads=12),
    'gpt2_350m': dict(GPT2, layers=24, width=1024, heads=16),
    'gpt2_774m': dict(GPT2, layers=36, width=1280, heads=20),
    'gpt2_1558m': dict(GPT2, **DEEP, layers=48, width=1600, heads=25),
    'llama2_7b': dict(LLAMA, **DEEP, layers=32, width=4096, heads=32, mlp_dim=11_008, vocab_size=32_000,
                      max_length=4096),
    'llama3_8b': dict(LLAMA3, **DEEP, layers=32, width=4096, heads=32, mlp_dim=14_336),
    'llama3_70b': dict(LLAMA3, **DEEP, layers=80, width=8192, heads=64, mlp_dim=28_672),
    'llama3_405b': dict(LLAMA3, **DEEP, layers=126, width=16_384, heads=128, mlp_dim=53_248),
    'llama3_2_1b': dict(LLAMA3, **DEEP, layers=16, width=2048, heads=32, mlp_dim=8192, tied_embeddings=True,
                        max_length=131_072, rope_scaling='llama3', rope_factor=32.0, rope_original_length=8192),
    'mistral_7b': dict(LLAMA, **DEEP, layers=32, width=4096, heads=32, kv_heads=8, mlp_dim=14_336, vocab_size=32_000,
                       max_length=32_768, windows=(4096,)),                # arXiv 2310.06825
    'smollm_135m': dict(SMOLLM, layers=30, width=576, heads=9, kv_heads=3, mlp_dim=1536, max_length=2048),
    'smollm2_135m': dict(SMOLLM, layers=30, width=576, heads=9, kv_heads=3, mlp_dim=1536, max_length=8192,
                         rope_base=100_000.0),
    'smollm2_360m': dict(SMOLLM, layers=32, width=960, heads=15, kv_heads=5, mlp_dim=2560, max_length=8192,
                         rope_base=100_000.0),
    'qwen2_5_0_5b': dict(QWEN25, layers=24, width=896, heads=14, kv_heads=2, mlp_dim=4864, vocab_size=151_936),
    'qwen2_5_7b': dict(QWEN25, **DEEP, layers=28, width=3584, heads=28, kv_heads=4, mlp_dim=18_944, vocab_size=152_064,
                       tied_embeddings=False),
    'qwen3_0_6b': dict(QWEN3, layers=28, width=1024, heads=16, mlp_dim=3072),
    'qwen3_8b': dict(QWEN3, **DEEP, layers=36, width=4096, heads=32, mlp_dim=12_288, tied_embeddings=False),
    'qwen3_30b_a3b': dict(QWEN3, **DEEP, layers=48, width=2048, heads=32, kv_heads=4, mlp_dim=6144, experts=128,
                          experts_per_token=8, expert_dim=768, tied_embeddings=False),
    'gemma2_2b': dict(GEMMA, **DEEP, layers=26, width=2304, heads=8, kv_heads=4, mlp_dim=9216, vocab_size=256_000,
                      max_length=8192, windows=(4096, 0), attention_softcap=50.0, logit_softcap=30.0),
    'gemma3_1b': dict(GEMMA3, **DEEP, layers=26, width=1152, heads=4, kv_heads=1, mlp_dim=6912, vocab_size=262_144,
                      max_length=32_768, windows=(512,) * 5 + (0,)),
    'gemma3_4b': dict(GEMMA3, **DEEP, layers=34, width=2560, heads=8, kv_heads=4, mlp_dim=10_240, vocab_size=262_208,
                      max_length=131_072, windows=(1024,) * 5 + (0,), rope_scaling='linear', rope_factor=8.0),
    'olmo2_1b': dict(OLMO2, **DEEP, layers=16, width=2048, heads=16, mlp_dim=8192),
    'olmo2_7b': dict(OLMO2, **DEEP, layers=32, width=4096, heads=32, mlp_dim=11_008),
    # arXiv 2409.02060.
    'olmoe_1b_7b': dict(LLAMA, **DEEP, layers=16, width=2048, heads=16, mlp_dim=1024, vocab_size=50_304,
                        max_length=4096, qk_norm='full', experts=64, experts_per_token=8, router_normalize=False),
    # arXiv 2401.04088.
    'mixtral_8x7b': dict(LLAMA, **DEEP, layers=32, width=4096, heads=32, kv_heads=8, mlp_dim=14_336, vocab_size=32_000,
                         max_length=32_768, rope_base=1e6, experts=8, experts_per_token=2),
    'phi3_mini': dict(LLAMA, **DEEP, layers=32, width=3072, heads=32, mlp_dim=8192, vocab_size=32_064, max_length=4096,
                      windows=(2047,)),                                   # arXiv 2404.14219, 4k context
}


def preset(name: str, **overrides) -> ConfigDict:
  """The model group of a published shape. Raises ConfigError with the nearest name for one that is not known."""
  if name not in PRESETS:
    raise config_lib.ConfigError(f'config.model: no preset {name!r}{config_lib.nearest(name, PRESETS)}')
  fields = dict(dataclasses.asdict(config_lib.Model()), **PRESETS[name])
  unknown = [key for key in overrides if key not in fields]
  if unknown:
    raise config_lib.ConfigError(f'config.model.{unknown[0]}: no such key{config_lib.nearest(unknown[0], fields)}')
  return ConfigDict(dict(fields, **overrides))
