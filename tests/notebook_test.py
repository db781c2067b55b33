"""The notebooks run from top to bottom in a real kernel: on a tiny text and models, and on SmolLM2."""
import pathlib
import random

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]


def execute(name, monkeypatch, **parameters):
  """(text printed, number of pictures) of a notebook with these in its cell of parameters."""
  notebook = nbformat.read(ROOT / 'notebooks' / name, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    tags = cell.metadata.get('tags', ())
    if 'install' in tags:
      cell.source = ''
    if 'parameters' in tags:
      cell.source = '\n'.join(f'{key} = {value!r}' for key, value in parameters.items())
  monkeypatch.setenv('XLA_FLAGS', '')
  NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(ROOT)}}).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == 'code' for o in cell.outputs]
  return ''.join(o.get('text', '') for o in outputs), sum('image/png' in o.get('data', {}) for o in outputs)


def write_code(folder):
  """Overrides that train on a small text, kept and prepared in a folder."""
  words = random.Random(0).choices(['import os', 'def f(x):', '  return x', 'class A:', '  pass', 'x = 1'], k=4000)
  (folder / 'code.txt').write_text('\n'.join(words))
  return {'data.source': 'text', 'data.path': str(folder / 'code.txt'), 'data.valid': 'tail', 'data.length': '64',
          'data.cache_dir': str(folder / 'cache')}


def test_quickstart(tmp_path, monkeypatch):
  overrides = write_code(tmp_path) | {
      'tokenizer.vocab_size': '300', 'model.layers': '2',
      'model.width': '64', 'model.heads': '2', 'train.steps': '30', 'eval.samples': '0', 'eval.max_tokens': '8',
      'log.every': '5'}
  printed, pictures = execute('quickstart.ipynb', monkeypatch, minutes=2.0, overrides=overrides,
                              workdir=str(tmp_path / 'run'))
  assert 'resuming' in printed and 'step 50/50' in printed and pictures == 2


def test_scaling_laws(tmp_path, monkeypatch):
  overrides = write_code(tmp_path)
  printed, pictures = execute('scaling_laws.ipynb', monkeypatch, quick=True, workdir=str(tmp_path / 'runs'),
                              code=overrides, shakespeare=overrides | {'model.layers': '1'})
  assert printed.count(', trained ') == 2 and printed.count('   best') == 3 and pictures == 2


def test_pretrained(smollm2, tmp_path, monkeypatch):
  printed, pictures = execute('pretrained.ipynb', monkeypatch, path=str(smollm2), exports=str(tmp_path / 'exports'))
  assert "' Paris'" in printed and printed.count('read back, logits differ by at most') == 2
  assert printed.rstrip().endswith('Paris.') and pictures == 4
