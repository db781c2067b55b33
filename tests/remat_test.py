"""remat='auto': the lightest way whose compiled step fits, by the compiler's own account of its memory."""
import contextlib
import dataclasses
import functools
import io
import types

import jax
import pytest
import runs
import tiny

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.planner import program
from llm_jax.train import remat

SIZES = dict(data__length=128, train__batch_size=8, train__accumulate=1, train__steps=2, model__layers=2,
             model__width=32, model__mlp_dim=256)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('remat')
  runs.write_texts(folder)
  return folder


@pytest.fixture(scope='module')
def needs(folder):
  """Bytes of the step of a run with each remat; and what a run says that fits with none."""
  seen, needed = [], remat.needed
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
    runs.make_quick(patch)
    patch.setattr(remat, 'memory', lambda: 1e3)
    patch.setattr(remat, 'needed', lambda step: seen.append(needed(step)) or seen[-1])
    runs.train(folder, **SIZES, workdir='nothing')
  return dict(zip(remat.ORDER, dict.fromkeys(seen), strict=True)), out.getvalue()


def test_what_is_kept_shrinks_in_the_order_that_is_tried(needs):
  none, dots, full = needs[0].values()
  assert none > 1.05 * dots and dots > 1.05 * full


@pytest.mark.parametrize('chosen', remat.ORDER)
def test_a_run_takes_the_first_that_fits(folder, needs, chosen, monkeypatch, capsys):
  """Limits just above what each needs, as if that was the device's memory."""
  limit = needs[0][chosen] / remat.SHARE * 1.01
  runs.make_quick(monkeypatch)
  monkeypatch.setattr(remat, 'memory', lambda: limit)
  runs.train(folder, **SIZES, workdir=chosen)
  line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('   remat  ')]
  assert line.startswith(f'   remat  {chosen} (none needs '), line
  assert line.endswith(f'of {limit / remat.GIB:.3g} GiB)') and 'may not fit' not in line


def test_where_nothing_fits_the_run_says_what_to_change(needs):
  assert '   remat  full (none needs ' in needs[1]
  assert 'may not fit: a smaller train.batch_size, or more train.accumulate' in needs[1]


def test_a_compiler_that_finds_no_room_is_asked_for_the_next():
  fits = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(
      argument_size_in_bytes=5, output_size_in_bytes=5, alias_size_in_bytes=5, temp_size_in_bytes=5,
      generated_code_size_in_bytes=0))

  def compiled(name, error='RESOURCE_EXHAUSTED: Used 20G of 16G hbm', refused=('none',)):
    if name in refused:
      raise jax.errors.JaxRuntimeError(error)
    return fits

  assert remat.lightest(compiled, 'auto', 100)[1] == 'dots'
  assert remat.needed(fits) == 10
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    remat.lightest(functools.partial(compiled, error='INTERNAL: broken'), 'auto', 100)
  with pytest.raises(jax.errors.JaxRuntimeError, match='Shared memory'):         # of a kernel, not of the device
    remat.lightest(functools.partial(compiled, error='RESOURCE_EXHAUSTED: Shared memory size limit'), 'auto', 100)
  with pytest.raises(ConfigError, match="not even 'full' fits.*a smaller train.batch_size.*Used 20G"):
    remat.lightest(functools.partial(compiled, refused=remat.ORDER), 'auto', 100)


def test_a_plan_takes_what_the_run_would():
  """With a limit between the needs of a plan's programs."""
  from llm_jax import hardware
  cfg = config_lib.Config(
      model=tiny.model(layers=2, remat='auto'), data=config_lib.Data(length=128),
      train=config_lib.Train(batch_size=8, accumulate=1), tokenizer=config_lib.Tokenizer(kind='byte'))
  machine = program.machine(hardware.topology('cpu:1'))
  none, dots = (program.compile_step(program.with_remat(cfg, name), machine).bytes for name in ('none', 'dots'))
  assert none > dots
  for limit, chosen in ((none, 'none'), (dots, 'dots')):
    small = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, memory=limit / remat.SHARE + 1))
    assert program.compile_step(cfg, small).model.remat == chosen


@pytest.mark.parametrize('own, limits, least', [
    ('0::/\n', {'memory.max': 2**31}, 2**31),
    ('0::/job/step\n', {'job/memory.max': 2**30, 'job/step/memory.max': 'max'}, 2**30),
    ('0::/elsewhere\n', {'memory.max': 2**31}, 2**31), ('0::/\n', {'memory.max': 'max'}, None), ('0::/\n', {}, None),
    ('9:cpu:/job\n4:blkio,memory:/job\n', {'memory/job/memory.limit_in_bytes': 2**30, 'cpu/job/memory.max': 7}, 2**30),
    ('4:memory:/\n', {'memory/memory.limit_in_bytes': 2**63 - 4096}, None)])
def test_what_a_container_or_job_may_take_counts(own, limits, least, tmp_path, monkeypatch):
  monkeypatch.setattr(remat, 'OWN_GROUPS', tmp_path / 'none')
  whole = remat.memory()
  for name, limit in limits.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'{limit}\n')
  (tmp_path / 'own').write_text(own)
  monkeypatch.setattr(remat, 'OWN_GROUPS', tmp_path / 'own')
  monkeypatch.setattr(remat, 'GROUPS', tmp_path)
  assert remat.memory() == (least / jax.local_device_count() if least else whole) and whole > 0
