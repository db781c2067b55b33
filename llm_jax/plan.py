"""Does a config fit a machine that is not here, how fast could it be, and what should be changed?

  python -m llm_jax.plan --config=configs/llama3_8b.py --topology=v5e:16x16 [--config.group.key=value ...]

Compiles the training step for the topology (extra `plan` for TPUs; nothing runs on a device) and prints bytes per
device by category, FLOPs, what is sent along which axis, a roofline, and the best other mesh, remat, accumulation or
batch that the compiler confirms.

--topology=NAME   v5e:16x16 (or v5e-256), v5p-128, h100:64, cpu:8, ...; an unknown one lists those that are known
--slices=N        slices of that TPU topology (default 1)
--tries=N         other configs to compile at most (default 2; 0: only the given one)
--full            compile with the effort of training (on TPUs three to seven times as long)
--debug           full tracebacks
"""
import os
import sys

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

GIB = 2**30


def parse(argv: list[str]):
  """(Config, flags). Raises ConfigError."""
  cfg, flags = config_lib.from_flags(argv, dict(topology=None, slices='1', tries='2', full=False, debug=False))
  for name in ('slices', 'tries'):
    if not flags[name].isdecimal() or name == 'slices' and flags[name] == '0':
      raise ConfigError(f'--{name}: expected a number, got {flags[name]!r}')
  if not flags['topology']:
    raise ConfigError('--topology: expected a machine, such as v5e:16x16, v5p-128, h100:64 or cpu:8')
  return cfg, flags


def main(argv: list[str]) -> int:
  """Exit status 0: the config fits; 1: it does not; 2: it cannot be compiled."""
  if '--help' in argv or '-h' in argv:
    print(__doc__)
    return 0
  with config_lib.one_line_errors('--debug' in argv):
    cfg, flags = parse(argv)
    from llm_jax import hardware
    topology = hardware.topology(flags['topology'])
    if topology.platform == 'tpu':
      os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    from llm_jax.planner import program, search
    machine = program.machine(topology, int(flags['slices']))
    print(f'compiling for {_describe(machine)} ...', flush=True)
    found, need = None, 0.0
    try:
      found = program.compile_step(cfg, machine, flags['full'])
      need = found.bytes
      print(report(found), flush=True)
    except program.OutOfMemory as e:           # of a TPU's compiler, which then says nothing more
      need = e.bytes
    chosen = found.model.remat if found else 'full' if cfg.model.remat == 'auto' else cfg.model.remat
    own = search.resolved(program.with_remat(cfg, chosen), machine)
    better = improve(own, machine, found, int(flags['tries']), flags['full'], search, program)
    if found and found.fits:
      return 0
    nearest = f'; nearest that fits: {_changes(own, better.cfg)}' if better else ''
    print(f'error: out of memory: {topology.name} has {machine.chip.memory / GIB:.2f} GiB per device, this config '
          f'needs {need / GIB:.2f} GiB{nearest}', file=sys.stderr)
    return 1


def improve(cfg, machine, found, tries: int, full: bool, search, program):
  """Compiles the best candidates, `tries` at most, and prints the first that the compiler confirms; returns it, or
  None. cfg: resolved; found: its Program, None where it does not even compile. Where the config fits, what is faster is
  better; where it does not, what fits and changes least."""
  if not tries:
    return None
  fits = found is not None and found.fits
  slack = search.slack_of(found) if found else 1.0
  ranked = search.rank(cfg, machine, 0.95 * (machine.chip.memory or float('inf')), slack, nearest=not fits)
  print('\nwhat to change')
  speed = lambda p: p.tokens / p.step()[0]
  for guess in ranked[:tries]:
    changes = _changes(cfg, guess.cfg)
    try:
      other = program.compile_step(guess.cfg, machine, full)
    except ConfigError as e:
      print(f'  no: {changes}: {e}', flush=True)
      continue
    if not other.fits:
      print(f'  no: {changes}: needs {other.bytes / GIB:.2f} GiB', flush=True)
    elif fits and speed(other) <= 1.02 * speed(found):
      print(f'  no: {changes}: {speed(other) / speed(found):.2f}x the tokens/s once compiled', flush=True)
    else:
      why = search.reason(found, other) if fits else f'it fits, in {other.bytes / GIB:.2f} GiB'
      print(f'  {changes}\n  because: {why}; predicted MFU {other.mfu():.1%} (compiled in {other.seconds:.0f} s)',
            flush=True)
      return other
  left = len(ranked) - tries
  print('  nothing: ' + (f'the {tries} most promising of {len(ranked)} configs were tried; --tries=N tries more'
                         if left > 0 else 'no other mesh, remat, accumulation or batch is promising' if fits else
                         'no mesh, remat, accumulation or batch should fit; take more devices'))
  return None


def report(p) -> str:
  """The printed page of a Program."""
  seconds, binding = p.step()
  devices, chip = len(p.machine.devices), p.machine.chip
  mesh = ' x '.join(f'{n} {axis}' for axis, n in p.mesh.items() if n > 1) or 'one device'
  verdict = 'fits' if p.fits else 'DOES NOT FIT'
  limit = f'of {chip.memory / GIB:.2f} GiB: {verdict}' if chip.memory else '(no limit known)'
  lines = [
      f'machine    {_describe(p.machine)}',
      f'mesh       {mesh}; {p.microbatches} microbatch(es) of {p.cfg.train.batch_size // p.microbatches} x '
      f'{p.cfg.data.length} tokens; attention {p.kernel}, {p.model.dtype}, remat {p.model.remat}',
      f'model      {p.parameters:,} parameters, {p.model_flops * p.tokens:.3e} FLOPs per step by the MFU convention',
      f'compiled   in {p.seconds:.0f} s' + (' with little effort: --full tells the memory exactly' if p.quick
                                            else ''), '',
      f'memory     {p.bytes / GIB:.2f} GiB per device {limit}']
  lines += [f'  {name:<14}{size / GIB:8.3f} GiB' for name, size in p.memory.items()]
  lines += [f'  (host memory {p.host / GIB:8.3f} GiB)'] if p.host else []
  lines += ['', f'work       {p.flops:.3e} FLOPs per device and step, {p.cost.bytes / 1e9:.1f} GB of memory traffic'
            + (f' ({p.cost.unknown_loops} loops of unknown length counted once)' if p.cost.unknown_loops else '')]
  lines += [f'  {c.kind:<18} along {"+".join(c.axes):<14}{c.bytes / 1e9:9.3f} GB sent, {c.count:.0f} times'
            for c in p.cost.collectives if c.bytes >= 1e5]
  lines += ['', f'roofline   {seconds:.4f} s per step at least, bound by {binding}']
  lines += [f'  {name:<34}{t:9.4f} s' for name, t in sorted(p.times().items(), key=lambda kv: -kv[1])]
  lines += [f'predicted  at most {p.tokens / seconds / devices:,.0f} tokens/s per device, MFU {p.mfu():.1%}']
  if any(c.axes == ('?',) for c in p.cost.collectives):
    lines += ['note       what is sent along ? (groups of devices that are no product of axes) is not in the roofline']
  if p.machine.stand_in:
    lines += ['note       compiled for as many CPU devices: mesh, FLOPs and what is sent are those of the GPUs; '
              'temporaries are an upper estimate (no flash attention, bfloat16 partly as float32)']
  return '\n'.join(lines)


def _describe(machine):
  slices = f'{machine.slices} slices of ' if machine.slices > 1 else ''
  return f'{slices}{machine.topology.name}: {len(machine.devices)} devices'


def _changes(old, new) -> str:
  return ' '.join(f'--config.{key}={after}' for key, (_, after) in config_lib.diff(old, new).items())


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
