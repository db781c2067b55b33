"""Wall time by part, and what restarts cost, in time.json."""
import json
import types

import pytest

from llm_jax.train import clock as clock_lib
from llm_jax.train.clock import PARTS, Clock


@pytest.fixture
def sleep(monkeypatch):
  """Moves the time that clock.py reads."""
  now = [1000.0]
  read = lambda: now[0]
  monkeypatch.setattr(clock_lib, 'time', types.SimpleNamespace(monotonic=read, time=read))

  def advance(seconds):
    now[0] += seconds
  return advance


def parts(**seconds):
  return dict.fromkeys(PARTS, 0.0) | seconds


def test_nested_parts_count_once_and_a_kill_costs_at_most_2_s(tmp_path, sleep):
  clock = Clock(tmp_path)
  clock.resume({})
  with clock('eval'):
    sleep(1)
    with clock('sample'):
      sleep(2)
    sleep(4)
  sleep(8)
  with pytest.raises(RuntimeError), clock('step'):
    sleep(16)
    raise RuntimeError
  assert clock.parts() == parts(eval=5, sample=2, other=8, step=16) and clock.total() == 31
  assert clock_lib.read(tmp_path)['parts'] == clock.parts()        # leaving a part had written the file
  with pytest.raises(ValueError, match='lunch'), clock('lunch'):
    pass


def test_what_came_after_the_checkpoint_and_the_way_back_are_lost(tmp_path, sleep):
  clock = Clock(tmp_path, started=1000.0 - 5)                      # imports took 5 s
  clock.resume({})
  with clock('compile'):
    sleep(10)
  with clock('step'):
    sleep(100)
  at_checkpoint = json.loads(json.dumps(clock.parts()))
  with clock('step'):
    sleep(30)                                                      # killed here
  sleep(1000)                                                      # until someone started it again
  again = Clock(tmp_path, started=2140.0 - 2)
  with again('compile'):
    sleep(7)
  again.resume(at_checkpoint, 100)
  again.restart()
  with again('step'):
    sleep(50)
  assert again.parts() == parts(other=5, compile=10, step=150, lost=30 + 2 + 7)
  assert (again.restarts, again.down) == (1, 998)
  again.end(150)
  assert clock_lib.goodput(again.parts()) == 150 / 204
  report = Clock(tmp_path)                                         # the finished run again: it only reports
  report.resume(at_checkpoint, 150)
  with report('eval'):
    sleep(3)
  assert report.parts() == parts(other=5, compile=10, step=150, lost=39, eval=3) and report.restarts == 1
  back = Clock(tmp_path)                                           # its last step is damaged: an older one goes on
  back.resume(at_checkpoint, 100)
  assert back.parts() == parts(other=5, compile=10, step=100, lost=39 + 50 + 3)


def test_a_run_that_saved_nothing_lost_everything(tmp_path, sleep):
  clock = Clock(tmp_path)
  clock.resume({})
  with clock('step'):
    sleep(20)
  clock = Clock(tmp_path)
  clock.resume({})
  assert clock.parts() == parts(lost=20)


def test_a_run_that_is_refused_writes_nothing(tmp_path, sleep):
  with Clock(tmp_path)('input'):
    sleep(20)
  assert not (tmp_path / 'time.json').exists()


def test_files_that_cannot_be_read_and_older_ones(tmp_path, sleep):
  (tmp_path / 'time.json').write_text('{"step": 1')
  assert Clock(tmp_path).total() == 0
  (tmp_path / 'time.json').write_text('{"step": 4.0, "eval": 2.0, "gone": 1.0}')
  assert Clock(tmp_path).parts() == parts(step=4.0, eval=2.0)
