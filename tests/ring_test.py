"""Ring attention equals plain attention, outputs and gradients, and gives every device the same work."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import attention, layers, ring
from llm_jax.models.view import View

B, T, N, K, H = 2, 32, 4, 2, 8
RNG = np.random.default_rng(0)
Q, KEY, VALUE = (RNG.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K))
SEGMENT = np.sort(RNG.integers(1, 4, (B, T)), 1).astype(np.int32)
PREFIX = RNG.random((B, T)) < 0.3
VIEWS = {'causal': View('causal'), 'packed': View('causal', segment_BT=SEGMENT, key_segment_BS=SEGMENT),
         'prefix': View('prefix', prefix_BS=PREFIX), 'bidirectional': View('bidirectional')}
PLAIN, RICH = dict(window=0, softcap=0.0), dict(window=5, softcap=3.0, slopes_N=layers.alibi_slopes(N))


@pytest.mark.parametrize('mesh', [dict(context=8, fsdp=1), dict(context=2, tensor=4, fsdp=1)], ids=str)
@pytest.mark.parametrize('view, options', [
    ('causal', PLAIN), ('packed', RICH), ('prefix', PLAIN), ('bidirectional', RICH)], ids=str)
def test_ring_is_plain_attention(view, options, mesh):
  def outputs(attend):
    weight = 1 + jnp.arange(T, dtype=jnp.float32)[None, :, None, None]
    loss = lambda q, k, v: (jnp.sin(attend(q, k, v, VIEWS[view], scale=0.3, **options)) * weight).sum()
    return tiny.quick_jit(jax.value_and_grad(loss, (0, 1, 2)))(Q, KEY, VALUE)

  want = outputs(lambda *args, **kw: attention.attend_xla(*args, **kw)[0])
  with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(**mesh))):
    got = outputs(ring.attend_ring)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-3)
  for a, b in zip(got[1], want[1]):
    assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize('n', [2, 3, 8])
def test_each_device_has_the_same_work_and_nothing_is_left_out(n):
  """Under a causal mask: in every step each device computes the same number of blocks, and together they compute each
  visible pair of the sequence's 2n parts once."""
  one = ring.Ring('causal', n, 0, 1.0, 0.0)
  part = lambda device, half: device if half == 0 else 2 * n - 1 - device
  done = []
  for step in range(n):
    counts = set()
    for device in range(n):
      source = (device - step) % n
      pairs = [(int(a), int(b)) for a, b in one.pairs(step == 0, np.int32(device), np.int32(source))]
      counts.add(len(pairs))
      done += [(part(device, a), part(source, b)) for a, b in pairs]
    assert len(counts) == 1
  assert sorted(done) == sorted((q, k) for q, k in itertools.product(range(2 * n), repeat=2) if k <= q)


def test_no_scores_are_kept_for_the_backward_pass():
  """What the forward pass saves is the size of q, k, v and o: nothing grows with T squared."""
  mesh = sharding.make_mesh(config_lib.Mesh(context=8, fsdp=1))
  with jax.set_mesh(mesh):
    saved = jax.eval_shape(lambda q, k, v: jax.vjp(lambda *x: ring.attend_ring(
        *x, View('causal'), scale=1.0, **PLAIN), q, k, v)[1], Q, KEY, VALUE)
  assert max(x.size for x in jax.tree.leaves(saved)) <= Q.size


def test_choose_says_why():
  cfg = tiny.model(kernel='auto')
  assert attention.choose(cfg, 'cpu', 'float32', 32, False, 4) == ('ring', 'positions split in 4')
  with pytest.raises(ConfigError, match='config.data.length: 20 is no multiple of 8, twice mesh.context'):
    attention.choose(cfg, 'cpu', 'float32', 20, False, 4)
  with pytest.raises(ConfigError, match="'splash' sees whole sequences, and mesh.context splits them in 2"):
    attention.choose(tiny.model(kernel='splash'), 'tpu', 'bfloat16', 256, False, 2)
