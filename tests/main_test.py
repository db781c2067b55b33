"""Bad input: one line that names the flag, key or file and the nearest right one; exit status 2; nothing is made."""
import pathlib
import subprocess
import sys

import pytest

from llm_jax import config as config_lib
from llm_jax import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASE = f'--config={ROOT}/configs/base.py'


@pytest.mark.parametrize('args, expected', [
    ([], '--config: expected a config file'),
    (['--confg=x'], "--confg; nearest: 'config'"),
    (['--config=configs/bse.py'], "no file 'configs/bse.py'"),
    ([BASE, '--debug=1'], '--debug: takes no value'),
    ([BASE, '--workdir=ftp://bucket/run'], 'ftp://bucket/run: expected a local path, gs:// or s3://'),
    ([BASE, '--config.mesh.distributed=True'], 'config.mesh.distributed: '),
    ([BASE, 'train'], "unexpected argument 'train'"),
    ([BASE, '--config.train.step=3'], "no such key 'step'; nearest: 'steps'"),
    ([BASE, '--config.trian.steps=3'], "no such key 'trian'; nearest: 'train'"),
    ([BASE, '--config.train.steps=many'], "expected int, got 'many'"),
    ([BASE, '--config.train=3'], 'is a group'),
    ([BASE, '--config.model=llama3_9b'], "no preset 'llama3_9b'; nearest: 'llama3_8b'"),
    ([BASE, '--config.optimizer.name=adam'], "'adam' is not known; nearest: 'adamw'"),
    ([BASE, '--config.train.batch_size=12', '--config.train.accumulate=5'], 'config.train.accumulate'),
    ([BASE, '--config.data.source=text'], 'config.data.path'),
    ([BASE, '--config.mesh.tensor=3'], 'config.mesh'),
    ([BASE, '--config.model.encoder_layers=2'], 'config.model.encoder_layers: 2'),
    ([BASE, '--config.mesh.context=16'], "'context': 16"),
    ([BASE, '--config.mesh.stage=2'], 'config.train.accumulate: a pipeline of 2 stages'),
    ([BASE, '--config.mesh.context=2', '--config.data.length=250'], 'no multiple of 4, twice mesh.context'),
    ([BASE, '--config.train.batch_size=4'], 'config.train.batch_size: 4 rows do not divide among 8'),
    ([BASE, '--config.data.source=text', '--config.data.path=nowhere.txt', '--config.tokenizer.kind=byte'],
     "config.data.path: no file, folder or glob 'nowhere.txt'"),
    ([BASE, '--config.data.source=text', '--config.data.path=nowhere.txt'], "'nowhere.txt'"),
    ([BASE, '--config.init_from=nowhere'], 'nowhere: no such directory'),
    ([BASE, '--config.tokenizer.kind=hf', '--config.tokenizer.path=tokenizer.json'], 'config.tokenizer.path: no file'),
    ([BASE, '--config.data.cache_dir=/dev/null'], '/dev/null'),
])
def test_one_line_that_names_it(args, expected, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stopped:
    main.main([*[f'--workdir={tmp_path}/run'] * bool(args), *args])
  err = capsys.readouterr().err
  assert stopped.value.code == 2
  assert len(err.splitlines()) == 1 and expected in err and 'Traceback' not in err
  assert not list(tmp_path.iterdir())


def test_a_broken_config_file_is_named(tmp_path, capsys):
  (tmp_path / 'broken.py').write_text('def get_config(:\n')
  with pytest.raises(SystemExit):
    main.main([f'--config={tmp_path}/broken.py'])
  assert 'broken.py failed: SyntaxError' in capsys.readouterr().err


def test_a_workdir_that_cannot_be_made_is_named_and_a_file_in_its_place_is_kept(tmp_path, capsys):
  (tmp_path / 'file').write_text('precious')
  for workdir in ('file', 'file/run'):
    with pytest.raises(SystemExit) as stopped:
      main.main([BASE, f'--workdir={tmp_path}/{workdir}'])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(err.splitlines()) == 1 and f'{tmp_path}/{workdir}' in err
  assert (tmp_path / 'file').read_text() == 'precious'


def test_a_second_interrupt_is_one_line_too(capsys, monkeypatch):
  from llm_jax.train import loop

  def interrupted(*_):
    raise KeyboardInterrupt
  monkeypatch.setattr(loop, 'train', interrupted)
  with pytest.raises(SystemExit) as stopped:
    main.main([BASE])
  assert stopped.value.code == 130
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_real_process_exits_2_with_one_line_and_debug_shows_where():
  run = lambda *more: subprocess.run(
      [sys.executable, '-m', 'llm_jax.main', BASE, '--config.data.lenght=3', *more], capture_output=True, text=True)
  quiet, debug = run(), run('--debug')
  assert quiet.returncode == debug.returncode == 2
  assert len(quiet.stderr.splitlines()) == 1 and "nearest: 'length'" in quiet.stderr
  assert 'Traceback' in debug.stderr


@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT / 'configs').glob('*.py')))
def test_every_config_builds(name):
  cfg = config_lib.build(config_lib.load_file(str(ROOT / 'configs' / name)))
  assert config_lib.derive(cfg.model, 100, cfg.data.length).head_dim > 0


def test_base_names_every_key():
  base = config_lib.load_file(str(ROOT / 'configs' / 'base.py')).to_dict()
  keys = lambda tree: {(k, j) for k, v in tree.items() for j in (v if isinstance(v, dict) else [''])}
  assert keys(base) == keys(config_lib.to_dict(config_lib.Config()))
