"""What to change in a config for a machine: a quick estimate ranks every mesh, remat and accumulation, and batches
around the config's own; plan.py then compiles the best of them, for only the compiler knows what fits."""
import dataclasses
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import pipeline
from llm_jax.planner import program as program_lib
from llm_jax.planner.program import Machine, Program
from llm_jax.train import metrics
from llm_jax.train import step as step_lib

OVERLAPPED = ('fsdp', 'data')          # what these axes send hides behind computing; the others are waited for
EFFICIENCY = 0.7                       # of the peak that matrix products reach, to weigh them against the rest


@dataclasses.dataclass(frozen=True)
class Estimate:
  cfg: config_lib.Config
  bytes: float                 # of one device
  seconds: float               # of a step
  binding: str

  @property
  def tokens_per_second(self) -> float:
    return self.cfg.train.batch_size * self.cfg.data.length / self.seconds


def candidates(cfg: config_lib.Config, machine: Machine) -> Iterator[config_lib.Config]:
  """Every config that the machine could run: other meshes of data, fsdp, tensor and expert (context and stage stay),
  remat (offload on TPUs), accumulation, and batches of a quarter to four times the config's."""
  left = len(machine.devices) // (cfg.mesh.context * cfg.mesh.stage)
  remats = ('none', 'dots', 'full') + (('offload',) if machine.topology.platform == 'tpu' else ())
  for tensor in (1, 2, 4, 8, 16):
    for expert in (1, 2, 4, 8, 16, 32, 64) if cfg.model.experts else (1,):
      if left % (tensor * expert):
        continue
      rest = left // (tensor * expert)
      for data in (d for d in range(1, rest + 1) if rest % d == 0 and d.bit_count() == 1):
        mesh = dataclasses.replace(cfg.mesh, data=data, fsdp=rest // data, tensor=tensor, expert=expert)
        for remat in remats:
          for accumulate in sorted({1, 2, 4, 8, 16, max(cfg.train.accumulate, 1)}):
            for batch in (cfg.train.batch_size // 4, cfg.train.batch_size // 2, cfg.train.batch_size,
                          2 * cfg.train.batch_size, 4 * cfg.train.batch_size):
              if batch == 0:
                continue
              yield dataclasses.replace(
                  cfg, mesh=mesh, model=dataclasses.replace(cfg.model, remat=remat),
                  train=dataclasses.replace(cfg.train, accumulate=accumulate, batch_size=batch))


def estimate(cfg: config_lib.Config, machine: Machine, slack: float = 1.0) -> Estimate:
  """cfg: with its remat chosen (Program.cfg). slack: temporaries, in times of the estimate (what the compiler needed
  for a neighbour, over its estimate). Raises ConfigError for what cannot run."""
  sizes = {axis: getattr(cfg.mesh, axis) for axis in sharding.AXES}
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  if machine.slices > 1:
    sharding.across_slices(sizes, machine.slices)
  step_lib.check_rows(cfg, mesh)
  model = program_lib.model_of(cfg, machine.topology.platform)
  state, parameters, layers = _state_bytes(cfg.model, cfg.optimizer, cfg.train.ema, model, tuple(sizes.items()))
  microbatches = max(cfg.train.accumulate, 1)
  width = 4 if model.dtype == 'float32' else 2
  tokens = cfg.train.batch_size * cfg.data.length / (
      sharding.axis_size(mesh, sharding.ACT['B']) * sizes['context']) / microbatches       # of a device and microbatch
  kept, temporaries = _activation_bytes(cfg, model, sizes, tokens, width)
  alive = microbatches if sizes['stage'] > 1 else 1
  gradients = parameters * (2 if microbatches > 1 and sizes['stage'] == 1 else 1)
  gathered = 3 * layers * sizes['fsdp'] / width * 2 if sizes['fsdp'] > 1 else 0
  total = state + gradients + slack * (kept * alive + temporaries + gathered)
  seconds, binding = _seconds(cfg, model, machine, sizes, microbatches, tokens, parameters, width)
  return Estimate(cfg, total, seconds, binding)


_cache = {}


def _state_bytes(model_cfg, optimizer, ema, model, sizes):
  """(state, parameters, the parameters of one layer): bytes of a device."""
  key = dataclasses.replace(model_cfg, remat='none'), optimizer, ema, sizes
  if key not in _cache:
    cfg = config_lib.Config(model=model_cfg, optimizer=optimizer, train=config_lib.Train(ema=ema))
    mesh = AbstractMesh(tuple(n for _, n in sizes), tuple(name for name, _ in sizes))
    state, _, _ = step_lib.abstract_state(cfg, model, mesh)
    blocks = [w for name, w in state['params'].items() if name.startswith(sharding.STACKED)]
    _cache[key] = (program_lib.shard_bytes(state), program_lib.shard_bytes(state['params']),
                   program_lib.shard_bytes(blocks) / (model.layers / dict(sizes)['stage']))
  return _cache[key]


def _activation_bytes(cfg, model, sizes, tokens, width):
  """(kept for the backward pass by all layers of a device, temporary at once): bytes for one microbatch."""
  tensor = sizes['tensor']
  mlp = model.expert_dim * model.experts_per_token if model.experts else model.mlp_dim
  heads = (model.heads + 2 * model.kv_heads) * model.head_dim
  products = (heads + model.heads * model.head_dim) / tensor + 2 * model.width + mlp * 2 / tensor
  again = (mlp if model.mlp in ('geglu', 'swiglu') else 0) + (heads if model.qk_norm != 'none' else 0)
  working = products + 6 * model.width + 3 * mlp / tensor + heads / tensor
  kept = {'none': products + 2 * model.width + again / tensor, 'dots': model.width + products, 'full': model.width,
          'offload': 0}[cfg.model.remat]
  entries = min(cfg.train.loss_chunk or model.vocab_size, model.vocab_size)
  logits = 3 * tokens * entries / tensor * 4
  table = (model.vocab_size + entries) * model.width / tensor * width
  return kept * tokens * width * model.layers / sizes['stage'], tokens * working * width * 1.5 + logits + table


def _seconds(cfg, model, machine, sizes, microbatches, tokens, parameters, width):
  chip, devices = machine.chip, len(machine.devices)
  flops = metrics.flops_per_token(model, cfg.data.length)['causal']
  again = {'none': 1.0, 'dots': 1.02, 'full': 4 / 3, 'offload': 4 / 3}[cfg.model.remat]
  compute = cfg.train.batch_size * cfg.data.length * flops * again / devices / chip.flops / EFFICIENCY
  if sizes['stage'] > 1:
    compute /= 1 - pipeline.bubble(sizes['stage'], cfg.mesh.interleave, microbatches)
  passes = 3 if cfg.model.remat in ('full', 'offload') else 2
  whole = parameters / 4 * width * sizes['fsdp']                 # a device's parameters once gathered, compute dtype
  sent = dict(
      fsdp=microbatches * (passes + 2) * whole * (sizes['fsdp'] - 1) / sizes['fsdp'],
      data=2 * parameters * microbatches * (sizes['data'] - 1) / sizes['data'],
      tensor=microbatches * 2 * passes * 2 * tokens * model.width * width * model.layers / sizes['stage']
      * (sizes['tensor'] - 1) / sizes['tensor'],
      expert=microbatches * 2 * passes * tokens * model.width * width * model.experts_per_token * model.layers
      / sizes['stage'] * (sizes['expert'] - 1) / sizes['expert'])
  times = {'matrix products': compute}
  times |= {axis: amount / speed for axis, amount in sent.items() if amount and (speed := _speed(machine, sizes, axis))}
  if cfg.model.remat == 'offload':
    moved = 2 * microbatches * tokens * model.width * width * model.layers / sizes['stage']
    times['host memory'] = moved / program_lib.HOST
  waiting = sum(t for axis, t in times.items() if axis not in (*OVERLAPPED, 'matrix products', 'host memory'))
  hidden = max((times.get(name, 0.0) for name in (*OVERLAPPED, 'host memory')), default=0.0)
  seconds = max(compute + waiting, hidden)
  return seconds, max(times, key=times.get)


def _speed(machine, sizes, axis):
  key = machine.topology, machine.slices, tuple(sizes.items()), axis
  if key not in _cache:
    mesh = sharding.make_mesh(config_lib.Mesh(**sizes), machine.devices)
    _cache[key] = program_lib.span(machine, mesh, (axis,))[0]
  return _cache[key]


def rank(cfg: config_lib.Config, machine: Machine, limit: float, slack: float = 1.0,
         nearest: bool = False) -> list[Estimate]:
  """Candidates that should fit in `limit` bytes: the fastest per token first (near ties: the config's own batch, then
  the one that changes least), or with `nearest` those that change least first. cfg: with every size of its mesh given;
  slack: as for `estimate`."""
  out = []
  for candidate in candidates(cfg, machine):
    try:
      guess = estimate(candidate, machine, slack)
    except ConfigError:
      continue
    if guess.bytes <= limit and candidate != cfg:
      out.append(guess)
  changes = lambda e: len(config_lib.diff(e.cfg, cfg))
  batch = lambda e: e.cfg.train.batch_size != cfg.train.batch_size
  speed = lambda e: -round(math.log(e.tokens_per_second) / 0.03)
  return sorted(out, key=lambda e: (batch(e), changes(e), speed(e)) if nearest else (
      speed(e), batch(e), changes(e), e.bytes))


def resolved(cfg: config_lib.Config, machine: Machine) -> config_lib.Config:
  """The config with its mesh as it lies on the machine, and accumulation as it would be."""
  mesh = sharding.make_mesh(cfg.mesh, machine.devices)
  microbatches = step_lib.microbatches(cfg, sharding.axis_size(mesh, sharding.ACT['B']), machine.topology.platform)
  return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh.shape),
                             train=dataclasses.replace(cfg.train, accumulate=microbatches))


def slack_of(found: Program) -> float:
  """What the compiler needed for a program's temporaries and activations, in times of their estimate."""
  guess = estimate(resolved(found.cfg, found.machine), found.machine)
  fixed = found.memory['parameters'] + found.memory['moments'] + found.memory['gradients']
  return max((found.bytes - fixed) / max(guess.bytes - fixed, 1.0), 0.5)


def reason(before: Program, after: Program) -> str:
  """Why the second is better, in a line."""
  (old, old_binding), (new, new_binding) = before.step(), after.step()
  gain = (after.tokens / new) / (before.tokens / old)
  return f'{gain:.2f}x the tokens/s, bound by {new_binding}' + (
      '' if new_binding == old_binding else f' instead of {old_binding}')
