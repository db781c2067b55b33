"""Whole training runs for the tests: real files, a tiny model, in this process or in one of its own."""
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile

import jax
from tiny import quick_jit

from llm_jax import checkpoint, main, paths, sharding

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEYS = {      # of configs/base.py, for a run of seconds
    'data.source': 'text', 'data.length': 32, 'data.valid_fraction': 0.2, 'tokenizer.kind': 'byte',
    'model.layers': 2, 'model.width': 32, 'model.heads': 2, 'model.embedding_init': 0.02, 'model.unroll': 'False',
    'model.qk_norm': 'none', 'model.tied_embeddings': 'True', 'model.embedding_skips': 'False',
    'model.value_skips': 'False', 'model.logit_softcap': 0.0, 'model.zero_init': 'False',
    'train.minutes': 0, 'train.steps': 10, 'train.batch_size': 8,
    'optimizer.name': 'adamw', 'optimizer.schedule': 'cosine', 'optimizer.warmup_steps': 2,
    'optimizer.learning_rate': 1e-2, 'checkpoint.every': 0, 'eval.every': 0, 'eval.batches': 4, 'eval.prompts': '()',
    'eval.samples': 0, 'eval.python': 'False', 'eval.max_tokens': 8, 'log.every': 1, 'log.tensorboard': 'False',
    'log.compile_cache': 'False'}


def flags(folder: pathlib.Path, **keys) -> list[str]:
  """The command line of a run in folder/run on the texts in folder/data; keys as train__steps=20 or workdir='x'."""
  workdir = keys.pop('workdir', 'run')
  changed = {key.replace('__', '.'): value for key, value in keys.items()}
  values = {'data.path': folder / 'data', 'data.cache_dir': folder / 'cache', **KEYS, **changed}
  return [f'--config={ROOT / "configs" / "base.py"}', f'--workdir={folder / workdir}',
          *(f'--config.{key}={value}' for key, value in values.items())]


def train(folder: pathlib.Path, **keys) -> dict:
  """Trains in this process; returns the report's figures."""
  from llm_jax.train import loop
  config, workdir, _ = main.parse(flags(folder, **keys))
  return loop.train(config, workdir)


def start(args: list[str], cwd=None, devices=1, code='', wrapper=(), env=None, module='llm_jax.main',
          **options) -> subprocess.Popen:
  """`python -m MODULE` with these arguments in a process of its own; `code` runs first, to break something."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1', **(env or {}),
         'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'}
  env.pop('JAX_NUMPY_RANK_PROMOTION', None)
  program = ['-c', f'{code}\nimport runpy; runpy.run_module({module!r}, run_name="__main__")'] if code else (
      ['-m', module])
  errors = tempfile.TemporaryFile('w+')       # a pipe that nobody reads meanwhile would fill and stop the process
  process = subprocess.Popen([*wrapper, sys.executable, *program, *args], cwd=cwd or ROOT, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=errors, **options)
  process.errors = errors
  return process


def start_hosts(args: list[str], hosts: int, devices: int, **options) -> list[subprocess.Popen]:
  """The same run in several processes, as on the hosts of a pod."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  return [start([*args, '--config.mesh.distributed=True'], devices=devices, env=dict(
      JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(hosts), JAX_PROCESS_ID=str(i)), **options)
          for i in range(hosts)]


def wait_for(process: subprocess.Popen, pattern: str) -> str:
  """Reads the process's output up to the first line that matches; returns it all."""
  out = ''
  for line in process.stdout:
    out += line
    if re.match(pattern, line):
      return out
  raise AssertionError(f'no line matches {pattern!r} in:\n{out}\n{read_errors(process)}')


def read_errors(process: subprocess.Popen) -> str:
  process.errors.seek(0)
  return process.errors.read()


def finish(process: subprocess.Popen, code=0, timeout=120) -> tuple[str, str]:
  """(stdout, stderr) of a process that must end with this exit status."""
  try:
    out, _ = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    out, _ = process.communicate()
    raise AssertionError(f'still running after {timeout} s:\n{out}\n{read_errors(process)}') from None
  error = read_errors(process)
  assert process.returncode == code, f'exit status {process.returncode}, expected {code}:\n{out}\n{error}'
  return out, error


REAL_MESH = sharding.make_mesh


def make_quick(patch) -> None:
  """One device, XLA without its optimiser, no plots: runs in this process would else spend their time on those."""
  from llm_jax.train import loop
  patch.setattr(sharding, 'make_mesh', lambda mesh: REAL_MESH(mesh, jax.devices()[:1]))
  patch.setattr(jax, 'jit', quick_jit)
  patch.setattr(loop.report, 'write', lambda workdir, *_: (workdir / 'report.html', workdir / 'report.md'))


def write_texts(folder: pathlib.Path, documents=24, lines=12) -> None:
  """Files of an easy language in folder/data."""
  rng = random.Random(0)
  (folder / 'data').mkdir(parents=True, exist_ok=True)
  nouns, verbs = ('the cat', 'a dog', 'the old man', 'my house'), ('sees', 'likes', 'finds')
  for i in range(documents):
    text = ''.join(f'{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}.\n' for _ in range(lines + i % 5))
    (folder / 'data' / f'{i:02}.txt').write_text(text)


def state_bits(workdir: pathlib.Path, step: int | None = None) -> dict[str, bytes]:
  """{path: dtype and bytes} of every array of a checkpoint."""
  leaves = jax.tree_util.tree_leaves_with_path(checkpoint.restore(workdir, step))
  return {jax.tree_util.keystr(path): (str(x.dtype), jax.device_get(x).tobytes()) for path, x in leaves}


def curve(workdir: pathlib.Path, *keys) -> list:
  """(step, key, value) of every row of metrics.jsonl, without what depends on time."""
  rows = paths.read_jsonl(workdir / 'metrics.jsonl')
  return [(row['step'], key, value) for row in rows for key, value in row.items()
          if not key.startswith('perf/') and key not in ('step', 'time') and (not keys or key in keys)]
