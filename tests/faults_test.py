"""Failures tried for real, by their numbers T1 to T20: each breaks a real file, disk or process and checks that what
was promised holds and that nothing is lost. docs/reliability.md is the table of them. `-m slow` repeats them often.
"""
import functools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from etils import epath
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
  shardings_of,
)

from llm_jax import checkpoint, main, manifest, paths
from llm_jax.data import batches, tokenizer

STEP = r'step +\d+/'             # the line of a step


def repeats(few, many):
  """Few repeats always, many when slow."""
  return [few, pytest.param(many, marks=pytest.mark.slow)]


@pytest.fixture
def run(tmp_path):
  return make_run(tmp_path / 'run')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Stores and compiled programs that the runs of this file share."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture
def flags(tmp_path, cache):
  """flags(train__steps=5, ...): the command line of a small run on texts of an easy language."""
  runs.write_texts(tmp_path)
  return lambda **keys: runs.flags(tmp_path, **dict(data__cache_dir=cache, log__compile_cache='True') | keys)


def rows(workdir, name='metrics.jsonl', **wanted):
  return [r for r in paths.read_jsonl(workdir / name) if all(r.get(k) == v for k, v in wanted.items())]


def payloads(folder):
  return sorted(p for p in (folder / 'state').rglob('*') if p.is_file() and p.stat().st_size)


# Checkpoints ---------------------------------------------------------------------------------------------------------

SAVER = '''
import sys, jax, jax.numpy as jnp
from llm_jax import checkpoint
def state(step):
  return dict(step=jnp.int32(step), params={'w_DF': jax.random.normal(jax.random.key(step), (1024, 2048))})
found = checkpoint.find_to_resume(sys.argv[1])
step = found.step if found else 0
assert not found or (checkpoint.restore(found)['params']['w_DF'] == state(step)['params']['w_DF']).all()
with checkpoint.Checkpointer(sys.argv[1], 2, {'a': 1}, resumed=found and found.step) as c:
  while True:
    step += 1
    c.save(step, state(step))
    print(step, flush=True)
'''


@pytest.mark.parametrize('kills', repeats(3, 20))
def test_T1_sigkill_at_random_moments_of_an_asynchronous_save(run, kills):
  """What is found afterwards is, bit for bit, what was saved as that step; the next process cleans up and goes on."""
  rng, found = random.Random(kills), 0
  for _ in range(kills):
    child = subprocess.Popen([sys.executable, '-c', SAVER, str(run)], cwd=runs.ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    for _ in range(2):
      assert child.stdout.readline().strip().isdigit(), child.stderr.read()
    time.sleep(rng.uniform(0, 0.5))
    child.kill()
    out, error = child.communicate()
    assert set(re.sub(r'warning: .*\n', '', error)) == set(), error
    newest = checkpoint.find(run)
    assert newest.step > found
    found = newest.step
    expected = jax.random.normal(jax.random.key(found), (1024, 2048))
    assert_same_bits(checkpoint.restore_params(newest), {'w_DF': expected})
  with checkpoint.Checkpointer(run, 2, CONFIG):
    assert [f for f in (run / 'checkpoints').iterdir() if manifest.problem(epath.Path(f))] == []
  assert len(checkpoint.steps(run)) <= 3


@pytest.mark.parametrize('flips', repeats(20, 200))
def test_T2_one_flipped_bit_in_any_payload_file_is_found_named_and_walked_back_from(run, capsys, flips):
  save(run, 1)
  state = save(run, 2, state=dict(make_state(), step=jnp.int32(2)))
  files, rng = payloads(folder_of(run, 2)), random.Random(flips)
  for _ in range(flips):
    path, bit = rng.choice(files), rng.randrange(8)
    offset = rng.randrange(path.stat().st_size)
    flip(path, offset, bit)
    name = str(path.relative_to(folder_of(run, 2)))
    capsys.readouterr()
    assert checkpoint.find(run).step == 1
    assert re.search(rf'checkpoints/2 is damaged: the contents of {re.escape(name)} changed since they were written '
                     r'\(sha256\) or cannot be read; going back to step 1', capsys.readouterr().err)
    fails(re.escape(name), checkpoint.restore, run, 2)
    flip(path, offset, bit)
  assert checkpoint.find(run).step == 2
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)


@pytest.mark.parametrize('how', ['cut', 'emptied', 'missing'])
def test_T3_a_cut_emptied_or_missing_payload_is_named_and_walked_back_from(run, capsys, how):
  save(run, 1)
  save(run, 2, state=dict(make_state(), step=jnp.int32(2)))
  path = max(payloads(folder_of(run, 2)), key=lambda p: p.stat().st_size)
  if how == 'missing':
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-1] if how == 'cut' else b'')
  assert checkpoint.restore(run, verify=False)['step'] == 7 and checkpoint.find(run).step == 1   # step 1's own
  assert path.name in capsys.readouterr().err
  fails(path.name, checkpoint.find, run, 2)
  with pytest.raises(SystemExit) as e:
    checkpoint.main(['verify', str(run)])
  assert e.value.code == 1
  out = capsys.readouterr().out
  assert re.search(r'\b1 .* verified\n', out) and path.name in out


def test_T4_empty_unfinished_and_incomplete_steps_are_skipped_with_a_warning(run, capsys):
  state = save(run, 1, 2)
  folder_of(run, 3).mkdir()
  for step in (4, 5, 6):
    shutil.copytree(folder_of(run, 2), folder_of(run, step))
  (folder_of(run, 4) / 'manifest.json').unlink()
  shutil.rmtree(folder_of(run, 5) / 'state' / 'params')
  (folder_of(run, 6) / 'manifest.json').write_text('{')
  (run / 'checkpoints' / 'notes').mkdir()
  assert checkpoint.steps(run) == [1, 2] and checkpoint.latest_step(run) == 2
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)
  warned = capsys.readouterr().err
  for step in (3, 4, 5, 6):
    assert f'checkpoints/{step} is ' in warned
  fails('no sound checkpoint of step 4 .*incomplete', checkpoint.restore, run, 4)
  checkpoint.main(['ls', str(run)])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ['1', '2', '3', '4', '5', '6']
  assert lines[1].endswith('complete') and 'no manifest.json' in lines[3] and 'missing' in lines[5]
  with checkpoint.Checkpointer(run, 9, CONFIG, resumed=2):       # unfinished ones are removed, damaged ones set aside
    assert sorted(f.name for f in (run / 'checkpoints').iterdir()) == ['1', '2', '5.damaged', '6.damaged', 'notes']


def test_T4_steps_whose_manifests_were_lost_are_not_deleted(run):
  save(run, 1, 2)
  for step in (1, 2):
    (folder_of(run, step) / 'manifest.json').unlink()            # as a copy that leaves out *.json
  fails('no checkpoint has its manifest.json; copy them again', checkpoint.find_to_resume, run)
  assert folder_of(run, 1).exists()


def test_T2_a_file_that_cannot_be_read_is_walked_back_from(run, capsys, monkeypatch):
  save(run, 1, 2)
  name = payloads(folder_of(run, 2))[0].name
  file_digest = manifest.hashlib.file_digest

  def broken(f, kind):
    if '/2/state/' in f.name and f.name.endswith(name):
      raise OSError(5, 'Input/output error')                     # what a dying disk says
    return file_digest(f, kind)
  monkeypatch.setattr(manifest.hashlib, 'file_digest', broken)
  assert checkpoint.find(run).step == 1 and name in capsys.readouterr().err


def test_T2_T3_T4_a_real_run_goes_back_to_its_newest_sound_step_and_ends_as_if_nothing_had_been(flags, tmp_path):
  keys = dict(train__steps=20, checkpoint__every=4, checkpoint__keep=9, model__dropout=0.1)
  runs.finish(runs.start(flags(**keys)))
  expected, curve = runs.state_bits(tmp_path / 'run'), runs.curve(tmp_path / 'run')
  shutil.rmtree(folder_of(tmp_path / 'run', 20))
  flip(max(payloads(folder_of(tmp_path / 'run', 16)), key=lambda p: p.stat().st_size))
  cut = payloads(folder_of(tmp_path / 'run', 12))[0]
  cut.write_bytes(cut.read_bytes()[:-1])
  folder_of(tmp_path / 'run', 24).mkdir()
  out, error = runs.finish(runs.start(flags(**keys)))
  assert re.search(r'resuming .* at step 8 \([\d.]+ MB in \d+ files verified in [\d.]+ s\)', out)
  name = cut.relative_to(folder_of(tmp_path / 'run', 12))
  for text in ('24 is incomplete', '16 is damaged: the contents of state/', f'12 is damaged: {name} has',
               '16.damaged: set aside'):
    assert text in error
  assert runs.state_bits(tmp_path / 'run') == expected and runs.curve(tmp_path / 'run') == curve
  event, = rows(tmp_path / 'run', 'events.jsonl', kind='resumed')
  assert 'step 16 is damaged: the contents of state/' in event['text']


def test_T5_a_failed_asynchronous_write_ends_the_run_at_the_latest_at_the_next_save(flags, tmp_path):
  process = runs.start(flags(train__steps=100_000, checkpoint__every=50))
  runs.wait_for(process, r'step +120/')
  while not (tmp_path / 'run' / 'checkpoints' / '100' / 'manifest.json').exists():        # on a busy machine
    time.sleep(0.01)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))       # the disk's "no", from here on
  out, error = runs.finish(process, 2)
  error = error.splitlines()[-1]                  # TensorStore may print before it what became of its other writes
  assert 'could not be written' in error and 'earlier steps are intact' in error
  failed = int(re.search(r'checkpoints/(\d+): this checkpoint', error)[1])
  assert int(re.findall(r'^step +(\d+)/', out, re.M)[-1]) <= failed + 50
  found = checkpoint.find(tmp_path / 'run')
  assert 100 <= found.step < failed and checkpoint.verify(found.folder) == ''


def test_T5_a_failed_write_is_raised_by_whatever_comes_next_and_leaves_nothing_behind(run, caplog):
  state = save(run, 1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  big = dict(step=jnp.int32(2), params={'w_DF': jax.random.normal(jax.random.key(0), (1024, 1024))})
  c = checkpoint.Checkpointer(run, 2, CONFIG)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    c.save(2, big)
    fails(r'checkpoints/2.*could not be written.*earlier steps are intact', c.wait)
    c.save(3, big)
    fails(r'checkpoints/3.*could not be written', c.save, 4, big)
    c.save(5, big)
    with pytest.raises(checkpoint.ConfigError, match='checkpoints/5'):
      while True:
        c.check()                                                  # what the loop asks after every step
        time.sleep(0.01)
    c.save(6, big)
    fails(r'checkpoints/6.*could not be written', c.close)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoint.steps(run) == [1]
  assert_same_bits(checkpoint.restore(run, abstract_state=abstract(state)), state)
  save(run, 2, state=big)                                          # room again: the same step can be written
  assert checkpoint.steps(run) == [1, 2] and not folder_of(run, 6).exists()
  assert caplog.text == ''                                         # nor did Orbax log its own traceback beside the line


@pytest.fixture
def small_disk(tmp_path):
  """small_disk(megabytes): a new file system of that size."""
  mounted = []

  def mount(megabytes):
    folder = tmp_path / f'disk{len(mounted)}'
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'llm_jax', str(folder)],
                          capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f'a small disk cannot be mounted here: {done.stderr.strip()}')
    mounted.append(folder)
    return folder
  yield mount
  for folder in mounted:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_T6_a_full_disk_ends_the_run_with_a_message_and_harms_no_step(flags, small_disk):
  disk = small_disk(6)
  args = [*flags(train__steps=100_000, checkpoint__every=100), f'--workdir={disk / "run"}']
  process = runs.start(args)
  runs.wait_for(process, r'checkpoint of step 200 ')
  with open(disk / 'ballast', 'wb', buffering=0) as f:
    try:
      while True:
        f.write(bytes(4096))
    except OSError:
      pass
  error = runs.finish(process, 2)[1].splitlines()[-1]
  assert error.startswith('error: ') and 'make room' in error and re.search('No space left|NO_SPACE', error)
  found = checkpoint.find(disk / 'run')
  assert found.step >= 100 and checkpoint.verify(found.folder) == ''
  (disk / 'ballast').unlink()
  process = runs.start(args)
  assert f'resuming {disk / "run"} at step {found.step}' in runs.wait_for(process, STEP)
  process.send_signal(signal.SIGTERM)
  runs.finish(process)


def test_T6_too_little_room_is_refused_before_step_0(flags, small_disk):
  disk = small_disk(1)
  out, error = runs.finish(runs.start([*flags(checkpoint__keep=3), f'--workdir={disk / "run"}']), 2)
  assert error.count('\n') == 1 and 'make room, lower checkpoint.keep' in error and '--workdir' in error
  assert not re.search(STEP, out) and not (disk / 'run').exists()


# Signals -------------------------------------------------------------------------------------------------------------

def test_T7_T18_sigterm_saves_at_that_step_and_the_resumed_run_is_bitwise_the_uninterrupted_one(flags, tmp_path):
  keys = dict(train__steps=40, model__dropout=0.1, data__packing='pack', train__accumulate=2)
  whole = runs.start(flags(**keys, workdir='whole'))
  process = runs.start(flags(**keys))
  runs.wait_for(process, STEP)
  process.send_signal(signal.SIGTERM)
  out, error = runs.finish(process)
  assert re.fullmatch(r'SIGTERM: saving at the end of this step.*\n', error)
  stopped = checkpoint.latest_step(tmp_path / 'run')
  assert 0 < stopped < 40 and f'stopped at step {stopped}' in out
  for process in (whole, runs.start(flags(**keys))):
    assert runs.finish(process)[1] == ''                         # no warning of any library
  assert runs.state_bits(tmp_path / 'run') == runs.state_bits(tmp_path / 'whole')
  assert runs.curve(tmp_path / 'run') == runs.curve(tmp_path / 'whole')


@pytest.mark.parametrize('notice', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_T7_a_preemption_notice_to_one_host_stops_all_after_the_same_step(flags, tmp_path, notice):
  keys = dict(train__steps=100_000, checkpoint__every=0, model__dropout=0.1)
  hosts = runs.start_hosts(flags(**keys), 2, devices=2)
  runs.wait_for(hosts[0], r'step +20/')
  hosts[1].send_signal(notice)
  out, error = runs.finish(hosts[0])
  stopped = int(re.search(r'stopped at step (\d+); the same command resumes', out)[1])
  assert f'saving step {stopped}' in error and f'saving step {stopped}' in runs.finish(hosts[1])[1]
  found = checkpoint.find(tmp_path / 'run')
  assert found.step == stopped and checkpoint.verify(found.folder) == ''


SLOW_DISK = '''
import time
from llm_jax import manifest
write = manifest.write
manifest.write = lambda *a: (time.sleep(60), write(*a))
'''


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_T8_ctrl_c_saves_although_it_also_reaches_the_workers_and_a_second_one_stops_at_once(flags, tmp_path, workers):
  """A terminal sends it to every process of the foreground group."""
  args = flags(train__steps=100_000, data__workers=workers, checkpoint__every=0)
  process = runs.start(args, start_new_session=True)
  runs.wait_for(process, STEP)
  os.killpg(process.pid, signal.SIGINT)
  _, error = runs.finish(process)
  assert 'SIGINT: saving at the end of this step' in error and 'Traceback' not in error
  saved = checkpoint.latest_step(tmp_path / 'run')
  assert saved > 0
  process = runs.start(args, start_new_session=True, code=SLOW_DISK)
  runs.wait_for(process, STEP)
  os.killpg(process.pid, signal.SIGINT)
  runs.wait_for(process, r'checkpoint of step \d+ started')       # and would be written for a minute
  start = time.monotonic()
  os.killpg(process.pid, signal.SIGINT)
  _, error = runs.finish(process, 130)
  assert time.monotonic() - start < 10 and 'the same command goes on' in error and 'Traceback' not in error
  with pytest.raises(ProcessLookupError):                         # no worker is left
    while time.monotonic() - start < 15:
      os.killpg(process.pid, 0)
      time.sleep(0.1)
  found = checkpoint.find(tmp_path / 'run')
  assert found.step == saved and checkpoint.verify(found.folder) == ''


# Steps ---------------------------------------------------------------------------------------------------------------

POISONED = '''
from llm_jax.data import batches
call = batches.Batches.__call__
def poisoned(self, step, rows=None):
  batch = call(self, step, rows)
  if step == 6:
    batch['mask_BT'] = batch['mask_BT'] * float('{}')
  return batch
batches.Batches.__call__ = poisoned
'''


@pytest.mark.parametrize('value', ['nan', pytest.param('inf', marks=pytest.mark.slow)])
def test_T9_a_non_finite_loss_leaves_the_state_and_names_its_documents_also_on_steps_not_logged(flags, tmp_path, value):
  keys = dict(train__steps=12, log__every=1000, model__dropout=0.1)
  code = POISONED.format(value)
  stop = runs.start(flags(**keys, workdir='stop'), code=code)
  empty = runs.start(flags(**keys, workdir='empty'), code=POISONED.format(0))
  out, error = runs.finish(stop, 2)
  assert error.count('\n') == 1 and 'step 7: loss or gradients are not finite' in error
  assert re.search(r'WARNING: step 7: loss .* \(not finite\): nothing was updated; documents: \d\d\.txt', out)
  event, = rows(tmp_path / 'stop', 'events.jsonl', kind='skipped')
  assert event['step'] == 7 and re.search(r'\d\d\.txt', event['text'])
  runs.finish(empty)
  saved = checkpoint.latest_step(tmp_path / 'stop')
  assert 7 <= saved <= 9                                         # that step, and the one that ran meanwhile
  out, _ = runs.finish(runs.start(flags(**keys, workdir='stop', train__on_nonfinite='skip'), code=code))
  assert re.search(r'steps skipped  1\n', out)                   # counted across the restart
  # As if the batch had been empty: nothing of it is in the parameters or the moments.
  assert runs.state_bits(tmp_path / 'stop') == runs.state_bits(tmp_path / 'empty')


SPIKE = POISONED.replace('step == 6', 'step == 60').replace(
    "batch['mask_BT'] = batch['mask_BT'] * float('{}')", "batch['target_BT'] = 255 - batch['target_BT']")


def test_T10_a_spike_is_skipped_counted_and_in_no_moment(flags, tmp_path):
  keys = dict(train__steps=70, train__spike_window=16, train__spike_sigmas=5.0, model__dropout=0.1)
  spike = runs.start(flags(**keys), code=SPIKE)
  empty = runs.start(flags(**keys, workdir='empty'), code=POISONED.replace('step == 6', 'step == 60').format(0))
  assert re.search(r'steps skipped  1\n', runs.finish(spike)[0]) and runs.finish(empty)
  event, = rows(tmp_path / 'run', 'events.jsonl', kind='skipped')
  assert event['step'] == 61 and 'a spike, more than 5 deviations above the last 16' in event['text']
  assert re.search(r'\d\d\.txt', event['text'])
  bits = runs.state_bits(tmp_path / 'run')                       # as if the batch had been empty
  assert bits == runs.state_bits(tmp_path / 'empty') and any('losses' in name for name in bits)


def test_T11_a_killed_data_worker_is_an_error_within_5_s_that_names_it(flags, tmp_path):
  process = runs.start(flags(train__steps=1_000_000, data__workers=2, log__every=100))
  runs.wait_for(process, STEP)
  children = [pid for path in pathlib.Path(f'/proc/{process.pid}/task').glob('*/children')
              for pid in path.read_text().split()]
  workers = [int(pid) for pid in children if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()]
  assert len(workers) >= 2
  os.kill(workers[-1], signal.SIGKILL)
  start = time.monotonic()
  _, error = runs.finish(process, 2)
  assert time.monotonic() - start < 5
  assert checkpoint.latest_step(tmp_path / 'run') > 0            # saved first
  assert f'data worker process {workers[-1]} died (SIGKILL' in error.splitlines()[0]


def test_T12_bad_utf8_is_an_error_with_file_and_offset_or_a_counted_skip_under_a_cap(flags, tmp_path, monkeypatch):
  (tmp_path / 'data' / 'bad.txt').write_bytes(b'the cat sees a \xff dog.\n')
  _, error = runs.finish(runs.start(flags()), 2)
  assert re.search(r'bad\.txt.*\b15\b', error) and error.count('\n') == 1
  assert not (tmp_path / 'run').exists()
  (tmp_path / 'records.jsonl').write_text('{"text": "the cat sees a dog."}\n{"text": "a do\n')
  _, error = runs.finish(runs.start(flags(data__source='jsonl', data__path=tmp_path / 'records.jsonl')), 2)
  assert re.search(r'records\.jsonl.*\b32\b', error) and error.count('\n') == 1
  runs.make_quick(monkeypatch)
  with pytest.warns(UserWarning, match=r'skipped bad record 1 of at most 1: .*bad\.txt'):
    assert runs.train(tmp_path, train__steps=2, data__max_bad_records=1)['steps'] == 2


# Exact resume and other meshes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('kills', repeats(2, 20))
def test_T13_T18_killed_anywhere_the_resumed_run_is_bitwise_the_uninterrupted_one(flags, tmp_path, kills):
  """Dropout, packing, a mixture, accumulation, an average and Grain workers on."""
  runs.write_texts(tmp_path / 'more', documents=9)
  mixture = [dict(source='text', path=str(tmp_path / 'data'), weight=3.0),
             dict(source='text', path=str(tmp_path / 'more' / 'data'), weight=1.0)]
  keys = dict(data__source='mixture', data__path='', data__mixture=mixture, data__workers=2, data__packing='pack',
              model__dropout=0.1, train__accumulate=2, train__ema=0.9, train__steps=100 * kills, checkpoint__every=9)
  whole = runs.start(flags(**keys, workdir='whole'))
  rng, killed = random.Random(kills), 0
  while killed < kills:
    process = runs.start(flags(**keys), start_new_session=True)
    runs.wait_for(process, STEP)
    time.sleep(rng.uniform(0, 0.8))
    killed += process.poll() is None
    assert process.returncode is None, process.communicate()
    process.kill()
    process.communicate(timeout=20)                              # the workers, who share its pipes, end too
  out, _ = runs.finish(runs.start(flags(**keys)))
  runs.finish(whole)
  assert runs.state_bits(tmp_path / 'run') == runs.state_bits(tmp_path / 'whole')
  assert runs.curve(tmp_path / 'run') == runs.curve(tmp_path / 'whole')
  spent = json.loads((tmp_path / 'run' / 'time.json').read_text())
  assert spent['restarts'] >= 1 and spent['parts']['lost'] > 0 and spent['parts']['step'] > 0
  assert 'lost to restarts' in (tmp_path / 'run' / 'report.md').read_text()


MESHES = {'1': (1, {}), '2 data x 2 fsdp x 2 tensor': (8, dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)),
          '4': (4, {}), '2': (2, dict(mesh__tensor=2, mesh__fsdp=1))}


@pytest.mark.parametrize('slow', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_T13_T14_saved_on_8_devices_other_meshes_and_hosts_give_the_same_tokens_and_losses(flags, tmp_path, slow):
  keys = dict(train__accumulate=1, model__dropout=0.1, data__packing='pack', optimizer__learning_rate=1e-3,
              optimizer__schedule='constant')
  runs.finish(runs.start(flags(**keys, train__steps=6), devices=8))
  started = {}
  for name, (devices, mesh) in [*MESHES.items()][:4 if slow else 2]:
    shutil.copytree(tmp_path / 'run', tmp_path / name)
    started[name] = [runs.start(flags(**keys, **mesh, train__steps=12, workdir=name), devices=devices)]
  for hosts in (4, 2) if slow else (2,):
    shutil.copytree(tmp_path / 'run', tmp_path / f'{hosts} hosts')
    started[f'{hosts} hosts'] = runs.start_hosts(flags(**keys, train__steps=12, workdir=f'{hosts} hosts'), hosts,
                                                 devices=8 // hosts)
  runs.finish(runs.start(flags(**keys, train__steps=12, workdir='whole'), devices=8))
  expected = [(r['step'], r['tokens'], r['loss/train']) for r in rows(tmp_path / 'whole') if 'loss/train' in r]
  assert len(expected) == 12
  for name, processes in started.items():
    for process in processes:
      runs.finish(process)
    got = [(r['step'], r['tokens'], r['loss/train']) for r in rows(tmp_path / name) if 'loss/train' in r]
    assert [x[:2] for x in got] == [x[:2] for x in expected], name
    np.testing.assert_allclose([x[2] for x in got], [x[2] for x in expected], rtol=1e-5, err_msg=name)
    assert checkpoint.verify(checkpoint.find(tmp_path / name).folder) == ''
  written = json.loads((folder_of(tmp_path / '2 hosts', 12) / 'manifest.json').read_text())['files']
  assert any('process_1/' in name for name in written)           # each host wrote, and hashed, its own


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


# What must fit -------------------------------------------------------------------------------------------------------

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


def test_T16_another_config_text_or_tokenizer_is_refused_with_a_diff_and_init_from_goes_on(
    flags, tmp_path, capsys, monkeypatch):
  runs.make_quick(monkeypatch)
  refused = functools.partial(refuse, capsys)
  keys = dict(tokenizer__kind='char', train__steps=3, log__compile_cache='False')
  main.main(flags(**keys))
  before = runs.state_bits(tmp_path / 'run')
  error = refused(flags(**keys | dict(train__batch_size=16, data__length=16, tokenizer__kind='byte')))
  for text in ('train.batch_size was 8, is 16', 'data.length was 32, is 16', "tokenizer.kind was 'char', is 'byte'",
               f'--config.init_from={tmp_path / "run"}'):
    assert text in error
  moved = shutil.copytree(tmp_path / 'data', tmp_path / 'elsewhere')           # the same text: only its path changed
  monkeypatch.setattr(batches, 'VERSION', 3)
  main.main(flags(**keys | dict(train__steps=4, optimizer__learning_rate=1e-4, optimizer__muon_b2=0.9,
                                data__path=moved)))                            # of an optimizer that is not used
  assert ('changed since then: train.steps was 3, is 4; optimizer.learning_rate was 0.01, is 0.0001; where windows are '
          'cut in later epochs') in capsys.readouterr().out
  (moved / '03.txt').write_text('the cat sees a dog.\n')
  error = refused(flags(**keys | dict(train__steps=5, data__path=moved)))
  assert f'config.data: since step 4 changed: train text of text {moved}' in error
  tokenizer.Char('abc').save(tmp_path / 'run' / 'tokenizer')
  error = refused(flags(**keys | dict(train__steps=5)))
  assert re.search(r'run/tokenizer is not the tokenizer that step 4 was trained with: it was char, \d+ ids, \w{8}, is '
                   r'char, 3 ids', error)
  shutil.copytree(folder_of(tmp_path / 'run', 4) / 'tokenizer', tmp_path / 'run' / 'tokenizer', dirs_exist_ok=True)
  main_keys = dict(keys, train__batch_size=16, data__path=moved, init_from=tmp_path / 'run')
  assert 'init_from was' in refused(flags(**main_keys))          # it would have been ignored
  main.main(flags(**main_keys, workdir='new'))
  assert checkpoint.latest_step(tmp_path / 'new') == 3
  assert runs.state_bits(tmp_path / 'run', 3) == before


def refuse(capsys, args) -> str:
  """The one line with which a command ends before any step."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as e:
    main.main(args)
  out, error = capsys.readouterr()
  assert e.value.code == 2 and error.count('\n') == 1 and not re.search(STEP, out)
  return error


def test_T17_a_second_writer_is_refused_and_the_first_goes_on(flags, tmp_path):
  first = runs.start(flags(train__steps=100_000))
  runs.wait_for(first, STEP)
  _, error = runs.finish(runs.start(flags(train__steps=100_000)), 2)
  assert 'in use by another run' in error and f'"pid": {first.pid}' in error and error.count('\n') == 1
  runs.wait_for(first, STEP)
  first.kill()                                                   # the lock ends with its process
  first.communicate()
  runs.finish(runs.start(flags(train__steps=2)))
  assert not (tmp_path / 'run' / 'lock').exists()


def test_T19_retention_keeps_the_last_verified_step_and_permanent_ones(run, capsys):
  state = lambda step: dict(step=jnp.int32(step), params=make_params(step))
  with checkpoint.Checkpointer(run, 1, CONFIG, keep_every=4) as c:
    for step in range(1, 10):
      c.save(step, state(step))
  assert checkpoint.steps(run) == [4, 8, 9]
  flip(max(payloads(folder_of(run, 9)), key=lambda p: p.stat().st_size))
  found = checkpoint.find(run)
  assert found.step == 8
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpointer(run, 1, CONFIG, resumed=8) as c:
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
      c.save(10, state(10))
      fails('could not be written', c.wait)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.find(run).step == 8                        # a step that failed costs no older one
    c.save(11, state(11))
  assert checkpoint.steps(run) == [11]                           # keep_every is off by now
  assert (run / 'checkpoints' / '9.damaged').is_dir()
  assert_same_bits(checkpoint.restore_params(run), make_params(11))


def test_T20_what_cannot_work_fails_before_step_0_and_names_the_key(flags, tmp_path):
  readonly = tmp_path / 'readonly'
  readonly.mkdir()
  readonly.chmod(0o555)
  obeys = ['setpriv', '--bounding-set=-dac_override'] if os.getuid() == 0 else []    # root would write all the same
  cases = {
      '--workdir: cannot write to': (dict(workdir='readonly/run'), 1, obeys),
      '--workdir: cannot write to /proc': (dict(workdir=pathlib.Path('/proc/run')), 1, []),
      'config.data.path': (dict(data__path=tmp_path / 'nowhere'), 1, []),
      "config.checkpoint.evry: no such key 'evry'; nearest: 'every'": (dict(checkpoint__evry=1), 1, []),
      'config.train.batch_size: expected int': (dict(train__batch_size='many'), 1, []),
      'config.mesh': (dict(mesh__tensor=3), 4, []),
      'config.train.batch_size: 6 rows do not divide': (dict(train__batch_size=6), 4, []),
      'config.checkpoint.keep: expected a positive number': (dict(checkpoint__keep=0), 1, [])}
  running = {text: runs.start(flags(**keys), devices=devices, wrapper=wrapper)
             for text, (keys, devices, wrapper) in cases.items()}
  for text, process in running.items():
    out, error = runs.finish(process, 2)
    assert text in error and error.count('\n') == 1, error
    assert not re.search(STEP, out) and not (tmp_path / 'run').exists()
