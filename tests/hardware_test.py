"""What is kept of compiled programs, and where."""
import os
import subprocess
import sys

import pytest

CODE = """
import sys
from llm_jax import hardware
hardware.keep_programs(sys.argv[1])
import jax
print(jax.config.jax_compilation_cache_dir)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.jit(lambda x: jax.numpy.sin(x @ x))(jax.numpy.ones((8, 8))).block_until_ready()
"""


@pytest.mark.parametrize('named', ['', 'other'])
def test_programs_are_kept_and_read_again_in_silence(named, tmp_path):
  """In the user's own cache, where one is named to JAX."""
  env = os.environ | dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / named)) if named else dict(os.environ)
  runs = [subprocess.run([sys.executable, '-c', CODE, str(tmp_path)], env=env, capture_output=True, text=True)
          for _ in range(2)]
  folders = [folder.name for folder in tmp_path.iterdir()]
  assert len(folders) == 1 and folders[0].startswith(named or 'xla-')
  for run in runs:
    assert run.returncode == 0 and run.stdout.strip() == str(tmp_path / folders[0]) and not run.stderr, run.stderr
  assert len([p for p in (tmp_path / folders[0]).iterdir() if p.name.endswith('-cache')]) >= 1
