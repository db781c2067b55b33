"""metrics.py: FLOPs against hand counts, files that stay valid and resume, time and energy, the turning point."""
import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax.models import transformer
from llm_jax.train import clock, metrics

LINES = config_lib.Log(progress='lines', tensorboard=False)
GPT2 = config_lib.derive(config_lib.Model(vocab_size=50304, layers=12, width=768, heads=12), length=1024)


@pytest.fixture
def sleep(monkeypatch):
  """Moves the time that metrics.py and clock.py read."""
  now = [1000.0]
  read = lambda: now[0]
  for module in (metrics, clock):
    monkeypatch.setattr(module, 'time', types.SimpleNamespace(monotonic=read, time=read))
  def advance(seconds):
    now[0] += seconds
  return advance


def logger(folder, log=LINES, total=100, **kwargs):
  return metrics.Logger(folder, log, total, clock=clock.Clock(folder), **kwargs)


def test_flops_of_gpt2_by_hand():
  flops = metrics.flops_per_token(GPT2, 1024)
  assert flops['matmul'] == 6 * (12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50304) == 741_408_768
  assert flops['attention_full'] == 12 * 12 * 768 * 1024 == 113_246_208        # PaLM: 12 L H Q T
  assert flops['attention_causal'] == 12 * 12 * 768 * 512.5
  assert flops['full'] == 854_654_976 and flops['causal'] == 741_408_768 + 56_678_400


@pytest.mark.parametrize('kind', ['causal', 'bidirectional'])
@pytest.mark.parametrize('windows', [(0,), (3, 0), (1,), (5,), (99,)])
def test_attention_flops_count_the_visible_pairs(kind, windows):
  model = config_lib.Model(vocab_size=64, layers=3, width=8, heads=2, windows=windows, attention=kind)
  model, length, pairs = config_lib.derive(model), 7, 0
  for layer in range(3):
    window = windows[layer % len(windows)] or length
    for q in range(length):
      pairs += sum(abs(q - k) < window and (k <= q or kind == 'bidirectional') for k in range(length))
  forward = 2 * 2 * 8 * pairs / length                  # q.k and p.v, 2 FLOPs per multiply-add, over all heads
  assert metrics.flops_per_token(model, length)['attention_causal'] == pytest.approx(3 * forward, rel=1e-12)


@pytest.mark.parametrize('changes', [
    {}, dict(mlp='swiglu', kv_heads=2, tied_embeddings=False),
    dict(head_dim=24, mlp='geglu', mlp_dim=40, qk_norm='head'), dict(encoder_layers=2, positions='sinusoidal')])
def test_matmul_flops_are_six_per_matrix_parameter(changes):
  model = config_lib.derive(config_lib.Model(vocab_size=128, layers=3, width=64, **changes), length=16)
  shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))))
  name = lambda path: next(k.key for k in reversed(path) if '_' in str(k.key))
  layer = [x.size for path, x in shapes if 'VD' not in name(path) and 'DV' not in name(path)
           and len(name(path).rsplit('_', 1)[1]) > 1]
  assert metrics.flops_per_token(model, 16)['matmul'] == 6 * (sum(layer) + 128 * 64)


def test_mfu_and_peaks():
  device = lambda kind: type('Device', (), dict(device_kind=kind, platform='gpu'))
  for kind, tflops in {'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H100 PCIe': 756, 'NVIDIA L4': 121, 'NVIDIA L40S': 362,
                       'NVIDIA A100-SXM4-40GB': 312, 'NVIDIA A10G': 70, 'Tesla T4': 65, 'NVIDIA GH200 480GB': 989,
                       'NVIDIA GeForce RTX 4090': 165.2, 'NVIDIA B200': 2250, 'TPU v2': 22.5, 'TPU v3': 61.5,
                       'TPU v4': 275, 'TPU v5 lite': 197, 'TPU v5e': 197, 'TPU v5p': 459, 'TPU v5': 459,
                       'TPU v6 lite': 918, 'TPU7x': 1153.5}.items():
    assert metrics.peak_flops(device(kind)).flops == tflops * 1e12, kind
  assert metrics.mfu(1000.0, 3e9, 6e12) == 0.5
  peak = metrics.peak_flops()                           # this CPU, shared by 8 virtual devices
  assert 'measured' in peak.source and 'float32' in peak.source
  assert 1e8 < peak.flops * jax.local_device_count() < 1e14
  assert metrics.peak_flops() == peak                   # measured once


def rows(folder, name='metrics.jsonl'):
  strict = lambda constant: pytest.fail(f'{constant} is not JSON')
  return [json.loads(line, parse_constant=strict) for line in (folder / name).read_text().splitlines()]


def test_rows_are_valid_json_and_on_disk_at_once(tmp_path, capsys):
  log = logger(tmp_path)
  log.log(1, {'loss/train': np.float32(2.5), 'grads/norm': math.nan, 'loss/z': math.inf, 'tokens': 512})
  assert rows(tmp_path)[0] | {'time': 0} == {
      'step': 1, 'time': 0, 'loss/train': 2.5, 'grads/norm': None, 'loss/z': None, 'tokens': 512.0}   # not closed yet
  log.close()
  assert 'step   1/100 | loss 2.5000 | grad nan' in capsys.readouterr().out


def test_console_line_has_speed_mfu_wait_memory_and_eta(tmp_path, capsys, sleep):
  log = logger(tmp_path, total=40, tokens_per_step=1000, flops_per_token=1e3, peak=1e6)
  for step in (10, 20):
    with log.clock('step'):
      sleep(0.15)
    with log.clock('input'):
      sleep(0.05)
    with log.clock('eval'):
      sleep(0.1)                                   # in the ETA, not in the speed
    row = log.log(step, {'loss/train': 1.0})
  first, second = capsys.readouterr().out.splitlines()
  assert 'tok/s' not in first                           # its time was compilation
  assert all(word in second for word in ('tok/s', 'MFU', 'input', 'mem', 'ETA')), second
  assert row['perf/tokens_per_second'] == pytest.approx(10_000 / 0.2)
  assert row['perf/mfu'] == pytest.approx(row['perf/tokens_per_second'] * 1e3 / 1e6)
  assert row['perf/input_wait'] == pytest.approx(0.25)
  assert row['perf/eta_s'] == pytest.approx(2 * 0.3)
  assert 0.01 < row['perf/memory_gb'] < 100
  log.close()


def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path):
  def train(folder, first, last, resumed=0):
    log = logger(folder, resumed_step=resumed)
    for step in range(first, last + 1):
      log.log(step, {'loss/train': 1 / step})
      log.text(step, 'sample', str(step))
    log.close()
  train(tmp_path / 'whole', 1, 20)
  train(tmp_path / 'killed', 1, 13)
  with (tmp_path / 'killed' / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 14, "loss/tr')                    # the line a kill cut short
  train(tmp_path / 'killed', 11, 20, resumed=10)
  losses = lambda name: [(r['step'], r['loss/train']) for r in rows(tmp_path / name)]
  assert losses('whole') == losses('killed')
  assert rows(tmp_path / 'whole', 'samples.jsonl') == rows(tmp_path / 'killed', 'samples.jsonl')
  train(tmp_path / 'killed', 1, 2)                      # afresh
  assert len(rows(tmp_path / 'killed')) == 2


def test_tensorboard_events(tmp_path):
  def events(folder):
    from tensorboardX.proto.event_pb2 import Event  # not before Logger has imported it, without PyTorch
    for path in sorted((folder / 'tensorboard').iterdir()):
      data = path.read_bytes()
      while data:                                       # TFRecord: length, crc, payload, crc
        size = struct.unpack('<Q', data[:8])[0]
        yield Event.FromString(data[12:12 + size])
        data = data[16 + size:]
  log = logger(tmp_path, dataclasses.replace(LINES, tensorboard=True), resumed_step=4)
  log.log(5, {'loss/train': 1.5})
  log.text(5, 'prompt', 'def f():\n  pass')
  log.close()
  found = list(events(tmp_path))
  assert [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == 'loss/train'] == [(5, 1.5)]
  texts = [v.tensor.string_val[0] for e in found for v in e.summary.value if 'prompt' in v.tag]
  assert texts == [b'    def f():\n      pass']
  assert any(e.session_log.status == e.session_log.START and e.step == 5 for e in found)   # hides an older step 5


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  log = logger(tmp_path / 'run')
  log.log(1, {'loss/train': 1.0})
  log.text(1, 'a', 'b')
  log.warn('c')
  log.close()
  assert not (tmp_path / 'run').exists() and not capsys.readouterr().out


def test_rich_display_shows_model_output_as_it_is(tmp_path, capsys):
  log = logger(tmp_path, config_lib.Log(progress='rich', tensorboard=False))
  log.log(1, {'loss/train': 1.0})
  log.text(1, '[bold]', 'x[0] = [red] :smile: \x1b[31m \x00 \ud800')
  log.warn('validation turned at step 20')
  log.close()
  out = capsys.readouterr().out
  assert 'step   1/100 | loss 1.0000' in out and '--- step 1: [bold] ---' in out
  assert 'x[0] = [red] :smile: \ufffd[31m \ufffd \ufffd' in out and 'WARNING: validation turned at step 20' in out
  assert rows(tmp_path, 'samples.jsonl')[0]['text'] == 'x[0] = [red] :smile: \x1b[31m \x00 \ud800'


def test_lines_where_stdout_is_no_terminal_or_ascii(tmp_path):
  code = textwrap.dedent('''
      import sys
      from llm_jax import config
      from llm_jax.train import clock, metrics
      log = metrics.Logger(sys.argv[1], config.Log(), 10, clock=clock.Clock(sys.argv[1]))
      log.log(1, {'loss/train': 1.0})
      log.text(1, 'sample', 'caf\\u00e9 \\ufffd')
      log.close()
      assert 'tensorboardX' in sys.modules and not {'rich', 'torch'} & set(sys.modules)''')
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                        env=os.environ | {'PYTHONIOENCODING': 'ascii'})
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ['step  1/10 | loss 1.0000', '--- step 1: sample ---', 'caf? ?', '---']



def test_energy_assumed_on_cpu():
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  energy = metrics.Energy(config_lib.Log(cpu_watts_per_core=15.0, co2_kg_per_kwh=0.2)).summary(7200.0)
  assert energy['kwh'] == pytest.approx(cores * 15 * 2 / 1000)
  assert energy['co2e_kg'] == pytest.approx(energy['kwh'] * 0.2)
  assert '15 W assumed' in energy['assumptions'] and '0.2 kg CO2e per kWh' in energy['assumptions']


@pytest.mark.parametrize('answer, watts', [('echo 250.5; echo 349.5', 300), ('echo [N/A]', 10), ('exit 9', 10)])
def test_energy_reads_nvml_where_it_can(tmp_path, monkeypatch, answer, watts):
  tool = tmp_path / 'nvidia-smi'
  tool.write_text(f'#!/bin/sh\n{answer}\n')
  tool.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  energy, end = metrics.Energy(config_lib.Log(), every=0.02), time.monotonic() + (10 if watts > 10 else 0.5)
  while time.monotonic() < end and 'NVML' not in energy.summary(1.0)['assumptions']:
    time.sleep(0.02)
  energy.close()
  found = energy.summary(3600.0)
  if watts > 10:
    assert found['kwh'] == pytest.approx(4 * watts / 1000) and 'power readings (NVML)' in found['assumptions']
  else:
    assert 'assumed' in found['assumptions'] and 'NVML' not in found['assumptions']


def curve(losses):
  return [(100 * (i + 1), float(x)) for i, x in enumerate(losses)]


def test_turning_point():
  t = np.arange(40)
  decay, rng = 1.5 + 2 * np.exp(-t / 6), np.random.default_rng(0)
  assert metrics.turning_point(curve(decay)) is None
  assert metrics.turning_point(curve(decay + np.where(t > 15, 0.03 * (t - 15), 0))) == 1600
  assert metrics.turning_point(curve([4, 3, 2.5, 2.4, 2.5, 2.7, 2.9])) == 400
  assert metrics.turning_point(curve([2.4] * 12 + [2.39, 3, 3])) is None              # two evaluations since
  assert metrics.turning_point(curve([2.4] * 12 + [2.39, 3, 3, 3])) == 1300
  assert metrics.turning_point(curve([4, 3, 2.4, 2.8, 2.9, 2.9, 2.3, 2.2])) is None   # it came back
  assert metrics.turning_point(curve([2.4] * 12 + [2.39] + [2.398] * 6)) is None      # a rise of 0.3%
  assert metrics.turning_point([]) is None and metrics.turning_point(curve([1, 2, 3])) is None
  assert metrics.turning_point([(1, None), (2, math.nan), *curve([4, 3, 2.5, 2.4, 2.5, 2.7, 2.9])]) == 400
  for noise in [0.003, 0.01, 0.03] * 30:
    assert metrics.turning_point(curve(decay + noise * rng.standard_normal(40))) is None
  step = metrics.turning_point(curve(decay + np.where(t > 15, 0.03 * (t - 15), 0) + 0.01 * rng.standard_normal(40)))
  assert 1300 <= step <= 1900


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-3, 10), max_size=30))
def test_a_falling_loss_never_turned(losses):
  assert metrics.turning_point(curve(sorted(losses, reverse=True))) is None


@pytest.mark.parametrize('seconds, text', [(7.4, '7s'), (59.7, '1m00s'), (192, '3m12s'), (7500, '2h05m')])
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text
