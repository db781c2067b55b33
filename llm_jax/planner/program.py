"""A config's training step, compiled for a machine that need not be here, and what the compiler says of it.

TPU programs are real ones: libtpu compiles for its topologies on any machine. A GPU's are stood in for by a CPU program
partitioned over as many virtual devices, unless the GPUs are here.
"""
import contextlib
import dataclasses
import math
import os
import re
import time

import jax
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import NamedSharding

from llm_jax import config as config_lib
from llm_jax import hardware, hlo, sharding
from llm_jax.config import ConfigError
from llm_jax.hardware import Topology
from llm_jax.models import attention, layers, transformer
from llm_jax.train import metrics
from llm_jax.train import remat as remat_lib
from llm_jax.train import step as step_lib

HOST = 15e9       # bytes/s between a TPU and its host's memory, roughly (jax-ml.github.io/scaling-book)
ROOM = 0.8        # of a chip's memory: what was compiled quickly and needs more is compiled again
TRAFFIC = 'memory bandwidth'


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices to compile for. stand_in: they are CPU devices in the place of GPUs."""
  topology: Topology
  devices: tuple
  slices: int
  chip: hardware.Chip
  stand_in: bool = False


class OutOfMemory(ConfigError):
  """A program that needs more memory than the chip has; `bytes`: what it needs."""

  def __init__(self, size: float):
    super().__init__(f'needs {size / 2**30:.2f} GiB')
    self.bytes = size


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step. Bytes and FLOPs are of one device and step."""
  cfg: config_lib.Config
  model: config_lib.Model              # derived
  machine: Machine
  mesh: dict[str, int]
  microbatches: int
  kernel: str
  parameters: int
  memory: dict[str, float]             # by category
  host: float                          # bytes kept in host memory
  cost: hlo.Cost
  flops: float                         # cost.flops, and those of attention kernels that do not tell theirs
  model_flops: float                   # per token, as in MFU
  spans: dict[tuple, tuple[float, str]]     # mesh axes of a collective -> (bytes/s of a device, network)
  seconds: float                       # to trace, lower and compile
  quick: bool                          # with little effort at the program's speed

  @property
  def bytes(self) -> float:
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    return not self.machine.chip.memory or self.bytes <= self.machine.chip.memory

  @property
  def tokens(self) -> int:
    return self.cfg.train.batch_size * self.cfg.data.length

  def times(self) -> dict[str, float]:
    """Seconds that each resource needs for a step, if it did nothing else and never waited. A stage of a pipeline
    computes in its idle ticks too, so they are among the products."""
    chip = self.machine.chip
    out = {'matrix products': self.flops / chip.flops}
    if chip.bandwidth:
      out[TRAFFIC] = self.cost.bytes / chip.bandwidth
    repeats = 1 if self.mesh['stage'] > 1 else self.microbatches       # a pipeline's microbatches share one pass
    if self.host:
      out['transfers to host memory'] = 2 * self.host * repeats / HOST
    for collective in self.cost.collectives:
      speed, network = self.spans.get(collective.axes, (0.0, ''))
      if speed:
        name = f'{network} along {"+".join(collective.axes)}'
        out[name] = out.get(name, 0.0) + collective.bytes / speed
    if self.machine.slices > 1:          # no collective of the program's text tells what passes there
      between = sharding.across_slices(self.mesh, self.machine.slices)
      share = lambda axis: (between[axis] - 1) / between[axis]
      width = 4 if self.model.dtype == 'float32' else 2
      gathered = self.memory['parameters'] / 4 * width * self.mesh['fsdp'] / between['fsdp']
      rows = self.tokens / math.prod(self.mesh[axis] for axis in sharding.ACT['B']) / self.mesh['context']
      sent = (2 * self.memory['gradients'] * share('data') * repeats           # each slice's gradients, to and fro
              + 4 * gathered * share('fsdp') * repeats                         # parameters, to and fro; their gradients
              + 2 * rows * self.model.width * width * (between['stage'] > 1))  # activations, and their gradients
      out['network between slices'] = sent / chip.slow
    return out

  def step(self) -> tuple[float, str]:
    """(seconds, what binds): the roofline (Williams et al. 2009), where all else hides behind the slowest resource."""
    times = self.times()
    binding = max(times, key=times.get)
    return times[binding], binding

  def mfu(self) -> float:
    seconds, _ = self.step()
    return metrics.mfu(self.tokens / seconds, self.model_flops, self.machine.chip.flops * len(self.machine.devices))


def machine(topology: Topology, slices: int = 1) -> Machine:
  """The devices of a topology. Must be called before JAX has started its backend. Raises ConfigError."""
  if topology.platform == 'tpu':
    return _tpu(topology, slices)
  if slices > 1:
    raise ConfigError(f'--slices: {topology.name} has none; leave it out')
  try:
    jax.config.update('jax_num_cpu_devices', topology.devices)
  except RuntimeError:
    pass                                                     # it runs already, as in tests
  if topology.platform == 'gpu' and jax.default_backend() == 'gpu' and jax.device_count() >= topology.devices and (
      hardware.known(jax.devices()[0].device_kind) == topology.chip):
    return Machine(topology, tuple(jax.devices()[:topology.devices]), 1, topology.chip)
  devices = jax.devices('cpu')
  if len(devices) < topology.devices:
    raise ConfigError(f'--topology: {topology.name} needs {topology.devices} virtual CPU devices, this process has '
                      f'{len(devices)}; call plan in a process of its own')
  devices = tuple(devices[:topology.devices])
  return Machine(topology, devices, 1, topology.chip or measured(devices), stand_in=topology.platform == 'gpu')


def _tpu(topology, slices):
  # Without these libtpu asks Google's metadata server, and waits.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')          # nothing runs: two plans do not disturb each other
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise ConfigError(f"--topology: {topology.name} is compiled by libtpu; pip install '.[plan]'") from e
  from jax.experimental import topologies
  extra = {'num_slices': slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **extra)
  except Exception as e:                                     # whatever libtpu raises
    raise ConfigError(f'--topology: libtpu refuses {topology.name}: {" ".join(str(e).split())[:200]}') from e
  return Machine(topology, tuple(found.devices), slices, topology.chip)


def measured(devices) -> hardware.Chip:
  """This CPU, each virtual device with its share: the best of a matrix product, and of a copy."""
  share = len(jax.devices('cpu'))
  a = np.ones(2**26, np.uint8)
  best = min(_copy_seconds(a) for _ in range(5))
  return hardware.Chip('CPU', metrics.peak_flops(devices[0]).flops, 0, bandwidth=2 * a.nbytes / best / share)


def _copy_seconds(a):
  start = time.perf_counter()
  a.copy()
  return time.perf_counter() - start


def compile_step(cfg: config_lib.Config, machine: Machine, full: bool = False) -> Program:
  """Compiles the step of a config: the program of the training loop. On TPUs with little effort at its speed at first,
  in a third of the time or less: FLOPs and what is sent are the same, temporaries differ by a few GiB, and memory
  traffic is an upper estimate. Where that comes near the chip's memory (ROOM), or traffic is what binds, it is compiled
  again as training would, as everything is with full=True. remat='auto' becomes what the loop would choose with all of
  the chip's memory. Raises ConfigError as the loop would, and OutOfMemory where a TPU's compiler finds no room."""
  if cfg.model.remat == 'auto':
    return remat_lib.lightest(
        lambda remat: compile_step(with_remat(cfg, remat), machine, full), 'auto', machine.chip.memory or math.inf,
        size_of=lambda program: program.bytes, no_room=lambda e: isinstance(e, OutOfMemory))[0]
  start = time.monotonic()
  platform = machine.topology.platform
  if machine.stand_in and cfg.model.remat == 'offload':
    raise ConfigError("config.model.remat: 'offload' is planned for TPUs only, for GPU plans are compiled on CPU "
                      "devices; set it to 'full'")
  mesh = sharding.make_mesh(cfg.mesh, machine.devices)
  step_lib.check_rows(cfg, mesh)
  model = model_of(cfg, platform)
  compiled_for = 'cpu' if machine.stand_in else platform
  kernel, _ = attention.choose(model, compiled_for, model.dtype, cfg.data.length, cfg.data.packing == 'pack',
                               mesh.shape['context'])
  microbatches = step_lib.microbatches(cfg, sharding.axis_size(mesh, sharding.ACT['B']), platform)
  state, shardings, tx = step_lib.abstract_state(cfg, model, mesh)
  step = step_lib.make_train_step(cfg, model, tx, kernel, microbatches)
  with jax.set_mesh(mesh):
    traced = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(state, abstract_batch(cfg, mesh))
    lowered = traced.lower()

  def read(compiled, quick) -> Program:
    text = compiled.as_text()
    attention.verify(kernel, text)
    cost, flops = hlo.count(text, dict(mesh.shape)), metrics.flops_per_token(model, cfg.data.length)
    in_kernels = _kernel_flops(cost, flops, cfg, model, len(machine.devices) // mesh.shape['stage'], microbatches)
    return Program(
        cfg, model, machine, dict(mesh.shape), microbatches, kernel, transformer.count(state['params']),
        categories(compiled, state, traced.jaxpr, model, mesh, cfg.mesh.interleave),
        float(compiled.memory_analysis().host_temp_size_in_bytes), cost, cost.flops + in_kernels, flops['causal'],
        {c.axes: span(machine, mesh, c.axes) for c in cost.collectives}, time.monotonic() - start, quick)

  options = layers.compiler_options(compiled_for)
  if platform == 'tpu' and not full:
    with contextlib.suppress(OutOfMemory):
      program = read(_compile(lowered, dict(exec_time_optimization_effort=-1.0), machine), quick=True)
      if program.bytes <= ROOM * machine.chip.memory and program.step()[1] != TRAFFIC:
        return program
  return read(_compile(lowered, options, machine), quick=False)


def with_remat(cfg: config_lib.Config, remat: str) -> config_lib.Config:
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))


def _compile(lowered, options, machine):
  try:
    return lowered.compile(options)
  except jax.errors.JaxRuntimeError as e:
    text = ' '.join(str(e).split())
    if needed := re.search(r'Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm', text):
      raise OutOfMemory(float(needed[1]) * dict(M=2**20, G=2**30, T=2**40)[needed[2]]) from e
    if needed := re.search(r'Allocation \(size=(\d+)\) would exceed memory', text):         # of one array alone
      raise OutOfMemory(float(needed[1])) from e
    raise ConfigError(f'{machine.topology.name}: {text[:240]}') from e


def model_of(cfg: config_lib.Config, platform: str) -> config_lib.Model:
  """The derived model, in the dtype it would have there. Raises ConfigError where the data would have to tell V."""
  size = dict(byte=274, sentencepiece=cfg.tokenizer.vocab_size).get(cfg.tokenizer.kind, 0)
  if not cfg.model.vocab_size and not size:
    raise ConfigError(f'config.model.vocab_size: a {cfg.tokenizer.kind} tokenizer is not read for a plan; set it')
  model = config_lib.derive(cfg.model, size, cfg.data.length)
  auto = 'float32' if platform == 'cpu' else 'bfloat16'
  return dataclasses.replace(model, dtype=auto if model.dtype == 'auto' else model.dtype)


def abstract_batch(cfg, mesh):
  """What data/batches.py would give: the arrays of the objective and of packing."""
  names = dict(token_BT='int32', target_BT='int32', mask_BT='float32')
  if cfg.data.packing == 'pack':
    names |= dict(position_BT='int32', segment_BT='int32')
  if cfg.train.objective in ('prefix', 'span'):
    names |= dict(prefix_BT='bool')
  rows = NamedSharding(mesh, sharding.spec('BT', sharding.ACT))
  shape = cfg.train.batch_size, cfg.data.length
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in names.items()}


def shard_bytes(tree) -> float:
  """Bytes on one device of ShapeDtypeStructs with shardings."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def categories(compiled, state, jaxpr, model, mesh, interleave: int = 1) -> dict[str, float]:
  """Bytes of one device by what they are for. Parameters, moments and the total are exact; gradients are as large as
  their parameters, what the backward pass keeps is read from the traced program, and the rest is temporary."""
  found = compiled.memory_analysis()
  parameters, everything = shard_bytes(state['params']), shard_bytes(state)
  rest = found.temp_size_in_bytes + max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
  gradients = min(parameters, rest)
  ways = sharding.axis_size(mesh, sharding.ACT['B']) * mesh.shape['context']
  parts = mesh.shape['stage'] * interleave
  lengths = {repeats // parts for _, _, repeats in transformer.stacks(model)}
  kept = min(kept_bytes(jaxpr, lengths, pipelined=parts > 1) / ways, rest - gradients)
  return {'parameters': parameters, 'moments': everything - parameters,
          'batch': max(found.argument_size_in_bytes - everything, 0.0), 'gradients': gradients, 'activations': kept,
          'temporaries': rest - gradients - kept}


def kept_bytes(jaxpr, lengths, pipelined: bool = False) -> float:
  """Bytes that the forward scans over layers (of these lengths) stack up in the devices' memory for the backward pass,
  on all devices that split rows or positions (some of it is split over `tensor` too, and counted whole). pipelined:
  they lie in a shard_map, in a scan over ticks that stacks them up again."""
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = jax_core.jaxprs_in_params(eqn.params)
    if pipelined and eqn.primitive.name == 'shard_map':
      ticks = [e for j in inner for e in j.eqns if e.primitive.name == 'scan' and not e.params['reverse']]
      total += sum(e.params['length'] * kept_bytes(e.params['jaxpr'].jaxpr, lengths) for e in ticks)
    elif not pipelined and eqn.primitive.name == 'scan' and not eqn.params['reverse'] and (
        eqn.params['length'] in lengths) and (stacked := eqn.outvars[eqn.params['num_carry']:]):
      total += sum(v.aval.size * v.aval.dtype.itemsize for v in stacked
                   if v.aval.memory_space != jax.memory.Space.Host)
    else:
      total += sum(kept_bytes(j, lengths, pipelined) for j in inner)
  return total


def _kernel_flops(cost, flops, cfg, model, devices, microbatches):
  """Splash attention does not tell its FLOPs: two products forward, five backward, over the keys that are seen."""
  if not any(name.startswith('splash') for name in cost.custom_calls):
    return 0.0
  layer = flops['attention_causal'] / 3 * cfg.train.batch_size * cfg.data.length / devices / model.layers
  runs = lambda part: sum(n for name, n in cost.custom_calls.items() if name.startswith('splash') and part in name)
  return layer / microbatches * (runs('fwd') + 2.5 * runs('dkv'))


def span(machine: Machine, mesh, axes) -> tuple[float, str]:
  """(bytes/s that a device can send, network) of a collective along these mesh axes: all links of the torus
  dimensions in which its devices differ, in both directions; NVLink inside a node; else the slow network."""
  chip = machine.chip
  along = [i for i, name in enumerate(mesh.axis_names) if name in axes]
  if not along or not chip.link:
    return 0.0, ''
  grid = np.moveaxis(mesh.devices, along, range(len(along)))
  group = grid.reshape(math.prod(grid.shape[:len(along)]), -1)[:, 0]
  if machine.topology.platform == 'tpu':
    if len({getattr(d, 'slice_index', 0) for d in group}) > 1:
      return chip.slow, 'network between slices'
    differ = sum(len(set(values)) > 1 for values in zip(*(d.coords for d in group)))
    return 2 * chip.link * max(differ, 1), 'ICI'
  places = {d.id // machine.topology.host for d in group}
  return (chip.link, 'NVLink') if len(places) == 1 else (chip.slow, 'network between nodes')
