"""The training step: (state, batch) -> (state, metrics), a pure function jitted once with its state donated.

State is a plain dict of arrays {step, horizon, params, opt_state[, ema][, losses]}. Gradients are summed over
microbatches and divided by the tokens of the whole batch, so accumulation equals the large batch. A step whose loss or
gradients are not finite, that has no tokens, or whose loss is a spike, leaves everything but its counter bit-identical
and reports step/skipped.
"""
import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from llm_jax import config as config_lib
from llm_jax import hlo, sharding
from llm_jax.config import ConfigError
from llm_jax.models import attention, layers, moe, pipeline, transformer
from llm_jax.train import loss as loss_lib
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import remat as remat_lib

INPUTS = ('position_BT', 'segment_BT', 'prefix_BT', 'source_BS', 'source_segment_BS')
MICRO_TOKENS = 1024


def init_state(cfg: config_lib.Config, model: config_lib.Model, tx: optax.GradientTransformation, key) -> dict:
  """A new state; jit it with out_shardings so that every array is created where it lives."""
  params = transformer.init(model, key)
  state = dict(step=jnp.zeros((), jnp.int32), horizon=jnp.asarray(cfg.train.steps, jnp.int32), params=params,
               opt_state=tx.init(params))
  if cfg.train.ema:
    state['ema'] = jax.tree.map(jnp.copy, params)
  if cfg.train.spike_window:
    state['losses'] = jnp.full(cfg.train.spike_window, jnp.nan)       # of the newest updates; nan: none yet
  return state


def check_rows(cfg: config_lib.Config, mesh) -> None:
  """Raises ConfigError where batch rows do not divide among microbatches and devices, or do not feed the model."""
  if cfg.model.encoder_layers:
    raise ConfigError(f'config.model.encoder_layers: {cfg.model.encoder_layers}; training from text feeds a decoder '
                      'alone; set it to 0 (an encoder-decoder trains through train.step, with source_BS in batches)')
  if cfg.model.remat == 'offload' and isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == 'cpu':
    raise ConfigError("config.model.remat: 'offload' moves layer inputs from an accelerator's memory to its host's, "
                      "and this is a CPU; set it to 'full'")
  ways, stages = sharding.axis_size(mesh, sharding.ACT['B']), mesh.shape['stage']
  pipeline.check(cfg.model, stages, cfg.mesh.interleave, cfg.train.accumulate)
  for key, rows, times in (('train.batch_size', cfg.train.batch_size, max(cfg.train.accumulate, 1)),
                           ('eval.batch_size', cfg.eval.batch_size or cfg.train.batch_size, stages)):
    if rows % (times * ways):
      raise ConfigError(f'config.{key}: {rows} rows do not divide among {times * ways} (data x fsdp x expert devices'
                        f'{" x microbatches" if times > 1 else ""}); set it to a multiple of {times * ways}')


def abstract_state(cfg: config_lib.Config, model: config_lib.Model, mesh):
  """(state as ShapeDtypeStructs with shardings, shardings, optimizer); mesh: a Mesh or an AbstractMesh."""
  key = jax.random.key(0)
  tx = optimizer_lib.make(cfg.optimizer, jax.eval_shape(lambda key: transformer.init(model, key), key))
  state = jax.eval_shape(lambda key: init_state(cfg, model, tx, key), key)
  shardings = state_shardings(state, tx, mesh)
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings), shardings, tx


def state_shardings(state, tx, mesh):
  """NamedShardings of an (abstract) state: parameters by their letters, moments as their parameters."""
  params = sharding.param_specs(state['params'], mesh)
  specs = dict(step=P(), horizon=P(), params=params,
               opt_state=optimizer_lib.opt_state_specs(tx, state['params'], params))
  return sharding.named(mesh, specs | {name: of for name, of in (('ema', params), ('losses', P())) if name in state})


def loss_sums(cfg: config_lib.Config, model: config_lib.Model, kernel: str, params, batch, key=None,
              training: bool = True) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum over a batch of the loss to minimise, and the sums behind the metrics (float32 scalars), with 'tokens'."""
  bound = transformer.bind(model, params)
  inputs = {name: batch[name] for name in INPUTS if name in batch}
  x_BTD, routed = bound.forward(batch['token_BT'], key=key, kernel=kernel, training=training, **inputs)
  loss, sums = token_loss(cfg, bound, x_BTD, batch, training)
  if training and routed:
    router_loss, router_sums = loss_lib.router_losses(cfg.train, routed, sums['tokens'])
    return loss + router_loss, sums | router_sums
  return loss, sums


def pipelined_sums(cfg: config_lib.Config, model: config_lib.Model, kernel: str, params, batch, microbatches: int,
                   key=None, training: bool = True):
  """`loss_sums` of a batch whose microbatches pass through the stages of a pipeline; embedding and loss are split among
  the stages too, by microbatches."""
  bound = transformer.bind(model, params)
  micros = {name: split_rows(x, microbatches) for name, x in batch.items()}
  key_M = None if key is None else jax.vmap(lambda i: _fold(key, i))(jnp.arange(microbatches))
  tokens_M = micros['mask_BT'].sum((1, 2), dtype=jnp.float32)
  inputs = {name: micros[name] for name in ('token_BT', *INPUTS) if name in micros} | dict(weight_M=tokens_M)
  x_MBTD, routed = pipeline.forward(bound, inputs, key_M, kernel, training, cfg.mesh.interleave)

  stages = sharding.ways('stage')
  one = lambda x_BTD, micro: token_loss(cfg, bound, bound.finish(x_BTD), micro, training)

  def add(_, xs):
    return None, jax.vmap(one, spmd_axis_name='stage')(*xs)

  targets = {name: micros[name] for name in ('target_BT', 'mask_BT')}
  turns = jax.tree.map(lambda x: x.reshape(stages, -1, *x.shape[1:]).swapaxes(0, 1), (x_MBTD, targets))
  loss, sums = jax.tree.map(jnp.sum, jax.lax.scan(add, None, turns)[1])
  if training and routed:
    router_loss, router_sums = loss_lib.router_losses(cfg.train, routed, 1.0)
    return loss + router_loss, sums | router_sums
  return loss, sums


def token_loss(cfg: config_lib.Config, bound, x_BTD, batch, training: bool):
  """The cross-entropy of a batch's targets from final hidden states: (loss, sums)."""
  z_loss, smoothing = (cfg.train.z_loss, cfg.train.label_smoothing) if training else (0.0, 0.0)
  target_BT, mask_BT = batch['target_BT'], batch['mask_BT']
  with jax.named_scope('loss'):
    if cfg.train.loss_chunk:
      return loss_lib.chunked_cross_entropy(x_BTD, bound.unembed_VD(), bound.logits, target_BT, mask_BT, z_loss,
                                            smoothing, cfg.train.loss_chunk)
    return loss_lib.cross_entropy(bound.logits(x_BTD), target_BT, mask_BT, z_loss, smoothing)


def microbatches(cfg: config_lib.Config, ways: int, platform: str = '') -> int:
  """train.accumulate, or where it is 0 what is fastest here: on a CPU, the fewest microbatches of at most 1,024 tokens
  per device, whose activations stay in its caches; elsewhere one. Also one with dropout, whose masks depend on the
  number: a mesh must not change them; nor with experts, whose balance and capacity are a microbatch's. ways: devices
  that split the rows."""
  train = cfg.train
  if train.accumulate or cfg.model.dropout or cfg.model.experts or (platform or jax.default_backend()) != 'cpu':
    return train.accumulate or 1
  rows = train.batch_size // ways
  return next(n for n in range(1, rows + 1)
              if rows % n == 0 and (rows // n * cfg.data.length <= MICRO_TOKENS or n == rows))


def make_train_step(cfg: config_lib.Config, model: config_lib.Model, tx: optax.GradientTransformation, kernel: str,
                    accumulate: int = 0):
  """train_step(state, batch) -> (state, metrics). Metrics are float32 scalars: loss/train (mean nats per token, without
  smoothing), loss/z, accuracy, grads/norm, optimizer/learning_rate, tokens, step/skipped[, step/spike], and for
  experts router/balance, router/z (without their weights), router/dropped (share of assignments) and router/max_load
  (of the busiest expert of any layer, in equal shares). accumulate: microbatches, from `microbatches`; 0:
  cfg.train.accumulate."""
  accumulate = accumulate or cfg.train.accumulate or 1

  def grads_of(params, batch, key):
    # Divided by the tokens of the whole batch, not of the microbatch: a mean of means is not the batch's mean.
    def loss(params, micro, key):
      total, sums = loss_sums(cfg, model, kernel, params, micro, key)
      return total / tokens, sums

    tokens = jnp.maximum(batch['mask_BT'].sum(dtype=jnp.float32), 1)
    grad = jax.grad(loss, has_aux=True)
    if sharding.ways('stage') > 1:
      def loss_of_all(params):
        total, sums = pipelined_sums(cfg, model, kernel, params, batch, accumulate, key)
        return total / tokens, sums
      return jax.grad(loss_of_all, has_aux=True)(params)
    if accumulate == 1:
      return grad(params, batch, _fold(key, 0))
    micros = {name: split_rows(x, accumulate) for name, x in batch.items()}
    dtype = jnp.dtype(cfg.train.accumulate_dtype)

    def add(carry, xs):
      micro, i = xs
      grads, sums = grad(params, micro, _fold(key, i))
      total = jax.tree.map(lambda a, g: a + g.astype(dtype), carry[0], grads)
      return (total, jax.tree.map(jnp.add, carry[1], sums)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        lambda: loss_sums(cfg, model, kernel, params, jax.tree.map(lambda x: x[0], micros))[1]))
    (grads, sums), _ = jax.lax.scan(add, (zeros, sums), (micros, jnp.arange(accumulate)))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), sums

  def train_step(state, batch):
    params = state['params']
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), state['step']) if model.dropout else None
    grads, sums = grads_of(params, batch, key)
    with jax.named_scope('optimizer'):
      norm = optax.tree.norm(grads)
      factor = optimizer_lib.schedule(cfg.optimizer, state['step'], state['horizon'])
      updates, opt_state = tx.update(grads, state['opt_state'], params)
      new = dict(params=jax.tree.map(lambda p, u: p + factor * u, params, updates), opt_state=opt_state)
      if 'ema' in state:
        new['ema'] = optimizer_lib.ema_update(state['ema'], new['params'], cfg.train.ema, state['step'])
      if model.router_bias:
        new['params'] = move_biases(new['params'], sums['load'], cfg.train.router_bias_rate)
    tokens = jnp.maximum(sums['tokens'], 1)
    loss = sums['loss/ce'] / tokens
    ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (sums['tokens'] > 0)
    if 'losses' in state:
      spike = ok & is_spike(loss, state['losses'], cfg.train.spike_sigmas)
      ok &= ~spike
      new['losses'] = jnp.append(state['losses'][1:], loss)
    new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, {name: state[name] for name in new})
    metrics = {'loss/train': loss, 'loss/z': sums['loss/z'] / tokens,
               'accuracy': sums['accuracy'] / tokens, 'grads/norm': norm, 'tokens': sums['tokens'],
               'optimizer/learning_rate': factor * cfg.optimizer.learning_rate, 'step/skipped': 1.0 - ok}
    if 'losses' in state:
      metrics['step/spike'] = jnp.float32(spike)
    if 'load' in sums:
      loads = [load_LE / load_LE.mean(1, keepdims=True) for load_LE in sums['load'].values()]
      metrics |= {'router/balance': sums['router/balance'] / tokens, 'router/z': sums['router/z'] / tokens,
                  'router/dropped': sums['router/dropped'] / tokens,
                  'router/max_load': jnp.stack([load_LE.max() for load_LE in loads]).max()}
    return dict(step=state['step'] + 1, horizon=state['horizon'], **new), metrics

  return train_step


class Compiled(NamedTuple):
  """A train step as it runs: the remat in use and why, seconds of tracing and lowering, and of all its making, where
  several were tried of them together."""
  step: jax.stages.Compiled
  remat: str
  why: str
  lower_s: float
  seconds: float


def compile_train_step(cfg: config_lib.Config, model: config_lib.Model, tx, kernel: str, accumulate: int, state, batch,
                       shardings=None) -> Compiled:
  """Compiles the train step for arrays or shapes like `state` and `batch`, keeping the most for the backward pass that
  fits (remat.lightest). shardings: of the state that it returns. Raises RuntimeError where the program does not hold
  what the banner says: this kernel, products in float8."""
  def compiled(remat):
    before = time.perf_counter()
    step = make_train_step(cfg, dataclasses.replace(model, remat=remat), tx, kernel, accumulate)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None),
                      compiler_options=layers.compiler_options()).lower(state, batch)
    lowering.append(time.perf_counter() - before)
    return lowered.compile()

  start, lowering = time.perf_counter(), []
  step, remat, why = remat_lib.lightest(compiled, model.remat)
  seconds = time.perf_counter() - start
  attention.verify(kernel, step)
  if model.fp8 and jax.default_backend() == 'gpu' and not hlo.products_in_float8(step.as_text()):
    raise RuntimeError('the compiled step has no product in float8, though model.fp8 is on; --config.model.fp8=False '
                       'trains without; please report the versions of jax and jaxlib')
  return Compiled(step, remat, why, sum(lowering), seconds)


def move_biases(params, loads, rate: float):
  """Parameters with the routers' biases moved by what each stack of layers loaded its experts with."""
  return params | {name: params[name] | {'mlp': params[name]['mlp'] | {
      'router_bias_E': moe.balance_bias(params[name]['mlp']['router_bias_E'], load_LE, rate)}}
                   for name, load_LE in loads.items()}


def is_spike(loss, recent, sigmas: float):
  """Whether a loss is more than so many standard deviations above the mean of the recent ones, once there are as many
  as the window holds (the rule of OLMo-core's skip-step optimizers)."""
  return loss > recent.mean() + sigmas * recent.std()      # false while one of them is nan


def make_eval_step(cfg: config_lib.Config, model: config_lib.Model, kernel: str):
  """eval_step(params, batch) -> sums {'loss/ce' nats, 'accuracy', 'tokens'} over the batch."""
  def eval_step(params, batch):
    if (stages := sharding.ways('stage')) > 1:
      return pipelined_sums(cfg, model, kernel, params, batch, stages, training=False)[1]
    return loss_sums(cfg, model, kernel, params, batch, training=False)[1]
  return eval_step


def split_rows(x, parts: int):
  """[B, ...] -> [parts, B / parts, ...]: microbatch i takes every parts-th row, so that no row changes its device."""
  return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _fold(key, i):
  return None if key is None else jax.random.fold_in(key, i)

