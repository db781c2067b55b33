"""The run directory: one writer, nothing left by a run that could not start, room for its checkpoints."""
import pytest

from llm_jax.config import ConfigError
from llm_jax.train.rundir import RunDirectory


def test_the_lock_ends_with_its_holder_and_leaves_no_file(tmp_path):
  with RunDirectory(tmp_path / 'run', tmp_path) as directory:
    with pytest.raises(ConfigError, match='in use by another run .*"pid"'), RunDirectory(tmp_path / 'run', tmp_path):
      pass
    assert directory.local == tmp_path / 'run' and (tmp_path / 'run' / 'lock').exists()
  with RunDirectory(tmp_path / 'run', tmp_path):
    pass
  assert list((tmp_path / 'run').iterdir()) == []


def test_a_run_that_could_not_start_leaves_no_folder_and_no_other_is_touched(tmp_path):
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'notes').write_text('mine')
  for name in ('new', 'old'):
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path / name, tmp_path):
      raise ZeroDivisionError
  assert not (tmp_path / 'new').exists()
  assert [p.name for p in (tmp_path / 'old').iterdir()] == ['notes']


def test_room_is_for_the_kept_steps_and_the_one_being_written(tmp_path, monkeypatch):
  import shutil
  import types
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=4 * 10**9))
  with RunDirectory(tmp_path / 'run', tmp_path) as directory:
    directory.check_room(10**9, keep=3, complete=0)
    directory.check_room(4 * 10**9, keep=3, complete=3)
    with pytest.raises(ConfigError, match='room for 4 GB, .* need 5 GB more .*checkpoint.keep=4 .* 1 GB each'):
      directory.check_room(10**9, keep=4, complete=0)
    directory.check_room(10**9, keep=4, complete=1)


def test_a_path_that_is_a_file_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--workdir: cannot write to'), RunDirectory(tmp_path / 'file', tmp_path):
    pass
