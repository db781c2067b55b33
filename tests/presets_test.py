"""Published shapes have their published sizes, and every parameter's name says how it is sharded."""
import functools
import math

import jax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import presets, transformer

SIZES = {                                # millions of parameters: the published checkpoints'
    'gpt2_124m': 124.44, 'gpt2_350m': 354.82, 'gpt2_774m': 774.03, 'gpt2_1558m': 1557.61,
    'llama2_7b': 6738.42, 'llama3_8b': 8030.26, 'llama3_70b': 70553.71, 'llama3_2_1b': 1235.81, 'mistral_7b': 7241.73,
    'smollm_135m': 134.52, 'smollm2_135m': 134.52, 'smollm2_360m': 361.82, 'qwen2_5_0_5b': 494.03,
    'qwen2_5_7b': 7615.62, 'qwen3_0_6b': 596.05, 'qwen3_8b': 8190.74, 'gemma2_2b': 2614.34, 'gemma3_1b': 999.89,
    'llama3_405b': 405_853.39, 'mixtral_8x7b': 46_702.79, 'qwen3_30b_a3b': 30_532.12, 'olmoe_1b_7b': 6919.16,
    'gemma3_4b': 3880.26, 'olmo2_1b': 1484.92, 'olmo2_7b': 7298.62, 'phi3_mini': 3821.08,
    'transformer': 37.85, 'transformer_encoder_decoder': 63.05,           # "65M" in the paper, with unshared positions
}
INDIVISIBLE = {                          # what 2 tensor ways do not divide
    'gpt2_124m': 'V=50257', 'gpt2_350m': 'V=50257', 'gpt2_774m': 'V=50257', 'gpt2_1558m': 'N=25', 'smollm_135m': 'N=9',
    'smollm2_135m': 'N=9', 'smollm2_360m': 'N=15'}
FEW_KV_HEADS = ('gemma3_1b', 'gpt2_1558m', 'smollm_135m', 'smollm2_135m', 'smollm2_360m')


@functools.cache
def shapes(name):
  return tiny.shapes(config_lib.derive(config_lib.Model(**presets.preset(name).to_dict())))


@pytest.mark.parametrize('name', presets.PRESETS)
def test_published_size(name):
  assert transformer.count(shapes(name)) / 1e6 == pytest.approx(SIZES[name], abs=0.006)


@pytest.mark.parametrize('name', presets.PRESETS)
def test_names_are_the_dims_and_the_shards_fit(name):
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(name)):
    assert len(sharding.dims_of(path)) == leaf.ndim, jax.tree_util.keystr(path)
    assert leaf.dtype == 'float32'
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  assert sharding.replicated_kv(shapes(name), mesh) == (name in FEW_KV_HEADS)
  if name in INDIVISIBLE:
    with pytest.raises(ConfigError, match=f"config.mesh: axis 'tensor' .2 ways. does not divide {INDIVISIBLE[name]} "):
      sharding.param_specs(shapes(name), mesh)
    return
  for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(shapes(name)),
                                jax.tree.leaves(sharding.param_specs(shapes(name), mesh))):
    parts = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    if leaf.ndim > 2 or 'embed' in path[-1].key:                        # matrices: split in at least fsdp's two parts
      assert math.prod(parts) * 2 <= leaf.size, jax.tree_util.keystr(path)


def test_one_kv_head_is_replicated_over_tensor():
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  attention = sharding.param_specs(shapes('gemma3_1b'), mesh)['blocks0']['attention']
  assert attention['w_k_DKH'] == P('stage', 'fsdp', None, None)
  assert attention['w_q_DNH'] == P('stage', 'fsdp', 'tensor', None)


@pytest.mark.parametrize('name', presets.PRESETS)
def test_a_preset_is_a_valid_group(name):
  length = presets.preset(name).max_length
  config = config_lib.build(ConfigDict(dict(model=presets.preset(name), data=dict(length=length))))
  assert config.model.layers == presets.PRESETS[name]['layers']
  assert presets.preset(name, layers=2).layers == 2


def test_unknown_names_have_a_nearest():
  with pytest.raises(ConfigError, match="no preset 'lama3_8b'; nearest: 'llama3_8b'"):
    presets.preset('lama3_8b')
  with pytest.raises(ConfigError, match="config.model.layrs: no such key; nearest: 'layers'"):
    presets.preset('llama3_8b', layrs=2)
