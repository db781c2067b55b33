"""The decoder as a pipeline over the mesh axis `stage`: GPipe (arXiv 1811.06965), or circular with `interleave` parts
of the depth on each stage (arXiv 2104.04473, 2.2), in one `shard_map` and one scan over ticks.

At each tick every stage runs one part of its layers on one microbatch and hands the result on. Microbatches go around
in groups of as many as there are stages, so that a result is back at the first stage in the tick in which that stage
needs it for the next part, and nothing is stored in between. Letters: M microbatches.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.models import transformer
from llm_jax.models.view import View


def ticks(stages: int, interleave: int, microbatches: int) -> int:
  """Ticks of a pass: each takes the time of layers / (stages x interleave) layers on one microbatch."""
  return microbatches * interleave + stages - 1


def bubble(stages: int, interleave: int, microbatches: int) -> float:
  """Share of a pass in which a stage has nothing to do."""
  return (stages - 1) / ticks(stages, interleave, microbatches)


def check(cfg, stages: int, interleave: int, microbatches: int) -> None:
  """Raises ConfigError for what such a pipeline cannot run. cfg: config.Model."""
  if stages == 1:
    if interleave != 1:
      raise ConfigError(f'config.mesh.interleave: {interleave}; one stage has nothing to interleave; set it to 1')
    return
  if microbatches == 0 or microbatches % stages:
    raise ConfigError(f'config.train.accumulate: a pipeline of {stages} stages needs a multiple of {stages} '
                      f'microbatches, got {microbatches}; {4 * stages} leave each stage idle '
                      f'{bubble(stages, interleave, 4 * stages):.0%} of the time')
  parts = stages * interleave
  stacks = transformer.stacks(cfg)
  if len({repeats for _, _, repeats in stacks}) > 1 or stacks[0][2] % parts or cfg.encoder_layers:
    period = sum(name.startswith('blocks') for name, _, _ in stacks)
    raise ConfigError(f'config.mesh.stage: {cfg.layers} layers in periods of {period} do not divide among {stages} '
                      f'stages x {interleave} (interleave); set model.layers to a multiple of {period * parts}')


def forward(model, micros: dict, key_M, kernel: str, training: bool, interleave: int):
  """The decoder's layers on M microbatches: micros holds token_MBT and maybe position_MBT, segment_MBT, prefix_MBT and
  weight_M; key_M: dropout keys, or None. Returns x_MBTD before the last norm, its M split over `stage`, and {stack:
  moe.statistics} summed over the microbatches, times weight_M but for the loads."""
  cfg = model.cfg
  stages = jax.sharding.get_abstract_mesh().shape['stage']
  names = [name for name, _, _ in transformer.stacks(cfg)]
  x_MBTD = jax.vmap(model.embed, (0, 0, 0), spmd_axis_name='stage')(
      micros['token_BT'], micros.get('position_BT'),
      None if key_M is None else jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(key_M))

  def deal(w):         # [L, ...] -> [interleave, stages, layers of a part, ...]
    w = w.reshape(interleave, stages, w.shape[0] // (stages * interleave), *w.shape[1:])
    return jax.lax.with_sharding_constraint(w, P(None, 'stage', *(P.UNCONSTRAINED,) * (w.ndim - 2)))

  stacked = tuple(getattr(model, name) for name in names)
  repeats = transformer.stacks(cfg)[0][2]
  blocks, layer = jax.tree.map(deal, (stacked, len(names) * jnp.arange(repeats)))
  run = Stage(model, kernel, training, stages, interleave)
  dealt = P(None, 'stage')
  x_MBTD, routed = jax.shard_map(
      run, axis_names={'stage'}, in_specs=(dealt, dealt, P(), P(), P(), P('stage')), out_specs=(P('stage'), dealt),
      check_vma=False)(blocks, layer, x_MBTD, micros, key_M, sharding.indices('stage'))
  routed = jax.tree.map(lambda x: x.reshape(repeats, *x.shape[3:]), routed)
  return x_MBTD, {name: of for name, of in zip(names, routed) if of is not None}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's part; what is static of it."""
  model: transformer.Transformer     # for embedding and context; its layers come dealt out
  kernel: str
  training: bool
  stages: int
  interleave: int

  def __call__(self, blocks, layer, x_MBTD, micros, key_M, index):
    """This stage's microbatches of the last stage's output, and the statistics of its own layers [interleave, 1, l]."""
    blocks, layer = jax.tree.map(lambda w: w[:, 0], (blocks, layer))
    M, index = x_MBTD.shape[0], index[0]

    def tick(carry, time):
      travelling, total = carry
      real, part, micro = self.schedule(time - index, M)
      pick = lambda tree, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
      start = pick(x_MBTD, micro), None if travelling[1] is None else jnp.zeros_like(travelling[1])
      fresh = (index == 0) & (part == 0)
      passing = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), start, travelling)
      context = self.context(pick(micros, micro), start[0], None if key_M is None else key_M[micro])
      passing, routed = transformer.run_stack(self.model.cfg, pick(blocks, part), pick(layer, part), passing, context)
      weigh = lambda name, x: x * (1 if name == 'load_E' else micros['weight_M'][micro])
      routed = [of and {name: jnp.where(real, weigh(name, x), 0) for name, x in of.items()} for of in routed]
      total = jax.tree.map(lambda a, b: a.at[part].add(b), total, routed)
      around = [(i, (i + 1) % self.stages) for i in range(self.stages)]
      return (jax.tree.map(lambda x: jax.lax.ppermute(x, 'stage', around), passing), total), passing[0]

    first_v = self.model.no_values(x_MBTD[0]) if self.model.cfg.value_skips else None
    empty = [None if not self.model.cfg.experts else self.no_statistics(layer.shape) for _ in blocks]
    every = jnp.arange(ticks(self.stages, self.interleave, M))
    (_, total), outputs = jax.lax.scan(tick, ((jnp.zeros_like(x_MBTD[0]), first_v), empty), every)
    out_MBTD = jnp.where(index == self.stages - 1, outputs[self.last_ticks(M)], 0)
    out_MBTD = jax.lax.psum_scatter(out_MBTD, 'stage', scatter_dimension=0, tiled=True)
    return out_MBTD, jax.tree.map(lambda x: x[:, None], total)

  def schedule(self, time, M):
    """(is there work, part, microbatch) of a stage, `time` ticks after its first."""
    group, step = jnp.divmod(time, self.interleave * self.stages)
    micro = group * self.stages + step % self.stages
    real = (time >= 0) & (time < M * self.interleave)
    return real, jnp.where(real, step // self.stages, 0), jnp.clip(micro, 0, M - 1)

  def last_ticks(self, M):
    """The tick in which each microbatch leaves the last stage for good."""
    group, i = jnp.divmod(jnp.arange(M), self.stages)
    return self.stages - 1 + (group * self.interleave + self.interleave - 1) * self.stages + i

  def context(self, micro, embed_BTD, key):
    segment_BT, position_BT = micro.get('segment_BT'), micro.get('position_BT')
    view = View(self.model.cfg.attention, segment_BT=segment_BT, key_segment_BS=segment_BT,
                prefix_BS=micro.get('prefix_BT'))
    return self.model.context(view, position_BT, micro['token_BT'].shape[1], self.kernel, embed_BTD, key,
                              training=self.training)

  def no_statistics(self, shape):
    one = dict.fromkeys(('balance', 'z', 'dropped'), jnp.zeros(shape))
    return one | dict(load_E=jnp.zeros((*shape, self.model.cfg.experts)))
