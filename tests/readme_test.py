"""The lines of README's code blocks run as they stand there; training lines with a tiny model and few steps, plans
of a small one."""
import gzip
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'README.md').read_text()
TINY = ['--config.train.steps=2', '--config.train.minutes=0.0', '--config.model.layers=1', '--config.model.width=32',
        '--config.model.heads=2', '--config.data.length=32', '--config.train.batch_size=2', '--config.eval.batches=1',
        '--config.eval.samples=1', '--config.eval.max_tokens=4', '--config.tokenizer.kind=byte',
        '--config.log.tensorboard=False', '--config.eval.prompts=()', '--config.eval.batch_size=256',
        '--config.eval.python=False']
SMALL = ['--tries=0', '--config.model.width=512', '--config.model.heads=4', '--config.model.kv_heads=4',
         '--config.model.mlp_dim=1024']


def blocks(language):
  return re.findall(rf'^```{language}\n(.*?)^```', TEXT, re.S | re.M)


def commands():
  """Every command of README's bash blocks, without comments; `a && b` is two."""
  for block in blocks('bash'):
    yield from (c.strip() for line in re.split(r'\n(?!    )', block) for c in line.split('&&') if c.strip())


def test_the_two_commands_are_the_ones_ci_runs():
  first = blocks('bash')[0].splitlines()
  assert first == ['pip install -e . && python -m llm_jax.main --config=configs/base.py',
                   "pip install -e '.[test]' && pytest -n 2 --dist=loadfile"]
  assert 'pytest -n 2 --dist=loadfile' in (ROOT / '.ci/run').read_text()


def test_every_extra_named_exists():
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  assert set(re.findall(r"'\.\[(\w+)\]'", TEXT)) <= set(extras)


def test_the_file_tree_is_the_tree():
  modules = {p.name for folder in ('llm_jax', 'configs') for p in (ROOT / folder).rglob('*.py')} - {'__init__.py'}
  tree = TEXT.split('## Files')[1]
  named = set(re.findall(r'^ +(\w+\.py) ', tree, re.M))
  assert named == modules


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A folder like the clone's, with the data that the lines name."""
  home = tmp_path_factory.mktemp('readme')
  (home / 'configs').symlink_to(ROOT / 'configs')
  (home / 'books').mkdir()
  for i in range(200):
    (home / 'books' / f'{i}.txt').write_text(f'Chapter {i}. ' + 'It was a dark and stormy night. ' * 20)
  with gzip.open(home / 'web.jsonl.gz', 'wt') as f:
    f.writelines(json.dumps(dict(text=f'Page {i} of the web. ' * 20)) + '\n' for i in range(200))
  return home


def test_every_command_line_runs(home):
  environ = dict(os.environ, XDG_CACHE_HOME=str(home / 'cache'), JAX_PLATFORMS='cpu')
  environ.pop('XLA_FLAGS', None)
  ran = []
  for command in commands():
    words = shlex.split(command, comments=True)
    if words[0] in ('pip', 'pytest', 'tensorboard'):
      continue
    assert words[:2] == ['python', '-m'], command
    words = [sys.executable, *words[1:], *(TINY if words[2] == 'llm_jax.main' else ())]
    if words[2] == 'llm_jax.sample':
      words += ['--max_tokens=4']
    if words[2] == 'llm_jax.plan':
      if importlib.util.find_spec('libtpu') is None:         # the extra of that line
        continue
      words += SMALL
    done = subprocess.run(words, cwd=home, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
    ran.append(words[2])
  assert {'llm_jax.main', 'llm_jax.sample', 'llm_jax.checkpoint'} <= set(ran)
  code = blocks('python')[0]
  assert subprocess.run([sys.executable, '-c', code], cwd=home, env=environ, timeout=300).returncode == 0
