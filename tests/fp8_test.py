"""Products in float8: how near they come, what a step holds of them, and that they learn."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.models import fp8, layers, quantize, transformer
from llm_jax.train import optimizer, step

MODEL = config_lib.derive(config_lib.Model(vocab_size=64, layers=1, width=64, heads=4, max_length=32, mlp='swiglu',
                                           dtype='bfloat16', fp8=True, remat='none'))
SPECS = {'BTD,DNH->BTNH': [(64, 4, 16), (64, 2, 16)], 'BTNH,NHD->BTD': [(4, 16, 64)], 'BTD,DF->BTF': [(64, 96)] * 2}


def case(spec, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = draw(2, 32, *((4, 16) if spec.startswith('BTNH') else (64,)))
  return x, [draw(*shape) for shape in SPECS[spec]], draw


def relative(got, want):
  return float(np.linalg.norm(np.float64(got) - np.float64(want)) / np.linalg.norm(np.float64(want)))


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('size', [1.0, 1e-6, 3e4])
def test_products_and_gradients_are_near_those_of_float32(spec, size):
  """Whatever the size: 3 bits of mantissa forward, 2 in the gradient, where values of one size are summed."""
  x, ws, draw = case(spec)
  x = x * size
  outs, pull = jax.vjp(functools.partial(layers.project, spec, True), x, *ws)
  want, pull_32 = jax.vjp(lambda x, *ws: [jnp.einsum(spec, x, w) for w in ws], x, *ws)
  gs = [draw(*o.shape) / size for o in outs]
  assert max(map(relative, outs, want)) < 0.05
  for got, exact in zip(pull(gs), pull_32(gs)):
    assert 0.01 < relative(got, exact) < 0.08 and got.dtype == exact.dtype


def test_an_array_of_zeros_has_zeros_as_its_product():
  x, ws, _ = case('BTD,DF->BTF')
  y, pull = jax.vjp(lambda x, w: layers.project('BTD,DF->BTF', True, x, w)[0], x * 0, ws[0])
  assert not y.any() and all(np.isfinite(g).all() for g in pull(jnp.zeros_like(y)))


def test_the_largest_value_is_exact_and_none_overflows():
  x = jnp.asarray([0.0, 1.5, -3e5, 7.0], jnp.float32)
  for scaled in (fp8.scaled(x), fp8.scaled(x, jnp.float8_e5m2)):
    assert float((scaled.q.astype(jnp.float32) * scaled.scale)[2]) == pytest.approx(-3e5, rel=1e-6)
    assert np.isfinite(np.float32(scaled.q)).all()


def test_quantised_weights_stay_what_they_are():
  x, ws, _ = case('BTD,DF->BTF')
  few = quantize.quantize(ws[0], (0,))
  np.testing.assert_array_equal(*(layers.project('BTD,DF->BTF', on, x, few)[0] for on in (True, False)))


@pytest.mark.parametrize('platform, capability, fine', [
    ('gpu', 9.0, True), ('gpu', 8.9, True), ('cpu', 9.0, True), ('gpu', 8.0, False), ('gpu', 0.0, False),
    ('tpu', 9.0, False)])
def test_machines_without_it_are_told(platform, capability, fine):
  if fine:
    return fp8.check(platform, capability)
  with pytest.raises(ConfigError, match='config.model.fp8: needs .* set it to False'):
    fp8.check(platform, capability)


def step_of(model, **train):
  """(a train step, its state and batch as shapes)."""
  cfg = config_lib.Config(model=model, data=config_lib.Data(length=32), train=config_lib.Train(batch_size=4, **train))
  tx = optimizer.make(cfg.optimizer, jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))))
  state = jax.eval_shape(lambda key: step.init_state(cfg, model, tx, key), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct((4, 32), dtype) for name, dtype in
           dict(token_BT=jnp.int32, target_BT=jnp.int32, mask_BT=jnp.float32).items()}
  return step.make_train_step(cfg, model, tx, 'xla'), state, batch


def test_a_step_for_a_gpu_holds_three_products_in_float8_for_each_matrix_of_a_layer():
  train_step, state, batch = step_of(MODEL)
  traced = jax.jit(train_step).trace(state, batch)
  products = [line for line in traced.lower(lowering_platforms=('cuda',)).as_text().splitlines()
              if 'stablehlo.dot_general' in line]
  kinds = [tuple(kind in line for kind in ('f8E4M3FN', 'f8E5M2')) for line in products]
  matrices = 7                                              # q, k, v, out, up, gate, down
  assert kinds.count((True, False)) == matrices and kinds.count((True, True)) == 2 * matrices
  assert not any('f32' in line for line, kind in zip(products, kinds) if any(kind))       # nothing wide is written


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_recomputation_and_microbatches_change_little(remat):
  """Each microbatch has scales of its own."""
  found = []
  for how, accumulate in (('none', 1), (remat, 2)):
    train_step, state, batch = step_of(dataclasses.replace(MODEL, remat=how, dtype='float32'), accumulate=accumulate)
    draw = lambda x: jax.random.randint(jax.random.key(x.size), x.shape, 0, 64).astype(x.dtype)
    values = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state) | {
        'params': transformer.init(MODEL, jax.random.key(0))}
    found.append(jax.jit(train_step)(values, jax.tree.map(draw, batch) | {'mask_BT': jnp.ones((4, 32))})[1])
  for name in ('loss/train', 'grads/norm'):
    np.testing.assert_allclose(found[1][name], found[0][name], rtol=0.03)


def test_a_run_learns_as_well_goes_on_without_and_is_evaluated_without(tmp_path, capsys):
  runs.write_texts(tmp_path)
  keys = dict(train__steps=30, model__mlp='swiglu')
  plain = runs.train(tmp_path, workdir='plain', **keys)['validation loss']
  found = runs.train(tmp_path, workdir='fp8', **keys, model__fp8='True')['validation loss']
  assert 'float8 in the layers' in capsys.readouterr().out
  assert plain != found == pytest.approx(plain, rel=0.03)
  again = runs.train(tmp_path, workdir='fp8', **keys, model__fp8='False')['validation loss']
  assert again == pytest.approx(found, rel=1e-5)


def test_a_mesh_scales_by_the_largest_value_of_all_its_parts():
  from jax.sharding import AxisType
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  x, ws, _ = case('BTD,DF->BTF')
  place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
  f = jax.jit(functools.partial(layers.project, 'BTD,DF->BTF', True))
  with jax.set_mesh(mesh):
    got = f(place(x, 'fsdp'), *(place(w, None, 'tensor') for w in ws))
  for a, b in zip(got, f(x, *ws)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
