"""A step's time by part: what an operation is, and how shared time is divided."""
import types

import jax
import jax.numpy as jnp
import pytest

from llm_jax.train import explain


def test_parts_and_rooflines():
  """Products by weights, attention's and an optimizer's work, each in its scope; and the products' time at a peak."""
  def step(w, x):
    def loss(w):
      y = x @ w
      with jax.named_scope('attend'):
        y = jnp.exp(jnp.einsum('bth,bsh->bts', y, y)).sum()
      with jax.named_scope('loss'):
        return jnp.sin(y)
    grad = jax.grad(loss)(w)
    with jax.named_scope('optimizer'):
      return w - 0.1 * grad

  text = jax.jit(step).lower(jnp.ones((64, 32)), jnp.ones((4, 16, 64))).compile().as_text()
  parts = explain.parts_of(text, 1e9, 0.0).values()
  needs = lambda which: sum(seconds for part, seconds in parts if part == which)
  assert 'optimizer' in {part for part, _ in parts}
  assert needs('matmul') == pytest.approx(2 * 2 * 64 * 64 * 32 / 1e9)     # forward, and dw
  assert needs('attention') == pytest.approx(3 * 2 * 4 * 16 * 16 * 32 / 1e9)


def test_time_that_operations_share(monkeypatch, tmp_path):
  """Two at once for 2 ms, then one alone for 1 ms, nothing for 3 ms, of a step of 10 ms that waits 1 ms for data."""
  event = lambda op, start, ms: types.SimpleNamespace(name=op, stats=[('hlo_op', op)], start_ns=start * 1e6,
                                                      duration_ns=ms * 1e6)
  other = types.SimpleNamespace(name='exp.2', stats=[('hlo_op', 'exp.2'), ('hlo_module', 'jit_eval_step(7)')],
                                start_ns=0, duration_ns=8e6)
  lines = [[event('dot.1', 0, 3)], [event('exp.2', 0, 2), event('unknown', 0, 9), other], [event('dot.1', 6, 2)]]
  plane = types.SimpleNamespace(lines=[types.SimpleNamespace(name='', events=events) for events in lines])
  (tmp_path / 'a.xplane.pb').touch()
  monkeypatch.setattr(jax.profiler, 'ProfileData', types.SimpleNamespace(
      from_file=lambda path: types.SimpleNamespace(planes=[plane])))
  monkeypatch.setattr(explain, 'parts_of', lambda *a: {'dot.1': ('matmul', 1e-3), 'exp.2': ('attention', 0.0)})
  found = explain.read(tmp_path, 'HloModule jit_train_step, x', 1, 10e-3, 1e-3, 1.0, 0.0)
  assert found['matmul'] == pytest.approx((4e-3, 1e-3)) and found['attention'] == pytest.approx((1e-3, 0))
  assert found['input'] == pytest.approx((1e-3, 0)) and found['idle'] == pytest.approx((4e-3, 0))
  plane.lines.clear()
  with pytest.raises(ValueError, match='no operation of the step is in the profile'):
    explain.read(tmp_path, '', 1, 10e-3, 1e-3, 1.0, 0.0)


def test_a_loop_counts_as_often_as_it_runs():
  def step(x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.ones((5, 32, 32)))[0]
  text = jax.jit(step).lower(jnp.ones((16, 32))).compile().as_text()
  needed = sum(seconds for part, seconds in explain.parts_of(text, 1.0, 0.0).values() if part == 'matmul')
  assert needed == 5 * 2 * 16 * 32 * 32


@pytest.mark.parametrize('part, line', [
    ('loss', '%a = f32[8]{0} add(%x, %x), metadata={op_name="jit(train_step)/transpose(jvp(loss))/mul"}'),
    ('loss', '%a = f32[8]{0} add(%x, %x), metadata={op_name="jit(train_step)/jvp(loss)/logits/mul"}'),
    ('optimizer', '%a = f32[8]{0} add(%x, %x), metadata={op_name="jit(train_step)/optimizer/add"}'),
    ('attention', '%a = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/transpose(jvp(attention))/attend/exp"}'),
    ('norm/elementwise', '%a = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/jvp(attention)/losses/add"}'),
    ('norm/elementwise', '%a = f32[8]{0} add(%x, %x)'),
    ('communication', '%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, metadata={op_name="jit(f)/loss/psum"}')])
def test_what_an_operation_is_by_its_scope(part, line):
  """As jax prints scopes inside differentiated functions."""
  text = f'HloModule m\n\nENTRY %e (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT {line}\n}}\n'
  assert explain.parts_of(text, 1.0, 1.0)['a'][0] == part
