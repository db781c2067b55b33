"""The report of a run: report.html and report.md in its directory, the same content, each one file without outside
requests. It comes from the arguments and from metrics.jsonl, samples.jsonl, events.jsonl and time.json.

Model output is untrusted text: it is escaped, and a Content-Security-Policy forbids the page scripts and requests.
"""
import ast
import gzip
import html
import importlib.metadata
import io
import json
import lzma
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import paths
from llm_jax.train import clock, explain, metrics

PLOTS = (('optimizer/learning_rate', 'learning rate'), ('grads/norm', 'gradient norm'),
         ('perf/tokens_per_second', 'tokens per second'))
EVENTS = 100          # shown
POINTS = 400          # of a curve; where there are more rows, each point is the mean of its neighbours


def compression_bits_per_byte(texts: Iterable[bytes]) -> dict[str, float]:
  """{'gzip -9', 'xz -9'}: 8 x compressed bytes / bytes, each text compressed alone; nan where there are no bytes."""
  size, zipped, xz = 0, 0, 0
  for text in texts:
    # xz -9 with its dictionary cut to the text: the same size, without clearing 64 MiB per text (10x faster)
    dictionary = max(4096, min(1 << 26, 1 << len(text).bit_length()))
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=dictionary)]
    size += len(text)
    zipped += len(gzip.compress(text, compresslevel=9))
    xz += len(lzma.compress(text, filters=filters))
  return {'gzip -9': 8 * zipped / size if size else math.nan, 'xz -9': 8 * xz / size if size else math.nan}


def parses(samples: Iterable[str]) -> tuple[int, int]:
  """(how many samples ast.parse accepts, how many there are)."""
  accepted = total = 0
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')      # SyntaxWarning of invalid escapes in generated code
    for sample in samples:
      total += 1
      try:
        ast.parse(sample)
        accepted += 1
      except (SyntaxError, ValueError, RecursionError, MemoryError):   # ValueError: NUL; the last two: deep nesting
        pass
  return accepted, total


def environment() -> dict[str, str]:
  """Versions, devices, cores, commit and command line of this process."""
  devices = jax.devices()
  out = {'date': time.strftime('%Y-%m-%d %H:%M %Z'), 'command': shlex.join(sys.orig_argv), 'commit': _commit(),
         'devices': f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})',
         'processes': str(jax.process_count()), 'CPU cores': str(os.cpu_count()), 'system': platform.platform(),
         'python': platform.python_version()}
  for name in ('llm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'):
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = 'not installed'
  return out


def _commit():
  """The commit of the clone this package runs from, '+' where files changed since; 'none' outside a clone."""
  root = pathlib.Path(__file__).resolve().parents[2]
  git = lambda *a: subprocess.run(['git', '-C', str(root), *a], capture_output=True, text=True, timeout=10, check=True)
  try:
    if pathlib.Path(git('rev-parse', '--show-toplevel').stdout.strip()).resolve() != root:
      return 'none'                      # installed somewhere inside another project's repository
    changed = git('status', '--porcelain', '--untracked-files=no').stdout.strip()
    return git('rev-parse', 'HEAD').stdout.strip() + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return 'none'


def write(workdir, config: config_lib.Config, figures: dict, environment: dict[str, str], energy: dict | None = None,
          default: config_lib.Config | None = None) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes report.html and report.md into workdir; returns their paths.

  figures: label -> float, int, str or (k, n), in the order shown. 'bits per byte' is drawn beside 'gzip -9' and 'xz -9'
  where given; perplexity is derived from 'validation loss'. energy: of metrics.Energy.summary. default: what the
  config's keys are compared with, config.Config() where None.
  """
  workdir = pathlib.Path(workdir)
  rows = paths.read_jsonl(workdir / 'metrics.jsonl')
  curves = {key: _series(rows, key) for key in ('loss/train', 'loss/valid', *(key for key, _ in PLOTS))}
  spent = clock.read(workdir)
  if 'validation loss' in figures:
    loss = figures['validation loss']
    figures = {'validation loss': loss, 'perplexity': math.exp(loss) if loss < 700 else math.inf, **figures}
  page = _Page(f'{workdir.resolve().name}: training report')
  page.tiles(_tiles(figures, spent, energy))
  turned = metrics.turning_point(list(zip(*curves['loss/valid'])))
  if turned is not None:
    page.warning(f'Overfitting: validation loss was lowest at step {turned} '
                 f'({dict(zip(*curves["loss/valid"]))[turned]:.4f}) and rose after it.')
  page.heading('Final figures')
  unit = lambda label: ' (bits per byte)' if label in ('gzip -9', 'xz -9') else ''
  page.table(('figure', 'value'), [(label + unit(label), _format(value)) for label, value in figures.items()])
  compared = {name: figures[key] for name, key in (('this model', 'bits per byte'), ('gzip -9', 'gzip -9'),
                                                   ('xz -9', 'xz -9')) if key in figures}
  if len(compared) > 1:
    page.paragraph('Bits per byte of the held-out text, less is better; gzip and xz compress each file alone.')
    page.bars(('', 'bits per byte'), [(name, value, _format(value)) for name, value in compared.items()])
  page.heading('Curves')
  _curves(page, curves, turned)
  page.heading('Time')
  _time(page, spent)
  speed, mfu = curves['perf/tokens_per_second'][1], _series(rows, 'perf/mfu')[1]
  if speed and mfu:
    page.paragraph(f'Median {np.median(speed):,.0f} tokens per second, MFU {np.median(mfu):.1%}. '
                   f'{metrics.MFU_CONVENTION}.')
  if (explained := explain.load(workdir)) is not None:
    page.paragraph('A step of the profiled range, by what its operations do; the roofline is what their products need '
                   "at the device's peak, or their reads and writes at its memory's bandwidth where that is known.")
    page.table(('part of a step', 'time', 'share', 'at the roofline'), explain.rows(explained))
  _events(page, paths.read_jsonl(workdir / 'events.jsonl'))
  page.heading('Energy')
  if energy:
    page.paragraph(f'About {energy["kwh"]:.4g} kWh and {energy["co2e_kg"]:.4g} kg CO2e, at {energy["watts"]:.4g} W: '
                   f'{energy["assumptions"]}.')
  else:
    page.paragraph('Not estimated.')
  page.heading('Samples')
  _samples(page, paths.read_jsonl(workdir / 'samples.jsonl'))
  page.heading('Config')
  _config(page, config, default or config_lib.Config())
  page.heading('Environment')
  page.table(('', ''), list(environment.items()))
  written = workdir / 'report.html', workdir / 'report.md'
  for path, text in zip(written, (page.as_html(), page.as_markdown())):
    path.write_text(text, encoding='utf-8', errors='backslashreplace')
  return written


def _series(rows, key):
  """(steps, values) of the finite values; a step logged twice counts once, the later one."""
  points = {r['step']: r[key] for r in rows if isinstance(r.get(key), (int, float))}
  return sorted(points), [points[step] for step in sorted(points)]


def _time(page, spent):
  """Where the wall time went. Goodput: the share of it in steps that count."""
  parts, total = spent['parts'], max(sum(spent['parts'].values()), 1e-9)
  page.bars(('part', 'time'), [(words, parts[k], f'{metrics.duration(parts[k])} ({parts[k] / total:.1%})')
                               for k, words in clock.PARTS.items()])
  text = f'Goodput {clock.goodput(parts):.1%}: productive steps in {metrics.duration(total)} of wall time'
  if spent['restarts']:
    text += (f', {spent["restarts"]} restart(s) included; what they lost is steps done again and the way back to the '
             f'first new step. Besides, no process ran for {metrics.duration(spent["down"])}')
  page.paragraph(text + '.')


def _events(page, rows):
  if rows:
    page.heading('Events')
    page.table(('step', 'time', 'what'), [
        (str(r['step']), time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(r['time'])), f'{r["kind"]}: {r["text"]}')
        for r in rows[:EVENTS]])
    if len(rows) > EVENTS:
      page.paragraph(f'{len(rows) - EVENTS} more in events.jsonl.')


def _tiles(figures, spent, energy):
  tiles = [(_format(figures[k]), k) for k in ('bits per byte', 'validation loss', 'perplexity') if k in figures]
  if any(spent['parts'].values()):
    tiles.append((metrics.duration(sum(spent['parts'].values())), 'wall time'))
    tiles.append((f'{clock.goodput(spent["parts"]):.0%}', 'of it productive steps'))
  if energy:
    kwh, kg = energy['kwh'], energy['co2e_kg']
    tiles.append((f'{kwh:.3g} kWh' if kwh >= 0.1 else f'{1000 * kwh:.2g} Wh',
                  f'about {kg:.3g} kg CO2e' if kg >= 0.1 else f'about {1000 * kg:.2g} g CO2e'))
  return tiles


def _format(value):
  if isinstance(value, (tuple, list)):
    return f'{value[0]} of {value[1]}'
  if isinstance(value, float):
    return f'{value:.4f}' if 0.01 <= abs(value) < 10 else f'{value:,.6g}'
  return f'{value:,}' if type(value) is int else str(value)


def _curves(page, curves, turned):
  losses = [(label, *curves[key]) for key, label in (('loss/train', 'train'), ('loss/valid', 'validation'))]
  page.plot('loss (log scale)', losses, turned, wide=True)
  for key, title in PLOTS:
    page.plot(title, [(title, *curves[key])])
  steps = curves['loss/valid'][0] or curves['loss/train'][0]
  if not steps:
    page.paragraph('Nothing was logged.')
    return
  steps = [steps[i] for i in sorted(set(np.linspace(0, len(steps) - 1, 12).astype(int)))]
  names = ('step', 'train loss', 'validation loss', *(title for _, title in PLOTS))
  page.table(names, [(str(s), *(_at(series, s) for series in curves.values())) for s in steps], folded='As a table')


def _at(series, step):
  """The last value at or before a step: rows of training and of validation need not share steps."""
  i = np.searchsorted(series[0], step, side='right') - 1
  return f'{series[1][i]:.4g}' if i >= 0 else ''


def _samples(page, rows):
  if not rows:
    page.paragraph('None were drawn.')
    return
  samples = list(dict.fromkeys((r['step'], r['title'], r['text']) for r in rows))   # a finished run, run again: once
  last = max(step for step, _, _ in samples)
  earlier = sorted({step for step, _, _ in samples} - {last})
  shown = {earlier[i] for i in np.linspace(0, len(earlier) - 1, 5).astype(int)} if earlier else ()
  for step, title, text in sorted(samples, key=lambda s: s[0] != last):
    if step == last or step in shown:
      page.sample(f'step {step}: {title}', text, folded=step != last)


def _config(page, config, default):
  changed = config_lib.diff(default, config)
  if changed:
    page.paragraph('Keys that differ from the defaults:')
    page.table(('key', 'value', 'default'), [(k, _plain(new), _plain(old)) for k, (old, new) in changed.items()])
  rows = []
  for group, values in config_lib.to_dict(config).items():
    leaves = {f'{group}.{k}': v for k, v in values.items()} if isinstance(values, dict) else {group: values}
    rows += [(key, _plain(value)) for key, value in leaves.items()]
  page.table(('key', 'value'), rows, strong=set(changed), folded='All keys')


def _plain(value):
  return value if isinstance(value, str) and value else json.dumps(value)


STYLE = '''
:root { color-scheme: light dark; --back: #f7f7f5; --card: #ffffff; --text: #1d2129; --soft: #667080; --line: #e2e4e8;
  --c1: #2f6fdb; --c2: #d9620f; --warn: #fff3d6; --bar: #c9daf8; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1c2027; --text: #e4e7ec; --soft: #98a2b1;
  --line: #313742; --c1: #78a9ff; --c2: #ff9d57; --warn: #463609; --bar: #2b4676; } }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, sans-serif; background: var(--back); color: var(--text); max-width: 1000px;
  margin: 0 auto; padding: 28px 18px 60px }
h1 { font-size: 25px; margin: 0 0 18px; overflow-wrap: anywhere } h2 { font-size: 18px; margin: 36px 0 10px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px }
.tile, .card, .warning, pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px }
.tile b { display: block; font-size: 23px; font-variant-numeric: tabular-nums } .tile span, p { color: var(--soft) }
.warning { background: var(--warn); margin-top: 14px; font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin-bottom: 12px }
.card.wide { grid-column: 1 / -1 } .card svg { display: block; width: 100%; height: auto }
.card h3 { margin: 0; font-size: 14px }
@media (max-width: 700px) { .plots { grid-template-columns: 1fr } }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); margin: 8px 0 }
td, th { text-align: left; padding: 5px 12px; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere } td:first-child { white-space: nowrap }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap }
.strong td { font-weight: 700; color: var(--c1) } td.wide { width: 55% }
.bar { display: block; height: 14px; border-radius: 4px; background: var(--bar) }
pre { margin: 4px 0 14px; overflow: auto; max-height: 480px; font: 13px/1.45 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--c1) } .caption { color: var(--soft); font-size: 13px }
'''
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class _Page:
  """Collects one content as HTML and as Markdown; every text is escaped here and nowhere else."""

  def __init__(self, title):
    self.title, self.html, self.md = title, [], [f'# {_md(title)}']

  def heading(self, text):
    self.html.append(f'<h2>{html.escape(text)}</h2>')
    self.md.append(f'## {text}')

  def paragraph(self, text):
    self.html.append(f'<p>{html.escape(text)}</p>')
    self.md.append(_md(text))

  def warning(self, text):
    self.html.append(f'<div class="warning">{html.escape(text)}</div>')
    self.md.append(f'> **{_md(text)}**')

  def tiles(self, tiles):
    cells = ''.join(f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for v, k in tiles)
    self.html.append(f'<div class="tiles">{cells}</div>')
    self.md.append(' · '.join(f'**{_md(v)}** {_md(k)}' for v, k in tiles))

  def table(self, header, rows, strong=(), folded=''):
    """Rows of texts; those whose first cell is in `strong` are emphasised. folded: summary of a closed <details>."""
    line = lambda cells, tag: ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
    body = ''.join(f'<tr{" class=strong" if r[0] in strong else ""}>{line(r, "td")}</tr>' for r in rows)
    head = f'<tr>{line(header, "th")}</tr>' if any(header) else ''
    self.html.append(_fold(f'<table>{head}{body}</table>', folded))
    bold = lambda row: [f'**{_md(c)}**' if row[0] in strong and c else _md(c) for c in row]
    self.md.append('\n'.join([_row(header), _row(['---'] * len(header)), *(_row(bold(r)) for r in rows)]))

  def bars(self, header, rows):
    """Rows of (label, value, text of the value), with a bar each."""
    top = max((value for _, value, _ in rows if math.isfinite(value)), default=0) or 1
    share = [max(0.0, value / top) if math.isfinite(value) else 0.0 for _, value, _ in rows]
    body = ''.join(f'<tr><td>{html.escape(label)}<td>{html.escape(text)}<td class="wide"><span class="bar" '
                   f'style="width:{100 * s:.1f}%"></span></tr>' for (label, _, text), s in zip(rows, share))
    self.html.append(f'<table><tr><th>{header[0]}<th>{header[1]}<th></tr>{body}</table>')
    lines = [_row([_md(label), _md(text), '█' * round(20 * s)]) for (label, _, text), s in zip(rows, share)]
    self.md.append('\n'.join([_row([*header, '']), _row(['---'] * 3), *lines]))

  def plot(self, title, series, mark=None, wide=False):
    """Curves [(label, steps, values)] in HTML; the Markdown has them as a table."""
    series = [s for s in series if s[1]]
    if not series:
      return
    if not self.html[-1].startswith('<div class="plots">'):
      self.html.append('<div class="plots"></div>')
    card = f'<div class="card{" wide" * wide}"><h3>{title}</h3>{_svg(title, series, mark, wide)}</div>'
    self.html[-1] = self.html[-1].removesuffix('</div>') + card + '</div>'

  def sample(self, caption, text, folded=False):
    text = metrics.without_controls(text)
    head = '' if folded else f'<div class="caption">{html.escape(caption)}</div>'
    self.html.append(_fold(f'{head}<pre>\n{html.escape(text)}</pre>', html.escape(caption) if folded else ''))
    fence = '`' * (1 + max([2, *(len(run) for run in re.findall('`+', text))]))
    self.md.append(f'{_md(caption)}\n\n{fence}text\n{text}\n{fence}')

  def as_html(self):
    title = html.escape(self.title)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
            f'<body><h1>{title}</h1>\n' + '\n'.join(self.html) + '\n</body></html>\n')

  def as_markdown(self):
    return '\n\n'.join(self.md) + '\n'


def _fold(body, summary):
  return f'<details><summary>{summary}</summary>{body}</details>' if summary else body


def _md(text):
  return re.sub(r'\s+', ' ', html.escape(text, quote=False)).replace('|', '\\|')


def _row(cells):
  return '| ' + ' | '.join(cells) + ' |'


COLOURS = {'#010101': 'var(--text)', '#020202': 'var(--line)', '#030303': 'var(--c1)', '#040404': 'var(--c2)'}


def _svg(title, series, mark, wide):
  """An <svg> drawn by matplotlib whose colours are the page's variables, so that it follows the light or dark theme."""
  import matplotlib
  from matplotlib.figure import Figure
  from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, StrMethodFormatter
  text, line, *colours = COLOURS
  style = {'svg.fonttype': 'none', 'svg.hashsalt': title, 'font.size': 8, 'text.color': text, 'axes.labelcolor': text,
           'xtick.color': text, 'ytick.color': text, 'axes.edgecolor': line, 'grid.color': line}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(9.6, 3.6) if wide else (3.4, 2.3), layout='constrained')
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(facecolor='none')
    for (label, steps, values), colour in zip(series, colours):
      n = -(-len(steps) // POINTS)
      mean = lambda x, n=n: [float(np.mean(x[i:i + n])) for i in range(0, len(x), n)]
      marker = 'o' if len(steps) <= 30 else ''
      axes.plot(mean(steps), mean(values), color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
    if wide and max(max(values) for _, _, values in series) > 0:
      axes.set_yscale('log')
      axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(8 if wide else 5, steps=[1, 2, 2.5, 5, 10]))
    large = max(max(values) for _, _, values in series) >= 1e4
    axes.yaxis.set_major_formatter(EngFormatter(sep='') if large else StrMethodFormatter('{x:g}'))
    if mark is not None:
      axes.axvline(mark, color=colours[1], linewidth=1, linestyle='--', label=f'validation turned: step {mark}')
    axes.grid(linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 4, integer=True))
    if wide:
      axes.set_xlabel('step')
      axes.legend(frameon=False)
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata={'Date': None})
  svg = out.getvalue()
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.DOTALL)
  box = re.search(r'viewBox="[^"]*"', svg)[0]
  svg = re.sub(r'<svg[^>]*>', f'<svg {box} role="img" aria-label="{html.escape(title)} by step">', svg, count=1)
  for colour, variable in COLOURS.items():
    svg = svg.replace(colour, variable)
  return re.sub(r"font: ([\d.]+px) [^;\"]*", r'font: \1 system-ui, sans-serif', svg)
