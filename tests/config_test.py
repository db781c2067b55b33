"""What a config file and a command line may say, and the one line that comes of what they may not."""
import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from llm_jax import config as config_lib
from llm_jax.config import CHOICES, Config, ConfigError, Model, Source, build, diff, override, to_dict
from llm_jax.models import transformer

ROOT = pathlib.Path(__file__).resolve().parents[1]


def group(**groups) -> ConfigDict:
  """The whole config at its defaults, with some keys replaced."""
  config = ConfigDict(dataclasses.asdict(Config()))
  for name, keys in groups.items():
    for key, value in keys.items():
      with config.unlocked():
        config[name][key] = value
  return config


def line(error) -> str:
  text = str(error.value)
  assert '\n' not in text
  return text


# Building -----------------------------------------------------------------------------------------------------------

def test_the_defaults_build():
  assert build(group()) == Config()
  assert build(ConfigDict()) == Config()


@pytest.mark.parametrize('groups, key, hint', [
    (dict(model=dict(layrs=2)), 'config.model.layrs: no such key', "nearest: 'layers'"),
    (dict(train=dict(learning_rate=0.1)), 'config.train.learning_rate: no such key', ''),
    (dict(model=dict(layers='2')), 'config.model.layers: expected int', "got '2'"),
    (dict(model=dict(layers=2.0)), 'config.model.layers: expected int', 'got 2.0'),
    (dict(model=dict(layers=True)), 'config.model.layers: expected int', 'got True'),
    (dict(model=dict(norm_bias=1)), 'config.model.norm_bias: expected bool', 'got 1'),
    (dict(optimizer=dict(b1='x')), 'config.optimizer.b1: expected float', "got 'x'"),
    (dict(model=dict(windows=4)), 'config.model.windows: expected a tuple', 'got 4'),
    (dict(model=dict(windows=(4, 'x'))), 'config.model.windows[1]: expected int', "got 'x'"),
    (dict(data=dict(source='mixture', mixture=({'pth': 'x'},))), 'config.data.mixture[0].pth: no such key', "'path'"),
    (dict(model=dict(mlp='swigul')), "config.model.mlp: 'swigul' is not known", "nearest: 'swiglu'"),
    (dict(optimizer=dict(muon_steps=7)), 'config.optimizer.muon_steps: 7 is not known', 'one of: 3, 4, 5, 6'),
    (dict(optimizer=dict(name='adam')), "config.optimizer.name: 'adam' is not known", "nearest: 'adamw'"),
])
def test_a_wrong_key_type_or_choice_names_itself_and_the_nearest(groups, key, hint):
  values = group().to_dict()
  for name, keys in groups.items():
    values[name].update(keys)
  with pytest.raises(ConfigError) as e:
    build(values)
  assert line(e).startswith(key) and hint in line(e)


@pytest.mark.parametrize('groups, key', [
    (dict(model=dict(width=100, heads=3)), 'config.model.heads: width 100 is not a multiple of 3'),
    (dict(model=dict(heads=4, kv_heads=3)), 'config.model.kv_heads: heads 4 is not a multiple of 3'),
    (dict(model=dict(width=12, heads=4)), 'config.model.head_dim: rotary positions need an even share'),
    (dict(model=dict(rope_scaling='yarn')), 'config.model.rope_original_length'),
    (dict(model=dict(windows=())), 'config.model.windows'),
    (dict(model=dict(windows=(4, -1))), 'config.model.windows'),
    (dict(model=dict(dropout=1.0)), 'config.model.dropout'),
    (dict(model=dict(max_length=128)), 'config.model.max_length: 128 is shorter than data.length 256'),
    (dict(model=dict(layers=0)), 'config.model.layers: expected a positive number'),
    (dict(train=dict(steps=0)), 'config.train.steps'),
    (dict(train=dict(batch_size=32, accumulate=3)), 'config.train.accumulate'),
    (dict(train=dict(loss_chunk=-1)), 'config.train.loss_chunk'),
    (dict(train=dict(objective='masked')), "config.model.attention: objective 'masked' needs 'bidirectional'"),
    (dict(data=dict(source='mixture')), 'config.data.mixture'),
    (dict(data=dict(mixture=({'path': 'x'},))), 'config.data.mixture'),
    (dict(data=dict(source='mixture', mixture=({'weight': 0.0},))), 'config.data.mixture[0]'),
    (dict(data=dict(source='mixture', mixture=({'source': 'text'},))), 'config.data.mixture[0].path'),
    (dict(data=dict(source='mixture', mixture=({'weight': math.inf},))), 'config.data.mixture[0]'),
    (dict(data=dict(source='text')), "config.data.path: source 'text' needs a path"),
    (dict(data=dict(valid='given')), 'config.data.valid_path'),
    (dict(data=dict(valid_fraction=0.0)), 'config.data.valid_fraction'),
    (dict(tokenizer=dict(kind='hf')), 'config.tokenizer.path'),
    (dict(log=dict(profile='13:10')), 'config.log.profile'),
    (dict(log=dict(profile='²:13')), 'config.log.profile'),
    (dict(log=dict(profile='10:13'), train=dict(steps=10)), "config.log.profile: '10:13' starts after the last of 10"),
    (dict(train=dict(steps=3_000_000_000)), 'config.train.steps: expected less than 2**31'),
    (dict(model=dict(kv_heads=-1)), 'config.model.kv_heads: expected 0 or more, got -1'),
    (dict(model=dict(mlp_dim=-4)), 'config.model.mlp_dim'),
    (dict(optimizer=dict(learning_rate=-1e-3)), 'config.optimizer.learning_rate'),
    (dict(optimizer=dict(clip_norm=float('nan'))), 'config.optimizer.clip_norm'),
    (dict(optimizer=dict(b1=2.0)), 'config.optimizer.b1: expected less than 1, got 2.0'),
    (dict(train=dict(ema=1.0)), 'config.train.ema: expected less than 1'),
    (dict(checkpoint=dict(every=-1)), 'config.checkpoint.every'),
    (dict(data=dict(workers=-1)), 'config.data.workers'),
    (dict(eval=dict(batches=0)), 'config.eval.batches: expected a positive number'),
    (dict(eval=dict(top_p=0.0)), 'config.eval.top_p'),
    (dict(tokenizer=dict(vocab_size=0)), 'config.tokenizer.vocab_size'),
    (dict(model=dict(rope_fraction=1.5)), 'config.model.rope_fraction: expected at most 1'),
    (dict(model=dict(rope_factor=0.0)), 'config.model.rope_factor'),
    (dict(model=dict(rope_scaling='llama3', rope_original_length=64, rope_low_freq=4.0)), 'config.model.rope_low_freq'),
    (dict(model=dict(positions='sinusoidal', width=63, heads=3)), 'config.model.width: sinusoidal'),
])
def test_contradictions_are_refused(groups, key):
  with pytest.raises(ConfigError) as e:
    build(group(**groups))
  assert line(e).startswith(key)


def test_whole_numbers_are_floats_where_a_float_is_meant():
  config = build(group(model=dict(windows=[4, 0])).to_dict() | dict(optimizer=dict(weight_decay=1)))
  assert config.model.windows == (4, 0) and hash(config.model)
  assert type(config.optimizer.weight_decay) is float


@given(st.fixed_dictionaries(dict(
    layers=st.integers(1, 200), heads=st.sampled_from([1, 2, 4]),
    windows=st.lists(st.integers(0, 9), min_size=1).map(tuple),
    rope_base=st.floats(1, 1e9), tied_embeddings=st.booleans(), mlp=st.sampled_from(CHOICES['model.mlp']))),
    st.lists(st.builds(Source, source=st.sampled_from(['text', 'jsonl']), path=st.text(min_size=1),
                       weight=st.floats(0.1, 9)),
             max_size=2).map(tuple), st.text(), st.lists(st.text(), max_size=3).map(tuple))
@settings(max_examples=60, deadline=None)
def test_to_dict_and_back(model, mixture, path, prompts):
  config = Config()
  data = dataclasses.replace(config.data, source='mixture' if mixture else 'stdlib', mixture=mixture, path=path)
  config = dataclasses.replace(config, model=Model(**model), data=data,
                               eval=dataclasses.replace(config.eval, prompts=prompts))
  assert build(to_dict(config)) == config
  assert build(json.loads(json.dumps(to_dict(config)))) == config
  assert diff(config, build(to_dict(config))) == {}


def test_diff_names_what_differs():
  a, b = build(group()), build(group(model=dict(layers=7), train=dict(seed=3)))
  assert diff(a, b) == {'model.layers': (4, 7), 'train.seed': (0, 3)}


def test_derive_fills_what_is_zero():
  derived = config_lib.derive(Model(width=96, heads=3), vocab_size=65, length=32)
  assert (derived.head_dim, derived.kv_heads, derived.mlp_dim) == (32, 3, 384)
  assert (derived.vocab_size, derived.max_length) == (128, 32)
  assert config_lib.derive(derived, vocab_size=500, length=64) == derived


# Overriding ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('key, text, value', [
    ('model.layers', '2', 2), ('model.layers', '1e2', 100), ('train.z_loss', '1', 1.0), ('train.z_loss', '1e-4', 1e-4),
    ('log.tensorboard', 'false', False), ('log.tensorboard', 'True', True), ('log.tensorboard', '0', False),
    ('model.windows', '(4, 0)', (4, 0)), ('model.windows', '[4, 0]', (4, 0)), ('model.windows', '512', (512,)),
    ('data.path', '123', '123'), ('data.path', '', ''), ('eval.prompts', "['a', 'b']", ('a', 'b')),
    ('eval.prompts', 'def main(', ('def main(',)), ('init_from', 'runs/x', 'runs/x'),
    ('data.mixture', "[{'source': 'text', 'path': 'a'}, {'path': 'b'}]", (Source('text', 'a'), Source(path='b'))),
    ('data.mixture', "{'source': 'text', 'path': 'a'}", (Source('text', 'a'),)),
])
def test_override_reads_the_type_the_key_has(key, text, value):
  config = group()
  override(config, key, text)
  if key == 'data.mixture':
    config.data.source = 'mixture'
  node = build(config)
  for part in key.split('.'):
    node = getattr(node, part)
  assert node == value and type(node) is type(value)


@pytest.mark.parametrize('key, text, message', [
    ('model.layrs', '2', "--config.model.layrs: no such key 'layrs'; nearest: 'layers'"),
    ('modle.layers', '2', "--config.modle.layers: no such key 'modle'; nearest: 'model'"),
    ('model.layers.x', '2', "--config.model.layers.x: no such key 'x'"),
    ('train', '2', '--config.train: is a group; set one of its keys: accumulate'),
    ('model.layers', 'two', "--config.model.layers: expected int, got 'two'"),
    ('model.layers', '2.5', "--config.model.layers: expected int, got '2.5'"),
    ('model.layers', 'True', "--config.model.layers: expected int, got 'True'"),
    ('log.tensorboard', 'yes', "--config.log.tensorboard: expected bool, got 'yes'"),
    ('train.steps', '{[]: 1}', '--config.train.steps: expected int'),
    ('optimizer.b1', 'x', "--config.optimizer.b1: expected float, got 'x'"),
    ('model', 'lama3_8b', "config.model: no preset 'lama3_8b'; nearest: 'llama3_8b'"),
])
def test_a_wrong_override_names_the_flag(key, text, message):
  with pytest.raises(ConfigError) as e:
    override(group(), key, text)
  assert line(e).startswith(message)


@pytest.mark.parametrize('text', ['llama3_8b', "preset('llama3_8b')"])
def test_a_preset_by_name_then_a_key(text):
  config = group(data=dict(length=512))
  override(config, 'model', text)
  override(config, 'model.layers', '2')
  built = build(config)
  assert (built.model.width, built.model.layers, built.model.kv_heads, built.data.length) == (4096, 2, 8, 512)


# Files and errors ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', sorted(str(p) for p in (ROOT / 'configs').glob('*.py')))
def test_every_config_file_builds(path):
  build(config_lib.load_file(path))


def test_base_has_every_key_once():
  """configs/base.py is where the keys are documented: none is missing there."""
  def keys(node, prefix=''):
    return {k for name, value in node.items() for k in (keys(value, f'{prefix}{name}.') if isinstance(value, dict)
                                                        else [prefix + name])}
  assert keys(config_lib.load_file(str(ROOT / 'configs/base.py')).to_dict()) == keys(to_dict(Config()))


def test_load_file(tmp_path):
  path = tmp_path / 'a.py'
  path.write_text('from ml_collections import ConfigDict\n'
                  'def get_config(size="small"):\n  return ConfigDict(dict(init_from=size))\n')
  assert config_lib.load_file(str(path)).init_from == 'small'
  assert config_lib.load_file(f'{path}:large').init_from == 'large'
  for text, message in {'def get_config(:': 'SyntaxError', 'import absent_module': "No module named 'absent_module'",
                        'x = 1': 'has no get_config()', 'def get_config(a, b): pass': 'TypeError'}.items():
    path.write_text(text)
    with pytest.raises(ConfigError, match='--config: ') as e:
      config_lib.load_file(str(path))
    assert message in line(e) and str(path) in line(e)
  with pytest.raises(ConfigError, match="--config: no file 'absent.py'"):
    config_lib.load_file('absent.py')


@pytest.mark.parametrize('error', [ConfigError('config.x: two\nlines'), FileNotFoundError(2, 'No such file', 'a.txt')])
def test_errors_become_one_line_and_status_2(error, capsys):
  for debug in (False, True):
    with pytest.raises(SystemExit) as e:
      with config_lib.one_line_errors(debug):
        raise error
    assert e.value.code == 2
    err = capsys.readouterr().err
    expected = 'config.x: two lines' if 'config' in str(error) else 'a.txt: No'
    assert err.splitlines()[-1].startswith('error: ' + expected)
    assert ('Traceback' in err) == debug and (debug or err.count('\n') == 1)


def test_a_bug_is_not_hidden():
  with pytest.raises(ZeroDivisionError), config_lib.one_line_errors():
    raise ZeroDivisionError


def test_importing_the_package_starts_no_jax():
  code = 'import sys, llm_jax; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize('body', ['x = y', 'raise KeyError("k")', 'def get_config():\n  return {}["k"]', 'x ='])
def test_a_config_file_that_fails_is_one_line(body, tmp_path):
  (tmp_path / 'mine.py').write_text(body)
  with pytest.raises(ConfigError, match='--config: .*mine.py failed: (NameError|KeyError|SyntaxError)'):
    config_lib.load_file(str(tmp_path / 'mine.py'))


def test_a_config_without_groups_is_refused():
  with pytest.raises(ConfigError, match='expected a group of keys, got None'):
    build(None)


def test_one_dial_sets_the_whole_run():
  """Compute-optimal: 20 tokens a parameter, unless it says otherwise; deeper is wider, longer and in larger batches."""
  before = None
  for depth in (1, 2, 4, 8, 12, 13, 24):
    cfg = config_lib.build(config_lib.load_file(f'{ROOT}/configs/depth.py:{depth}'))
    shape = config_lib.derive(dataclasses.replace(cfg.model, vocab_size=64))
    blocks = jax.eval_shape(lambda key, shape=shape: transformer.init(shape, key), jax.random.key(0))['blocks0']
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.data.length
    if depth > 2:                                  # a run has 100 steps at least
      assert 0.97 < tokens / (20 * transformer.count(blocks)) < 1.03
    now = (cfg.model.layers, cfg.model.width, cfg.train.batch_size * cfg.data.length, tokens)
    assert before is None or all(a >= b for a, b in zip(now, before)) and now[1] == 64 * depth
    before = now
  longer = config_lib.build(config_lib.load_file(f'{ROOT}/configs/depth.py:4,80'))
  assert longer.train.steps * longer.train.batch_size > 3.9 * 960 * 256
  for wrong in ('0', 'x', '4,x', '200'):
    with pytest.raises(ConfigError, match='depth.py'):
      config_lib.load_file(f'{ROOT}/configs/depth.py:{wrong}')
