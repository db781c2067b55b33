"""bench compile: from the start of a process to the first loss, with empty caches and with what an earlier one kept."""
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from llm_jax import hardware as hardware_lib
from llm_jax.bench import hardware, import_torch, token_batch, training
from llm_jax.bench.learning import CONFIG
from llm_jax.config import ConfigError

TEXT = 'The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n' * 2000


def compile_(flags) -> None:
  """Prints medians of fresh processes: ours import, trace, lower and compile a step, then train for one; twice, the
  second time with the caches of the first. The peer imports, runs a step, and one that torch.compile has compiled."""
  peer = ('torch eager', 'torch compiled') if flags.peer == 'torch' else ()
  versions = f', torch {import_torch().__version__}' if peer else ''
  found = {}
  for _ in range(flags.rounds):
    with tempfile.TemporaryDirectory() as folder:
      for what in ('step', *peer, 'first command'):
        for start in ('empty', 'kept'):
          where = pathlib.Path(folder)
          run = first_command(where, start) if what == 'first command' else process(what, flags, where)
          for name, value in run.items():
            found.setdefault((what, name), {}).setdefault(start, []).append(value)
  print(f'compile {flags.layers} x {flags.width}, {flags.batch} x {flags.length} tokens, {flags.rounds} rounds, '
        f'medians; {hardware()}{versions}')
  print(f'{"":>46}  empty caches  kept caches')
  for (what, name), values in found.items():
    cells = [f'{statistics.median(values[start]):.2f}' if name.endswith(', s') else
             f'{statistics.median(values[start]):.0f}' for start in ('empty', 'kept')]
    print(f'{what:>16}  {name:>28}  {cells[0]:>12}  {cells[1]:>11}')


def process(what: str, flags, folder: pathlib.Path) -> dict[str, float]:
  """What `child` measured in a process of its own, which keeps its caches in a folder."""
  arguments = what, training.sizes_of(flags), str(folder)
  program = f'from llm_jax.bench import compiling; compiling.child{arguments!r}'
  out, memory = run_alone([sys.executable, '-c', program], folder)
  return json.loads(out.splitlines()[-1]) | {"host's peak memory, MB": memory}


def first_command(folder: pathlib.Path, start: str) -> dict[str, float]:
  """One step of python -m llm_jax.main on a small text, with the caches in a folder."""
  (folder / 'text').write_text(TEXT)
  command = [sys.executable, '-m', 'llm_jax.main', f'--config={CONFIG}', f'--workdir={folder / start}',
             '--config.data.source=text', f'--config.data.path={folder / "text"}', '--config.data.valid=tail',
             '--config.train.steps=1', '--config.eval.prompts=()', '--config.log.progress=lines']
  out, memory = run_alone(command, folder)
  seconds = re.search(r'time to first loss ([0-9.]+) s', out)
  return {'start to first loss, s': float(seconds[1]), "host's peak memory, MB": memory,
          'programs kept on disk': len(list(folder.glob('llm_jax/xla-*/*-cache')))}


def run_alone(command: list[str], folder: pathlib.Path) -> tuple[str, float]:
  """(stdout, most memory in MB) of a command whose caches are in a folder. Raises ConfigError with what it said."""
  env = os.environ | dict(XDG_CACHE_HOME=str(folder), TORCHINDUCTOR_CACHE_DIR=str(folder / 'inductor'))
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  with open(folder / 'said', 'w+') as said, open(folder / 'errors', 'w+') as errors:
    running = subprocess.Popen(command, env=env, stdout=said, stderr=errors)
    try:
      _, status, usage = os.wait4(running.pid, 0)
    except BaseException:
      running.kill()
      running.wait()
      raise
    running.returncode = os.waitstatus_to_exitcode(status)
    said.seek(0), errors.seek(0)
    if running.returncode:
      raise ConfigError(f'{" ".join(command)}: ended with {running.returncode}: {errors.read()[-2000:]}')
    return said.read(), usage.ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e6 / 1024)


def child(what: str, sizes: dict, folder: str) -> None:
  """Prints as JSON what a fresh process spends on the training path and its first step, or on torch's."""
  import argparse
  start = time.perf_counter()
  flags = argparse.Namespace(**sizes)
  token_BT = token_batch(flags)
  if what != 'step':
    import torch  # noqa: F401
    imported = time.perf_counter()
    from llm_jax.bench import torch_peer
    peer = torch_peer.Torch(training.model_of(flags), token_BT, what == 'torch compiled')
    print(json.dumps({'import, s': imported - start, 'first step, s': peer.compile_s}))
    return
  import jax

  from llm_jax.train import loop  # noqa: F401  all that a training run imports
  imported = time.perf_counter()
  hits = []
  jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith('/cache_hits') else 0)
  hardware_lib.keep_programs(pathlib.Path(folder) / 'step')
  ours = training.Ours(flags, token_BT)
  ready = time.perf_counter()
  ours.run(1)
  made = ours.compiled
  print(json.dumps({'import, s': imported - start, 'trace and lower, s': made.lower_s,
                    'compile, s': made.seconds - made.lower_s, 'first step, s': time.perf_counter() - ready,
                    'programs from the cache': len(hits)}))
