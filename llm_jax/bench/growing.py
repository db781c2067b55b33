"""bench grow: a step's time and memory against depth, width, context and batch, and what the host spends on a step."""
import argparse
import contextlib
import io
import pathlib
import statistics
import tempfile
import time

import numpy as np

from llm_jax import config as config_lib
from llm_jax import hardware as hardware_lib
from llm_jax import sharding
from llm_jax.bench import alternate, hardware, medians, seconds_of, token_batch, training
from llm_jax.config import ConfigError

BASE = dict(layers=4, width=128, length=128, batch=8)
ACCELERATOR = dict(layers=1, width=4, length=4, batch=1)      # times as large, there: small steps are all launches
AXES = dict(layers=('depth', (2, 4, 8, 16, 32), 1), width=('width', (64, 128, 256, 512, 1024), 2),
            length=('context', (64, 128, 256, 512, 1024), 2), batch=('batch', (4, 8, 16, 32, 64), 1))
NOISE = 0.15                     # of an exponent
DEEP = dict(layers=48, width=16, heads=2)
CALLS = 50                       # of the deep model's step


def grow(flags) -> None:
  """Prints how a step's time and memory grow with each size of a small model, the others fixed: the exponent of their
  upper half, beside what is expected at most. Then what the host spends on a step of 48 layers. --out draws it."""
  if flags.out and not flags.out.endswith('.svg'):
    raise ConfigError(f'--out: expected a file whose name ends in .svg, got {flags.out}')
  times = ACCELERATOR if hardware_lib.accelerated() else dict.fromkeys(ACCELERATOR, 1)
  base = {name: size * times[name] for name, size in BASE.items()}
  axes = {axis: (name, [times[axis] * value for value in values], most) for axis, (name, values, most) in AXES.items()}
  milliseconds, megabytes = {}, {}
  for axis, (_, values, _) in axes.items():
    milliseconds[axis], megabytes[axis] = measure(base, axis, values, flags)
  print(f'grow {base["layers"]} x {base["width"]}, {base["batch"]} x {base["length"]} tokens, {flags.rounds} rounds, '
        f'medians; {hardware()}')
  for axis, (name, values, most) in axes.items():
    for what, found, form in (('ms', milliseconds, ',.1f'), ('MB', megabytes, ',.0f')):
      power = exponent(values, found[axis])
      verdict = f'MORE than expected: look at {name}' if power > most + NOISE else 'as expected'
      row = '  '.join(f'{value}: {x:{form}}' for value, x in zip(values, found[axis]))
      print(f'{name:>8}  {what}  {row}  exponent {power:.2f} (at most {most})  {verdict}')
  dispatch, batch = host_overhead()
  print(f'host, {DEEP["layers"]} layers of {DEEP["width"]}: {dispatch:.2f} ms a step in the call of the compiled step '
        f'(aim: under 1), {batch:.2f} ms in putting its batch on the devices')
  if flags.out:
    pathlib.Path(flags.out).write_text(drawing(axes, milliseconds, megabytes))


def measure(base: dict, axis: str, values, flags) -> tuple[list[float], list[float]]:
  """(milliseconds of a step, MB of its arguments and temporaries by XLA's account) at each value of an axis."""
  runs = {}
  remat = 'none' if flags.remat == 'auto' else flags.remat      # one for all values
  for value in values:
    sizes = argparse.Namespace(**(training.sizes_of(flags) | base | {axis: value, 'remat': remat}))
    runs[value] = training.Ours(sizes, token_batch(sizes))
    runs[value].run(1)
  times = {value: lambda run=run: 1e3 * seconds_of(lambda: run.run(flags.steps)) / flags.steps
           for value, run in runs.items()}
  memory = [run.step.memory_analysis() for run in runs.values()]
  return (list(medians(alternate(times, flags.rounds)).values()),
          [(m.argument_size_in_bytes + m.temp_size_in_bytes) / 1e6 for m in memory])


def exponent(values, found) -> float:
  """The slope in logarithms of the last three points, where what does not grow no longer counts for much."""
  return float(np.polyfit(np.log(values[-3:]), np.log(found[-3:]), 1)[0])


def host_overhead() -> tuple[float, float]:
  """Median milliseconds that the calling thread spends in the training loop's own compiled step of a deep, tiny model,
  whose state is ready, and in putting a batch on the devices."""
  import jax

  from llm_jax.train import loop
  from llm_jax.train.rundir import RunDirectory
  with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder) / 'text'
    text.write_text('to be or not to be, that is the question.\n' * 500)
    cfg = config_lib.Config(
        model=config_lib.Model(vocab_size=0, max_length=0, **DEEP), tokenizer=config_lib.Tokenizer(kind='byte'),
        data=config_lib.Data(source='text', path=str(text), valid='tail', length=16, cache_dir=folder),
        train=config_lib.Train(batch_size=8, steps=1), eval=config_lib.Eval(prompts=(), samples=0))
    mesh = sharding.make_mesh(cfg.mesh)
    calls, puts = [], []
    with RunDirectory(str(pathlib.Path(folder) / 'run'), pathlib.Path(folder)) as directory, jax.set_mesh(mesh), \
         loop.Run(cfg, directory, mesh, time.time()) as run:
      with contextlib.redirect_stdout(io.StringIO()):
        run.setup()
      for step in range(CALLS):
        rows = run.batches(step, run.rows())
        start = time.perf_counter()
        batch = jax.block_until_ready(sharding.put_batch(rows, mesh))
        put = time.perf_counter()
        run.state, _ = run.train_step(run.state, batch)
        calls.append(time.perf_counter() - put)
        puts.append(put - start)
        jax.block_until_ready(run.state)
  return 1e3 * statistics.median(calls), 1e3 * statistics.median(puts)


def drawing(sizes: dict, milliseconds: dict, megabytes: dict) -> str:
  """An SVG: time and memory against each axis, with the slope that is expected at most."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 5), layout='constrained')
  for i, (unit, found) in enumerate((('ms', milliseconds), ('MB', megabytes))):
    for j, (axis, (name, values, most)) in enumerate(sizes.items()):
      axes = figure.add_subplot(2, len(sizes), 1 + i * len(sizes) + j)
      top = found[axis][-1]
      axes.plot(values, [top * (value / values[-1]) ** most for value in values], '--', color='#b0b6bf', linewidth=1,
                label=f'power {most}')
      axes.plot(values, found[axis], 'o-', color='#2f6fdb', linewidth=1.4, markersize=4, label='measured')
      axes.set_xscale('log', base=2)
      axes.set_yscale('log', base=2)
      axes.yaxis.set_major_formatter('{x:g}')
      axes.set_ylim(min(found[axis]) / 2, 2 * top)
      axes.set_xticks(values, [str(value) for value in values])
      axes.set_title(f'{name}: power {exponent(values, found[axis]):.2f}', fontsize=10)
      axes.set_ylabel(f'{unit} a step' if unit == 'ms' else unit)
      axes.grid(linewidth=0.4, which='major')
      axes.legend(frameon=False, fontsize=8)
  out = io.StringIO()
  figure.savefig(out, format='svg', metadata={'Date': None})
  return out.getvalue()
