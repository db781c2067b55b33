"""Whole runs: what resumes, what stops, what is written, and that nothing is lost on the way."""
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache
from tiny import quick_jit

from llm_jax import checkpoint, main, sharding
from llm_jax.config import ConfigError
from llm_jax.train import loop

REAL_MESH, REAL_WRITE = runs.REAL_MESH, loop.report.write


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  """Compiled programs are kept between the runs of this file, most of which are the same."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('xla')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  runs.make_quick(monkeypatch)


@pytest.fixture
def folder(tmp_path):
  runs.write_texts(tmp_path)
  return tmp_path


def at_step(monkeypatch, step, action):
  """Runs action(run) when the metrics of `step` are read, in the middle of the loop."""
  log = loop.Run.log

  def wrapped(self, n, metrics):
    if n == step:
      action(self)
    return log(self, n, metrics)
  monkeypatch.setattr(loop.Run, 'log', wrapped)


def files_under(path):
  """{name: hash} of every file."""
  return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob('*') if p.is_file()}


# Resuming ------------------------------------------------------------------------------------------------------------

HARD = dict(model__dropout=0.1, data__packing='pack', train__accumulate=2, train__ema=0.9, eval__every=4,
            checkpoint__every=4, train__steps=10, log__profile='4:5', log__tensorboard='True')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run with everything on: (folder, figures, console output)."""
  import contextlib
  import io
  folder = tmp_path_factory.mktemp('whole')
  runs.write_texts(folder)
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    runs.make_quick(patch)
    patch.setattr(loop.report, 'write', REAL_WRITE)
    figures = runs.train(folder, **HARD, eval__prompts="('the ',)", eval__samples=1, eval__python='True')
  return folder, figures, out.getvalue()


@pytest.mark.parametrize('how', ['SIGTERM', 'crash'])
def test_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path, monkeypatch, capsys, how):
  """Dropout, packing, accumulation and EMA on, an evaluation in between; the crash loses the steps since step 4."""
  reference, _, _ = whole
  os.symlink(reference / 'data', tmp_path / 'data')
  with monkeypatch.context() as patch:
    if how == 'SIGTERM':
      at_step(patch, 5, lambda run: os.kill(os.getpid(), signal.SIGTERM))
      assert runs.train(tmp_path, **HARD | dict(log__profile='5:100')) == {}
      assert 'the same command resumes' in capsys.readouterr().out
    else:
      at_step(patch, 6, lambda run: (run.checkpoints.wait(), 1 / 0))
      with pytest.raises(ZeroDivisionError):
        runs.train(tmp_path, **HARD)
  stopped = checkpoint.latest_step(tmp_path / 'run')
  assert stopped == {'SIGTERM': 7, 'crash': 4}[how]
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  runs.train(tmp_path, **HARD | dict(log__profile='5:100'))     # in the middle of the range: it traces what is left
  assert f'resuming {tmp_path / "run"} at step {stopped}' in capsys.readouterr().out
  assert checkpoint.latest_step(tmp_path / 'run') == 10
  assert 'part of a step' in (reference / 'run' / 'report.md').read_text()
  wanted = runs.state_bits(reference / 'run')
  assert runs.state_bits(tmp_path / 'run') == wanted
  assert any('ema' in name for name in wanted) and any('opt_state' in name for name in wanted)
  assert runs.curve(tmp_path / 'run') == runs.curve(reference / 'run')
  assert len(list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))) == {'SIGTERM': 2, 'crash': 2}[how]


def test_a_finished_run_stays_finished_and_more_steps_go_on(whole, capsys, monkeypatch):
  folder, figures, _ = whole
  before = runs.state_bits(folder / 'run')
  again = runs.train(folder, **HARD)
  assert runs.state_bits(folder / 'run') == before
  assert again['validation loss'] == pytest.approx(figures['validation loss'], rel=1e-6)
  assert [s for s, _, _ in runs.curve(folder / 'run', 'loss/train')] == list(range(1, 11))


def test_another_model_is_refused_readably_and_nothing_is_touched(whole, capsys):
  folder, _, _ = whole
  before = files_under(folder / 'run')
  with pytest.raises(SystemExit) as e:
    main.main(runs.flags(folder, **HARD, model__width=64, tokenizer__kind='char', optimizer__muon_b2=0.9,
                         optimizer__name='muon'))
  assert e.value.code == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  for changed in ('model.width was 32, is 64', "tokenizer.kind was 'byte', is 'char'",
                  'optimizer.muon_b2 was 0.0, is 0.9'):
    assert changed in error
  with pytest.raises(ConfigError, match='checkpoint.resume is False'):
    runs.train(folder, **HARD, checkpoint__resume='False')
  assert files_under(folder / 'run') == before


# What a run leaves --------------------------------------------------------------------------------------------------

def test_banner_first_loss_samples_and_figures_are_printed(whole):
  _, figures, out = whole
  for text in ('cpu', 'mesh  one device', 'float32 matrix products, attention kernel xla', '   remat  none (none',
               'training tokens', '2 microbatch(es)'):
    assert text in out, text
  assert re.search(r'time to first loss [\d.]+ s \(loss 5\.\d+\)', out)
  assert len(re.findall(r"--- step 4: 'the ' ---\nthe ", out)) == 1
  assert len(re.findall(r"--- step 10: 'the ' ---\nthe ", out)) == 1
  assert "--- step 10: '' ---" in out
  assert f'{figures["validation loss"]:.4f}' in out
  assert figures['steps'] == 10 and figures['training tokens'] == 10 * 8 * 32 and figures['steps skipped'] == 0
  assert 0 < figures['bits per byte'] < 8 and figures['gzip -9'] > 0


def test_final_loss_is_that_of_the_average_on_all_held_out_text(whole):
  """Computed again here from the checkpoint: every held-out byte counts once."""
  from llm_jax import config as config_lib
  from llm_jax.data import store
  from llm_jax.data import tokenizer as tokenizer_lib
  from llm_jax.models import transformer
  folder, figures, _ = whole
  cfg, _, _ = main.parse(runs.flags(folder, **HARD))
  tokenizer = tokenizer_lib.load(folder / 'run' / 'tokenizer')
  held_out, = store.prepare(cfg.data, tokenizer, progress='none').valid
  model = config_lib.derive(cfg.model, tokenizer.vocab_size, 32)
  params = checkpoint.restore_params(folder / 'run', ema=True)
  forward = quick_jit(lambda token_BT: transformer.bind(model, params)(token_BT))
  tokens, nats, count = np.asarray(held_out.tokens), 0.0, 0
  for start, stop in zip(held_out.offsets[:-1], held_out.offsets[1:]):
    for first in range(start, stop, 32):
      row = np.asarray(tokens[first:min(first + 32, stop)], np.int64)
      target = np.append(row[1:], tokens[first + 32] if first + 32 < stop else tokenizer.eos_id)
      padded = np.pad(row, (0, 32 - len(row))).astype(np.int32)
      logits = np.asarray(forward(padded[None])[0, :len(row)], np.float64)
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      nats -= logp[np.arange(len(row)), target].sum()
      count += len(row)
  assert figures['validation loss'] == pytest.approx(nats / count, rel=1e-5)
  assert figures['bits per byte'] == pytest.approx(nats / math.log(2) / held_out.total_bytes, rel=1e-5)


@pytest.mark.slow
def test_profiles_while_checkpoints_are_written_do_not_crash(tmp_path):
  """In a process of its own: with Python frames in the trace it died of a segmentation fault within a minute."""
  code = f"""
import pathlib, time, jax, jax.numpy as jnp
from llm_jax import checkpoint
from llm_jax.train import explain
state = {{item: {{str(i): jnp.ones((64, 64)) for i in range(20)}} for item in ('params', 'opt_state')}}
state['step'] = jnp.int32(0)
step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
end, n = time.monotonic() + 60, 0
while time.monotonic() < end:
  n += 1
  folder = pathlib.Path({str(tmp_path)!r}) / str(n)
  (folder / 'tokenizer').mkdir(parents=True)
  with checkpoint.Checkpointer(folder, 2, {{}}) as saved:
    for i in range(3):
      saved.save(i, state)
      explain.start(folder / 'profile')
      for _ in range(3):
        state = step(state)
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]


def test_report_logs_and_profile_are_there(whole):
  folder, figures, _ = whole
  page = (folder / 'run' / 'report.html').read_text()
  for text in ('Final figures', 'Curves', 'Energy', 'Samples', 'Config', 'Environment',
               f'{figures["validation loss"]:.4f}', f'{figures["bits per byte"]:.4f}'):
    assert text in page, text
  assert 'validation loss' in (folder / 'run' / 'report.md').read_text()
  assert len(list((folder / 'run' / 'profile').rglob('*.xplane.pb'))) >= 1
  assert list((folder / 'run' / 'tensorboard').iterdir())
  assert [s for s, _, _ in runs.curve(folder / 'run', 'loss/valid')][:3] == [4, 8, 10]
  parts = json.loads((folder / 'run' / 'time.json').read_text())['parts']
  assert all(parts[name] > 0 for name in ('compile', 'input', 'step', 'eval', 'checkpoint', 'sample'))


def test_a_tiny_text_over_many_epochs_is_called_overfitting(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(loop.report, 'write', REAL_WRITE)
  (tmp_path / 'data').mkdir()
  rng = random.Random(0)
  for i in range(8):                       # letters drawn by chance can be learned by heart alone
    (tmp_path / 'data' / f'{i}.txt').write_text(''.join(rng.choices('abcdefgh ', k=80)))
  runs.train(tmp_path, data__valid_fraction=0.4, train__steps=200, eval__every=10, log__every=100,
             optimizer__schedule='constant', optimizer__weight_decay=0.0, optimizer__learning_rate=2e-2)
  out = capsys.readouterr().out
  step = re.findall(r'WARNING: validation loss was lowest at step (\d+)', out)[-1]
  valid = {s: value for s, _, value in runs.curve(tmp_path / 'run', 'loss/valid')}
  assert min(valid, key=valid.get) == int(step)
  assert f'Overfitting: validation loss was lowest at step {step}' in (tmp_path / 'run' / 'report.md').read_text()


# What stops a run ----------------------------------------------------------------------------------------------------

def test_a_non_finite_loss_stops_with_one_line_and_all_is_saved(folder, capsys):
  args = runs.flags(folder, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, train__steps=50)
  with pytest.raises(SystemExit) as e:
    main.main(args)
  assert e.value.code == 2
  out, error = capsys.readouterr()
  assert error.count('\n') == 1 and 'not finite' in error and 'optimizer.learning_rate' in error
  skipped = len(re.findall(r'WARNING: step \d+: loss .* (?:nan|inf).*: nothing was updated; documents: \d\d\.txt', out))
  assert skipped
  saved = checkpoint.latest_step(folder / 'run')
  assert 1 < saved < 50
  assert checkpoint.verify(folder / 'run' / 'checkpoints' / str(saved)) == ''
  figures = runs.train(folder, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, train__steps=saved + 5,
                       train__on_nonfinite='skip')
  assert figures['steps skipped'] == skipped + 5 and figures['steps'] == saved + 5


def test_a_batch_without_tokens_is_skipped_not_fatal_and_the_state_is_donated(folder, capsys, monkeypatch):
  from llm_jax.data import batches
  call = batches.Batches.__call__

  def empty_at_2(self, step, rows=None):
    batch = call(self, step, rows)
    return dict(batch, mask_BT=batch['mask_BT'] * (step != 2))
  monkeypatch.setattr(batches.Batches, '__call__', empty_at_2)
  states = []
  at_step(monkeypatch, 0, lambda run: states.append(run.state))
  figures = runs.train(folder, train__steps=5)
  assert figures['steps skipped'] == 1 and figures['steps'] == 5
  assert all(x.is_deleted() for x in jax.tree.leaves(states[0]))          # donated
  assert ('step 3: loss 0.0, gradient norm 0.0, 0 tokens (an empty batch): nothing was updated; documents: '
          in capsys.readouterr().out)


def test_prompts_that_cannot_be_continued_are_refused_before_training(folder):
  for keys, message in ((dict(eval__prompts=f"('{'x' * 40}',)"), '41 tokens, the model reads 32'),
                        (dict(eval__prompts="('\u4e2d',)", tokenizer__kind='char'), "character '\u4e2d'"),
                        (dict(eval__samples=1, tokenizer__kind='char'), 'is empty')):
    with pytest.raises(ConfigError, match=message):
      runs.train(folder, **keys)
    assert not (folder / 'run').exists()


# A budget of minutes -------------------------------------------------------------------------------------------------

def test_a_budget_in_minutes_is_kept_and_the_learning_rate_ends_low(folder, monkeypatch, capsys):
  """And in between nothing is compiled: not where the horizon changes, nor anywhere else."""
  keys = dict(train__minutes=0.06, train__steps=0, optimizer__schedule='wsd', optimizer__final_fraction=0.0,
              log__every=5)
  compiled, began = [], []
  at_step(monkeypatch, 1, lambda run: began.append((time.monotonic(), len(compiled))))
  saved = loop.Run.save
  monkeypatch.setattr(loop.Run, 'save', lambda run, step: (began.append((time.monotonic(), len(compiled))),
                                                           saved(run, step)))
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: compiled.append(event) if event == '/jax/core/compile/backend_compile_duration' else None)
  figures = runs.train(folder, **keys)
  (start, before), (end, after) = began
  assert before > 0 and after == before
  assert 0.5 * 3.6 < end - start < 2 * 3.6
  steps = figures['steps']
  assert steps > 50
  assert re.search(rf'^step +\d+/{steps} .* ETA', capsys.readouterr().out, re.M)     # once it is known
  rates = {s: value for s, _, value in runs.curve(folder / 'run', 'optimizer/learning_rate')}
  assert rates[steps // 20 * 5] == pytest.approx(1e-2)      # at a quarter of the run
  assert rates[max(rates)] < 0.1 * 1e-2

  assert runs.train(folder, **keys)['steps'] == steps                      # it was used up
  more = runs.train(folder, **keys | dict(train__minutes=0.09))['steps']
  assert steps < more < 3 * steps


def test_a_budget_of_fewer_than_calibration_steps_is_kept(folder, monkeypatch):
  at_each = loop.Run.log
  monkeypatch.setattr(loop.Run, 'log', lambda *a: (time.sleep(0.3), at_each(*a))[1])
  figures = runs.train(folder, train__minutes=0.05, train__steps=0)
  assert 6 <= figures['steps'] <= 14


# Other ways to run ---------------------------------------------------------------------------------------------------

def test_init_from_takes_weights_and_tokenizer_also_from_a_thread(folder):
  """The new text's own alphabet would be another: every id would mean something else."""
  first = runs.train(folder, tokenizer__kind='char', train__steps=60, workdir='first')
  for path in (folder / 'data').iterdir():
    path.write_text(path.read_text().replace('the old man', 'a cat'))
  (folder / 'first' / 'metrics.jsonl').unlink()
  figures = []
  keys = dict(tokenizer__kind='char', init_from=folder / 'first', train__ema=0.9)
  thread = threading.Thread(target=lambda: figures.append(runs.train(folder, train__steps=1, **keys)))
  thread.start()
  thread.join()
  (_, _, start), = runs.curve(folder / 'run', 'loss/train')
  assert start < first['validation loss'] + 0.5 < 3
  assert (folder / 'run' / 'tokenizer' / 'meta.json').read_bytes() == (
      folder / 'first' / 'tokenizer' / 'meta.json').read_bytes()
  with pytest.raises(ConfigError, match=r'config.init_from: .* another model; differing: .*w_up_DF'):
    runs.train(folder, **keys, model__mlp_dim=72, workdir='other')
  with pytest.raises(ConfigError, match='no such directory'):
    runs.train(folder, **keys | dict(init_from=folder / 'nowhere'), workdir='another')
  assert not (folder / 'another').exists()


@pytest.mark.parametrize('prompts', ['()', pytest.param("('the ',)", marks=pytest.mark.slow)])
def test_a_run_on_a_mesh_evaluates_samples_saves_and_resumes_on_another(folder, monkeypatch, prompts):
  monkeypatch.setattr(sharding, 'make_mesh', REAL_MESH)
  loop.metrics_lib._measured.cache_clear()             # what is measured of a device is measured under this mesh
  keys = dict(eval__prompts=prompts, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  runs.train(folder, **keys, train__steps=2)
  params = checkpoint.restore_params(folder / 'run')
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
  monkeypatch.setattr(sharding, 'make_mesh', lambda mesh: REAL_MESH(mesh, jax.devices()[:1]))
  assert runs.train(folder, train__steps=4)['steps'] == 4
