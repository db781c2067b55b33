"""Where the time of a training step goes: a profile's operations by part, each beside its roofline.

The profiler tells when each operation of the compiled program ran; the program's text tells what it is (the named scope
it was written in), how many FLOPs it does and what it reads and writes.
"""
import collections
import json
import pathlib
import re

import jax

from llm_jax import hardware, hlo
from llm_jax.train import metrics

PARTS = ('matmul', 'attention', 'norm/elementwise', 'loss', 'optimizer', 'communication', 'input', 'idle')
SCOPES = dict(optimizer='optimizer', loss='loss|logits', attention='attend')     # of jax.named_scope, by part
CONTAINERS = ('while', 'call', 'conditional', 'async-start', 'async-done')     # their operations are in the profile too
NAME = 'step_time.json'


def start(folder) -> None:
  """Traces devices and XLA, not Python: tracing Python crashes the process where another thread ends meanwhile, as
  those that write a checkpoint do."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(str(folder), profiler_options=options)


def parts_of(text: str, flops: float, bandwidth: float) -> dict[str, tuple[str, float]]:
  """{name of an operation: (part, seconds that a step needs for it at least)} of a compiled program's text. flops:
  FLOP/s of the device, twice as many in float8; bandwidth: bytes/s of its memory, 0: not known."""
  program, out = hlo.Program(text, {}), {}
  for computation, op, times in program.executed():
    cost = collections.Counter()
    if op.opcode not in CONTAINERS and not _communicates(op):
      cost = program.cost(computation, op, {}, False)
    computing = (cost['flops', ''] - cost['flops8', ''] / 2) / flops
    needs = max(computing, cost['bytes', ''] / bandwidth if bandwidth else 0.0)
    out[op.name] = _part(program, op, cost['flops', '']), times * needs
  return out


def _communicates(op: hlo.Op) -> bool:
  return op.opcode.removesuffix('-start').removesuffix('-done') in hlo.KINDS


def _part(program: hlo.Program, op: hlo.Op, flops: float) -> str:
  inside = [op] if op.opcode != 'fusion' else list(program.computations[op.attr('calls')].ops.values())
  if any(map(_communicates, inside)):
    return 'communication'
  scope = re.search(r'op_name="([^"]*)"', op.config)
  for part, names in SCOPES.items():
    if scope and re.search(rf'[/(]({names})[/)]', scope[1]):
      return part
  if re.search('fmha|splash', op.target + op.config):
    return 'attention'
  return 'matmul' if flops else 'norm/elementwise'


def read(folder, text: str, steps: int, seconds: float, input_seconds: float, flops: float,
         bandwidth: float) -> dict[str, tuple[float, float]]:
  """{part: (seconds, seconds at its roofline)} of one step, from the profile that jax.profiler.trace wrote under
  `folder` over so many steps.

  text: of the compiled step; seconds: wall time of a step; input_seconds: of it, waiting for data. Where operations ran
  beside each other, on one device or on several, their time is shared; idle is what no operation covers, and
  what other programs took, such as an evaluation. Raises ValueError where the profile holds none of the operations.
  """
  parts, module = parts_of(text, flops, bandwidth), re.match(r'HloModule ([\w.-]+)', text)
  files = sorted(pathlib.Path(folder).rglob('*.xplane.pb'))
  edges, seen = [], set()
  for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes if files else ():
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        name = stats.get('hlo_op', event.name if line.name == 'XLA Ops' else None)
        op = str(name).split(' = ')[0].lstrip('%')
        ours = not module or str(stats.get('hlo_module', module[1])).split('(')[0] == module[1]
        if ours and op in parts and event.duration_ns and not op.startswith(CONTAINERS):
          edges += [(event.start_ns, 1, parts[op][0]), (event.start_ns + event.duration_ns, -1, parts[op][0])]
          seen.add(op)
  if not edges:
    raise ValueError(f'{folder}: no operation of the step is in the profile; profile at least one whole step')
  busy, running, since = collections.Counter(), collections.Counter(), 0.0
  for at, change, part in sorted(edges):
    for which, n in running.items():
      busy[which] += (at - since) * n / running.total() / 1e9 / steps if n else 0.0
    running[part] += change
    since = at
  out = {part: (busy[part], sum(parts[op][1] for op in seen if parts[op][0] == part)) for part in PARTS}
  out['input'] = input_seconds, 0.0
  out['idle'] = max(0.0, seconds - sum(busy.values()) - input_seconds), 0.0
  return out


def keep(workdir, text: str, steps: int, seconds: float, waited: float) -> None:
  """Explains the profile in a run directory for its report. seconds, waited: of all the steps that were profiled, and
  of them for data."""
  workdir = pathlib.Path(workdir)
  try:
    explained = read(workdir / 'profile', text, steps, seconds / steps, waited / steps, *limits())
  except ValueError as e:
    print(f'    note  {e}', flush=True)
  else:
    (workdir / NAME).write_text(json.dumps(explained, indent=1))


def limits() -> tuple[float, float]:
  """(FLOP/s, bytes/s of memory; 0: not known) of this machine's device."""
  chip = hardware.known(jax.devices()[0].device_kind)
  return metrics.peak_flops().flops, chip.bandwidth if chip else 0.0


def load(workdir) -> dict[str, tuple[float, float]] | None:
  """What `keep` left; None where nothing was profiled."""
  path = pathlib.Path(workdir) / NAME
  return json.loads(path.read_text()) if path.exists() else None


def rows(explained: dict[str, tuple[float, float]]) -> list[tuple[str, str, str, str]]:
  """(part, milliseconds, share, milliseconds at the roofline) for a table."""
  total = max(sum(seconds for seconds, _ in explained.values()), 1e-12)
  return [(part, f'{1e3 * seconds:.2f} ms', f'{seconds / total:.1%}', f'{1e3 * least:.2f} ms' if least else '')
          for part, (seconds, least) in explained.items()]
