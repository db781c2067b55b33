"""llm_jax.load and what notebooks do with the model, on real checkpoints; and that importing llm_jax costs nothing."""
import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import llm_jax
from llm_jax import checkpoint, sharding
from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import transformer

LETTERS = tokenizer_lib.Char('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567é')
CONFIG = config_lib.Config(
    model=config_lib.Model(layers=1, width=32, heads=4, tied_embeddings=False),   # the rest is left to derive
    data=config_lib.Data(source='text', path='corpus', length=32),
    tokenizer=config_lib.Tokenizer(kind='char'), mesh=config_lib.Mesh(fsdp=1))


def save(workdir, config=CONFIG, steps=(3, 5), tokenizer=LETTERS):
  """A run directory whose parameters and moving average at step s are drawn from seeds s and 100 + s."""
  shape = config_lib.derive(config.model, tokenizer.vocab_size, config.data.length)
  tokenizer.save(workdir / 'tokenizer')
  with checkpoint.Checkpointer(workdir, 9, config_lib.to_dict(config)) as checkpoints:
    for s in steps:
      checkpoints.save(s, dict(step=np.int32(s), params=tiny.params(shape, s), ema=tiny.params(shape, 100 + s)))
  return shape


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(run directory, its derived Model)."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, save(workdir)


@pytest.fixture(scope='module')
def model(run):
  return llm_jax.load(run[0])


def test_import_starts_nothing_and_takes_less_than_a_second():
  code = ('import sys, time; t = time.process_time(); import llm_jax; t = time.process_time() - t\n'
          'print(t, llm_jax.__version__, [m for m in ("jax", "flax", "orbax", "grain", "numpy") if m in sys.modules])')
  seconds, version, heavy = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                           check=True).stdout.split(maxsplit=2)
  assert float(seconds) < 1 and heavy.strip() == '[]' and version == llm_jax.__version__


def test_logits_are_the_models(run, model):
  token_BT = tiny.tokens(0, 2, 9)
  expected = transformer.bind(run[1], tiny.params(run[1], 5))(jax.numpy.asarray(token_BT))
  for given in (token_BT, token_BT.tolist(), jax.numpy.asarray(token_BT), token_BT.astype(np.uint8)):
    logits_BTV = model.logits(given)
    assert isinstance(logits_BTV, jax.Array) and logits_BTV.dtype == 'float32' and logits_BTV.shape == (2, 9, 64)
    np.testing.assert_allclose(logits_BTV, expected, atol=1e-5)
  assert model.config == CONFIG and model.tokenizer.decode([0, 60]) == 'aé'


def test_step_ema_and_one_step_folder(run):
  workdir, shape = run
  for loaded, seed in ((llm_jax.load(str(workdir)), 5), (llm_jax.load(workdir, step=3), 3),
                       (llm_jax.load(workdir, ema=True), 105), (llm_jax.load(workdir / 'checkpoints' / '3'), 3)):
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny.params(shape, seed))


def test_dtype_is_what_is_computed_in(run, model):
  token_BT = tiny.tokens(0, 1, 9)
  half = llm_jax.load(run[0], dtype='bfloat16')
  assert half.logits(token_BT).dtype == 'float32'
  difference = np.abs(half.logits(token_BT) - model.logits(token_BT)).max()
  assert 1e-4 < difference < 0.5
  with pytest.raises(ConfigError, match="'bf16' is not known; nearest: 'bfloat16'"):
    llm_jax.load(run[0], dtype='bf16')


def test_generate_is_greedy_by_default_and_takes_a_text_or_several(model):
  text, = model.generate('abc', max_tokens=12)
  ids = [0, 1, 2]
  for c in text:                                           # no padded id (61 to 63) either, though these are random
    ids.append(int(model.logits(np.pad([ids], ((0, 0), (0, 15 - len(ids)))))[0, len(ids) - 1, :61].argmax()))
    assert LETTERS.decode(ids[-1:]) == c
  assert len(text) == 12
  several = model.generate(['abc', 'Zq'], max_tokens=12)
  assert several[0] == text and len(several) == 2
  with pytest.raises(ConfigError, match=r"top_q: no such option; nearest: 'top_[kp]'"):
    model.generate('abc', top_q=1)


def every_tap(shape, params, token_BT):
  def taps_of(params, token_BT):
    taps = {}
    transformer.bind(shape, params).hidden(token_BT, taps=taps)
    return taps
  return tiny.quick_jit(taps_of)(params, token_BT)


def test_attention_and_activations(tmp_path):
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=11, width=8, heads=2))
  shape = save(tmp_path, config, steps=(1,))
  model = llm_jax.load(tmp_path)
  token_BT = tiny.tokens(1, 2, 6)
  weight_LBNTS = np.asarray(model.attention(token_BT))
  assert weight_LBNTS.shape == (11, 2, 2, 6, 6)
  np.testing.assert_allclose(weight_LBNTS.sum(-1), 1, atol=1e-5)
  assert not np.triu(weight_LBNTS, 1).any()
  taps = every_tap(shape, tiny.params(shape, 1), token_BT)
  names = ['layer10/mlp', 'layer2/residual', 'layer2/attention_weights', 'layer0/attention']
  found = model.activations(token_BT, names)
  assert list(found) == names
  for name in names:
    np.testing.assert_allclose(found[name], taps[name], atol=1e-4)
  for layer in (2, 10):                                    # in order of depth, not of name
    np.testing.assert_allclose(weight_LBNTS[layer], taps[f'layer{layer}/attention_weights'], atol=1e-5)
  with pytest.raises(ConfigError, match=r"no 'layer3/mpl'; nearest: 'layer3/mlp'; there are layer0 to layer10, each"):
    model.activations(token_BT, ['layer3/mpl'])


def test_loaded_onto_a_mesh(run, model):
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  token_BT = tiny.tokens(0, 3, 9)                          # three rows on four ways
  logits_BTV, texts = model.logits(token_BT), model.generate(['abc', 'Zq'], max_tokens=8)
  with jax.set_mesh(mesh):
    meshed = llm_jax.load(run[0])
    w = meshed.params['blocks0']['mlp']['w_up_DF']
    assert w.sharding.shard_shape(w.shape) == (1, 16, 64)
    np.testing.assert_allclose(meshed.logits(token_BT), logits_BTV, atol=1e-4)
    assert meshed.attention(token_BT).shape == (1, 3, 4, 9, 9)
    assert meshed.generate(['abc', 'Zq'], max_tokens=8) == texts


@pytest.mark.parametrize('tokens,message', [
    ([1, 2, 3], r'expected rows of token ids, int \[B, T\], got int64 \(3,\)'), ([[1, 2], [3]], 'of several lengths'),
    ([[0.5]], r'int \[B, T\], got float64'), ([[]], r'int \[B, T\]'), ([[0, -1]], 'ids -1 to 0, expected 0 to 60'),
    ([[61, 7]], 'ids 7 to 61, expected 0 to 60'), ([[0] * 33], '33 tokens a row, the model reads at most 32')])
def test_tokens_the_model_cannot_read(model, tokens, message):
  with pytest.raises(ConfigError, match=message):
    model.logits(tokens)
  with pytest.raises(ConfigError, match=message):
    model.attention(tokens)
