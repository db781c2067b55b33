"""The mesh and the letter tables."""
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import model, quick_jit, shapes, tokens

from llm_jax import sharding
from llm_jax.config import ConfigError, Mesh
from llm_jax.models import transformer
from llm_jax.sharding import ACT, PARAM, spec

MESH = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))


def test_make_mesh_fills_the_free_axis():
  assert dict(MESH.shape) == dict(data=2, fsdp=2, tensor=2, context=1, expert=1, stage=1)
  assert sharding.make_mesh(Mesh()).shape['fsdp'] == 8
  assert sharding.make_mesh(Mesh(data=-1, fsdp=2)).shape['data'] == 4
  assert sharding.make_mesh(Mesh(fsdp=2), devices=jax.devices()[:2]).size == 2
  assert all(kind == jax.sharding.AxisType.Auto for kind in MESH.axis_types)


@pytest.mark.parametrize('fields, message', [
    (dict(fsdp=3), "'fsdp': 3, .* needs 3 devices, there are 8"),
    (dict(tensor=3), "needs a multiple of 3 devices, there are 8"),
    (dict(data=-1), 'at most one -1'),
    (dict(tensor=0), 'expected positive sizes'),
    (dict(tensor=-2), 'expected positive sizes'),
    (dict(expert=3), "'expert': 3, .* needs a multiple of 3 devices, there are 8"),
])
def test_a_mesh_that_does_not_fit(fields, message):
  with pytest.raises(ConfigError, match=message) as e:
    sharding.make_mesh(Mesh(**fields))
  assert '\n' not in str(e.value)


@given(st.sampled_from([dict(data=a, fsdp=b, tensor=8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8)
                        if a * b <= 8]), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_a_spec_divides_or_says_why(sizes, rows):
  mesh, ways = sharding.make_mesh(Mesh(**sizes)), sizes['data'] * sizes['fsdp']
  if rows % ways:
    with pytest.raises(ConfigError, match=f'B={rows} of BTD'):
      spec('BTD', ACT, (rows, 5, 3), mesh)
  else:
    assert NamedSharding(mesh, spec('BTD', ACT, (rows, 5, 3), mesh)).shard_shape((rows, 5, 3)) == (rows // ways, 5, 3)


def test_spec_is_the_tables():
  assert spec('LDF', PARAM) == P('stage', 'fsdp', 'tensor')
  assert spec('BTD', ACT) == P(('data', 'fsdp', 'expert'), 'context', None)
  assert spec('BSKH', ACT, (4, 3, 3, 8), MESH) == P(ACT['B'], None, None, None)                # 3 kv heads on 2 ways
  with pytest.raises(ValueError, match='NF: a mesh axis is used twice'):
    spec('NF', PARAM)
  with pytest.raises(ValueError, match='DF: 2 letters for shape'):
    spec('DF', PARAM, (4,), MESH)
  with pytest.raises(ConfigError, match=r"axis 'tensor' \(2 ways\) does not divide F=3 of DF; set it to .* 3"):
    spec('DF', PARAM, (4, 3), MESH)


def test_dims_of_paths():
  key = jax.tree_util.DictKey
  assert sharding.dims_of((key('embed_VD'),)) == 'VD'
  assert sharding.dims_of((key('blocks0'), key('attention'), key('norm_q'), key('scale_NH'))) == 'LNH'
  assert sharding.dims_of((key('encoder_blocks0'), key('mlp'), key('w_up_DF'))) == 'LDF'
  assert sharding.dims_of((key('tail1'), key('mlp'), key('b_up_F'))) == 'LF'
  with pytest.raises(ValueError, match='no parameter name with dims'):
    sharding.dims_of((key('count'),))


def test_shard_constrains_only_where_there_is_a_mesh():
  x_BTD = np.zeros((4, 2, 2), np.float32)
  assert sharding.shard(x_BTD, 'BTD') is x_BTD
  with jax.set_mesh(MESH):
    assert jax.jit(lambda x: sharding.shard(x, 'BTD'))(x_BTD).sharding.spec[0][:2] == ('data', 'fsdp')


def test_put_batch_splits_rows():
  batch = dict(token_BT=tokens(0, 8, 4), source_BS=tokens(1, 8, 6), mask_BT=np.ones((8, 4), np.float32))
  placed = sharding.put_batch(batch, MESH)
  for name, x in placed.items():
    assert x.sharding.shard_shape(x.shape)[0] == 2
    np.testing.assert_array_equal(x, batch[name])
  with jax.set_mesh(MESH), pytest.raises((ConfigError, ValueError)):
    sharding.put_batch(dict(token_BT=tokens(0, 6, 4)), MESH)


@pytest.mark.parametrize('fields, host, expected', [
    (dict(fsdp=8), range(4), (0, 8)), (dict(fsdp=8), range(4, 8), (8, 16)),
    (dict(fsdp=2, tensor=4), range(4, 8), (8, 16)), (dict(fsdp=2, tensor=4), range(2), (0, 8)),
    (dict(fsdp=1, tensor=8), range(4), (0, 16))])
def test_rows_of_a_host_are_those_of_its_devices(fields, host, expected, monkeypatch):
  mesh = sharding.make_mesh(Mesh(**fields))
  whole = jax.sharding.NamedSharding.devices_indices_map
  monkeypatch.setattr(jax.sharding.NamedSharding, 'addressable_devices_indices_map', lambda self, shape: {
      d: index for d, index in whole(self, shape).items() if d.id in host})
  assert sharding.local_rows(16, mesh) == expected


def test_parameters_made_in_place_are_the_same():
  """Initialised under the mesh, each device making its part: the numbers of one device, laid out by the letters."""
  cfg = model(layers=2, vocab_size=64, kv_heads=1)
  init = lambda key: transformer.init(cfg, key)
  want = quick_jit(init)(jax.random.key(0))
  specs = sharding.param_specs(shapes(cfg), MESH)
  with jax.set_mesh(MESH):
    got = quick_jit(init, out_shardings=sharding.named(MESH, specs))(jax.random.key(0))
  for a, b, s in zip(*map(jax.tree.leaves, (got, want)), jax.tree.leaves(specs)):
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert a.sharding.is_equivalent_to(NamedSharding(MESH, s), a.ndim)
