"""The training run, from a Config to a checkpoint, samples and a report. `train` is the table of contents.

The loop dispatches step n, then logs step n - 1, so that the device never waits for the host; nothing else in it reads
an array back. Everything a step needs is a pure function of (config, step): resuming needs the checkpoint alone.
"""
import contextlib
import itertools
import math
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.data import batches as batches_lib
from llm_jax.data import prepare, store
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.generate import sampling
from llm_jax.models import attention, transformer
from llm_jax.train import metrics as metrics_lib
from llm_jax.train import optimizer as optimizer_lib
from llm_jax.train import report
from llm_jax.train import step as step_lib

FREE = ('model.kernel', 'model.remat', 'model.unroll', 'model.dropout')   # may change when a run is resumed
UNKNOWN = 2**30    # steps of a run whose budget in minutes has not been turned into steps yet
CALIBRATE = 20     # steps after which a budget in minutes is turned into a number of steps


def train(cfg: config_lib.Config, workdir: str, started: float | None = None) -> dict:
  """Runs a config in workdir, resuming the run that is there; returns the final figures of the report.

  started: time.time() at which the process started, for the time to first loss. Raises ConfigError before any work for
  what the user can put right.
  """
  started = time.time() if started is None else started
  if '://' in str(workdir):
    raise ConfigError(f'--workdir: {workdir} is a bucket; mount it (gcsfuse) and name the folder it is mounted at')
  workdir = pathlib.Path(workdir)
  if cfg.mesh.distributed:
    sharding.initialize_hosts()
  mesh = sharding.make_mesh(cfg.mesh)
  check_rows(cfg, mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  if cfg.log.compile_cache:
    jax.config.update('jax_compilation_cache_dir', str(store.cache_folder(cfg.data) / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  with jax.set_mesh(mesh), Run(cfg, workdir, mesh, started) as run:
    run.setup()
    run.loop()
    return run.finish()


def check_rows(cfg: config_lib.Config, mesh) -> None:
  """Batch rows must divide among microbatches and devices, and feed the model that is asked for."""
  if cfg.model.encoder_layers:
    raise ConfigError(f'config.model.encoder_layers: {cfg.model.encoder_layers}; training from text feeds a decoder '
                      'alone; set it to 0 (an encoder-decoder trains through train.step, with source_BS in batches)')
  ways = sharding.axis_size(mesh, sharding.ACT['B'])
  for key, rows in (('train.batch_size', cfg.train.batch_size), ('eval.batch_size', eval_rows(cfg))):
    parts = max(cfg.train.accumulate, 1) * ways if key == 'train.batch_size' else ways
    if rows % parts:
      raise ConfigError(f'config.{key}: {rows} rows do not divide among {parts} '
                        f'(data x fsdp devices{" x microbatches" if parts != ways else ""})')


def eval_rows(cfg: config_lib.Config) -> int:
  return cfg.eval.batch_size or cfg.train.batch_size


def start_profile(folder) -> None:
  """Traces devices and XLA, not Python: tracing Python crashes the process where another thread ends meanwhile, as
  those that write a checkpoint do."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(str(folder), profiler_options=options)


class Run:
  """One process's part of a training run; its methods are called in order by `train`."""

  def __init__(self, cfg, workdir, mesh, started):
    self.cfg, self.workdir, self.mesh, self.started = cfg, workdir, mesh, started
    self.earlier = 0.0               # seconds of the budget that earlier processes of this run used
    self.turned = None               # the step at which validation turned, once warned of
    self.planned = False             # a budget in minutes has been turned into steps
    self.stop = False                # set by a signal: save at the next step and end
    self.profiling = False
    self.cleanup = contextlib.ExitStack()
    self.listening = self.cleanup.enter_context(contextlib.ExitStack())      # to signals

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    self.cleanup.close()
    if kind is not None:
      with contextlib.suppress(OSError):
        self.workdir.rmdir()         # succeeds where it is empty: a run that could not start leaves no folder

  # Setup ------------------------------------------------------------------------------------------------------------

  def setup(self) -> None:
    """Data, model, state, compiled steps; then the banner."""
    cfg = self.cfg
    self.clock = metrics_lib.Clock(self.workdir)
    self.energy = metrics_lib.Energy(cfg.log)
    self.cleanup.callback(self.energy.close)
    checkpoint_lib.require_one_sound(self.workdir)
    with self.clock('input'):
      self.tokenizer = self.make_tokenizer()
      self.stores = store.prepare(cfg.data, self.tokenizer, progress=cfg.log.progress)
      self.batches = batches_lib.Batches(self.stores.train, self.stores.weights, cfg.data, cfg.train, self.tokenizer)
      self.evaluations = [
          batches_lib.EvalBatches(s, cfg.data, eval_rows(cfg), self.tokenizer, cfg.train.objective,
                                  self.rows(eval_rows(cfg))) for s in self.stores.valid]
    self.model = config_lib.derive(cfg.model, self.tokenizer.vocab_size, cfg.data.length)
    if self.model.vocab_size < self.tokenizer.vocab_size:
      raise ConfigError(f'config.model.vocab_size: {self.model.vocab_size} is smaller than the tokenizer\'s '
                        f'{self.tokenizer.vocab_size}')
    self.check_prompts()
    dtype = attention.compute_dtype(self.model.dtype)
    self.kernel, self.kernel_reason = attention.choose(
        self.model, jax.default_backend(), dtype, cfg.data.length, cfg.data.packing == 'pack')

    self.microbatches = step_lib.microbatches(cfg, sharding.axis_size(self.mesh, sharding.ACT['B']))
    key = jax.random.key(cfg.train.seed)
    abstract_params = jax.eval_shape(lambda: transformer.init(self.model, key))
    self.tx = optimizer_lib.make(cfg.optimizer, abstract_params)
    init = lambda key: step_lib.init_state(cfg, self.model, self.tx, key)
    abstract = jax.eval_shape(init, key)
    self.shardings = step_lib.state_shardings(abstract, self.tx, self.mesh)
    self.abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract,
                                 self.shardings)
    latest = checkpoint_lib.latest_step(self.workdir)
    if latest is None and jax.process_index() == 0:
      self.tokenizer.save(self.workdir / 'tokenizer')
    self.wait_for_all('tokenizer')
    self.checkpoints = checkpoint_lib.Checkpointer(self.workdir, cfg.checkpoint.keep, config_lib.to_dict(cfg),
                                                   cfg.checkpoint.resume)
    self.cleanup.callback(self.checkpoints.close)
    self.banner(abstract_params)
    if latest is not None:
      self.resume(latest)
    else:
      with self.clock('compile'):
        # Drawing random numbers runs once but takes XLA's CPU compiler longer than the whole step (10 s or 2 s).
        options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
        self.state = jax.jit(init, out_shardings=self.shardings, compiler_options=options)(key)
      if cfg.init_from:
        self.start_from(cfg.init_from)
    self.first_step = int(self.state['step'])
    self.compile()

  def check_prompts(self) -> None:
    """Raises ConfigError for prompts that this model could not continue, before it is trained."""
    cfg = self.cfg.eval
    if self.model.attention == 'bidirectional':
      return
    try:
      rows = sampling.encode(self.model, self.tokenizer, [*cfg.prompts, *('',) * cfg.samples])
    except ConfigError as e:
      raise ConfigError(f'config.eval.prompts and eval.samples (empty prompts): {e}') from e
    longest = max(map(len, rows), default=0)
    if longest >= self.model.max_length:
      raise ConfigError(f'config.eval.prompts: one has {longest} tokens, the model reads {self.model.max_length} '
                        '(data.length); shorten it')

  def make_tokenizer(self):
    """The run's own tokenizer where it has one, or that of the run it starts from: what a model was trained with never
    changes under it."""
    if checkpoint_lib.latest_step(self.workdir) is not None:
      before = checkpoint_lib.read_meta(self.workdir).config
      changed = {key: pair for key, pair in config_lib.diff(config_lib.build(before), self.cfg).items()
                 if key.startswith(('model.', 'tokenizer.')) and key not in FREE}
      if changed:
        text = '; '.join(f'{key} was {old!r}, is {new!r}' for key, (old, new) in changed.items())
        raise ConfigError(f'--workdir: {self.workdir} was trained with another config: {text}; set it as it was, name '
                          'another folder, or start a new run from these weights with --config.init_from')
      return tokenizer_lib.load(self.workdir / 'tokenizer')
    if self.cfg.init_from:
      return tokenizer_lib.load(checkpoint_lib.read_meta(self.cfg.init_from).tokenizer)
    return prepare.tokenizer(self.cfg)

  def resume(self, latest: int) -> None:
    """Takes the state of the newest checkpoint; a new number of steps, or budget, is taken from the config."""
    self.state = checkpoint_lib.restore(self.workdir, latest, self.abstract)
    meta = checkpoint_lib.read_meta(self.workdir, latest)
    self.earlier = meta.extra['seconds']
    budget = meta.config['train']['minutes'], meta.config['train']['steps']
    if not self.cfg.train.minutes or budget != (self.cfg.train.minutes, self.cfg.train.steps):
      self.set_horizon(self.cfg.train.steps or UNKNOWN)
    print(f'resuming {self.workdir} at step {latest}', flush=True)

  def start_from(self, path: str) -> None:
    """Takes the weights of another run; its tokenizer came with them."""
    params = checkpoint_lib.restore_params(path, mesh=self.mesh)
    shapes = lambda tree: {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    ours, theirs = shapes(self.state['params']), shapes(params)
    if ours != theirs:
      wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
      raise ConfigError(f'config.init_from: {path} has another model; differing: {", ".join(wrong[:8])}')
    self.state['params'] = params
    if 'ema' in self.state:
      self.state['ema'] = jax.tree.map(jnp.copy, params)
    print(f'starting from the weights and the tokenizer of {path}', flush=True)

  def compile(self) -> None:
    """Compiles the train step ahead of time: the loop can then never compile again, it would raise instead."""
    cfg = self.cfg
    step = step_lib.make_train_step(cfg, self.model, self.tx, self.kernel, self.microbatches)
    with self.clock('compile'):
      batch = sharding.put_batch(self.batches(self.first_step, self.rows()), self.mesh)
      self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None),
                                compiler_options=step_lib.compiler_options()).lower(self.abstract, batch).compile()
    self.eval_step = jax.jit(step_lib.make_eval_step(cfg, self.model, self.kernel),
                             compiler_options=step_lib.compiler_options())

  def rows(self, batch_size: int | None = None) -> tuple[int, int]:
    """The rows of the global batch that this process feeds."""
    return sharding.local_rows(batch_size or self.cfg.train.batch_size, self.mesh)

  def banner(self, params) -> None:
    """What runs where: nothing that changes speed or numbers is silent."""
    if jax.process_index():
      return
    cfg, device = self.cfg, jax.devices()[0]
    mesh = ' x '.join(f'{n} {a}' for a, n in self.mesh.shape.items() if n > 1) or 'one device'
    source = ' + '.join(s.label for s in self.stores.train)
    flops = metrics_lib.flops_per_token(self.model, cfg.data.length)
    lines = [
        ('device', f'{jax.device_count()} x {device.device_kind} ({device.platform}), {jax.process_count()} '
                   'process(es)'),
        ('mesh', mesh + (', kv heads replicated over tensor' if sharding.replicated_kv(params, self.mesh) else '')),
        ('model', f'{transformer.count(params):,} parameters, {self.model.layers} layers, width {self.model.width}, '
                  f'{self.model.heads} heads, vocabulary {self.model.vocab_size:,}'),
        ('compute', f'{attention.compute_dtype(self.model.dtype)} matrix products, attention kernel {self.kernel} '
                    f'({self.kernel_reason}), remat {self.model.remat}, {flops["causal"] / 1e6:.3g} MFLOP/token'),
        ('data', f'{source}: {sum(s.n_tokens for s in self.stores.train):,} training tokens, '
                 f'{sum(s.n_tokens for s in self.stores.valid):,} held out, {self.tokenizer.kind} tokenizer'),
        ('step', f'{cfg.train.batch_size} x {cfg.data.length} tokens, {self.microbatches} microbatch(es), '
                 f'{cfg.optimizer.name}, {f"{cfg.train.minutes:g} minutes" if cfg.train.minutes else cfg.train.steps} '
                 f'{"" if cfg.train.minutes else "steps"}'),
        ('run', str(self.workdir))]
    for name, text in lines:
      print(f'{name:>8}  {text.strip()}', flush=True)

  # The loop ---------------------------------------------------------------------------------------------------------

  def loop(self) -> None:
    cfg, step = self.cfg, self.first_step
    horizon = self.provisional_horizon(step)
    self.logger = metrics_lib.Logger(
        self.workdir, cfg.log, horizon % UNKNOWN, clock=self.clock,
        tokens_per_step=cfg.train.batch_size * cfg.data.length,
        flops_per_token=metrics_lib.flops_per_token(self.model, cfg.data.length)['causal'],
        peak=metrics_lib.peak_flops().flops * jax.device_count(), resumed_step=step)
    self.cleanup.callback(self.logger.close)
    self.valid, self.skipped = self.past_valid(), 0
    self.listening.enter_context(self.signals())
    first, last = (int(x) for x in (cfg.log.profile or '0:-1').split(':'))
    profiled = range(first, last + 1)
    self.cleanup.callback(self.stop_profile)
    prefetch = self.batches.prefetch(step, rows=self.rows(), workers=cfg.data.workers)
    self.cleanup.callback(prefetch.close)
    self.begun, pending = time.monotonic(), None
    while step < horizon and not self.stop:
      if step in profiled and not self.profiling:
        start_profile(self.workdir / 'profile')
        self.profiling = True
      with self.clock('input'):
        batch = sharding.put_batch(next(prefetch)[1], self.mesh)
      with self.clock('step'):
        self.state, metrics = self.train_step(self.state, batch)
        if pending is not None:
          self.log(*pending)                # step n - 1, while step n runs
        pending = step, metrics
      step += 1
      if self.profiling and (step not in profiled or step >= horizon or self.stop):
        jax.block_until_ready(self.state)
        self.stop_profile()
      if cfg.train.minutes and step < horizon:
        horizon = self.plan(step, horizon)
      evaluating = step < horizon and self.due(step, cfg.eval.every)
      saving = step < horizon and self.due(step, cfg.checkpoint.every)
      if evaluating or saving:
        pending = self.log(*pending)        # first, so that no row is lost where a kill comes after the checkpoint
      if evaluating:
        self.evaluate(step, cfg.eval.batches)
        self.sample(step, cfg.eval.prompts)
      if saving:
        self.save(step)
    if pending is not None:
      self.log(*pending)
    self.step = step
    if step > self.first_step:
      self.save(step)

  def stop_profile(self) -> None:
    """Writes the trace, also where an error ends the loop inside the range."""
    if self.profiling:
      self.profiling = False
      jax.profiler.stop_trace()
      print(f'profile of steps {self.cfg.log.profile} in {self.workdir / "profile"}', flush=True)

  def due(self, step, every) -> bool:
    return bool(every) and step % every == 0

  def log(self, step, metrics) -> None:
    """Reads one step's metrics back (the only wait of the loop) and logs them; a skipped step is always reported."""
    if step == self.first_step:
      loss = float(metrics['loss/train'])
      print(f'time to first loss {time.time() - self.started:.1f} s (loss {loss:.4f})', flush=True)
    if metrics['step/skipped']:
      self.skipped += 1
      loss, norm, tokens = (float(metrics[name]) for name in ('loss/train', 'grads/norm', 'tokens'))
      self.logger.warn(f'step {step}: loss {loss}, gradient norm {norm}, {tokens:g} tokens: nothing was updated; '
                       f'documents: {self.documents(step)}')
      finite = math.isfinite(loss) and math.isfinite(norm)     # then it had no tokens, which harms nothing
      if self.cfg.train.on_nonfinite == 'stop' and not finite:
        self.save(int(self.state['step']))
        raise ConfigError(f'step {step}: loss or gradients are not finite; the last sound state is saved. Lower '
                          "optimizer.learning_rate, or set train.on_nonfinite='skip' to go on without such steps")
    if (step + 1) % self.cfg.log.every == 0 or step == self.first_step:
      self.logger.log(step + 1, {name: float(value) for name, value in metrics.items()})

  def documents(self, step) -> str:
    names = dict.fromkeys(name for row in self.batches.names(step) for name in row)
    return ', '.join(itertools.islice(names, 8)) + (f' and {len(names) - 8} more' if len(names) > 8 else '')

  @contextlib.contextmanager
  def signals(self):
    """SIGTERM and Ctrl-C: finish the step, save, end; a second Ctrl-C ends at once."""
    def handle(number, frame):
      if self.stop:
        raise KeyboardInterrupt
      self.stop = True
      print(f'{signal.Signals(number).name}: saving at the end of this step (again: stop at once)', file=sys.stderr)
    try:
      old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:                       # not the main thread (a notebook server): leave the signals alone
      old = {}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  # A budget of minutes ------------------------------------------------------------------------------------------------

  def provisional_horizon(self, step) -> int:
    if not self.cfg.train.minutes:
      return self.cfg.train.steps
    if step:
      horizon = int(self.state['horizon'])
      self.planned = horizon < (self.cfg.train.steps or UNKNOWN)
      return horizon
    horizon = self.cfg.train.steps or UNKNOWN
    self.set_horizon(horizon)
    return horizon

  def set_horizon(self, horizon: int) -> None:
    self.state['horizon'] = jax.device_put(np.int32(horizon), self.shardings['horizon'])

  def plan(self, step: int, horizon: int) -> int:
    """The number of steps that fit the budget at the speed so far. Set once after CALIBRATE steps, and with the wsd
    schedule again every CALIBRATE steps until the decay starts, since its stable phase does not depend on it. All
    processes must agree, so process 0 decides."""
    done = step - self.first_step
    if done == 2:
      self.calibrated = time.monotonic(), step      # the first steps pay for warming up
    wsd = self.cfg.optimizer.schedule == 'wsd'
    decaying = step >= (1 - self.cfg.optimizer.decay_fraction) * horizon
    slow = done == 5                                # a first look: perhaps the budget ends before CALIBRATE steps
    if not slow and (done < CALIBRATE or step % CALIBRATE) or decaying or (self.planned and not wsd):
      return horizon
    jax.block_until_ready(self.state['step'])
    since, first = self.calibrated
    pace = (time.monotonic() - since) / (step - first)
    left = 60 * self.cfg.train.minutes - (time.monotonic() - self.begun) - self.earlier
    fits = self.agree(min(step + max(1, round(left / pace)), self.cfg.train.steps or UNKNOWN))
    if slow and fits > step + 2 * CALIBRATE:
      return horizon
    self.planned, horizon = True, fits
    self.set_horizon(horizon)
    self.logger.total_steps = horizon
    return horizon

  def wait_for_all(self, name: str) -> None:
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils
      multihost_utils.sync_global_devices(name)

  def agree(self, n: int) -> int:
    if jax.process_count() == 1:
      return n
    from jax.experimental import multihost_utils
    return int(multihost_utils.broadcast_one_to_all(np.int32(n)))

  # Evaluation, samples, checkpoints -----------------------------------------------------------------------------------

  def evaluate(self, step: int, limit: int | None) -> dict[str, float]:
    """Loss in nats per token, and bits per byte, on held-out text: `limit` batches of each source, None for all."""
    with self.clock('eval'):
      params = self.state.get('ema', self.state['params'])
      sums, bits = [], 0.0
      for held_out in self.evaluations:
        count = min(limit or len(held_out), len(held_out))
        chosen = [i * len(held_out) // count for i in range(count)]       # spread evenly over the text
        part = [self.eval_step(params, sharding.put_batch(held_out[i], self.mesh)) for i in chosen]
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
    rows = metrics_lib.read_jsonl(self.workdir / 'metrics.jsonl')
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
    with self.clock('checkpoint'):
      seconds = self.earlier + time.monotonic() - self.begun
      self.checkpoints.save(step, self.state, dict(seconds=seconds))

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
    self.listening.close()           # everything is saved: from here on a signal ends the process as usual
    if self.stop:
      print(f'stopped at step {self.step}; the same command resumes', flush=True)
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
      print(f'checkpoint  {self.workdir}\nreport      {page}\n'
            f"sample      python -m llm_jax.sample --model={self.workdir} --prompt='def main('", flush=True)
    return figures
