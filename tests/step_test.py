"""The training step: golden metrics, accumulation, steps that must change nothing, objectives, optimizers, dtypes."""
import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import quick_jit

from llm_jax import config as config_lib
from llm_jax.data import batches as batches_lib
from llm_jax.data import store
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import step as step_lib

B, T, V = 8, 16, 64
BYTE = tokenizer_lib.build(config_lib.Tokenizer(kind='byte'), ())


def config(**groups):
  """A tiny config; keyword arguments are groups of changed keys."""
  base = dict(model=dict(vocab_size=V, layers=2, width=32, heads=4, mlp_dim=64), data=dict(length=T),
              train=dict(batch_size=B, steps=100),
              optimizer=dict(learning_rate=1e-2, schedule='constant', warmup_steps=0))
  kinds = dict(model=config_lib.Model, data=config_lib.Data, train=config_lib.Train, optimizer=config_lib.Optimizer)
  return config_lib.check(config_lib.Config(**{
      name: kind(**{**base[name], **groups.get(name, {})}) for name, kind in kinds.items()}))


def batch_of(seed=0, rows=B):
  """Random tokens; the rows have very different numbers of targets, and one row has none."""
  rng = np.random.default_rng(seed)
  token = rng.integers(0, V, (rows, T + 1)).astype(np.int32)
  mask = (rng.random((rows, T)) < np.linspace(0, 1, rows)[:, None]).astype(np.float32)
  return dict(token_BT=token[:, :-1].copy(), target_BT=token[:, 1:].copy(), mask_BT=mask)


def start(cfg, tx=None):
  """(state, jitted step) of a config; `tx` replaces its optimizer."""
  model = config_lib.derive(cfg.model, V, cfg.data.length)
  key = jax.random.key(cfg.train.seed)
  tx = tx or optimizer_lib.make(cfg.optimizer, jax.eval_shape(lambda: step_lib.transformer.init(model, key)))
  state = initial(cfg, model, tx)
  return state, quick_jit(step_lib.make_train_step(cfg, model, tx, 'xla'))


@functools.cache
def initial(cfg, model, tx):
  return quick_jit(lambda key: step_lib.init_state(cfg, model, tx, key))(jax.random.key(cfg.train.seed))


KEEP = optax.GradientTransformation(      # an optimizer that keeps the gradients, to the last bit, and changes nothing
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads))


def gradients(cfg, batch, step=0):
  """({leaf: gradient}, metrics) of one step."""
  state, run = start(cfg, KEEP)
  state = dict(state, step=jnp.int32(step))
  state, metrics = run(state, batch)
  return leaves(state['opt_state']), metrics


def leaves(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_gradients_equal(got, wanted, tolerance=1e-6):
  """Per leaf, to `tolerance` of its norm."""
  assert got.keys() == wanted.keys()
  for name, g in wanted.items():
    norm = np.linalg.norm(g)
    assert norm > 0, f'{name}: a gradient of zero proves nothing'
    assert np.linalg.norm(got[name] - g) <= tolerance * norm, name


def bits(tree):
  return {name: (x.dtype, x.tobytes()) for name, x in leaves(tree).items()}


def test_golden_metrics_of_one_step():
  """If you did not mean to change behaviour, this is a bug."""
  cfg = config(train=dict(z_loss=1e-3, label_smoothing=0.1, ema=0.9, accumulate=2), model=dict(mlp='swiglu', kv_heads=2))
  state, run = start(cfg)
  state, metrics = run(state, batch_of())
  got = {name: float(value) for name, value in metrics.items()}
  got |= {'params/norm': float(optax.tree.norm(state['params'])), 'ema/norm': float(optax.tree.norm(state['ema']))}
  golden = {}
  assert got.keys() == golden.keys()
  for name, value in golden.items():
    assert got[name] == pytest.approx(value, rel=1e-5), f'{name}; all: {got}'


@pytest.mark.parametrize('changes', [
    dict(), dict(z_loss=1e-2, label_smoothing=0.1), dict(loss_chunk=4)], ids=['plain', 'z and smoothing', 'chunked'])
def test_accumulation_gives_the_gradients_and_metrics_of_the_large_batch(changes):
  batch = batch_of()
  wanted, large = gradients(config(train=changes), batch)
  counts = [float(batch['mask_BT'][i::4].sum()) for i in range(4)]
  assert len(set(counts)) == 4                              # else a mean of means would pass
  for parts in (2, 4, 8):
    got, small = gradients(config(train=dict(changes, accumulate=parts)), batch)
    assert_gradients_equal(got, wanted)
    for name in large:
      assert float(small[name]) == pytest.approx(float(large[name]), rel=1e-6), name


def test_accumulation_in_bfloat16_is_coarser_but_the_same():
  wanted, _ = gradients(config(), batch_of())
  got, _ = gradients(config(train=dict(accumulate=4, accumulate_dtype='bfloat16')), batch_of())
  assert_gradients_equal(got, wanted, 2e-2)
  assert all(g.dtype == np.float32 for g in got.values())
  with pytest.raises(AssertionError):                       # the key does something
    assert_gradients_equal(got, wanted, 1e-5)


@pytest.mark.parametrize('changes', [
    dict(remat='dots'), dict(remat='full'), dict(unroll=False), dict(unroll=False, remat='full')], ids=str)
def test_remat_and_unroll_change_nothing(changes):
  """With dropout on: what is computed again has the same masks."""
  with jax.default_matmul_precision('highest'):
    wanted, first = gradients(config(model=dict(dropout=0.2, layers=3)), batch_of())
    got, second = gradients(config(model=dict(dropout=0.2, layers=3, **changes)), batch_of())
  assert_gradients_equal(got, wanted)
  assert float(first['loss/train']) == pytest.approx(float(second['loss/train']), rel=1e-6)


def test_chunked_loss_changes_nothing():
  wanted, first = gradients(config(train=dict(z_loss=1e-3)), batch_of())
  got, second = gradients(config(train=dict(z_loss=1e-3, loss_chunk=4)), batch_of())
  assert_gradients_equal(got, wanted)
  for name in first:
    assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-6), name


def test_dropout_is_a_function_of_seed_step_and_microbatch():
  with_dropout = config(model=dict(dropout=0.3))
  batch = batch_of()
  same = dict(batch, **{name: np.repeat(x[5:6], B, 0) for name, x in batch.items()})   # eight equal rows
  loss = lambda cfg, step, batch: float(gradients(cfg, batch, step=step)[1]['loss/train'])
  first = loss(with_dropout, 0, batch)
  assert loss(with_dropout, 0, batch) == first
  assert loss(with_dropout, 1, batch) != first
  assert loss(dataclasses.replace(with_dropout, train=dataclasses.replace(with_dropout.train, seed=1)), 0, batch) != first
  assert loss(config(), 0, batch) == loss(config(), 1, batch)
  once, _ = gradients(with_dropout, {name: x[:1] for name, x in same.items()})
  twice, _ = gradients(config(model=dict(dropout=0.3), train=dict(batch_size=2, accumulate=2)),
                       {name: x[:2] for name, x in same.items()})
  with pytest.raises(AssertionError):                       # the second microbatch has masks of its own
    assert_gradients_equal(twice, once, 1e-3)


def poisoned(how):
  """(params -> params, batch -> batch) that make one step unusable."""
  def nan(params):
    return jax.tree.map(lambda x: x, dict(params, embed_VD=params['embed_VD'].at[0, 0].set(jnp.nan)))

  def tiny(params):     # loss finite, gradients up to 1e25: their squares overflow
    return dict(params, embed_VD=params['embed_VD'] * 1e-25)
  same = lambda x: x
  return {'nan in the parameters': (nan, same), 'overflowing gradients': (tiny, same),
          'infinite mask': (same, lambda b: dict(b, mask_BT=np.where(b['mask_BT'] > 0, np.inf, 0).astype(np.float32))),
          'no tokens': (same, lambda b: dict(b, mask_BT=np.zeros_like(b['mask_BT'])))}[how]


@pytest.mark.parametrize('how', ['nan in the parameters', 'overflowing gradients', 'infinite mask', 'no tokens'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_an_unusable_step_changes_no_bit_and_is_counted(how, accumulate):
  cfg = config(train=dict(ema=0.9, accumulate=accumulate), model=dict(tied_embeddings=False, norm_eps=1e-45))
  state, run = start(cfg)
  state, metrics = run(state, batch_of(1))                  # moments that are not zero
  assert metrics['step/skipped'] == 0
  spoil_params, spoil_batch = poisoned(how)
  state['params'] = spoil_params(state['params'])
  after, metrics = run(state, spoil_batch(batch_of(2)))
  assert metrics['step/skipped'] == 1
  assert int(after['step']) == int(state['step']) + 1
  for part in ('params', 'opt_state', 'ema', 'horizon'):
    assert bits(after[part]) == bits(state[part]), part
  if how == 'overflowing gradients':
    assert np.isfinite(metrics['loss/train']) and not np.isfinite(metrics['grads/norm'])
  if how in ('infinite mask', 'no tokens'):                 # the state is sound: the next step trains
    again, metrics = run(after, batch_of(3))
    assert metrics['step/skipped'] == 0
    assert np.isfinite(optax.tree.norm(again['params']))
    assert bits(again['params']) != bits(after['params'])


def test_one_program_for_every_step():
  state, run = start(config(model=dict(dropout=0.1), train=dict(ema=0.9)))
  for i in range(4):
    state, _ = run(dict(state, horizon=jnp.asarray(100 + i, jnp.int32)), batch_of(i))
  # The first call's arrays are uncommitted; from the second on nothing may differ.
  assert run._cache_size() == 1


def test_metrics_are_what_they_say():
  cfg = config(train=dict(label_smoothing=0.2, z_loss=0.01), optimizer=dict(warmup_steps=10, schedule='linear'))
  state, run = start(cfg)
  batch = batch_of()
  model = step_lib.transformer.bind(config_lib.derive(cfg.model, V, T), state['params'])
  logits = np.asarray(model(batch['token_BT']), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  mask = batch['mask_BT']
  ce = -np.take_along_axis(logp, batch['target_BT'][..., None], -1)[..., 0]
  _, metrics = run(state, batch)
  assert float(metrics['loss/train']) == pytest.approx((ce * mask).sum() / mask.sum(), rel=1e-5)
  z = 0.01 * np.log(np.exp(logits).sum(-1)) ** 2
  assert float(metrics['loss/z']) == pytest.approx((z * mask).sum() / mask.sum(), rel=1e-4)
  hits = (logits.argmax(-1) == batch['target_BT']) * mask
  assert float(metrics['accuracy']) == pytest.approx(hits.sum() / mask.sum(), abs=1e-6)
  assert float(metrics['tokens']) == mask.sum()
  assert float(metrics['optimizer/learning_rate']) == pytest.approx(0.1 * 1e-2, rel=1e-6)
  sums = step_lib.make_eval_step(cfg, config_lib.derive(cfg.model, V, T), 'xla')(state['params'], batch)
  assert float(sums['loss/ce']) == pytest.approx((ce * mask).sum(), rel=1e-5)
  assert float(sums['loss/z']) == 0


def test_evaluation_has_no_dropout():
  cfg = config(model=dict(dropout=0.5))
  state, _ = start(cfg)
  evaluate = lambda cfg: step_lib.make_eval_step(cfg, config_lib.derive(cfg.model, V, T), 'xla')(
      state['params'], batch_of())['loss/ce']
  assert evaluate(cfg) == evaluate(config())


def test_ema_follows_the_parameters():
  cfg = config(train=dict(ema=0.5))
  state, run = start(cfg)
  ema = leaves(state['ema'])
  assert bits(state['ema']) == bits(state['params'])
  for step in range(3):
    state, _ = run(state, batch_of(step))
    d = min(0.5, (1 + step) / (10 + step))
    ema = {name: d * ema[name] + (1 - d) * x for name, x in leaves(state['params']).items()}
    for name, x in leaves(state['ema']).items():
      np.testing.assert_allclose(x, ema[name], rtol=1e-5, atol=1e-7)


# Learning ------------------------------------------------------------------------------------------------------------

@functools.cache
def corpus():
  """Documents of an easy language, in files."""
  import pathlib
  import tempfile
  folder = pathlib.Path(tempfile.mkdtemp())
  rng = random.Random(0)
  nouns, verbs = ('the cat', 'a dog', 'the old man', 'my house'), ('sees', 'likes', 'finds')
  for i in range(40):
    lines = (f'{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}.\n' for _ in range(40))
    (folder / f'{i}.txt').write_text(''.join(lines))
  return folder


def learn(steps=60, **groups):
  """(validation loss before, after, state) of a short training run."""
  cfg = config(**groups | dict(
      model=dict(vocab_size=0, max_length=0) | groups.get('model', {}),
      data=dict(source='text', path=str(corpus()), length=32, valid_fraction=0.2) | groups.get('data', {})))
  stores = store.prepare(cfg.data, BYTE, corpus().with_suffix('.cache'), 'none')
  batches = batches_lib.Batches(stores.train, stores.weights, cfg.data, cfg.train, BYTE)
  held_out = batches_lib.EvalBatches(stores.valid[0], cfg.data, B, BYTE, cfg.train.objective)
  model = config_lib.derive(cfg.model, BYTE.vocab_size, cfg.data.length)
  cfg = dataclasses.replace(cfg, model=model)
  evaluate = quick_jit(step_lib.make_eval_step(cfg, model, 'xla'))

  def valid(params):
    sums = [evaluate(params, held_out[i]) for i in range(min(len(held_out), 16))]
    return sum(float(s['loss/ce']) for s in sums) / sum(float(s['tokens']) for s in sums)

  state, run = start(cfg)
  before = valid(state['params'])
  for step in range(steps):
    state, metrics = run(state, batches(step))
    assert metrics['step/skipped'] == 0
  return before, valid(state['params']), state


@pytest.mark.parametrize('objective, attention, packing', [
    ('causal', 'causal', 'pack'), ('prefix', 'prefix', 'pack'), ('masked', 'bidirectional', 'concat'),
    ('span', 'prefix', 'concat')])
def test_each_objective_lowers_its_validation_loss(objective, attention, packing):
  """From about ln 320 = 5.8 to below the 2.7 of a model that knows only how often each letter comes."""
  before, after, _ = learn(100 if objective in ('masked', 'span') else 60, train=dict(objective=objective),
                           model=dict(attention=attention), data=dict(packing=packing))
  assert before > 5
  assert after < 2.7


@pytest.mark.parametrize('name, rates', [
    ('adamw', dict(learning_rate=1e-2)), ('adafactor', dict(learning_rate=1e-2)), ('lion', dict(learning_rate=1e-3)),
    ('muon', dict(learning_rate=1e-2, matrix_learning_rate=0.02))])
def test_each_optimizer_lowers_the_loss(name, rates):
  before, after, state = learn(40, optimizer=dict(name=name, **rates))
  assert after < 0.6 * before
  assert int(state['step']) == 40


def test_bfloat16_compute_has_float32_masters():
  before, after, state = learn(60, model=dict(dtype='bfloat16'), train=dict(accumulate=2))
  assert after < 0.5 * before
  for part in ('params', 'opt_state'):
    for name, x in leaves(state[part]).items():
      assert x.dtype in (np.float32, np.int32), name
      assert np.isfinite(x).all(), name
  cfg = config(model=dict(dtype='bfloat16'))
  low, _ = gradients(cfg, batch_of())
  high, _ = gradients(config(), batch_of())
  assert_gradients_equal(low, high, 0.1)
  with pytest.raises(AssertionError):                       # it does compute in bfloat16
    assert_gradients_equal(low, high, 1e-4)
