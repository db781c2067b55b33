"""The training run, from a Config to a checkpoint, samples and a report. `train` is the table of contents.

The loop dispatches step n, then logs step n - 1, so that the device never waits for the host; nothing else in it reads
an array back. Everything a step needs is a pure function of (config, step): resuming needs the checkpoint alone.
"""
import contextlib
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax import hardware, paths, sharding
from llm_jax.config import ConfigError
from llm_jax.data import batches as batches_lib
from llm_jax.data import prepare, store
from llm_jax.generate import sampling
from llm_jax.interop import families
from llm_jax.interop import load as interop
from llm_jax.models import attention, fp8, layers, pipeline, transformer
from llm_jax.train import clock as clock_lib
from llm_jax.train import explain, report
from llm_jax.train import metrics as metrics_lib
from llm_jax.train import resume as resume_lib
from llm_jax.train import step as step_lib
from llm_jax.train.budget import UNKNOWN, Budget
from llm_jax.train.rundir import STAGE, RunDirectory
from llm_jax.train.stop import Stop


def train(cfg: config_lib.Config, workdir: str, started: float | None = None, own_process: bool = False) -> dict:
  """Runs a config in workdir (local, gs:// or s3://), resuming the run that is there; returns the final figures of the
  report.

  started: time.time() at which the process started, for the time to first loss. own_process: as in Stop.
  Raises ConfigError before any work for what the user can put right.
  """
  started = time.time() if started is None else started
  hardware.keep_memory()
  if cfg.mesh.distributed:
    sharding.initialize_hosts()
  mesh = sharding.make_mesh(cfg.mesh)
  step_lib.check_rows(cfg, mesh)
  if cfg.log.compile_cache:
    hardware.keep_programs(store.cache_folder(cfg.data))
  with RunDirectory(workdir, store.cache_folder(cfg.data)) as directory, jax.set_mesh(mesh):
    with Run(cfg, directory, mesh, started, own_process) as run:
      run.setup()
      hardware.give_back_memory()
      run.loop()
      return run.finish()


def eval_rows(cfg: config_lib.Config) -> int:
  return cfg.eval.batch_size or cfg.train.batch_size


def one_at_a_time(result):
  """On CPU devices, waits: programs that run at the same time there can wait for each other's collectives for ever."""
  several = jax.default_backend() == 'cpu' and jax.device_count() > 1
  return jax.block_until_ready(result) if several else result


class Run:
  """One process's part of a training run; its methods are called in order by `train`."""

  def __init__(self, cfg, directory, mesh, started, own_process=False):
    self.cfg, self.directory, self.mesh, self.started = cfg, directory, mesh, started
    self.workdir = directory.local   # of everything but checkpoints
    self.turned = None               # the step at which validation turned, once warned of
    self.stop = Stop(own_process)
    self.error = None                # ends the run once everything is saved
    self.profiling = False
    self.cleanup = contextlib.ExitStack()
    self.listening = self.cleanup.enter_context(contextlib.ExitStack())      # to signals

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.cleanup.__exit__(*error)

  # Setup ------------------------------------------------------------------------------------------------------------

  def setup(self) -> None:
    """Data, model, state, compiled steps; then the banner."""
    cfg = self.cfg
    self.clock = clock_lib.Clock(self.workdir, self.started)
    self.energy = metrics_lib.Energy(cfg.log)
    self.cleanup.callback(self.energy.close)
    with self.clock('checkpoint'):
      self.found = self.find()
    with self.clock('input'):
      self.tokenizer = self.make_tokenizer()
      self.stores = store.prepare(cfg.data, self.tokenizer, progress=cfg.log.progress)
      self.batches = batches_lib.Batches(self.stores.train, self.stores.weights, cfg.data, cfg.train, self.tokenizer)
      self.evaluations = [
          batches_lib.EvalBatches(s, cfg.data, eval_rows(cfg), self.tokenizer, cfg.train.objective,
                                  self.rows(eval_rows(cfg))) for s in self.stores.valid]
      self.data = resume_lib.fingerprints(self.stores)
    if self.found:
      resume_lib.check_data(self.found, self.stores, self.data)
    self.model = config_lib.derive(cfg.model, self.tokenizer.vocab_size, cfg.data.length)
    if self.model.vocab_size < self.tokenizer.vocab_size:
      raise ConfigError(f'config.model.vocab_size: {self.model.vocab_size} is smaller than the tokenizer\'s '
                        f'{self.tokenizer.vocab_size}')
    self.check_prompts()
    if self.model.fp8:
      fp8.check(jax.default_backend(), attention.capability())
    dtype = attention.compute_dtype(self.model.dtype)
    self.kernel, self.kernel_reason = attention.choose(
        self.model, jax.default_backend(), dtype, cfg.data.length, cfg.data.packing == 'pack',
        self.mesh.shape['context'])

    self.microbatches = step_lib.microbatches(cfg, sharding.axis_size(self.mesh, sharding.ACT['B']))
    self.abstract, self.shardings, self.tx = step_lib.abstract_state(cfg, self.model, self.mesh)
    self.open_checkpoints(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract)))
    self.banner(self.abstract['params'])
    if self.found:
      self.resume()
    else:
      with self.clock('compile'):
        # Drawing random numbers runs once but takes XLA's CPU compiler longer than the whole step (10 s or 2 s).
        options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
        init = jax.jit(lambda key: step_lib.init_state(cfg, self.model, self.tx, key), out_shardings=self.shardings,
                       compiler_options=options)
        self.state = init(jax.random.key(cfg.train.seed))
      if cfg.init_from:
        self.start_from(self.source)
    self.first_step = int(self.state['step'])
    self.compile()

  def find(self) -> checkpoint_lib.Step | None:
    """The step to go on from."""
    found = checkpoint_lib.find_to_resume(self.directory.path, self.cfg.checkpoint.verify)
    if found and not self.cfg.checkpoint.resume:
      raise ConfigError(f'{self.directory.path}: already has checkpoints up to step {found.step} and checkpoint.resume '
                        'is False; give another --workdir, or delete its checkpoints/')
    if found:
      self.changed = resume_lib.check_config(found, self.cfg)
    return found

  def open_checkpoints(self, size: int) -> None:
    """size: bytes of the state."""
    cfg, path = self.cfg.checkpoint, self.directory.path
    passing = [step for step in checkpoint_lib.steps(path) if not cfg.keep_every or step % cfg.keep_every]
    with sharding.fail_together():
      self.directory.check_room(size, cfg.keep, min(len(passing), cfg.keep))
      if jax.process_index() == 0:
        self.tokenizer.save(self.workdir / 'tokenizer')
      self.checkpoints = checkpoint_lib.Checkpointer(
          path, cfg.keep, config_lib.to_dict(self.cfg), tokenizer=self.workdir / 'tokenizer',
          keep_every=cfg.keep_every, resumed=self.found.step if self.found else None,
          stage=self.workdir / STAGE)
    self.cleanup.push(self.checkpoints)

  def check_prompts(self) -> None:
    """Raises ConfigError for prompts that this model could not continue, before it is trained."""
    cfg = self.cfg.eval
    if self.model.attention == 'bidirectional':
      return
    try:
      rows = sampling.encode(self.model, self.tokenizer, [*cfg.prompts, *('',) * cfg.samples])
    except ConfigError as e:
      raise ConfigError(f'config.eval.prompts, and eval.samples empty ones: {e}; or --config.eval.samples=0') from e
    longest = max(map(len, rows), default=0)
    if longest >= self.model.max_length:
      raise ConfigError(f'config.eval.prompts: one has {longest} tokens, the model reads {self.model.max_length} '
                        '(data.length); shorten it')

  def make_tokenizer(self):
    """The run's own tokenizer where it has one, or that of the run it starts from: what a model was trained with never
    changes under it."""
    self.came_with = {}                    # what an export needs to know of the model it started from
    if self.found:
      self.came_with = {k: v for k, v in self.found.extra.items() if k in ('chat_template', 'family')}
      return resume_lib.check_tokenizer(self.found, self.cfg, self.workdir)
    if self.cfg.init_from:
      self.source = interop.find(self.cfg.init_from, verify=self.cfg.checkpoint.verify)
      self.came_with = dict(chat_template=self.source.chat_template, family=self.source.family)
      return self.source.tokenizer
    return prepare.tokenizer(self.cfg)

  def resume(self) -> None:
    """Takes the state of the step that was found."""
    with self.clock('checkpoint'):
      self.state = checkpoint_lib.restore(self.found, abstract_state=self.abstract)
    if jax.process_index() == 0:
      print(f'resuming {self.directory.path} at step {self.found.step} ({self.found.verified})', flush=True)
      if self.changed:
        print(f'    note  changed since then: {self.changed}', flush=True)

  def start_from(self, source: interop.Loaded) -> None:
    """Takes the weights of another model; its tokenizer came with them."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), source.read(self.mesh))
    shapes = lambda tree: {name: x.shape for name, x in checkpoint_lib.flat(tree).items()}
    ours, theirs = shapes(self.state['params']), shapes(params)
    if ours != theirs:
      wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
      raise ConfigError(f'config.init_from: {self.cfg.init_from} has another model; differing: {", ".join(wrong[:8])}; '
                        f'--config.model={self.cfg.init_from} takes its shape too')
    self.state['params'] = params
    if 'ema' in self.state:
      self.state['ema'] = jax.tree.map(jnp.copy, params)
    if jax.process_index() == 0:
      theirs, ours = (families.computed(m) for m in (source.shape, self.model))
      other = [f'model.{name} {x!r} for {getattr(theirs, name)!r}' for name, x in vars(ours).items()
               if x != getattr(theirs, name) and name != 'max_length']
      print(f'starting from the weights and the tokenizer of {self.cfg.init_from} ({source.origin})', flush=True)
      if other:
        print(f'    note  it was made with other values; here: {", ".join(other)}', flush=True)

  def compile(self) -> None:
    """Compiles the train step ahead of time: the loop can then never compile again, it would raise instead."""
    cfg = self.cfg
    with self.clock('compile'):
      batch = sharding.put_batch(self.batches(self.first_step, self.rows()), self.mesh)
      self.train_step, remat, why, *_ = step_lib.compile_train_step(
          cfg, self.model, self.tx, self.kernel, self.microbatches, self.abstract, batch, self.shardings)
    self.model = dataclasses.replace(self.model, remat=remat, fp8=False)     # evaluated as it will be used
    if jax.process_index() == 0:
      print(f'   remat  {remat} ({why})', flush=True)
    self.eval_step = jax.jit(step_lib.make_eval_step(cfg, self.model, self.kernel),
                             compiler_options=layers.compiler_options())

  def rows(self, batch_size: int | None = None) -> tuple[int, int]:
    """The rows of the global batch that this process feeds."""
    return sharding.local_rows(batch_size or self.cfg.train.batch_size, self.mesh)

  def banner(self, params) -> None:
    """What runs where: nothing that changes speed or numbers is silent."""
    if jax.process_index():
      return
    cfg, device = self.cfg, jax.devices()[0]
    mesh = ' x '.join(f'{n} {a}' for a, n in self.mesh.shape.items() if n > 1) or 'one device'
    if (stages := self.mesh.shape['stage']) > 1:
      idle = pipeline.bubble(stages, cfg.mesh.interleave, self.microbatches)
      mesh += f', pipeline with {cfg.mesh.interleave} part(s) of the depth per stage, idle {idle:.1%} of the time'
    source = ' + '.join(s.label for s in self.stores.train)
    flops = metrics_lib.flops_per_token(self.model, cfg.data.length)
    lines = [
        ('device', f'{jax.device_count()} x {device.device_kind} ({device.platform}), {jax.process_count()} '
                   'process(es)'),
        ('mesh', mesh + (', kv heads replicated over tensor' if sharding.replicated_kv(params, self.mesh) else '')),
        ('model', f'{transformer.count(params):,} parameters, {self.model.layers} layers, width {self.model.width}, '
                  f'{self.model.heads} heads, vocabulary {self.model.vocab_size:,}'),
        ('compute', f'{attention.compute_dtype(self.model.dtype)} matrix products'
                    f'{", float8 in the layers" * self.model.fp8}, attention kernel {self.kernel} '
                    f'({self.kernel_reason}), {flops["causal"] / 1e6:.3g} MFLOP/token'),
        ('data', f'{source}: {sum(s.n_tokens for s in self.stores.train):,} training tokens, '
                 f'{sum(s.n_tokens for s in self.stores.valid):,} held out, {self.tokenizer.kind} tokenizer'),
        ('step', f'{cfg.train.batch_size} x {cfg.data.length} tokens, {self.microbatches} microbatch(es), '
                 f'{cfg.optimizer.name}, {f"{cfg.train.minutes:g} minutes" if cfg.train.minutes else cfg.train.steps} '
                 f'{"" if cfg.train.minutes else "steps"}'),
        ('run', str(self.directory.path))]
    for name, text in lines:
      print(f'{name:>8}  {text.strip()}', flush=True)

  # The loop ---------------------------------------------------------------------------------------------------------

  def loop(self) -> None:
    cfg, step = self.cfg, self.first_step
    first, last = (int(x) for x in (cfg.log.profile or '0:-1').split(':'))
    profiled = range(first, last + 1)
    self.cleanup.callback(self.stop_profile)
    prefetch = self.batches.prefetch(step, rows=self.rows(), workers=cfg.data.workers)
    self.cleanup.callback(prefetch.close)
    self.open_logs()
    budget, checkpoints = self.budget, self.checkpoints
    self.listening.enter_context(self.stop)
    pending = None
    while step < budget.horizon and not self.error and not self.stop.reached(step):
      if step in profiled and not self.profiling:
        explain.start(self.workdir / 'profile')
        self.profiling, self.profile_from = True, (step, time.perf_counter(), self.clock.parts()['input'])
      with self.clock('input'):
        try:
          batch = sharding.put_batch(next(prefetch)[1], self.mesh)
        except ConfigError as e:            # a data worker died: what was trained so far is saved first
          if jax.process_count() > 1:
            raise
          self.error = e
          break
      with self.clock('step'):
        self.state, metrics = self.train_step(self.state, batch)
        if pending is not None:
          self.log(*pending)                # step n - 1, while step n runs
        pending = step, metrics
      step += 1
      if self.profiling and (step not in profiled or step >= budget.horizon or self.stop.asked):
        jax.block_until_ready(self.state)
        self.stop_profile(step)
      if step < budget.horizon and budget.plan(step, lambda: jax.block_until_ready(self.state['step'])):
        self.set_horizon(budget.horizon)
        self.logger.total_steps = budget.horizon
      evaluating = step < budget.horizon and self.due(step, cfg.eval.every)
      saving = step < budget.horizon and (self.due(step, cfg.checkpoint.every) or
                                          self.due(step, cfg.checkpoint.keep_every))
      if evaluating or saving:
        pending = self.log(*pending)        # first, so that no row is lost where a kill comes after the checkpoint
      if evaluating:
        self.evaluate(step, cfg.eval.batches)
        self.sample(step, cfg.eval.prompts)
      if saving:
        self.save(step)
      checkpoints.check()                   # a write that failed meanwhile ends the run
    if pending is not None:
      self.log(*pending)
    self.step = step
    if step > self.first_step:
      self.save(step)
    if self.error:
      raise self.error

  def open_logs(self) -> None:
    """The clock, the budget and the logger, as a run that was interrupted left them."""
    cfg, step, extra = self.cfg, self.first_step, self.found.extra if self.found else {}
    self.clock.resume(extra.get('time', {}), step)
    saved = None
    if self.found:
      before = checkpoint_lib.config_of(self.found).train
      if (before.minutes, before.steps) == (cfg.train.minutes, cfg.train.steps):
        saved = int(self.state['horizon'])
    self.budget = Budget(cfg, step, extra.get('seconds', 0.0), saved)
    self.set_horizon(self.budget.horizon)
    self.logger = metrics_lib.Logger(
        self.workdir, cfg.log, self.budget.horizon % UNKNOWN, clock=self.clock,
        tokens_per_step=cfg.train.batch_size * cfg.data.length,
        flops_per_token=metrics_lib.flops_per_token(self.model, cfg.data.length)['causal'],
        peak=metrics_lib.peak_flops().flops * jax.device_count(), resumed_step=step)
    self.cleanup.callback(self.logger.close)
    self.valid = self.past_valid()
    self.skipped = sum(row['kind'] == 'skipped' for row in paths.read_jsonl(self.workdir / 'events.jsonl'))
    self.spikes = 0                         # in a row
    if (step or self.clock.before['at']) and step < self.budget.horizon:
      self.clock.restart()
    if step and step < self.budget.horizon:
      damaged = ''.join(f'; step {n} is {why}' for n, why in self.found.damaged.items())
      self.logger.event(step, 'resumed', f'at step {step}, {self.found.verified}{damaged}', quiet=True)

  def stop_profile(self, step: int = 0) -> None:
    """Writes the trace, also where an error ends the loop inside the range; and where `step` says how far the range
    went, how a step's time is divided."""
    if not self.profiling:
      return
    self.profiling, (first, since, waited) = False, self.profile_from
    seconds, waited = time.perf_counter() - since, self.clock.parts()['input'] - waited
    jax.profiler.stop_trace()
    print(f'profile of steps {self.cfg.log.profile} in {self.workdir / "profile"}', flush=True)
    if step > first and jax.process_index() == 0:
      explain.keep(self.workdir, self.train_step.as_text(), step - first, seconds, waited)

  def due(self, step, every) -> bool:
    return bool(every) and step % every == 0

  def log(self, step, metrics) -> None:
    """Reads one step's metrics back (the only wait of the loop) and logs them; a skipped step is always reported."""
    if step == self.first_step:
      loss = float(metrics['loss/train'])
      print(f'time to first loss {time.time() - self.started:.1f} s (loss {loss:.4f})', flush=True)
    self.spikes = self.spikes + 1 if metrics.get('step/spike') else 0
    if metrics['step/skipped']:
      self.explain_skip(step, {name: float(value) for name, value in metrics.items()})
    if (step + 1) % self.cfg.log.every == 0 or step == self.first_step:
      self.logger.log(step + 1, {name: float(value) for name, value in metrics.items()})

  def explain_skip(self, step, metrics) -> None:
    """Says why a step changed nothing, and which documents it read; stops the run where going on makes no sense."""
    loss, norm, tokens = (metrics[name] for name in ('loss/train', 'grads/norm', 'tokens'))
    finite = math.isfinite(loss) and math.isfinite(norm)
    reason = (f'a spike, more than {self.cfg.train.spike_sigmas:g} deviations above the last '
              f'{self.cfg.train.spike_window}' if self.spikes else
              'an empty batch' if finite and not tokens else 'not finite')
    self.skipped += 1
    documents = list(dict.fromkeys(name for row in self.batches.names(step) for name in row))
    names = ', '.join(documents[:8]) + (f' and {len(documents) - 8} more' if len(documents) > 8 else '')
    self.logger.event(step + 1, 'skipped', f'loss {loss}, gradient norm {norm}, {tokens:g} tokens ({reason}): nothing '
                      f'was updated; documents: {names}', documents=documents)
    if self.cfg.train.on_nonfinite == 'stop' and not finite:
      self.error = ConfigError(
          f'step {step + 1}: loss or gradients are not finite; the last sound state is saved. Lower '
          "optimizer.learning_rate, or set train.on_nonfinite='skip' to go on without such steps")
    if self.spikes and self.spikes >= self.cfg.train.spike_window:
      self.error = ConfigError(
          f'step {step + 1}: {self.spikes} spikes in a row: the loss has moved for good; the last sound state is '
          'saved. Lower optimizer.learning_rate, or raise train.spike_sigmas')

  def set_horizon(self, horizon: int) -> None:
    self.state['horizon'] = jax.device_put(np.int32(horizon), self.shardings['horizon'])

  # Evaluation, samples, checkpoints -----------------------------------------------------------------------------------

  def evaluate(self, step: int, limit: int | None) -> dict[str, float]:
    """Loss in nats per token, and bits per byte, on held-out text: `limit` batches of each source, None for all."""
    with self.clock('eval'):
      params = self.state.get('ema', self.state['params'])
      sums, bits = [], 0.0
      for held_out in self.evaluations:
        count = min(limit or len(held_out), len(held_out))
        chosen = [i * len(held_out) // count for i in range(count)]       # spread evenly over the text
        part = [one_at_a_time(self.eval_step(params, sharding.put_batch(held_out[i], self.mesh))) for i in chosen]
        sums += part
        bits += sum(float(x['loss/ce']) for x in part) / math.log(2) * len(held_out) / count
      total = {name: math.fsum(float(x[name]) for x in sums) for name in sums[0]}
      tokens = max(total['tokens'], 1)
      out = {'loss/valid': total['loss/ce'] / tokens, 'eval/accuracy': total['accuracy'] / tokens}
      if self.cfg.train.objective == 'causal':
        out['eval/bits_per_byte'] = bits / sum(e.total_bytes for e in self.evaluations)
    self.logger.log(step, out)
    self.valid.append((step, out['loss/valid']))
    turned = metrics_lib.turning_point(self.valid)
    if turned is not None and turned != self.turned:
      self.logger.warn(f'validation loss was lowest at step {turned} and rises since: the model overfits from there')
    self.turned = turned
    return out

  def past_valid(self):
    rows = paths.read_jsonl(self.workdir / 'metrics.jsonl')
    return [(row['step'], row['loss/valid']) for row in rows
            if row.get('loss/valid') is not None and row['step'] <= self.first_step]

  def sample(self, step: int, prompts) -> list[str]:
    cfg = self.cfg.eval
    if not prompts or self.model.attention == 'bidirectional':
      return []
    with self.clock('sample'):
      params = self.state.get('ema', self.state['params'])
      results = sampling.generate(
          self.model, params, self.tokenizer, list(prompts), max_tokens=cfg.max_tokens, temperature=cfg.temperature,
          top_p=cfg.top_p, seed=self.cfg.train.seed + step)
    texts = [prompt + result.text for prompt, result in zip(prompts, results)]
    for prompt, text in zip(prompts, texts):
      self.logger.text(step, repr(prompt), text)
    return texts

  def save(self, step: int) -> None:
    start = time.monotonic()
    with self.clock('checkpoint'):
      self.checkpoints.save(step, self.state, dict(
          seconds=self.budget.seconds(), time=self.clock.parts(), data=self.data, batches=batches_lib.VERSION,
          **self.came_with))
      try:
        self.directory.publish()
      except ConfigError as e:              # the logs stay here, and go with the next checkpoint
        self.logger.warn(f'{e}')
    self.logger.note(f'checkpoint of step {step} started; it held training for {time.monotonic() - start:.3f} s')

  def held_out(self):
    """The bytes of every held-out document."""
    for s in self.stores.valid:
      for i in range(s.n_docs):
        yield self.tokenizer.decode_bytes(s.tokens[s.offsets[i]:s.offsets[i + 1]])

  # The end ------------------------------------------------------------------------------------------------------------

  def finish(self) -> dict:
    """Waits for the checkpoint, evaluates on all held-out text, samples, writes the report."""
    cfg = self.cfg
    with self.clock('checkpoint'):
      self.checkpoints.wait()
    self.clock.end(self.step)
    self.listening.close()           # everything is saved: from here on a signal ends the process as usual
    if self.stop.asked:
      self.logger.event(self.step, 'stopped', f'{self.stop.by}: stopped at step {self.step}; the same command resumes')
      self.directory.publish()
      return {}
    final = self.evaluate(self.step, None)
    figures = {'validation loss': final['loss/valid']}
    if 'eval/bits_per_byte' in final:
      figures['bits per byte'] = final['eval/bits_per_byte']
    if cfg.eval.python:
      figures |= report.compression_bits_per_byte(self.held_out())
    samples = self.sample(self.step, cfg.eval.prompts) + self.sample(self.step, ('',) * cfg.eval.samples)
    if cfg.eval.python:
      figures['samples that ast.parse accepts'] = report.parses(samples)
    figures |= {'steps': self.step, 'training tokens': self.step * cfg.train.batch_size * cfg.data.length,
                'steps skipped': self.skipped}
    self.clock.save()
    if jax.process_index() == 0:
      page, _ = report.write(self.workdir, cfg, figures, report.environment(),
                             self.energy.summary(self.clock.total()))
      print('\n'.join(f'{name:>32}  {value if not isinstance(value, float) else f"{value:.4f}"}'
                      for name, value in figures.items()))
      where = self.directory.path
      print(f'checkpoint  {where}\nreport      {page}\n'
            f"sample      python -m llm_jax.sample --model={where} --prompt='def main('", flush=True)
    self.directory.publish()
    return figures
