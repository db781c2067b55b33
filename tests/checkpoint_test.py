"""Checkpoints survive meshes, donation, retention, failed writes, damage and SIGKILL, with every bit unchanged."""
import functools
import json
import pathlib
import resource
import shutil
import signal
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

from llm_jax import checkpoint, sharding
from llm_jax import config as config_lib
from llm_jax.config import ConfigError

CONFIG = config_lib.to_dict(config_lib.Config())
TREE = {'embed_VD': (16, 8), 'blocks0': {'mlp': {'w_up_DF': (3, 8, 16)}, 'norm': {'scale_D': (3, 8)}}}


def mesh_of(devices, fsdp, tensor):
  return sharding.make_mesh(config_lib.Mesh(fsdp=fsdp, tensor=tensor), jax.devices()[:devices])


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), TREE,
                      is_leaf=lambda x: isinstance(x, tuple))


def make_state(tx=None):
  """Optimizer states of random bits (NaN payloads too), among them bfloat16 moments and int32 counts."""
  tx = tx or optax.adamw(1e-2, mu_dtype=jnp.bfloat16)
  rng = np.random.default_rng(1)
  opt_state = jax.tree.map(
      lambda x: jnp.asarray(np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), x.dtype).reshape(x.shape)),
      jax.eval_shape(tx.init, make_params()))
  return dict(step=jnp.int32(7), horizon=jnp.int32(2**31 - 1), params=make_params(), opt_state=opt_state,
              ema=make_params(9))


def shardings_of(state, mesh):
  """Every leaf named like a parameter lies like that parameter; the rest is replicated."""
  def one(path, x):
    try:
      return NamedSharding(mesh, sharding.spec(sharding.dims_of(path), sharding.PARAM, x.shape, mesh))
    except ValueError:
      return NamedSharding(mesh, P())
  return jax.tree_util.tree_map_with_path(one, state)


def abstract(state, shardings=None):
  shardings = jax.tree.map(lambda x: x.sharding, state) if shardings is None else shardings
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture
def run(tmp_path):
  return make_run(tmp_path / 'run')


def make_run(path):
  (path / 'tokenizer' / 'sub').mkdir(parents=True)
  (path / 'tokenizer' / 'tokenizer.json').write_text('{"kind": "byte"}')
  (path / 'tokenizer' / 'sub' / 'model').write_bytes(bytes(range(256)))
  return path


def save(run, *steps, state=None, keep=9, **kwargs):
  state = make_state() if state is None else state
  with checkpoint.Checkpointer(run, keep, CONFIG, **kwargs) as c:
    for step in steps:
      c.save(step, state, dict(horizon=100))
  return state


def folder_of(run, step):
  return run / 'checkpoints' / str(step)


def fails(match, function, *args, **kwargs):
  with pytest.raises(ConfigError, match=match) as e:
    function(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


def flip(path, offset=None, bit=0):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if offset is None else offset % len(data)] ^= 1 << bit
  path.write_bytes(data)


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


def test_T14_saved_on_8_devices_restored_on_1_2_4_and_another_shape(run):
  state = make_state()
  assert state['opt_state'][0].mu['embed_VD'].dtype == jnp.bfloat16
  placed = jax.device_put(state, shardings_of(state, mesh_of(8, 4, 2)))
  assert len(placed['params']['embed_VD'].addressable_shards[0].data) == 8     # V over 2
  save(run, 7, state=placed)
  for devices, fsdp, tensor in [(8, 4, 2), (8, 2, 4), (4, 4, 1), (2, 1, 2), (1, 1, 1)]:
    shardings = shardings_of(state, mesh_of(devices, fsdp, tensor))
    back = checkpoint.restore(run, abstract_state=abstract(state, shardings))
    assert_same_bits(back, state)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), back, shardings))
  assert_same_bits(checkpoint.restore(run)['params'], state['params'])         # no abstract state: one device


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
  assert params['blocks0']['mlp']['w_up_DF'].sharding.spec == P(None, 'fsdp', 'tensor')


def test_restore_params_falls_back_to_params_where_no_average_is_kept(run):
  state = make_state()
  del state['ema']
  save(run, 5, state=state)
  assert_same_bits(checkpoint.restore_params(run, ema=True), state['params'])


def test_T15_wrong_shape_missing_and_extra_keys_are_listed(run):
  state = save(run, 5)
  other = abstract(state)
  other['params']['embed_VD'] = jax.ShapeDtypeStruct((17, 8), jnp.float32)
  other['params']['new_D'] = jax.ShapeDtypeStruct((8,), jnp.float32)
  del other['params']['blocks0']['norm']
  message = fails('does not fit', checkpoint.restore, run, abstract_state=other)
  assert 'not in the checkpoint: params/new_D;' in message
  assert 'only in the checkpoint: params/blocks0/norm/scale_D;' in message
  assert 'other shape: params/embed_VD (16, 8) saved, (17, 8) here' in message


def test_T15_dtype_changes_only_when_asked_for(run):
  state = save(run, 5)
  other = abstract(state)
  other['params'] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
                                 other['params'])
  message = fails('other dtype', checkpoint.restore, run, abstract_state=other)
  assert 'params/embed_VD float32 saved, bfloat16 here' in message
  back = checkpoint.restore(run, abstract_state=other, change_dtype=True)
  assert_same_bits(back, state | dict(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state['params'])))


def test_a_copied_step_folder_is_enough(run, tmp_path):
  state = save(run, 5, 6)
  shutil.copytree(folder_of(run, 5), tmp_path / 'elsewhere')
  shutil.rmtree(run)
  meta = checkpoint.read_meta(tmp_path / 'elsewhere')
  assert (meta.step, meta.config, meta.extra) == (5, CONFIG, {'horizon': 100})
  assert config_lib.build(meta.config) == config_lib.Config()
  assert (meta.tokenizer / 'sub' / 'model').read_bytes() == bytes(range(256))
  assert (meta.tokenizer / 'tokenizer.json').read_text() == '{"kind": "byte"}'
  assert_same_bits(checkpoint.restore_params(tmp_path / 'elsewhere'), state['params'])
  assert_same_bits(checkpoint.restore(tmp_path / 'elsewhere', 5, abstract(state)), state)
  fails('holds step 5, not 6', checkpoint.read_meta, tmp_path / 'elsewhere', 6)


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
  fails('up to step 30.*checkpoint.resume', checkpoint.Checkpointer, run, 2, CONFIG, resume=False)
  assert checkpoint.steps(run) == [20, 30]


def test_T5_a_failed_write_is_raised_and_harms_no_earlier_step(run, caplog):
  state = save(run, 1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  big = dict(step=jnp.int32(2), params={'w_DF': jax.random.normal(jax.random.key(0), (1024, 1024))})
  c = checkpoint.Checkpointer(run, 2, CONFIG)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))     # the disk's "no": writes past this fail
    c.save(2, big)
    message = fails(r'checkpoints/2.*could not be written', c.wait)
    assert 'earlier steps are intact' in message
    c.save(3, big)
    fails(r'checkpoints/3.*could not be written', c.save, 4, big)
    c.save(5, big)
    fails(r'checkpoints/5.*could not be written', c.close)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoint.steps(run) == [1]
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)
  save(run, 2, state=big)                                          # room again: the same step can be written
  assert checkpoint.steps(run) == [1, 2]
  assert not folder_of(run, 5).exists()                            # and leftovers are gone
  assert caplog.text == ''                                         # nor did Orbax log its own traceback beside the line


def test_T4_empty_and_incomplete_steps_do_not_count(run, capsys):
  state = save(run, 1, 2)
  folder_of(run, 3).mkdir()
  shutil.copytree(folder_of(run, 2), folder_of(run, 4))
  (folder_of(run, 4) / 'manifest.json').unlink()
  shutil.copytree(folder_of(run, 2), folder_of(run, 5))
  shutil.rmtree(folder_of(run, 5) / 'state' / 'params')
  shutil.copytree(folder_of(run, 2), folder_of(run, 6))
  (folder_of(run, 6) / 'manifest.json').write_text('{')
  (run / 'checkpoints' / 'notes').mkdir()
  assert checkpoint.steps(run) == [1, 2] and checkpoint.latest_step(run) == 2
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)
  warned = capsys.readouterr().err
  for step in (3, 4, 5, 6):
    assert f'checkpoints/{step} is ' in warned
  fails('no complete checkpoint of step 4 .*incomplete.*complete: 1, 2', checkpoint.restore, run, 4)
  checkpoint.main(['ls', str(run)])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ['1', '2', '3', '4', '5', '6']
  assert lines[1].endswith('complete') and 'no manifest.json' in lines[3] and 'missing' in lines[5]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  run = make_run(tmp_path_factory.mktemp('checkpoint') / 'run')
  save(run, 1, 2)
  return run


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_T2_T3_any_flipped_bit_or_cut_in_any_file_is_named(saved, data):
  folder = folder_of(saved, 2)
  files = sorted(p for p in folder.rglob('*') if p.is_file() and p.name != 'manifest.json' and p.stat().st_size)
  path = data.draw(st.sampled_from(files))
  original = path.read_bytes()
  try:
    if data.draw(st.booleans()):
      flip(path, data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7)))
      assert str(path.relative_to(folder)) in checkpoint.verify(folder)
    else:
      path.write_bytes(original[:data.draw(st.integers(0, len(original) - 1))])
      assert str(path.relative_to(folder)) in checkpoint.problem(folder) and checkpoint.latest_step(saved) == 1
  finally:
    path.write_bytes(original)
  assert checkpoint.verify(folder) == '' and checkpoint.latest_step(saved) == 2


def test_T2_a_flipped_bit_is_refused_by_name_and_the_command_exits_1(run, capsys):
  save(run, 1, 2)
  payload = max((folder_of(run, 2) / 'state/params').glob('ocdbt.process_0/d/*'), key=lambda p: p.stat().st_size)
  flip(payload)
  fails(f'{payload.name}.*delete this folder to use step 1', checkpoint.restore, run)
  fails(payload.name, checkpoint.restore_params, run)
  with pytest.raises(SystemExit) as e:
    checkpoint.main(['verify', str(run)])
  assert e.value.code == 1
  out = capsys.readouterr().out
  assert 'verified' in out and payload.name in out


def test_formats_newer_is_refused_and_older_is_read(run, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT', checkpoint.FORMAT + 1)
  state = save(run, 5)
  monkeypatch.undo()
  for read in (checkpoint.restore, checkpoint.restore_params, checkpoint.read_meta):
    fails('checkpoint format 2, this llm_jax reads up to 1; update', read, run)
  shutil.rmtree(run / 'checkpoints')
  save(run, 5)
  monkeypatch.setattr(checkpoint, 'FORMAT', checkpoint.FORMAT + 1)
  assert_same_bits(checkpoint.restore_params(run), state['params'])


def test_what_is_not_a_run_directory_is_said_in_one_line(tmp_path, capsys):
  for read in (checkpoint.restore, checkpoint.restore_params, checkpoint.read_meta):
    fails('nowhere: no such directory', read, tmp_path / 'nowhere')
    fails('not a run directory: expected checkpoints/', read, tmp_path)
  assert checkpoint.latest_step(tmp_path / 'nowhere') is None
  fails('tokenizer: no such folder', checkpoint.Checkpointer, tmp_path, 1, CONFIG)
  (tmp_path / 'checkpoints').mkdir()
  fails('no complete checkpoint.*empty', checkpoint.restore, tmp_path)
  for args in (['ls', str(tmp_path / 'nowhere')], ['list', str(tmp_path)], ['ls', str(tmp_path), '--debag']):
    with pytest.raises(SystemExit) as e:
      checkpoint.main(args)
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_with_nothing_but_damaged_checkpoints_is_not_started_again(run):
  checkpoint.require_one_sound(run)
  save(run, 1, 2)
  checkpoint.require_one_sound(run)
  for folder in (run / 'checkpoints').iterdir():
    payload = max((p for p in (folder / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    payload.write_bytes(payload.read_bytes()[:-1])
  fails('every checkpoint is damaged .step .*put a good copy back', checkpoint.require_one_sound, run)


KILLED = '''
import os, signal, sys
import jax, jax.numpy as jnp
from llm_jax import checkpoint
def state(step):
  return dict(step=jnp.int32(step), params={'w_DF': jax.random.normal(jax.random.key(step), (2048, 2048))})
c = checkpoint.Checkpointer(sys.argv[1], 2, {'a': 1})
c.save(1, state(1))
c.wait()
c.save(2, state(2))
assert 'orbax' in sys.modules
os.kill(os.getpid(), signal.SIGKILL)
'''


def test_T1_sigkill_in_an_asynchronous_save_leaves_the_previous_step(run):
  child = subprocess.run([sys.executable, '-c', KILLED, str(run)], cwd=pathlib.Path(__file__).parents[1],
                         capture_output=True, text=True, timeout=60)
  assert child.returncode == -signal.SIGKILL and child.stderr == ''      # neither errors nor Orbax's chatter
  assert (folder_of(run, 2) / 'meta.json').exists()                      # it was killed while writing
  assert checkpoint.latest_step(run) == 1
  assert checkpoint.restore(run)['step'] == 1
  expected = jax.random.normal(jax.random.key(1), (2048, 2048))
  assert_same_bits(checkpoint.restore_params(run), {'w_DF': expected})
  with checkpoint.Checkpointer(run, 2, CONFIG) as c:
    assert not folder_of(run, 2).exists()
    c.save(2, make_state())
  assert checkpoint.steps(run) == [1, 2]


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
  assert checkpoint._nest(checkpoint._flat(tree)) == tree
