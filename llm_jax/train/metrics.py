"""What the training loop measures and logs: FLOPs and MFU, energy, the console line, metrics.jsonl, TensorBoard, and
the step at which validation turned.

Keys: loss/train, loss/valid, eval/bits_per_byte, grads/norm, optimizer/learning_rate, and perf/..., which Logger adds.
Files in the run directory: metrics.jsonl, samples.jsonl, events.jsonl (steps skipped, restarts, stops), tensorboard/.
report.py reads them.
"""
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from llm_jax import config as config_lib
from llm_jax import hardware, paths
from llm_jax.config import ConfigError
from llm_jax.train import clock as clock_lib

MFU_CONVENTION = ('MFU = tokens/s x training FLOPs per token / peak FLOP/s; forward + backward = 3 x forward, matrix '
                  'products only, attention over the keys each query may see (causal), recomputation not counted')

class Peak(NamedTuple):
  flops: float   # FLOP/s of one device
  source: str    # where the figure comes from


def flops_per_token(model: config_lib.Model, length: int) -> dict[str, float]:
  """Training FLOPs per token, forward + backward, of a derived config.Model at `length` tokens per sequence.

  'matmul': 6 x the parameters of matrix products (unembedding in, embedding lookup out; of the experts, those
  chosen). 'attention_full': 12 N H keys per layer with every key of the sequence or of the window (PaLM, arXiv
  2204.02311 B); 'attention_causal': only the keys a query may see, a mean of (length + 1) / 2
  without a window. 'full', 'causal': the two sums. Bidirectional attention sees all, so there the two are equal; prefix
  attention counts as causal. An encoder-decoder counts both sides per target token, for a source as long as the target.
  """
  m = model
  heads = m.heads * m.head_dim
  projections = 2 * m.width * heads + 2 * m.width * m.kv_heads * m.head_dim
  hidden = m.expert_dim * (m.experts_per_token + m.shared_experts) if m.experts else m.mlp_dim
  layer = projections + m.width * (hidden * (3 if m.mlp in ('geglu', 'swiglu') else 2) + m.experts)
  cross = m.layers * projections if m.encoder_layers else 0
  matmul = 6 * ((m.layers + m.encoder_layers) * layer + cross + m.width * m.vocab_size)
  windows = [m.windows[i % len(m.windows)] for i in range(m.layers)]
  bidirectional = m.attention == 'bidirectional'
  unmasked = length * (m.encoder_layers + (m.layers if m.encoder_layers else 0))     # encoder, and cross-attention
  full = sum(_mean_keys(length, w, True) if bidirectional else min(w or length, length) for w in windows) + unmasked
  causal = sum(_mean_keys(length, w, bidirectional) for w in windows) + unmasked
  return dict(matmul=float(matmul), attention_full=12.0 * heads * full, attention_causal=12.0 * heads * causal,
              full=matmul + 12.0 * heads * full, causal=matmul + 12.0 * heads * causal)


def _mean_keys(length, window, bidirectional):
  """Keys a query sees, averaged over the positions of a sequence; a window w: the w newest, itself included."""
  position = np.arange(length)
  reach = window or length
  before = np.minimum(position + 1, reach)
  after = np.minimum(length - 1 - position, reach - 1) if bidirectional else 0
  return float(np.mean(before + after))


def peak_flops(device=None) -> Peak:
  """Peak bf16 dense FLOP/s of one device by its device_kind. A device not in hardware.CHIPS, such as any CPU, is
  measured for 0.3 s: the best of a square matmul, f32 on CPU and bf16 elsewhere; virtual CPU devices share the
  machine's figure."""
  device = jax.local_devices()[0] if device is None else device
  if chip := hardware.known(device.device_kind):
    return Peak(chip.flops, f'{device.device_kind}: {chip.flops / 1e12:g} TFLOP/s bf16 dense, data sheet')
  flops, name = _measured(device)
  if device.platform == 'cpu':
    flops /= jax.local_device_count(backend='cpu')
  return Peak(flops, f'{device.device_kind}: {flops / 1e12:.3g} TFLOP/s, measured here with a {name} matmul')


@functools.cache
def _measured(device):
  n, dtype = (1536, jnp.float32) if device.platform == 'cpu' else (4096, jnp.bfloat16)
  matmul = jax.jit(lambda a: a @ a)
  best = math.inf
  with jax.set_mesh(jax.make_mesh((1,), ('one',), (AxisType.Auto,), devices=[device])):    # not the caller's devices
    a = jax.device_put(jnp.ones((n, n), dtype), device)
    matmul(a).block_until_ready()
    start = time.perf_counter()
    while time.perf_counter() - start < 0.3:
      t = time.perf_counter()
      matmul(a).block_until_ready()
      best = min(best, time.perf_counter() - t)
  return 2 * n ** 3 / best, f'{n} x {n} {jnp.dtype(dtype).name}'


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
  """Model FLOPs utilisation, 0..1, as MFU_CONVENTION says. peak: FLOP/s of all devices together."""
  return tokens_per_second * flops_per_token / peak if peak else math.nan


def memory_gb() -> float:
  """Most memory in use on a local device, in 1e9 bytes; the process's resident memory where none tell (CPU)."""
  stats = [d.memory_stats() for d in jax.local_devices()]
  if all(s and 'bytes_in_use' in s for s in stats):
    return max(s.get('peak_bytes_in_use', s['bytes_in_use']) for s in stats) / 1e9
  try:
    return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e9
  except OSError:
    import resource  # no /proc on macOS; the peak, in bytes there

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


class Energy:
  """Electric energy and CO2e of a run: power x time. NVIDIA GPUs are asked for their power every `every` seconds
  (NVML, by nvidia-smi, in a thread); elsewhere watts are assumed: hardware.CHIPS, or cores x log.cpu_watts_per_core."""

  def __init__(self, log: config_lib.Log, every: float = 10.0):
    self.log = log
    self._readings, self._stop = [], threading.Event()
    if jax.default_backend() != 'cpu' and shutil.which('nvidia-smi'):
      threading.Thread(target=self._read_power, args=(every,), daemon=True).start()

  def _read_power(self, every):
    command = ['nvidia-smi', '--query-gpu=power.draw', '--format=csv,noheader,nounits']
    if os.environ.get('CUDA_VISIBLE_DEVICES'):
      command += ['-i', os.environ['CUDA_VISIBLE_DEVICES']]
    while not self._stop.wait(every):
      try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        self._readings.append(float(np.mean([float(line) for line in out.split()])))
      except (OSError, ValueError, subprocess.SubprocessError):
        return   # no right to read it, or a card that does not tell: the assumed watts stand

  def summary(self, seconds: float) -> dict:
    """{'kwh', 'co2e_kg', 'watts', 'assumptions'} of `seconds` of wall time on all devices of the run."""
    device, n = jax.devices()[0], jax.device_count()
    if self._readings:
      watts = n * float(np.mean(self._readings))
      how = f'{n} x {device.device_kind}, mean of {len(self._readings)} power readings (NVML); host not included'
    elif device.platform == 'cpu':
      cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
      watts = jax.process_count() * cores * self.log.cpu_watts_per_core
      how = f'{cores} cores x {self.log.cpu_watts_per_core:g} W assumed (log.cpu_watts_per_core), not measured'
    else:
      chip = hardware.known(device.device_kind)
      watts = n * (chip.watts if chip else 300.0)
      how = f'{n} x {device.device_kind} x {watts / n:g} W assumed, not measured; host not included'
    kwh = watts * seconds / 3.6e6
    how += f'; {self.log.co2_kg_per_kwh:g} kg CO2e per kWh assumed (log.co2_kg_per_kwh); cooling not included'
    return dict(kwh=kwh, co2e_kg=kwh * self.log.co2_kg_per_kwh, watts=watts, assumptions=how)

  def close(self):
    self._stop.set()


def turning_point(valid: list[tuple[int, float]], k: int = 3) -> int | None:
  """The step of the lowest validation loss, where the loss rose for good after it; else None.

  It turned when at least k evaluations follow the lowest one, and the mean of the last k is above the lowest mean of k
  by more than four times the noise of one evaluation and by 0.5%. Noise: from the median third difference, which a
  smooth curve leaves near zero (for independent errors of deviation s it is 0.6745 sqrt(20) s).
  """
  valid = [(step, loss) for step, loss in sorted(dict(valid).items()) if loss is not None and math.isfinite(loss)]
  losses = np.array([loss for _, loss in valid])
  if len(losses) < k + 2:
    return None
  low = int(np.argmin(losses))
  noise = float(np.median(np.abs(np.diff(losses, 3)))) / (0.6745 * math.sqrt(20))
  means = np.convolve(losses, np.ones(k) / k, mode='valid')
  rise = float(means[-1] - means.min())
  turned = len(losses) - 1 - low >= k and rise > max(4 * noise, 0.005 * abs(float(means.min())))
  return valid[low][0] if turned else None


def _replace(path, text):
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def without_controls(text: str) -> str:
  """Model output without control characters (terminal escapes, NUL) and lone surrogates; tab and newline stay."""
  return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


def duration(seconds: float) -> str:
  """'7s', '3m12s', '2h05m'."""
  s = int(round(seconds))
  return f'{s}s' if s < 60 else f'{s // 60}m{s % 60:02}s' if s < 3600 else f'{s // 3600}h{s % 3600 // 60:02}m'


def _import_tensorboardx():
  absent = 'torch' not in sys.modules
  if absent:
    sys.modules['torch'] = None     # else tensorboardX imports PyTorch where it is installed: seconds, for nothing
  try:
    import tensorboardX
  finally:
    if absent:
      del sys.modules['torch']
  return tensorboardX


COLUMNS = (   # of the console line: those present are shown; every key goes to the files
    ('loss/train', 'loss {:.4f}'), ('loss/valid', 'valid loss {:.4f}'), ('eval/bits_per_byte', '{:.4f} bits/byte'),
    ('optimizer/learning_rate', 'lr {:.2e}'), ('grads/norm', 'grad {:.2f}'),
    ('perf/tokens_per_second', '{:,.0f} tok/s'), ('perf/mfu', 'MFU {:.1%}'), ('perf/input_wait', 'input {:.1%}'),
    ('perf/memory_gb', 'mem {:.2f} GB'))


FILES = ('metrics.jsonl', 'samples.jsonl', 'events.jsonl')


class Logger:
  """Writes what the loop measures; only process 0 does. tokens_per_step: B x T, padding included. flops_per_token: of
  MFU_CONVENTION. peak: FLOP/s of all devices. resumed_step: rows after it are dropped, so that the curve is that of an
  uninterrupted run; 0 starts afresh. total_steps: 0 while unknown, set later. Call close() also after an error."""

  def __init__(self, workdir, log: config_lib.Log, total_steps: int, *, clock: clock_lib.Clock,
               tokens_per_step: int = 0, flops_per_token: float = 0.0, peak: float = 0.0, resumed_step: int = 0):
    self.workdir, self.total_steps, self.clock = pathlib.Path(workdir), total_steps, clock
    self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
    self.main = jax.process_index() == 0
    self._last = self._first = None    # (step, busy seconds, input seconds, wall seconds) of a training row
    self._writer = self._progress = None
    self._tensorboard, self._purge = log.tensorboard, resumed_step + 1 if resumed_step else 0
    if not self.main:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._files = {name: self._open(self.workdir / name, resumed_step) for name in FILES}
    if log.progress == 'rich' or (log.progress == 'auto' and sys.stdout.isatty()):
      from rich import progress
      self._progress = progress.Progress(
          progress.TextColumn('{task.description}'), progress.BarColumn(None), progress.MofNCompleteColumn(),
          progress.TextColumn('[bold]{task.fields[note]}'), progress.TimeElapsedColumn(), refresh_per_second=4)
      self._task = self._progress.add_task('training', total=total_steps or None, completed=resumed_step, note='')
      self._progress.start()

  def _open(self, path, resumed_step):
    rows = [r for r in paths.read_jsonl(path) if r.get('step', math.inf) <= resumed_step] if resumed_step else []
    _replace(path, ''.join(json.dumps(r) + '\n' for r in rows))
    return path.open('a', encoding='utf-8', buffering=1)     # by the line: a kill loses none

  def log(self, step: int, metrics: dict[str, float]) -> dict:
    """One row, written and shown; non-finite values are null. A row with 'loss/train' gets the perf/ keys of the steps
    since the last one, but not the first, whose time is compilation. Returns the row with its floats as they are."""
    row = {name: float(value) for name, value in metrics.items()}
    if 'loss/train' in row:
      row |= self._perf(step)
    if not self.main:
      return row
    self._write('metrics.jsonl', dict(step=step, time=round(time.time(), 3), **{
        name: value if math.isfinite(value) else None for name, value in row.items()}))
    if self._tensorboard:
      for name, value in row.items():
        self._events().add_scalar(name, value, step)
    cells = [form.format(row[name]) for name, form in COLUMNS if name in row]
    if 'perf/eta_s' in row:
      cells.append(f'ETA {duration(row["perf/eta_s"])}')
    total = self.total_steps or '?'
    self._print(' | '.join([f'step {step:{len(str(total))}}/{total}', *cells]))
    if self._progress:
      note = cells[-1] if 'perf/eta_s' in row else self._progress.tasks[0].fields['note']
      self._progress.update(self._task, completed=step, total=self.total_steps or None, note=note)
    return row

  def _perf(self, step):
    """Speed over the time of parts 'input' and 'step' alone; the ETA over all of it, evaluations included."""
    parts = self.clock.parts()
    now = step, parts['step'] + parts['input'], parts['input'], sum(parts.values())
    last, self._last, self._first = self._last, now, self._first or now
    if last is None or now[0] <= last[0] or now[1] <= last[1]:
      return {}
    rate = self.tokens_per_step * (now[0] - last[0]) / (now[1] - last[1])
    pace = (now[3] - self._first[3]) / (now[0] - self._first[0])
    out = {'perf/tokens_per_second': rate, 'perf/input_wait': (now[2] - last[2]) / (now[1] - last[1]),
           'perf/memory_gb': memory_gb(), 'perf/eta_s': max(0, self.total_steps - step) * pace}
    if not self.total_steps:
      del out['perf/eta_s']              # a budget in minutes that is no number of steps yet
    return out | ({'perf/mfu': mfu(rate, self.flops_per_token, self.peak)} if self.peak else {})

  def text(self, step: int, title: str, text: str):
    """A sample: to the console, TensorBoard and samples.jsonl."""
    if not self.main:
      return
    self._write('samples.jsonl', dict(step=step, title=title, text=text))
    if self._tensorboard:
      self._events().add_text(title, '    ' + without_controls(text).replace('\n', '\n    '), step)
    self._print(f'--- step {step}: {title} ---\n{text}\n---')

  def warn(self, message: str):
    if self.main:
      self._print(f'WARNING: {message}', 'bold yellow')

  def note(self, message: str):
    if self.main:
      self._print(message)

  def event(self, step: int, kind: str, text: str, quiet: bool = False, **more):
    """What befell a run, kept in events.jsonl for the report and for the processes that go on with it."""
    if self.main:
      self._write('events.jsonl', dict(step=step, time=round(time.time(), 3), kind=kind, text=text, **more))
      if not quiet:
        self._print(f'WARNING: step {step}: {text}', 'bold yellow')

  def close(self):
    with contextlib.suppress(OSError):     # a full disk has ended the run already, with its message
      self.clock.save()
    if self.main:
      for file in self._files.values():
        with contextlib.suppress(OSError):
          file.close()
      if self._writer:
        self._writer.close()
      if self._progress:
        self._progress.stop()

  def _write(self, name, row):
    try:
      self._files[name].write(json.dumps(row, allow_nan=False) + '\n')
    except OSError as e:
      raise ConfigError(f'{self.workdir / name}: cannot be written ({e.strerror}); checkpoints are intact: make room, '
                        'then start the same command again to resume') from e

  def _events(self):
    if self._writer is None:
      tensorboardX = _import_tensorboardx()
      folder = str(self.workdir / 'tensorboard')
      self._writer = tensorboardX.SummaryWriter(folder, purge_step=self._purge, flush_secs=10)
    return self._writer

  def _print(self, text, style=''):
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    text = without_controls(text).encode(encoding, 'replace').decode(encoding)    # a console may lack U+FFFD
    if self._progress:
      from rich.text import Text
      self._progress.console.print(Text(text, style), soft_wrap=True)
    else:
      print(text, flush=True)
