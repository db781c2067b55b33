"""Weights and caches in few bits: as near as their bits allow, the same on every path, and smaller in memory."""
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax import hardware, sharding
from llm_jax.generate import engine, programs
from llm_jax.generate.options import Options
from llm_jax.models import quantize

CFG = tiny.model(layers=2, width=64, max_length=256, vocab_size=64, tied_embeddings=False)
PROMPTS = [tiny.tokens(i, n).tolist() for i, n in enumerate((3, 40, 90))]


@pytest.fixture(scope='module')
def params():
  return tiny.params(CFG, seed=1)


@hypothesis.given(st.sampled_from(['int8', 'int4']), st.sampled_from([0, 32]), st.integers(0, 2**31), st.booleans())
@hypothesis.settings(max_examples=30, deadline=None)
def test_no_element_is_further_off_than_half_a_step(kind, group, seed, two):
  x = np.random.default_rng(seed).normal(size=(64, 6) if not two else (3, 64, 5)).astype(np.float32)
  axes = (0, 1) if two else (0,)
  q = quantize.quantize(x, axes, kind, group)
  back = np.asarray(q.astype(jnp.float32))
  peak = np.abs(x.reshape(*x.shape[:axes[-1]], -1, group, x.shape[-1])).max(-2) if group else np.abs(x).max(axes)
  peak = np.broadcast_to(np.repeat(peak, group, axes[-1]) if group else peak, x.shape)
  off = np.abs(back - x)
  if kind == 'int8':
    assert (off <= peak / 127 / 2 * 1.0001 + 1e-7).all()
  else:                                          # what is cut off at the other end is off by a step or two
    assert (off <= 2 * peak / 7).all() and np.sqrt((off**2).mean() / (x**2).mean()) < (0.1 if group else 0.15)
  assert back.shape == x.shape


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('spec, shape, axes', [
    ('BTD,DF->BTF', (64, 6), (0,)), ('BTNH,NHD->BTD', (2, 32, 6), (0, 1)), ('BTD,DNH->BTNH', (64, 3, 4), (0,))])
def test_a_product_is_that_of_what_the_integers_stand_for(kind, spec, shape, axes):
  rng = np.random.default_rng(0)
  w = quantize.quantize(rng.normal(size=shape), axes, kind, 32 if kind == 'int4' else 0)
  x = rng.normal(size=(2, 5, *shape[:len(axes)])).astype(np.float32)
  np.testing.assert_allclose(quantize.einsum(spec, x, w), np.einsum(spec, x, w.astype(jnp.float32)), atol=1e-4)


def run(params, cfg=CFG, **options):
  e = engine.Engine(cfg, params, slots=3, **options)
  requests = [engine.Request(p, Options(max_tokens=24, logprobs=0)) for p in PROMPTS]
  for request in requests:
    e.submit(request)
  e.run()
  return e, requests


def logps(requests):
  return np.array([[logp for logp, _, _ in request.logprobs] for request in requests])


@pytest.mark.parametrize('cfg', [CFG, dataclasses.replace(CFG, tied_embeddings=True), tiny.model(
    'mixtral_8x7b', width=64, expert_dim=64, max_length=256, vocab_size=64)], ids=['untied', 'tied', 'experts'])
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_an_engine_in_few_bits_is_the_model_of_the_rounded_weights(cfg, kind):
  params = tiny.params(cfg, seed=1)
  _, found = run(params, cfg, weights=kind)
  untied = dataclasses.replace(cfg, tied_embeddings=False)     # what is looked up is not rounded
  if cfg.tied_embeddings:
    params = params | dict(unembed_DV=params['embed_VD'].T)

  def rounded(path, w):
    name, _, dims = path[-1].key.rpartition('_')
    if name not in quantize.MATRICES:
      return w
    stacked = path[0].key.startswith(('blocks', 'tail'))
    inner = dims.replace('E', '')[:-1] if dims.endswith('D') else 'D'
    axes = tuple(i + stacked for i, letter in enumerate(dims) if letter in inner)
    of = 'int8' if name == 'unembed' else kind
    return np.asarray(quantize.quantize(w, axes, of, 32 if of == 'int4' else 0).astype(jnp.float32))
  _, wanted = run(jax.tree_util.tree_map_with_path(rounded, params), untied)
  assert [r.tokens for r in found] == [r.tokens for r in wanted]
  np.testing.assert_allclose(logps(found), logps(wanted), atol=2e-3)


def test_a_cache_of_int8_is_near_the_whole_one_and_survives_moving(params):
  """Rows are moved, resized and shared: the second of two equal prompts starts in the first one's cache."""
  whole, exact = run(params)
  small, near = run(params, cache='int8')
  np.testing.assert_allclose(logps(near)[:, 0], logps(exact)[:, 0], atol=0.1)
  again = engine.Request(PROMPTS[2] + tiny.tokens(9, 60).tolist(), Options(max_tokens=100, logprobs=0))
  fresh = engine.Request(list(again.ids), again.options, salt='other')
  for request in (again, fresh):
    small.submit(request)
    small.run()
  assert again.cached >= len(PROMPTS[2]) > fresh.cached == 0 and again.tokens == fresh.tokens
  size = lambda e: quantize.nbytes(e.state['cache']) / e.length
  assert size(small) < 0.35 * size(whole)


def test_bytes_in_memory(params):
  size = {kind: quantize.nbytes(programs.unstack(CFG, params, kind)[1]) for kind in ('', 'int8', 'int4')}
  assert size['int8'] < 0.3 * size[''] and size['int4'] < 0.2 * size['']


def test_a_mesh_computes_the_same(params):
  _, alone = run(params, weights='int8', cache='int8', ahead=2)
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=2, tensor=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.named(mesh, sharding.param_specs(params, mesh)))
    _, spread = run(placed, weights='int8', cache='int8', ahead=2)
  assert [r.tokens for r in spread] == [r.tokens for r in alone]


def test_a_tpu_reads_fewer_bytes():
  """A decoding step compiled for a v5e: the integers are read by the products themselves. Were they widened before, it
  would read more bytes than without them, not fewer."""
  pytest.importorskip('libtpu', reason="compiling for TPUs needs pip install '.[plan]'")
  from llm_jax.generate import filters
  from llm_jax.planner import program
  device = program.machine(hardware.topology('v5e:2x2')).devices[0]
  on = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)), tree)
  cfg = tiny.model(layers=2, width=1024, heads=16, kv_heads=8, head_dim=64, mlp_dim=4096, vocab_size=2048,
                   max_length=8192, tied_embeddings=False, mlp='swiglu', dtype='bfloat16')
  row = filters.Row(*(x[:16] for x in engine.Engine(CFG, tiny.params(CFG), slots=16).rows))
  read = {}
  for weights, cache, length in (('', '', 128), ('int8', '', 128), ('', '', 8192), ('', 'int8', 8192)):
    plan = programs.Plan(cfg, cfg.vocab_size, 16, cache=cache)
    params = jax.eval_shape(lambda p, kind=weights: programs.unstack(cfg, p, kind), tiny.shapes(cfg))
    state = jax.eval_shape(lambda plan=plan, length=length: programs.empty_state(plan, 16, length, 8, 0))
    step = jax.jit(programs.decode.__wrapped__, static_argnums=0, donate_argnums=3)
    traced = step.trace(plan, on(params), None, on(state), on(row), on(jnp.arange(16)), on(jnp.int32(1)))
    cost = traced.lower(lowering_platforms=('tpu',)).compile().cost_analysis()
    read[weights, cache, length] = cost['bytes accessed'] / 1e6
    print(f'weights {weights or "bfloat16"}, cache {cache or "bfloat16"} of {length}: '
          f'{read[weights, cache, length]:.0f} MB a step')
  assert read['', '', 128] - read['int8', '', 128] > 30                    # of 67 MB of weights
  assert read['', '', 8192] - read['', 'int8', 8192] > 250                 # of 537 MB of keys and values
