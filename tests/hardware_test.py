"""What is kept: of compiled programs, and where; and of memory."""
import os
import pathlib
import platform
import statistics
import subprocess
import sys

import pytest
import runs

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


FAULTS = """
import atexit, itertools, resource
from llm_jax import hardware
from llm_jax.train import loop
seen, log = [], loop.Run.log
def counted(self, *args):
  seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
  return log(self, *args)
loop.Run.log = counted
atexit.register(lambda: print('faults', *(b - a for a, b in itertools.pairwise(seen))))
"""


HUGE = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has mallopt')
@pytest.mark.skipif(HUGE.exists() and '[always]' in HUGE.read_text(), reason='with pages of 2 MiB few are cleared')
def test_steps_work_in_the_memory_of_the_steps_before(tmp_path):
  """The system clears no page for a step of the loop, but for those of a whole step of 50 MB where nothing is kept."""
  runs.write_texts(tmp_path)
  sizes = dict(train__batch_size=64, data__length=256, train__accumulate=1, train__steps=12)
  faults = []
  for i, code in enumerate([FAULTS, FAULTS + 'hardware.keep_memory = lambda: None']):
    out, _ = runs.finish(runs.start(runs.flags(tmp_path, workdir=f'run{i}', **sizes), code=code))
    faults.append(statistics.median(map(int, out.splitlines()[-1].split()[-6:])))
  assert faults[0] < 500 and faults[1] > 5000, faults
