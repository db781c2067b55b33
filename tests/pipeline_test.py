"""The pipeline's schedule. That it computes what one device computes is in mesh_test.py."""
import re

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import pipeline
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import step as step_lib


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_part_meets_every_microbatch_in_order(stages, interleave, groups):
  """Played tick by tick: each microbatch goes through all parts of the depth in order, one stage computes one thing at
  a time, a result is used in the tick after it was made, and the idle share is what `bubble` says."""
  M = groups * stages
  stage = pipeline.Stage(None, '', True, stages, interleave)
  ticks = pipeline.ticks(stages, interleave, M)
  progress, held = {m: 0 for m in range(M)}, {}       # parts done; what each stage hands on: (microbatch, parts done)
  idle, left = 0, {}
  for time in range(ticks):
    handed = {}
    for s in range(stages):
      real, part, micro = (int(x) for x in stage.schedule(np.int32(time - s), M))
      if not real:
        idle += 1
        continue
      depth = part * stages + s
      assert progress[micro] == depth
      if depth:
        assert held[(s - 1) % stages] == (micro, depth)
      handed[s] = micro, depth + 1
      left[micro] = time
    held = handed
    for micro, depth in handed.values():
      progress[micro] = depth
  assert set(progress.values()) == {stages * interleave}
  assert stage.last_ticks(M).tolist() == [left[m] for m in range(M)]
  assert idle / (ticks * stages) == pytest.approx(pipeline.bubble(stages, interleave, M))


@pytest.mark.parametrize('interleave', [1, 2])
def test_the_compiled_step_has_that_many_ticks(interleave):
  stages, M = 2, 4
  cfg = config_lib.Config(
      model=config_lib.Model(vocab_size=64, layers=4, width=16, heads=2, unroll=False),
      data=config_lib.Data(length=8), train=config_lib.Train(batch_size=16, accumulate=M),
      mesh=config_lib.Mesh(stage=stages, fsdp=4, interleave=interleave))
  model, mesh = config_lib.derive(cfg.model, 64, 8), sharding.make_mesh(cfg.mesh)
  tx = optimizer_lib.make(cfg.optimizer, tiny.shapes(model))
  with jax.set_mesh(mesh):
    state = jax.eval_shape(lambda key: step_lib.init_state(cfg, model, tx, key), jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((16, 8), dtype) for name, dtype in (
        ('token_BT', 'int32'), ('target_BT', 'int32'), ('mask_BT', 'float32'))}
    text = str(jax.make_jaxpr(step_lib.make_train_step(cfg, model, tx, 'xla'))(state, batch))
  assert re.search(rf'length={pipeline.ticks(stages, interleave, M)}\b', text)


@pytest.mark.parametrize('stages, interleave, accumulate, layers, message', [
    (4, 1, 0, 4, 'config.train.accumulate: a pipeline of 4 stages needs a multiple of 4 microbatches, got 0; 16 leave '
                 'each stage idle 16% of the time'),
    (4, 1, 6, 4, 'config.train.accumulate'),
    (4, 1, 8, 6, 'config.mesh.stage: 6 layers in periods of 1 do not divide among 4 stages x 1 .*multiple of 4'),
    (2, 2, 4, 6, 'config.mesh.stage: .*multiple of 4'),
    (1, 2, 1, 4, 'config.mesh.interleave: 2; one stage has nothing to interleave')])
def test_what_a_pipeline_cannot_run(stages, interleave, accumulate, layers, message):
  with pytest.raises(ConfigError, match=message):
    pipeline.check(tiny.model(layers=layers), stages, interleave, accumulate)
