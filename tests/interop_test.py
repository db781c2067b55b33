"""Models of other libraries compute here what they compute there, and go back unchanged: each architecture against
transformers (extra `parity`), with tiny random models; files that are broken or hostile end in one line."""
import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.generate import sampling
from llm_jax.interop import families, gguf, hf, layout, load, save, vocabulary
from llm_jax.models import presets, transformer

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


@pytest.fixture(scope='module')
def tokenizer_json():
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


VARIANTS = {'llama, biases, tied', 'llama, linear', 'qwen2, windows', 'stablelm, parallel', 'gpt_neox, in turn',
            'falcon, one kv head', 'falcon, in turn'}


@pytest.mark.parametrize('case', [pytest.param(c, marks=pytest.mark.slow) if c in VARIANTS else c for c in CASES])
def test_parity(case, tmp_path, tokenizer_json):
  """Logits within 2e-5, the same 64 greedy tokens; written back, transformers computes what it did before and our own
  parameters are bit for bit the same; so too by way of a GGUF file and of a run directory."""
  reference, torch = theirs(case, tmp_path / 'a', tokenizer_json)
  model = load.load(tmp_path / 'a')
  with torch.no_grad():
    expected = reference(torch.tensor(IDS)).logits.numpy()
  np.testing.assert_allclose(logits(model, IDS), expected, atol=2e-5, rtol=0)

  prompt = 'the quick brown fox'
  ids = torch.tensor(model.tokenizer.encode(prompt)[None].astype(np.int64))
  with torch.no_grad():
    continued = reference.generate(ids, max_new_tokens=64, do_sample=False, use_cache=False,
                                   pad_token_id=0)[0, ids.shape[1]:].tolist()
  found = sampling.generate(model.shape, model.params, model.tokenizer, [prompt], max_tokens=64, temperature=0.0)
  assert list(found[0].tokens) == continued

  saved = save.to_hf(model, tmp_path / 'b')
  assert saved.error == 0 and not saved.notes
  import transformers
  again, told = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'b', attn_implementation='eager', output_loading_info=True)
  assert not any(told.values()), told
  with torch.no_grad():
    np.testing.assert_allclose(again(torch.tensor(IDS)).logits.numpy(), expected, rtol=0,
                               atol=1e-6 if again.config.model_type == CASES[case][0] else 1e-5)
  same_leaves(model, load.load(tmp_path / 'b'))
  save.to_orbax(model, tmp_path / 'c')
  same_leaves(model, load.load(tmp_path / 'c'))
  if case in NOT_IN_GGUF:
    with pytest.raises(ConfigError, match='cannot say'):
      save.to_gguf(model, tmp_path / 'd.gguf')
    assert not (tmp_path / 'd.gguf').exists()
  else:
    assert save.to_gguf(model, tmp_path / 'd.gguf').error < 1e-5
    again = load.load(tmp_path / 'd.gguf')
    assert families.computed(again.shape) == families.computed(model.shape)
    same_leaves(model, again, 1e-6 if 'gemma' in case else 0)      # whose norms are stored with 1 added


NOT_IN_GGUF = {'llama, llama3', 'qwen2, windows'}


def same_leaves(a, b, atol=0):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize('name', [n for n, p in presets.PRESETS.items() if 'encoder_layers' not in p
                                  and n != 'transformer'])
def test_every_published_shape_has_a_config_there(name):
  """What is written for a preset is read as the same model."""
  model = config_lib.derive(config_lib.Model(**presets.preset(name).to_dict()))
  family, written = families.family_for(model)
  assert families.computed(families.model_of(json.loads(json.dumps(written)), name)[1]) == families.computed(model)
  assert all(link.parts for link in layout.hf_links(family.name, dataclasses.replace(model, layers=2)))


def directory(folder, tokenizer_json, **changes):
  """A tiny llama of ours as a Hugging Face directory, its config.json changed."""
  shape = config_lib.derive(config_lib.Model(vocab_size=V, layers=2, width=32, heads=4, kv_heads=2, mlp_dim=48,
                                             max_length=64, mlp='swiglu', tied_embeddings=False))
  params = jax.jit(lambda: transformer.init(shape, jax.random.key(0)))()
  (folder / 't').mkdir(parents=True)
  (folder / 't/tokenizer.json').write_text(tokenizer_json)
  model = load.Loaded(load.config_of(shape, None), params, vocabulary.from_folder(folder / 't'), '{{ messages }}',
                      'llama', 'float32', 'made here')
  save.to_hf(model, folder / 'm')
  said = json.loads((folder / 'm/config.json').read_text()) | changes
  (folder / 'm/config.json').write_text(json.dumps({k: v for k, v in said.items() if v != 'absent'}))
  return folder / 'm', model


@pytest.mark.parametrize('changes, message', [
    (dict(model_type='mamba'), "architecture 'mamba' cannot be run"),
    (dict(model_type=None), 'cannot be run'),
    (dict(hidden_act='gelu'), "hidden_act='gelu' cannot be run"),
    (dict(mlp_bias=True), 'mlp_bias'),
    (dict(new_fangled_scale=2.0), "new_fangled_scale='2.0' is not understood"),
    (dict(rope_parameters=dict(rope_type='longrope', rope_theta=1e4)), "'longrope' cannot be run"),
    (dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4)), "no key 'factor'"),
    (dict(quantization_config=dict(bits=4)), 'quantised'),
    (dict(vocab_size='many'), 'vocab_size: expected a whole number'),
    (dict(hidden_size='absent'), "no key 'hidden_size'"),
    (dict(num_attention_heads=0), 'heads'),
    (dict(vocab_size=V + 1), r'embed_tokens.weight \[96, 32\], expected \[97, 32\]'),
    (dict(num_hidden_layers=3), 'tensors missing'),
    (dict(num_hidden_layers=1), 'tensors unknown'),
])
def test_what_cannot_be_run_exactly_is_refused_by_name(changes, message, tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json, **changes)
  with pytest.raises(ConfigError, match=message) as e:
    load.load(folder)
  assert '\n' not in str(e.value)


def test_old_spellings_of_rotary_scaling(tmp_path, tokenizer_json):
  """rope_theta and rope_scaling, as transformers wrote them before release 5."""
  folder, _ = directory(tmp_path, tokenizer_json, rope_parameters='absent', rope_theta=5e5,
                        rope_scaling=dict(type='linear', factor=2.0))
  shape = load.load(folder).shape
  assert (shape.rope_base, shape.rope_scaling, shape.rope_factor) == (5e5, 'linear', 2.0)


def test_shards_with_an_index_bfloat16_and_the_template(tmp_path, tokenizer_json, monkeypatch):
  """Files of at most SHARD bytes; half precision in and out is lossless; the chat template comes along."""
  folder, model = directory(tmp_path, tokenizer_json)
  monkeypatch.setattr(hf, 'SHARD', 8000)
  save.to_hf(load.load(folder), tmp_path / 'half', 'bfloat16')
  assert len(list((tmp_path / 'half').glob('*.safetensors'))) > 2
  half = load.load(tmp_path / 'half')
  assert half.dtype == 'bfloat16' and half.chat_template == '{{ messages }}'
  save.to_hf(half, tmp_path / 'again')
  for name in ('model.safetensors.index.json', 'config.json', 'model-00001-of-00005.safetensors'):
    if (tmp_path / 'half' / name).exists():
      assert (tmp_path / 'half' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
  index = json.loads((tmp_path / 'half/model.safetensors.index.json').read_text())
  index['weight_map']['model.norm.weight'] = '../m/model.safetensors'
  (tmp_path / 'half/model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(ConfigError, match='expected the name of a file beside it'):
    load.load(tmp_path / 'half')


def test_on_a_mesh(tmp_path, tokenizer_json):
  """Tensors go straight to the devices that hold them: fsdp x tensor gives what one device gives."""
  folder, model = directory(tmp_path, tokenizer_json)
  ids = IDS.reshape(2, 32)
  alone = logits(load.load(folder), ids)
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=2, tensor=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    spread = load.load(folder)
    assert not spread.params['blocks0']['mlp']['w_up_DF'].sharding.is_fully_replicated
    same_leaves(spread, model)
    np.testing.assert_allclose(logits(spread, ids), alone, atol=1e-5)


def safetensors(header, data=b'', size=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text) if size is None else size) + text + data


@pytest.mark.parametrize('content', [
    b'', b'\0' * 7, safetensors({}, size=2**62), safetensors({}, size=10**9), safetensors(b'{"a":' * 1000),
    safetensors(b'[1]'), safetensors(dict(a=dict(dtype='F99', shape=[1], data_offsets=[0, 4])), b'1234'),
    safetensors(dict(a=dict(dtype='F32', shape=[2], data_offsets=[0, 4])), b'1234'),
    safetensors(dict(a=dict(dtype='F32', shape=[1], data_offsets=[0, 4]), b=dict(
        dtype='F32', shape=[1], data_offsets=[2, 6])), b'123456'),
    safetensors(dict(a=dict(dtype='F32', shape=[1], data_offsets=[0, 2**63])), b'1234'),
    safetensors(dict(a=dict(dtype='F32', shape=[2**40, 2**40], data_offsets=[0, 4])), b'1234'),
    safetensors(dict(a=dict(dtype='F32', shape=[-1], data_offsets=[0, 4])), b'1234')], ids=str)
def test_a_hostile_safetensors_file_is_one_line(content, tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json)
  (folder / 'model.safetensors').write_bytes(content)
  with pytest.raises(ConfigError, match='no sound safetensors file') as e:
    load.load(folder)
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_a_truncated_file_is_one_line(tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json)
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for size in (len(whole) - 1, len(whole) // 2, 100):
    file.write_bytes(whole[:size])
    with pytest.raises(ConfigError, match='download it again'):
      load.load(folder)


def test_nothing_is_unpickled(tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  for path in (folder, folder / 'pytorch_model.bin'):
    with pytest.raises(ConfigError, match='save_pretrained'):
      load.load(path)


def test_what_is_no_model_says_what_is_expected(tmp_path):
  for path, message in ((tmp_path / 'none', 'no such directory'), (tmp_path, 'not a run directory')):
    with pytest.raises(ConfigError, match=message):
      load.load(path)
  (tmp_path / 'x.gguf').write_bytes(b'GGUF')
  with pytest.raises(ConfigError, match='truncated'):
    load.load(tmp_path / 'x.gguf')
  gguf.write(tmp_path / 'part.gguf', {'split.count': 3}, {'a': ((1,), 'F32')}, lambda name: np.zeros(1))
  with pytest.raises(ConfigError, match='one part of 3'):
    load.load(tmp_path / 'part.gguf')
  gguf.write(tmp_path / 'other.gguf', {'general.architecture': 'mamba'}, {'a': ((1,), 'F32')},
             lambda name: np.zeros(1))
  with pytest.raises(ConfigError, match="'mamba' cannot be run"):
    load.load(tmp_path / 'other.gguf')


def test_an_architecture_without_a_counterpart_names_what_differs(tmp_path, tokenizer_json):
  _, model = directory(tmp_path, tokenizer_json)
  odd = dataclasses.replace(model.config.model, mlp='relu2', value_skips=True)
  config = dataclasses.replace(model.config, model=odd)
  with pytest.raises(ConfigError, match='nearest: .*differs in model.*value_skips'):
    save.to_hf(dataclasses.replace(model, config=config), tmp_path / 'x')


def test_quantised_files_say_their_kinds_and_lose_little(tmp_path, tokenizer_json):
  _, model = directory(tmp_path, tokenizer_json)
  before = logits(model, IDS)
  for kind, most in dict(q8_0=0.05, q4_0=0.7, float16=3e-3, bfloat16=3e-2).items():
    saved = save.to_gguf(model, tmp_path / f'{kind}.gguf', kind)
    kinds = {t.name: t.kind for t in gguf.read(saved.path).tensors.values()}
    assert kinds['blk.0.attn_norm.weight'] == 'F32'
    assert kinds['blk.0.attn_q.weight'] == dict(float16='F16', bfloat16='BF16').get(kind, kind.upper())
    error = logits(load.load(saved.path), IDS) - before
    assert 0 < np.sqrt(np.square(error).mean()) < most * before.std()
    assert load.load(saved.path).chat_template == '{{ messages }}'
