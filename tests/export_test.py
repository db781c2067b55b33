"""What an export must not do: compute something else, lose what it need not, or leave half of itself behind."""
import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from interop_test import directory
from theirs import IDS, V, logits, theirs

from llm_jax import config as config_lib
from llm_jax import convert
from llm_jax.config import ConfigError
from llm_jax.interop import gguf, hf, load, save, vocabulary
from llm_jax.models import transformer


def ours(tmp_path, tokenizer_json, **fields):
  """A model of ours with these fields, random."""
  shape = config_lib.derive(config_lib.Model(**dict(
      vocab_size=V, layers=2, width=32, heads=4, kv_heads=2, mlp_dim=48, max_length=64, mlp='swiglu') | fields))
  params = jax.jit(lambda: transformer.init(shape, jax.random.key(0)))()
  (tmp_path / 't').mkdir(exist_ok=True)
  (tmp_path / 't/tokenizer.json').write_text(tokenizer_json)
  return load.Loaded(load.config_of(shape, None), vocabulary.from_folder(tmp_path / 't'), None, '', 'float32', 'here',
                     params)


@pytest.mark.parametrize('fields, family', [
    (dict(rope_fraction=0.5), 'phi3'), (dict(rope_fraction=0.5, qk_norm='head'), ''),
    (dict(rope_fraction=0.5, mlp='gelu', norm='layer', norm_bias=True), ''), (dict(windows=(8,)), 'mistral'),
    (dict(attention_bias=True, attention_out_bias=True), 'llama')], ids=str)
def test_transformers_computes_what_is_exported_or_nothing_is(fields, family, tmp_path, tokenizer_json):
  """Also for models that did not come from there."""
  model = ours(tmp_path, tokenizer_json, **fields)
  if not family:
    with pytest.raises(ConfigError, match='no counterpart'):
      save.to_hf(model, tmp_path / 'x')
    return
  torch = pytest.importorskip('torch', reason="the reference needs pip install '.[parity]'")
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  save.to_hf(model, tmp_path / 'x')
  reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'x', attn_implementation='eager')
  assert reference.config.model_type == family
  with torch.no_grad():
    np.testing.assert_allclose(logits(model, IDS), reference(torch.tensor(IDS)).logits.numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize('case, changes', [
    ('qwen3_moe', dict(attention_bias=True)), ('qwen3_moe', dict(use_sliding_window=True, sliding_window=8)),
    ('starcoder2', dict(head_dim=16)), ('stablelm', dict(tie_word_embeddings=True)),
    ('qwen3', dict(attention_bias=True)), ('llama', dict(num_key_value_heads=1, head_dim=16))], ids=str)
def test_further_variants_go_both_ways(case, changes, tmp_path, tokenizer_json, monkeypatch):
  import theirs as module
  kind, said = module.CASES[case]
  monkeypatch.setitem(module.CASES, 'changed', (kind, said | changes))
  reference, torch = theirs('changed', tmp_path / 'a', tokenizer_json)
  with torch.no_grad():
    expected = reference(torch.tensor(IDS)).logits.numpy()
  model = load.load(tmp_path / 'a')
  np.testing.assert_allclose(logits(model, IDS), expected, atol=2e-5, rtol=0)
  save.to_hf(model, tmp_path / 'b')
  import transformers
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b', attn_implementation='eager')
  with torch.no_grad():
    np.testing.assert_allclose(again(torch.tensor(IDS)).logits.numpy(), expected, rtol=0, atol=1e-5)


def test_scaling_beside_rope_parameters_wins_as_in_transformers(tmp_path, tokenizer_json):
  _, torch = theirs('llama', tmp_path, tokenizer_json)
  said = json.loads((tmp_path / 'config.json').read_text()) | dict(rope_scaling=dict(rope_type='linear', factor=4.0))
  (tmp_path / 'config.json').write_text(json.dumps(said))
  import transformers
  reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager')
  with torch.no_grad():
    expected = reference(torch.tensor(IDS)).logits.numpy()
  model = load.load(tmp_path)
  assert model.shape.rope_factor == 4.0
  np.testing.assert_allclose(logits(model, IDS), expected, atol=2e-5, rtol=0)


def test_an_output_matrix_that_differs_is_not_tied(tmp_path, tokenizer_json):
  """Whatever config.json says of it, as in transformers."""
  _, torch = theirs('llama', tmp_path, tokenizer_json)
  said = json.loads((tmp_path / 'config.json').read_text()) | dict(tie_word_embeddings=True)
  (tmp_path / 'config.json').write_text(json.dumps(said))
  import transformers
  reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager')
  with torch.no_grad():
    expected = reference(torch.tensor(IDS)).logits.numpy()
  model = load.load(tmp_path)
  assert not model.shape.tied_embeddings
  np.testing.assert_allclose(logits(model, IDS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize('key, value', [
    ('logit_scale', 0.5), ('attention.scale', 0.25), ('attention.causal', False), ('attention.clamp_kqv', 8.0),
    ('attn_logit_softcapping', 30.0), ('new_thing', 3), ('expert_weights_scale', 2.0)])
def test_a_field_that_changes_the_arithmetic_is_refused(key, value, tmp_path, tokenizer_json):
  _, model = directory(tmp_path, tokenizer_json)
  save.to_gguf(model, tmp_path / 'a.gguf')
  file = gguf.read(tmp_path / 'a.gguf')
  tensors = {name: (t.shape, t.kind) for name, t in file.tensors.items()}
  gguf.write(tmp_path / 'b.gguf', file.fields | {f'llama.{key}': value}, tensors, file.array)
  with pytest.raises(ConfigError, match=f"'llama.{key}'={value} is not understood"):
    load.load(tmp_path / 'b.gguf')
  gguf.write(tmp_path / 'c.gguf', file.fields | {'llama.rope.scale_linear': 4.0}, tensors, file.array)
  assert load.load(tmp_path / 'c.gguf').shape.rope_factor == 4.0


def test_half_precision_and_ids_stay_what_they_were(tmp_path, tokenizer_json):
  """float16 goes in and out as float16; padding that is none is not invented; ids of config.json come along."""
  folder, model = directory(tmp_path, tokenizer_json, bos_token_id=1, eos_token_id=2)
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'generation_config.json').unlink()
  said = json.loads((folder / 'tokenizer.json').read_text())
  said['added_tokens'] = [dict(id=i, content=f'<{i}>', single_word=False, lstrip=False, rstrip=False, normalized=False,
                               special=True) for i in (1, 2)]
  vocab = {token: i for token, i in said['model']['vocab'].items() if i not in (1, 2)}
  said['model'] |= dict(vocab=vocab | {'<1>': 1, '<2>': 2}, merges=[])
  (folder / 'tokenizer.json').write_text(json.dumps(said))
  save.to_hf(load.load(folder), tmp_path / 'half', 'float16')
  half = load.load(tmp_path / 'half')
  assert half.dtype == 'float16' and (half.tokenizer.bos_id, half.tokenizer.eos_id) == (1, 2)
  assert not save.to_hf(half, tmp_path / 'again').notes
  assert (tmp_path / 'half/model.safetensors').read_bytes() == (tmp_path / 'again/model.safetensors').read_bytes()
  ids = json.loads((tmp_path / 'again/config.json').read_text())
  assert (ids['bos_token_id'], ids['eos_token_id'], ids['pad_token_id']) == (1, 2, None)
  saved = save.to_gguf(half, tmp_path / 'x.gguf')
  assert gguf.read(saved.path).tensors['blk.0.attn_q.weight'].kind == 'F16'


def test_a_failed_export_leaves_nothing(tmp_path, tokenizer_json, monkeypatch):
  """Too large for float16; not what it was when read back; a place that cannot be written."""
  _, model = directory(tmp_path, tokenizer_json)
  large = dataclasses.replace(model, params=jax.tree.map(lambda x: 1e6 * x, model.params))
  with pytest.raises(ConfigError, match='not finite in float16; write it in bfloat16'):
    save.to_hf(large, tmp_path / 'x', 'float16')
  with pytest.raises(ConfigError, match='expected a local path'):
    save.to_orbax(model, 's3://bucket/x')
  write = hf.write_safetensors
  monkeypatch.setattr(hf, 'write_safetensors', lambda path, shapes, read, kind: write(
      path, shapes, lambda name: read(name) * (2 if 'q_proj' in name else 1), kind))
  for dtype, message in (('float32', 'do not use it'), ('bfloat16', 'more than rounding')):
    with pytest.raises(ConfigError, match=message):
      save.to_hf(model, tmp_path / 'x', dtype)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='cannot be written'):
    save.to_hf(model, tmp_path / 'file/x')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'm']


@pytest.mark.parametrize('change, message', [
    (lambda m: (m / 'model.safetensors.index.json').write_text('{"weight_map": [1]}'), 'expected a weight_map'),
    (lambda m: (m / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'a': 'x' * 300}))),
     'expected the name of a file'),
    (lambda m: (m / 'chat_template.jinja').write_bytes(b'\xff\xfe'), 'expected UTF-8')])
def test_broken_files_beside_the_weights_are_one_line(change, message, tmp_path, tokenizer_json):
  folder, _ = directory(tmp_path, tokenizer_json)
  change(folder)
  with pytest.raises(ConfigError, match=message) as e:
    load.load(folder)
  assert '\n' not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize('path', ['x' * 5000, '~nosuchuser/x', None, b'/tmp', '\0'])
def test_odd_paths_are_one_line(path):
  with pytest.raises(ConfigError) as e:
    load.load(path)
  assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_gguf_files_by_any_name(tmp_path, tokenizer_json):
  folder, model = directory(tmp_path, tokenizer_json)
  path = save.to_gguf(model, tmp_path / 'x.gguf').path
  for name in ('X.GGUF', 'blob'):
    (tmp_path / name).write_bytes(path.read_bytes())
    assert load.load(tmp_path / name).family == 'llama'
  (folder / 'model.safetensors').unlink()
  path.rename(folder / 'x.gguf')                              # a config.json beside it says nothing of weights
  assert load.load(folder).family == 'llama'
  (folder / 'y.gguf').write_bytes(b'')
  with pytest.raises(ConfigError, match='has 2 GGUF files; give one'):
    load.load(folder)


def test_names_without_their_prefix(tmp_path, tokenizer_json):
  """As AutoModel writes them."""
  folder, model = directory(tmp_path, tokenizer_json)
  weights = hf.Weights(folder)
  arrays = {name.removeprefix('model.'): weights.read(name) for name in weights.shapes}
  hf.write_safetensors(folder / 'model.safetensors', {k: x.shape for k, x in arrays.items()}, arrays.get,
                       np.dtype(np.float32))
  np.testing.assert_array_equal(logits(load.load(folder), IDS), logits(model, IDS))


def test_the_command(tmp_path, tokenizer_json, capsys):
  """There, back and on, with one line for what is wrong."""
  folder, model = directory(tmp_path, tokenizer_json)
  convert.main([str(folder), str(tmp_path / 'a b/x.gguf'), '--quantize=q8_0'])
  convert.main([str(tmp_path / 'a b/x.gguf'), str(tmp_path / 'run'), '--to=orbax'])
  assert capsys.readouterr().out.count('read back, logits differ by at most') == 2
  assert load.load(tmp_path / 'run').chat_template == '{{ messages }}'
  for args, message in ((['m', 'm'], 'is there already'), (['m', 'y', '--quantize=q8_0'], 'use --to=gguf'),
                        (['m', 'gs://b/x'], 'expected a local path'), (['none', 'y'], 'no such')):
    out = subprocess.run([sys.executable, '-m', 'llm_jax.convert', *args], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2 and message in out.stderr and out.stderr.count('\n') == 1, out.stderr
  assert not (tmp_path / 'y').exists()
