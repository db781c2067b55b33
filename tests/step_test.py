"""The training step: golden metrics, accumulation, steps that must change nothing, objectives, optimizers, dtypes."""
import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llm_jax import config as config_lib
from llm_jax.data import batches as batches_lib
from llm_jax.data import store
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import layers
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import step as step_lib

B, T, V = 8, 16, 64
BYTE = tokenizer_lib.build(config_lib.Tokenizer(kind='byte'), ())


def config(**groups):
  """A tiny config; keyword arguments are groups of changed keys."""
  base = dict(model=dict(vocab_size=V, layers=2, width=32, heads=4, mlp_dim=64, unroll=False), data=dict(length=T),
              train=dict(batch_size=B, steps=100),
              optimizer=dict(learning_rate=1e-2, schedule='constant', warmup_steps=0))
  kinds = dict(model=config_lib.Model, data=config_lib.Data, train=config_lib.Train, optimizer=config_lib.Optimizer)
  return config_lib.check(config_lib.Config(**{
      name: kind(**{**base[name], **groups.get(name, {})}) for name, kind in kinds.items()}))


HARD = config(model=dict(mlp='swiglu', kv_heads=2, tied_embeddings=False, dropout=0.1),
              train=dict(z_loss=1e-3, label_smoothing=0.1, ema=0.9, accumulate=2))


def batch_of(seed=0):
  """Random tokens; the rows have very different numbers of targets, and one row has none."""
  rng = np.random.default_rng(seed)
  token = rng.integers(0, V, (B, T + 1)).astype(np.int32)
  mask = (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32)
  return dict(token_BT=token[:, :-1].copy(), target_BT=token[:, 1:].copy(), mask_BT=mask)


KEEP = optax.GradientTransformation(      # an optimizer that keeps the gradients, to the last bit, and changes nothing
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads))


@functools.cache
def compiled(cfg, tx=None):
  """(abstract state -> initial state, jitted step) of a config; `tx` replaces its optimizer."""
  model = config_lib.derive(cfg.model, V, cfg.data.length)
  tx = tx or optimizer_lib.make(cfg.optimizer, tiny.shapes(model))
  return (functools.partial(step_lib.init_state, cfg, model, tx),
          tiny.quick_jit(step_lib.make_train_step(cfg, model, tx, 'xla')))


def start(cfg, tx=None):
  """(state, jitted step); the parameters are drawn by NumPy, which costs no compilation."""
  init, run = compiled(cfg, tx)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    dims = leaf.shape[1:] if 'blocks' in jax.tree_util.keystr(path) else leaf.shape
    values = rng.normal(0, np.prod(dims[:-1], initial=1) ** -0.5, leaf.shape) if len(dims) > 1 else np.ones(leaf.shape)
    return jnp.asarray(values, leaf.dtype)
  abstract = jax.eval_shape(init, jax.random.key(0))
  params = jax.tree_util.tree_map_with_path(draw, abstract['params'])
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
  state |= dict(params=params, horizon=jnp.int32(cfg.train.steps))
  return state | (dict(ema=params) if 'ema' in state else {}), run


def gradients(cfg, batch, step=0):
  """({leaf: gradient}, metrics) of one step."""
  state, run = start(cfg, KEEP)
  state, metrics = run(dict(state, step=jnp.int32(step)), batch)
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
  init, run = compiled(HARD)
  state = tiny.quick_jit(init)(jax.random.key(HARD.train.seed))
  state, metrics = run(state, batch_of())
  got = {name: float(value) for name, value in metrics.items()}
  got |= {'params/norm': float(optax.tree.norm(state['params'])), 'ema/norm': float(optax.tree.norm(state['ema']))}
  golden = {'loss/train': 5.0731449, 'loss/z': 0.022460187, 'accuracy': 0.0, 'grads/norm': 13.688582, 'tokens': 61.0,
            'optimizer/learning_rate': 0.01, 'step/skipped': 0.0, 'params/norm': 25.527248, 'ema/norm': 25.524590}
  assert got.keys() == golden.keys()
  for name, value in golden.items():
    assert got[name] == pytest.approx(value, rel=1e-5), f'{name}; all: {got}'


CHUNKED = dict(z_loss=1e-2, label_smoothing=0.1, loss_chunk=48)


@pytest.mark.parametrize('changes', [dict(), CHUNKED], ids=['plain', 'chunked, z and smoothing'])
def test_accumulation_gives_the_gradients_and_metrics_of_the_large_batch(changes):
  batch = batch_of()
  wanted, large = gradients(config(train=changes), batch)
  counts = [float(batch['mask_BT'][i::4].sum()) for i in range(4)]
  assert len(set(counts)) == 4                              # else a mean of means would pass
  got, small = gradients(config(train=dict(changes, accumulate=4)), batch)
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


def test_chunked_loss_changes_nothing():
  plain = dict(CHUNKED, loss_chunk=0)
  wanted, first = gradients(config(train=plain), batch_of())
  got, second = gradients(config(train=CHUNKED), batch_of())
  assert_gradients_equal(got, wanted)
  for name in first:
    assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-6), name


DROPOUT = dict(dropout=0.2, layers=3)


@pytest.mark.parametrize('changes', [dict(unroll=True), dict(remat='full'), dict(remat='offload'), pytest.param(
    dict(remat='dots', unroll=True), marks=pytest.mark.slow)], ids=str)
def test_remat_and_unroll_change_nothing(changes):
  """With dropout on: what is computed again has the same masks."""
  wanted, first = gradients(config(model=DROPOUT), batch_of())
  got, second = gradients(config(model=dict(DROPOUT, **changes)), batch_of())
  assert_gradients_equal(got, wanted)
  assert float(first['loss/train']) == pytest.approx(float(second['loss/train']), rel=1e-6)


def test_dropout_is_a_function_of_step_and_microbatch():
  cfg = config(model=DROPOUT)
  same = {name: np.repeat(x[5:6], B, 0) for name, x in batch_of().items()}             # eight equal rows
  first, one = gradients(cfg, same)
  again, _ = gradients(cfg, same)
  assert bits(first) == bits(again)
  assert gradients(cfg, same, step=1)[1]['loss/train'] != one['loss/train']
  assert gradients(config(), same)[1]['loss/train'] == gradients(config(), same, step=1)[1]['loss/train']
  # Row 0 of the first microbatch draws what row 0 of a batch draws; were the second's masks the first's, then
  # two microbatches of four equal rows would give the gradient of one of them.
  half = {name: x[:B // 2] for name, x in same.items()}
  wanted, _ = gradients(config(model=DROPOUT, train=dict(batch_size=B // 2)), half)
  got, _ = gradients(config(model=DROPOUT, train=dict(accumulate=2)), same)
  with pytest.raises(AssertionError):
    assert_gradients_equal(got, wanted, 1e-3)


POISON = {     # what makes a step unusable: (parameters, mask)
    'nan in the parameters': (dict(unembed_DV=np.nan), 1),
    'overflowing gradients': (dict(unembed_DV=1e20), 1),    # the loss is finite, the gradients' squares are not
    'infinite mask': ({}, np.inf),
    'no tokens': ({}, 0)}


@pytest.mark.parametrize('how', POISON)
def test_an_unusable_step_changes_no_bit_and_is_counted(how):
  state, run = start(HARD)
  state, metrics = run(state, batch_of(1))                  # moments that are not zero
  assert metrics['step/skipped'] == 0
  factors, weight = POISON[how]
  state['params'] = {name: x * factors[name] if name in factors else x for name, x in state['params'].items()}
  batch = batch_of(2)
  batch['mask_BT'] = np.where(batch['mask_BT'] > 0, weight, 0).astype(np.float32)
  after, metrics = run(state, batch)
  assert metrics['step/skipped'] == 1
  assert int(after['step']) == int(state['step']) + 1
  for part in ('params', 'opt_state', 'ema', 'horizon'):
    assert bits(after[part]) == bits(state[part]), part
  if how == 'overflowing gradients':
    assert np.isfinite(metrics['loss/train']) and not np.isfinite(metrics['grads/norm'])
  if not factors:                                           # the state is sound: the next step trains
    again, metrics = run(after, batch_of(3))
    assert metrics['step/skipped'] == 0
    assert np.isfinite(optax.tree.norm(again['params']))
    assert bits(again['params']) != bits(after['params'])


def test_a_compiled_step_without_what_the_banner_says_is_refused(monkeypatch):
  """As training and bench compile it: an attention kernel, products in float8."""
  def compile_one(**more):
    cfg = config(model=more)
    model = config_lib.derive(cfg.model, V, T)
    tx = optimizer_lib.make(cfg.optimizer, tiny.shapes(model))
    state = jax.eval_shape(lambda key: step_lib.init_state(cfg, model, tx, key), jax.random.key(0))
    return step_lib.compile_train_step(cfg, model, tx, 'xla', 1, state, batch_of())
  made = compile_one(remat='none')
  assert made.remat == 'none' and 0 < made.lower_s < made.seconds
  monkeypatch.setattr(step_lib.hlo, 'products_in_float8', lambda text: 0)
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='no product in float8.*fp8=False'):
    patch.setattr(jax, 'default_backend', lambda: 'gpu')
    patch.setattr(step_lib.attention, 'capability', lambda: 9.0)
    compile_one(fp8=True)
  monkeypatch.setitem(step_lib.attention.MARKS, 'xla', ('no such call',))
  with pytest.raises(RuntimeError, match="attention does not run by 'xla'"):
    compile_one()


def test_one_program_for_every_step():
  """Also from the real initial state, whose arrays must not be of weak type."""
  init, _ = compiled(HARD)
  model = config_lib.derive(HARD.model, V, T)
  state = jax.eval_shape(init, jax.random.key(0))
  assert [path for path, x in jax.tree_util.tree_leaves_with_path(state) if x.weak_type] == []
  compiled.cache_clear()
  state, run = start(HARD)
  for i in range(3):
    state, _ = run(dict(state, horizon=jnp.int32(100 + i)), batch_of(i))
  assert run._cache_size() == 1
  assert model.dropout


def test_metrics_are_what_they_say():
  cfg = dataclasses.replace(HARD, model=dataclasses.replace(HARD.model, dropout=0.0), optimizer=config_lib.Optimizer(
      warmup_steps=10, schedule='linear', learning_rate=1e-2))
  state, run = start(cfg)
  batch = batch_of()
  model = config_lib.derive(cfg.model, V, T)
  forward = tiny.quick_jit(lambda params, token_BT: step_lib.transformer.bind(model, params)(token_BT))
  logits = np.asarray(forward(state['params'], batch['token_BT']), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  mask = batch['mask_BT']
  ce = -np.take_along_axis(logp, batch['target_BT'][..., None], -1)[..., 0]
  before = state['params']
  _, metrics = run(state, batch)
  assert float(metrics['loss/train']) == pytest.approx((ce * mask).sum() / mask.sum(), rel=1e-5)
  z = 1e-3 * np.log(np.exp(logits).sum(-1)) ** 2
  assert float(metrics['loss/z']) == pytest.approx((z * mask).sum() / mask.sum(), rel=1e-4)
  hits = (logits.argmax(-1) == batch['target_BT']) * mask
  assert float(metrics['accuracy']) == pytest.approx(hits.sum() / mask.sum(), abs=1e-6)
  assert float(metrics['tokens']) == mask.sum()
  assert float(metrics['optimizer/learning_rate']) == pytest.approx(0.1 * 1e-2, rel=1e-6)
  # Evaluation: the same cross-entropy, without dropout, smoothing or z-loss.
  evaluate = tiny.quick_jit(step_lib.make_eval_step(HARD, config_lib.derive(HARD.model, V, T), 'xla'))
  sums = evaluate(before, batch)
  assert float(sums['loss/ce']) == pytest.approx((ce * mask).sum(), rel=1e-5)
  assert float(sums['loss/z']) == 0


def test_ema_follows_the_parameters():
  state, run = start(HARD)
  ema = leaves(state['ema'])
  for step in range(3):
    state, _ = run(state, batch_of(step))
    d = min(0.9, (1 + step) / (10 + step))
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
      model=dict(vocab_size=0, layers=1) | groups.get('model', {}),
      data=dict(source='text', path=str(corpus()), length=32, valid_fraction=0.2) | groups.get('data', {})))
  stores = store.prepare(cfg.data, BYTE, corpus().with_suffix('.cache'), 'none')
  batches = batches_lib.Batches(stores.train, stores.weights, cfg.data, cfg.train, BYTE)
  held_out = batches_lib.EvalBatches(stores.valid[0], cfg.data, B, BYTE, cfg.train.objective)
  model = config_lib.derive(cfg.model, BYTE.vocab_size, cfg.data.length)
  cfg = dataclasses.replace(cfg, model=model)
  evaluate = evaluation(cfg.train, model)

  def valid(params):
    sums = [evaluate(params, held_out[i]) for i in range(min(len(held_out), 16))]
    return sum(float(s['loss/ce']) for s in sums) / sum(float(s['tokens']) for s in sums)

  state, run = start(cfg)
  before = valid(state['params'])
  for step in range(steps):
    state, metrics = run(state, batches(step))
    assert metrics['step/skipped'] == 0
  return before, valid(state['params']), state


@functools.cache
def evaluation(train, model):
  return tiny.quick_jit(step_lib.make_eval_step(config_lib.Config(model=model, train=train), model, 'xla'))


@pytest.mark.parametrize('objective, attention, packing', [
    ('causal', 'causal', 'pack'), ('prefix', 'prefix', 'pack'), ('masked', 'bidirectional', 'concat'),
    ('span', 'prefix', 'concat')])
def test_each_objective_lowers_its_validation_loss(objective, attention, packing):
  """Below the 2.7 nats of a model that knows only how often each letter comes."""
  before, after, _ = learn(220 if objective in ('masked', 'span') else 60, train=dict(objective=objective),
                           model=dict(attention=attention), data=dict(packing=packing))
  assert before > 5
  assert after < 2.5


@pytest.mark.parametrize('name, rates', [
    ('adafactor', dict(learning_rate=1e-2)), ('lion', dict(learning_rate=2e-3)),
    ('muon', dict(learning_rate=1e-2, matrix_learning_rate=0.02))])
def test_each_optimizer_lowers_the_loss(name, rates):
  """AdamW does in every other test."""
  before, after, state = learn(60, optimizer=dict(name=name, **rates), data=dict(packing='pack'))
  assert before > 5
  assert after < 2.5
  assert int(state['step']) == 60


def test_bfloat16_compute_has_float32_masters():
  _, after, state = learn(60, model=dict(dtype='bfloat16'), data=dict(packing='pack'))
  assert after < 2.5
  for part in ('params', 'opt_state'):
    for name, x in leaves(state[part]).items():
      assert x.dtype in (np.float32, np.int32), name
      assert np.isfinite(x).all(), name
  low, _ = gradients(config(model=dict(dtype='bfloat16')), batch_of())
  high, _ = gradients(config(), batch_of())
  assert_gradients_equal(low, high, 0.1)
  with pytest.raises(AssertionError):                       # it does compute in bfloat16
    assert_gradients_equal(low, high, 1e-4)


@pytest.mark.parametrize('rows, length, ways, accumulate, dropout, expected', [
    (16, 256, 1, 0, 0.0, 4), (16, 256, 2, 0, 0.0, 2), (6, 512, 1, 0, 0.0, 3), (4, 4096, 1, 0, 0.0, 4),
    (4, 64, 1, 0, 0.0, 1), (16, 256, 1, 2, 0.0, 2), (16, 256, 1, 0, 0.1, 1), (16, 256, 1, 2, 0.1, 2)])
def test_microbatches_on_a_cpu_have_1024_tokens_unless_the_config_says(rows, length, ways, accumulate, dropout,
                                                                       expected):
  cfg = config_lib.Config(model=config_lib.Model(dropout=dropout), data=config_lib.Data(length=length),
                          train=config_lib.Train(batch_size=rows, accumulate=accumulate))
  assert step_lib.microbatches(cfg, ways) == expected


@pytest.mark.parametrize('platform, barriers', [('cpu', 1), ('tpu', 0), ('cuda', 0)])
def test_only_a_cpu_program_has_the_barriers_that_stop_fusion(platform, barriers):
  lowered = jax.jit(layers.settle).trace(jnp.ones((2, 2))).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count('optimization_barrier') == barriers


def test_a_cpu_keeps_the_barriers_to_the_end():
  settle = jax.jit(lambda x: layers.settle(x + 1) * 2, compiler_options=layers.compiler_options())
  assert 'opt-barrier' in settle.lower(jnp.ones((2, 2))).compile().as_text()
