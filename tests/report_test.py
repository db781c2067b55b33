"""report.py on real run directories: self-contained, inert, complete; compression and ast.parse figures."""
import gzip
import html.parser
import json
import lzma
import math
import pathlib
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import config as config_lib
from llm_jax.train import clock as clock_lib
from llm_jax.train import metrics, report

ATTACK = '</pre><script src="https://x.example/a.js">f(1)</script><img src=//x.example/a.png onerror=f(2)>\n````'
FIGURES = {'validation loss': 2.0, 'bits per byte': 1.5849, 'gzip -9': 1.8412, 'xz -9': 1.5213,
           'samples accepted by ast.parse': (5, 8), 'parameters': 4_812_032}
CONFIG = config_lib.Config(model=config_lib.Model(layers=6, mlp='swiglu'),
                           eval=config_lib.Eval(prompts=(ATTACK, 'a|b')))
ENVIRONMENT = {'devices': '2 x <b>', 'command': 'python -m llm_jax.main --config=configs/base.py'}
ENERGY = dict(kwh=0.25, co2e_kg=0.1, watts=20.0, assumptions='2 cores x 10 W assumed')


def run(folder, turns=True, steps=1000):
  """A run directory as the loop leaves it."""
  folder.mkdir(parents=True, exist_ok=True)
  clock = clock_lib.Clock(folder)
  clock.resume({})
  log = metrics.Logger(folder, config_lib.Log(progress='lines', tensorboard=False), steps, clock=clock,
                       tokens_per_step=4096, flops_per_token=1e6, peak=1e12)
  for step in range(10, steps + 1, 10):
    with clock('step'):
      log.log(step, {'loss/train': 2 + 4 * math.exp(-step / 100) if step != 500 else math.nan, 'grads/norm': 0.5,
                     'optimizer/learning_rate': 1e-3})
    if step % 100 == 0:
      log.log(step, {'loss/valid': 2.2 + math.exp(-step / 100) + (1e-3 * max(0, step - 600) if turns else 0)})
      for _ in range(2):                                # as a finished run that is run again
        log.text(step, 'prompt <i>', f'{ATTACK}\x00 at {step}')
  log.close()
  return folder


class Parsed(html.parser.HTMLParser):
  """What a browser would make of the page: its tags, its attributes, and the text of each kind of element."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.open, self.texts = [], [], [], {}
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ('meta', 'br', 'img'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    while self.open and self.open.pop() != tag:         # <td> and <th> close themselves
      pass

  def handle_data(self, data):
    for tag in set(self.open):
      self.texts.setdefault(tag, []).append(data)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = run(tmp_path_factory.mktemp('runs') / 'my run')
  paths = report.write(folder, CONFIG, FIGURES, ENVIRONMENT, ENERGY)
  assert paths == (folder / 'report.html', folder / 'report.md')
  return Parsed(paths[0].read_text('utf-8')), paths[0].read_text('utf-8'), paths[1].read_text('utf-8')


def test_html_asks_for_nothing_and_runs_nothing(written):
  page, text, _ = written
  assert not {'script', 'link', 'iframe', 'object', 'embed', 'base', 'img', 'i'} & set(page.tags)
  assert not [name for name, _ in page.attributes if name.startswith('on')]
  references = [value for name, value in page.attributes if name in ('src', 'href', 'xlink:href', 'data', 'action')]
  assert references and all(re.fullmatch(r'#\w+', value) for value in references)        # the curves' own markers
  assert not re.search(r'url\((?!#)|@import|http://|https://(?!x\.example)', text)
  policy = [value for name, value in page.attributes if name == 'content' and 'default-src' in value]
  assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_samples_and_keys_are_shown_as_text(written):
  page, text, markdown = written
  assert f'{ATTACK}\ufffd at 1000' in ''.join(page.texts['pre'])
  assert 'step 1000: prompt <i>' in ''.join(page.texts['div']) and '2 x <b>' in page.texts['td']
  assert [s for s in page.texts['summary'] if 'prompt' in s] == [
      f'step {step}: prompt <i>' for step in (100, 300, 500, 700, 900)]
  outside = re.sub(r'^(`{3,})text\n.*?^\1$', '', markdown, flags=re.DOTALL | re.MULTILINE)
  assert not re.search(r'<\w', outside) and '\x00' not in markdown + text
  assert markdown.count(f'`````text\n{ATTACK}\ufffd at 1000\n`````') == 1        # a fence longer than any in the text


@pytest.mark.parametrize('text', [
    'Overfitting: validation loss was lowest at step 600', '1.5849', '1.8412', '1.5213', '5 of 8', '4,812,032',
    '7.3891', 'gzip -9 (bits per byte)', 'perplexity', '0.25 kWh', '0.1 kg CO2e', '2 cores x 10 W assumed', 'compile',
    'tokens per second', 'MFU = ', 'gradient norm', 'learning rate', 'model.mlp', 'swiglu', 'optimizer.weight_decay',
    '--config=configs/base.py', 'my run'])
def test_both_files_have(written, text):
  page, _, markdown = written
  assert text in ' '.join(page.texts['body']) and text in markdown


def test_changed_keys_stand_out(written):
  _, text, markdown = written
  assert '<tr class=strong><td>model.layers</td><td>6</td></tr>' in text and '| **model.layers** | **6** |' in markdown
  assert '<tr><td>model.width</td><td>256</td></tr>' in text and '| model.width | 256 |' in markdown
  assert '| model.mlp | swiglu | gelu |' in markdown


def test_curves_are_drawn(written):
  page, text, _ = written
  assert page.tags.count('svg') == 4
  assert {'train', 'validation', 'validation turned: step 600'} <= set(page.texts['svg'])
  assert 'var(--c1)' in text and '#030303' not in text  # colours follow the theme
  longest = max(re.findall(r'<path d="([^"]*)"', text), key=len)
  assert longest.count('L') > 60                        # not cut at the NaN of step 500


def test_no_warning_while_validation_falls(tmp_path):
  html_path, md_path = report.write(run(tmp_path / 'run', turns=False), CONFIG, FIGURES, ENVIRONMENT)
  assert 'Overfitting' not in html_path.read_text('utf-8') + md_path.read_text('utf-8')
  assert 'Not estimated.' in md_path.read_text('utf-8')


def test_a_run_with_nothing_logged(tmp_path):
  html_path, md_path = report.write(tmp_path, config_lib.Config(), {'validation loss': math.nan}, {})
  assert 'Nothing was logged.' in md_path.read_text('utf-8') and Parsed(html_path.read_text('utf-8')).texts['h1']
  report.write(tmp_path, config_lib.Config(), {'validation loss': math.inf}, {})
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss/train": 0.0}\n{"step": 2, "loss/train": null}\n')
  report.write(tmp_path, config_lib.Config(), {}, {})


def test_long_runs_stay_small(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(''.join(
      json.dumps({'step': i, 'loss/train': 3 + i % 7}) + '\n' for i in range(1, 20_001)))
  html_path, _ = report.write(tmp_path, config_lib.Config(), {}, {})
  assert html_path.stat().st_size < 100_000


def test_environment():
  found = report.environment()
  assert found['devices'].startswith('8 x cpu') and re.match(r'\d+\.\d+', found['jax'])
  assert 'python' in found['command']
  root = pathlib.Path(report.__file__).parents[2]
  git = shutil.which('git') and subprocess.run(['git', '-C', root, 'rev-parse', 'HEAD'], capture_output=True, text=True)
  if git and git.returncode == 0:
    assert found['commit'].rstrip('+') == git.stdout.strip()
  else:
    assert found['commit'] == 'none'


def test_compression_is_that_of_each_file_alone():
  texts = [path.read_bytes() for path in sorted(pathlib.Path(json.__file__).parent.glob('*.py'))] + [b'', b'x']
  found, size = report.compression_bits_per_byte(texts), sum(map(len, texts))
  assert found['gzip -9'] == 8 * sum(len(gzip.compress(t, 9)) for t in texts) / size
  assert found['xz -9'] == 8 * sum(len(lzma.compress(t, preset=9)) for t in texts) / size
  assert found['xz -9'] > 8 * len(lzma.compress(b''.join(texts), preset=9)) / size
  assert math.isnan(report.compression_bits_per_byte([])['xz -9'])


@settings(deadline=None, max_examples=5)
@given(st.lists(st.binary(max_size=9000), min_size=1, max_size=2))
def test_xz_with_a_small_dictionary_has_the_size_of_preset_9(texts):
  size = sum(map(len, texts))
  expected = sum(len(lzma.compress(t, preset=9)) for t in texts)
  assert size == 0 or report.compression_bits_per_byte(texts)['xz -9'] == 8 * expected / size


def test_parses(recwarn):
  deep = ['(' * 100_000 + ')' * 100_000, '-' * 50_000 + '1', 'a' + '.b' * 50_000]
  samples = ['def f(x):\n  return x\n', 'x = "\\d"', 'def f(:', 'a\0b', '\ud800', '', *deep]
  accepted, total = report.parses(samples)
  assert total == 9 and 3 <= accepted <= 6              # how deep is too deep depends on the Python
  assert report.parses(samples[:5]) == (2, 5) and not recwarn.list
