"""Models of other libraries compute here what they compute there, and go back unchanged: each architecture against
transformers (extra `parity`), with tiny random models; files that are broken or hostile end in one line."""
import dataclasses
import functools
import json
import pathlib
import shutil
import struct
import tempfile
import time

import jax
import numpy as np
import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from theirs import CASES, IDS, V, leaves, logits, theirs

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.generate import sampling
from llm_jax.interop import families, gguf, hf, layout, load, save, vocabulary
from llm_jax.models import presets, transformer

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
  assert saved.error == 0 and [note for note in saved.notes if not note.startswith('what was')] == []
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


@functools.cache
def made(tokenizer_json):
  """(a tiny llama of ours as a Hugging Face directory, the model), once for all tests."""
  shape = config_lib.derive(config_lib.Model(vocab_size=V, layers=2, width=32, heads=4, kv_heads=2, mlp_dim=48,
                                             max_length=64, mlp='swiglu', tied_embeddings=False))
  params = jax.jit(lambda: transformer.init(shape, jax.random.key(0)))()
  place = tempfile.TemporaryDirectory()
  folder = pathlib.Path(place.name)
  (folder / 't').mkdir()
  (folder / 't/tokenizer.json').write_text(tokenizer_json)
  model = load.Loaded(load.config_of(shape, None), vocabulary.from_folder(folder / 't'), '{{ messages }}', 'llama',
                      'float32', 'made here', params)
  save.to_hf(model, folder / 'm')
  return place, model


def directory(folder, tokenizer_json, **changes):
  """A copy of it in folder/m, its config.json changed, and the model."""
  place, model = made(tokenizer_json)
  shutil.copytree(pathlib.Path(place.name) / 'm', folder / 'm')
  said = json.loads((folder / 'm/config.json').read_text()) | changes
  (folder / 'm/config.json').write_text(json.dumps({k: v for k, v in said.items() if v != 'absent'}))
  return folder / 'm', model


@pytest.mark.parametrize('changes, message', [
    (dict(model_type='mamba'), "architecture 'mamba' cannot be run"),
    (dict(model_type=None), 'cannot be run'),
    (dict(hidden_act='gelu'), "hidden_act='gelu' cannot be run"),
    (dict(mlp_bias=True), 'mlp_bias'),
    (dict(use_rope=False), "'use_rope'=False is not understood"),
    (dict(is_causal=False), 'is_causal=False cannot be run'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5 cannot be run; only 1.0'),
    ({'a\nb': 1}, r"'a.nb'=1 is not understood"), (dict(hidden_act='x' * 9999), 'hidden_act=.x* cannot be run'),
    (dict(new_fangled_scale=2.0), "new_fangled_scale'=2.0 is not understood"),
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
  assert not save.to_gguf(half, tmp_path / 'half.gguf').notes
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


@pytest.mark.parametrize('kind', ['directory', 'GGUF file'])
def test_training_goes_on_from_a_model_from_elsewhere(kind, tmp_path, tokenizer_json, monkeypatch):
  """Shape, weights and tokenizer by path; the run keeps family and chat template, and its card its figures."""
  runs.make_quick(monkeypatch)
  runs.write_texts(tmp_path)
  path, model = directory(tmp_path, tokenizer_json)
  if kind == 'GGUF file':
    path = save.to_gguf(model, tmp_path / 'x.gguf').path
  keys = dict(init_from=path, train__steps=3, optimizer__learning_rate=0.0, optimizer__warmup_steps=0)
  with pytest.raises(ConfigError, match=f'another model; .*--config.model={path} takes its shape'):
    runs.train(tmp_path, **keys, workdir='other')
  runs.train(tmp_path, **keys, model=path)
  trained = load.load(tmp_path / 'run')
  same_leaves(trained, model)
  assert trained.family == 'llama' and trained.chat_template == '{{ messages }}'
  assert trained.tokenizer.encode('the fox').tolist() == model.tokenizer.encode('the fox').tolist()
  assert trained.figures['step'] == 3
  saved = save.to_hf(trained, tmp_path / 'again')
  text = (saved.path / 'README.md').read_text()
  assert f'from the weights of {path}' in text and 'LlamaForCausalLM' in text
  assert f'| loss per token, nats | {trained.figures["loss/valid"]:.4f} |' in text and 'bits per byte' in text
  (tmp_path / 'run/metrics.jsonl').unlink()
  assert 'No evaluation was recorded' in save.card(load.load(tmp_path / 'run'), 'X', 'float32')


def test_what_ends_a_text_comes_along(tmp_path, tokenizer_json):
  """The list of generation_config.json, by way of every format."""
  folder, model = directory(tmp_path, tokenizer_json)
  go = lambda m: sampling.generate(m.shape, m.params, m.tokenizer, ['the fox'], max_tokens=8)[0]
  tokens = go(model).tokens
  stop = next(t for t in tokens[2:] if t not in tokens[:2])
  (folder / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[95, stop])))
  first = load.load(folder)
  assert first.tokenizer.stop_ids == (95, stop) and model.tokenizer.stop_ids == ()
  ended = go(first)
  assert ended.finish_reason == 'stop' and ended.tokens == tokens[:tokens.index(stop) + 1]
  for saved in (save.to_hf(first, tmp_path / 'b'), save.to_orbax(first, tmp_path / 'c'),
                save.to_gguf(first, tmp_path / 'd.gguf')):
    assert load.load(saved.path).tokenizer.stop_ids == (95, stop), saved.path


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


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_in_a_header_are_one_line_or_load(data, tmp_path_factory, tokenizer_json):
  """Of a safetensors file; what loads has every tensor in the shape its config.json says."""
  place, model = made(tokenizer_json)
  folder = tmp_path_factory.mktemp('fuzz')
  shutil.copytree(pathlib.Path(place.name) / 'm', folder / 'm')
  file = folder / 'm/model.safetensors'
  content = bytearray(file.read_bytes())
  end = 8 + int.from_bytes(content[:8], 'little')
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, end - 1) | st.integers(0, 40))
    new = data.draw(st.binary(max_size=3) | st.sampled_from([b'9', b'0', b'"', b'}', b'-1', b'F16', b'I64']))
    content[at:at + data.draw(st.integers(0, 3))] = new
  file.write_bytes(content)
  try:
    found = leaves(load.load(folder / 'm'))
  except ConfigError as e:
    assert '\n' not in str(e) and len(str(e)) < 1000
  else:
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in leaves(model).items()}
  shutil.rmtree(folder)


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_any_value_in_a_config_is_one_line_or_a_model(data):
  """Of every family: never another exception, and never a model with sizes out of range."""
  name, keys = CASES[data.draw(st.sampled_from(sorted(CASES)))]
  said = dict(keys, model_type=name, rope_theta=1e4, rope_scaling=dict(rope_type='linear', factor=2.0))
  values = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5), st.lists(
      st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
  for _ in range(data.draw(st.integers(1, 3))):
    said[data.draw(st.sampled_from(sorted(said)))] = data.draw(values)
  try:
    _, model = families.model_of(said, 'config.json')
  except ConfigError as e:
    assert '\n' not in str(e) and len(str(e)) < 1000
  else:
    assert model.layers >= 1 and model.width >= 1 and model.head_dim >= 1 and model.vocab_size >= 1


def test_a_hundred_thousand_tensors_are_refused_at_once(tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json)
  many = {f't{i}': dict(dtype='F32', shape=[1], data_offsets=[4 * i, 4 * i + 4]) for i in range(100_000)}
  (folder / 'model.safetensors').write_bytes(safetensors(many, b'\0' * 400_000))
  start = time.monotonic()
  with pytest.raises(ConfigError, match='tensors missing') as e:
    load.load(folder)
  assert len(str(e.value)) < 600 and time.monotonic() - start < 30
  gguf.write(tmp_path / 'x.gguf', {'general.architecture': 'llama'},
             {f't{i}': ((1,), 'F32') for i in range(100_000)}, lambda name: np.zeros(1, np.float32))
  with pytest.raises(ConfigError) as e:
    load.load(tmp_path / 'x.gguf')
  assert len(str(e.value)) < 600 and time.monotonic() - start < 60


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


def test_norms_beyond_bfloat16_are_rounded_and_that_is_said(tmp_path, tokenizer_json):
  """A GGUF file of bfloat16 keeps norms in float32."""
  _, model = directory(tmp_path, tokenizer_json)
  params = jax.tree.map(lambda x: x.astype('bfloat16').astype('float32') if x.ndim > 2 else 1.001 * x, model.params)
  first = save.to_gguf(dataclasses.replace(model, params=params), tmp_path / 'x.gguf', 'bfloat16')
  again = load.load(first.path)
  saved = save.to_hf(again, tmp_path / 'half', 'bfloat16')
  assert again.dtype == 'bfloat16' and '5 of 21 tensors are rounded' in saved.notes[0]
  assert 0 < saved.error < 0.1
  saved = save.to_hf(again, tmp_path / 'whole')                       # left to itself it loses nothing
  assert saved.error == 0 and not saved.notes and load.load(saved.path).dtype == 'float32'


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
    assert 'tensors are rounded' in saved.notes[0]
    assert load.load(saved.path).chat_template == '{{ messages }}'
