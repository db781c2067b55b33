"""Checkpoints survive meshes, donation, retention, failed writes, damage and SIGKILL, with every bit unchanged."""
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved import (
  CONFIG,
  abstract,
  assert_same_bits,
  fails,
  flip,
  folder_of,
  make_params,
  make_run,
  make_state,
  mesh_of,
  save,
)

from llm_jax import checkpoint
from llm_jax import config as config_lib


@pytest.fixture
def run(tmp_path):
  return make_run(tmp_path / 'run')


OPTIMIZERS = dict(
    masked=optax.chain(optax.clip_by_global_norm(1.0),
                       optax.masked(optax.adamw(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 2, p))),
    split=optax.partition({'a': optax.lion(1e-2), 'b': optax.sgd(1e-2, momentum=0.9)},
                          lambda p: jax.tree.map(lambda x: 'ab'[x.ndim % 2], p)),
    adafactor=optax.adafactor(1e-2, min_dim_size_to_factor=4), muon=optax.contrib.muon(1e-2))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_round_trip_is_bitwise_for_every_optimizer_state(run, name):
  state = make_state(OPTIMIZERS[name])
  save(run, 3, state=state)
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)


def test_buffers_donated_right_after_save_do_not_change_what_is_saved(run):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: x * -3 + 1, state)

  mesh = mesh_of(8, 8, 1)
  params = {'w_DF': jax.device_put(jax.random.normal(jax.random.key(0), (1024, 4096)), NamedSharding(mesh, P('fsdp')))}
  state = dict(step=jnp.int32(1), params=params)
  copy = jax.tree.map(np.array, state)
  with checkpoint.Checkpointer(run, 1, CONFIG) as c:
    stall = c.save(1, state)
    assert checkpoint.latest_step(run) is None       # save() did not wait for the write
    for _ in range(5):
      state = step(state)
    jax.block_until_ready(state)
    assert 0 < stall <= c.stall_seconds
  assert_same_bits(checkpoint.restore(run), copy)
  assert not np.array_equal(state['params']['w_DF'], copy['params']['w_DF'])


def test_restore_params_reads_neither_moments_nor_needs_the_model(run):
  state = save(run, 5)
  for path in (folder_of(run, 5) / 'state' / 'train').rglob('*'):
    if path.is_file():
      path.write_bytes(b'x' * path.stat().st_size)
  fails('state/train', checkpoint.restore, run)
  assert_same_bits(checkpoint.restore_params(run), state['params'])
  assert_same_bits(checkpoint.restore_params(run, ema=True), state['ema'])
  mesh = mesh_of(8, 2, 4)
  params = checkpoint.restore_params(run, 5, mesh)
  assert_same_bits(params, state['params'])
  assert params['blocks0']['mlp']['w_up_DF'].sharding.spec == P('stage', 'fsdp', 'tensor')


def test_restore_params_falls_back_to_params_where_no_average_is_kept(run):
  state = make_state()
  del state['ema']
  save(run, 5, state=state)
  assert_same_bits(checkpoint.restore_params(run, ema=True), state['params'])


def test_a_copied_step_folder_is_enough(run, tmp_path):
  state = save(run, 5, 6)
  shutil.copytree(folder_of(run, 5), tmp_path / 'elsewhere')
  shutil.rmtree(run)
  meta = checkpoint.find(tmp_path / 'elsewhere')
  assert (meta.step, meta.config, meta.extra) == (5, CONFIG, {'horizon': 100})
  assert config_lib.build(meta.config) == config_lib.Config()
  assert (meta.tokenizer / 'sub' / 'model').read_bytes() == bytes(range(256))
  assert (meta.tokenizer / 'tokenizer.json').read_text() == '{"kind": "byte"}'
  assert_same_bits(checkpoint.restore_params(tmp_path / 'elsewhere'), state['params'])
  assert_same_bits(checkpoint.restore(tmp_path / 'elsewhere', 5, abstract(state)), state)
  fails('holds step 5, not 6', checkpoint.find, tmp_path / 'elsewhere', 6)


def test_retention_keeps_the_newest_and_the_same_step_twice_is_written_once(run):
  with checkpoint.Checkpointer(run, 2, CONFIG) as c:
    for step in (10, 20, 30, 30):
      c.save(step, dict(step=jnp.int32(step), params=make_params()))
    c.wait()
    assert checkpoint.steps(run) == [20, 30]
    written = (folder_of(run, 30) / 'manifest.json').stat().st_mtime_ns
    assert c.save(30, dict(step=jnp.int32(0))) < 0.01
  with checkpoint.Checkpointer(run, 2, CONFIG) as c:        # a resumed run that has nothing left to do
    c.save(30, dict(step=jnp.int32(0)))
  assert (folder_of(run, 30) / 'manifest.json').stat().st_mtime_ns == written
  assert checkpoint.restore(run)['step'] == 30
  assert json.loads((run / 'config.json').read_text()) == dict(format_version=checkpoint.FORMAT, config=CONFIG)
  assert checkpoint.steps(run) == [20, 30]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  run = make_run(tmp_path_factory.mktemp('checkpoint') / 'run')
  save(run, 1, 2)
  return run


def test_formats_newer_is_refused_and_older_is_read(run, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT', checkpoint.FORMAT + 1)
  state = save(run, 5)
  monkeypatch.undo()
  for read in (checkpoint.restore, checkpoint.restore_params, checkpoint.find):
    fails('checkpoint format 2, this llm_jax reads up to 1; update', read, run)
  shutil.rmtree(run / 'checkpoints')
  save(run, 5)
  monkeypatch.setattr(checkpoint, 'FORMAT', checkpoint.FORMAT + 1)
  assert_same_bits(checkpoint.restore_params(run), state['params'])


def test_what_is_not_a_run_directory_is_said_in_one_line(tmp_path, capsys):
  for read in (checkpoint.restore, checkpoint.restore_params, checkpoint.find):
    fails('nowhere: no such directory', read, tmp_path / 'nowhere')
    fails('not a run directory: expected checkpoints/', read, tmp_path)
  assert checkpoint.latest_step(tmp_path / 'nowhere') is None
  fails('tokenizer: no such folder', checkpoint.Checkpointer, tmp_path, 1, CONFIG)
  (tmp_path / 'checkpoints').mkdir()
  fails('no sound checkpoint.*empty', checkpoint.restore, tmp_path)
  for args in (['ls', str(tmp_path / 'nowhere')], ['list', str(tmp_path)], ['ls', str(tmp_path), '--debag']):
    with pytest.raises(SystemExit) as e:
      checkpoint.main(args)
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_started_again(run):
  assert checkpoint.find_to_resume(run) is None
  save(run, 1, 2)
  assert checkpoint.find_to_resume(run).step == 2
  for folder in (run / 'checkpoints').iterdir():
    payload = max((p for p in (folder / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    payload.write_bytes(payload.read_bytes()[:-1])
  fails('no sound checkpoint .step 2 is damaged.*put a good copy back', checkpoint.find_to_resume, run)


def test_a_step_from_before_manifests_is_read_with_a_warning_and_never_deleted(run, capsys):
  state = save(run, 1, 2)
  (folder_of(run, 2) / 'manifest.json').unlink()
  assert checkpoint.latest_step(run) == 1                          # this format has manifests: its write did not finish
  meta = json.loads((folder_of(run, 2) / 'meta.json').read_text())
  del meta['format_version']
  (folder_of(run, 2) / 'meta.json').write_text(json.dumps(meta))
  capsys.readouterr()
  found = checkpoint.find(run)
  assert found.step == 2 and found.verified == 'not verified'
  assert 'checkpoints/2 is unverified: it is from before manifests' in capsys.readouterr().err
  assert_same_bits(checkpoint.restore(found, abstract_state=abstract(state)), state)
  checkpoint.main(['ls', str(run)])
  assert capsys.readouterr().out.splitlines()[2].endswith('unverified')
  (folder_of(run, 2) / 'state' / '_CHECKPOINT_METADATA').unlink()
  assert checkpoint.latest_step(run) == 1                          # nor did Orbax finish: incomplete


def test_verifying_can_be_turned_off_and_says_what_it_read(run):
  save(run, 1)
  found = checkpoint.find(run)
  assert re.fullmatch(r'[\d.]+ MB in \d+ files verified in [\d.]+ s', found.verified)
  payload = max((folder_of(run, 1) / 'state/params').glob('ocdbt.process_0/d/*'), key=lambda p: p.stat().st_size)
  flip(payload)
  fails(payload.name, checkpoint.find, run)
  assert checkpoint.find(run, verify=False).verified == 'not verified'


def test_importing_starts_no_device_and_no_orbax():
  code = ('import sys, llm_jax.checkpoint as c; from jax._src import xla_bridge; c.latest_step(".");'
          'assert "orbax" not in sys.modules and not xla_bridge._backends')
  start = time.perf_counter()
  subprocess.run([sys.executable, '-c', code], check=True, cwd=pathlib.Path(__file__).parents[1], timeout=60)
  assert time.perf_counter() - start < 30


names = st.text('abcdefgh_0123456789', min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(tree=st.dictionaries(names, st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=8)))
def test_nested_dicts_survive_their_paths(tree):
  assert checkpoint.nest(checkpoint.flat(tree)) == tree
