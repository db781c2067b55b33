"""The notebook runs from top to bottom in a real kernel, on a tiny text and model."""
import pathlib
import random

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_quickstart(tmp_path, monkeypatch):
  words = random.Random(0).choices(['import os', 'def f(x):', '  return x', 'class A:', '  pass', 'x = 1'], k=4000)
  (tmp_path / 'code.txt').write_text('\n'.join(words))
  notebook = nbformat.read(ROOT / 'notebooks' / 'quickstart.ipynb', as_version=4)
  nbformat.validate(notebook)
  overrides = {
      'data.source': 'text', 'data.path': str(tmp_path / 'code.txt'), 'data.valid': 'tail', 'data.length': '64',
      'data.cache_dir': str(tmp_path / 'cache'), 'tokenizer.vocab_size': '300', 'model.layers': '2',
      'model.width': '64', 'model.heads': '2', 'train.steps': '30', 'eval.samples': '0', 'eval.max_tokens': '8',
      'log.every': '5'}
  for cell in notebook.cells:
    tags = cell.metadata.get('tags', ())
    if 'install' in tags:
      cell.source = ''
    if 'parameters' in tags:
      cell.source = f'minutes = 2.0\noverrides = {overrides!r}\nworkdir = {str(tmp_path / "run")!r}'
  monkeypatch.setenv('XLA_FLAGS', '')
  NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(ROOT)}}).execute()
  printed = ''.join(o.get('text', '') for cell in notebook.cells if cell.cell_type == 'code' for o in cell.outputs)
  assert 'resuming' in printed and 'step 50/50' in printed
  assert sum('image/png' in o.get('data', {}) for c in notebook.cells if c.cell_type == 'code' for o in c.outputs) == 2
