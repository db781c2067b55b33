"""bench train: the step that training runs, beside the same model in PyTorch and the machine's limit. Each is in a
process of its own; they take turns."""
import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile

from llm_jax import config as config_lib
from llm_jax import hardware as machine
from llm_jax.bench import hardware, import_torch, seconds_of, token_batch
from llm_jax.config import ConfigError

SIZES = ('layers', 'width', 'length', 'batch', 'vocab', 'remat', 'unroll', 'dtype', 'fp8', 'loss_chunk')   # of a step


def sizes_of(flags) -> dict:
  return {name: getattr(flags, name) for name in SIZES}


def model_of(flags) -> config_lib.Model:
  """nanoGPT's model: pre-norm LayerNorm without bias, learned positions, GELU, tied embeddings."""
  return config_lib.derive(config_lib.Model(
      vocab_size=flags.vocab, layers=flags.layers, width=flags.width, heads=flags.width // 64, max_length=flags.length,
      norm='layer', norm_eps=1e-5, positions='learned', mlp='gelu_exact', dtype=flags.dtype, remat=flags.remat,
      unroll=flags.unroll, fp8=flags.fp8))


class Ours:
  """The step that training runs, on a fixed random batch."""

  def __init__(self, flags, token_BT):
    import jax

    from llm_jax.models import attention, fp8, transformer
    from llm_jax.train import optimizer as optimizer_lib
    from llm_jax.train import step as step_lib
    machine.keep_memory()
    self.model = model_of(flags)
    optimizer = config_lib.Optimizer(learning_rate=1e-3, b2=0.99, schedule='constant', warmup_steps=0)
    cfg = config_lib.Config(model=self.model, data=config_lib.Data(length=flags.length), optimizer=optimizer,
                            train=config_lib.Train(batch_size=flags.batch, loss_chunk=flags.loss_chunk))
    if self.model.fp8:
      fp8.check(jax.default_backend(), attention.capability())
    self.kernel, self.kernel_reason = attention.choose(
        self.model, jax.default_backend(), attention.compute_dtype(self.model.dtype), flags.length, False)
    tx = optimizer_lib.make(optimizer, jax.eval_shape(lambda: transformer.init(self.model, jax.random.key(0))))
    self.state = jax.jit(lambda key: step_lib.init_state(cfg, self.model, tx, key))(jax.random.key(0))
    batch = dict(token_BT=token_BT[:, :-1], target_BT=token_BT[:, 1:], mask_BT=token_BT[:, 1:] * 0.0 + 1.0)
    self.batch = jax.device_put({k: v.astype('float32' if k == 'mask_BT' else 'int32') for k, v in batch.items()})
    self.compiled = step_lib.compile_train_step(cfg, self.model, tx, self.kernel, step_lib.microbatches(cfg, 1),
                                                self.state, self.batch)
    self.step = self.compiled.step

  def run(self, steps: int) -> float:
    """Loss after some steps; returns when they are done."""
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
    return float(metrics['loss/train'])

  def about(self) -> dict:
    from llm_jax.train import metrics
    peak, flops = metrics.peak_flops(), metrics.flops_per_token(self.model, self.model.max_length)
    what = f'attention kernel {self.kernel} ({self.kernel_reason}); remat {self.compiled.remat} ({self.compiled.why})'
    return dict(name='llm_jax', compile_s=self.compiled.seconds, hardware=hardware(), what=what, peak=peak.flops,
                source=peak.source, causal=flops['causal'], full=flops['full'])

  def explain(self, steps: int) -> list:
    """Where the time of a step goes, by part, beside each part's roofline; and the seconds of a step so observed."""
    import jax

    from llm_jax.train import explain
    with tempfile.TemporaryDirectory() as folder:
      explain.start(folder)
      seconds = seconds_of(lambda: self.run(steps)) / steps
      jax.profiler.stop_trace()
      try:
        found = explain.read(folder, self.step.as_text(), steps, seconds, 0.0, *explain.limits())
      except ValueError as e:
        return [[('not explained', str(e), '', '')], seconds]
    return [explain.rows(found), seconds]


def contestant(which: str, sizes: dict) -> None:
  """What runs in a process: answers each line of stdin, 'run 2' or 'explain 2', with a line of JSON."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)                      # what libraries print is no answer
  flags = argparse.Namespace(**sizes)
  token_BT = token_batch(flags)
  if which == 'llm_jax':
    if folder := os.environ.get('BENCH_CACHE'):
      machine.keep_programs(folder)
    run = Ours(flags, token_BT)
    about = run.about()
  else:
    from llm_jax.bench import torch_peer
    run = torch_peer.Torch(model_of(flags), token_BT, which == 'torch compiled')
    about = dict(name=run.name, compile_s=run.compile_s)
  run.run(2)
  print(json.dumps(about), file=answers, flush=True)
  for line in sys.stdin:
    what, steps = line.split()
    answer = seconds_of(functools.partial(run.run, int(steps))) if what == 'run' else run.explain(int(steps))
    print(json.dumps(answer), file=answers, flush=True)


class Process:
  """A contestant, which is ready once this is made."""

  def __init__(self, which: str, sizes: dict, folder: str):
    program = f'from llm_jax.bench import training; training.contestant({which!r}, {sizes!r})'
    env = os.environ | dict(BENCH_CACHE=folder, TORCHINDUCTOR_CACHE_DIR=f'{folder}/inductor')
    env.pop('JAX_COMPILATION_CACHE_DIR', None)
    env.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')     # it is alone on a GPU, as PyTorch is
    self.which, self.errors = which, tempfile.TemporaryFile('w+', dir=folder)
    self.process = subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=self.errors, text=True, env=env)
    try:
      self.about = self._answer()
    except BaseException:
      self.process.kill()
      self.end()
      raise

  def ask(self, what: str):
    with contextlib.suppress(BrokenPipeError):       # it has ended: the answer will say how
      print(what, file=self.process.stdin, flush=True)
    return self._answer()

  def _answer(self):
    line = self.process.stdout.readline()
    if line:
      return json.loads(line)
    code = self.process.wait()
    self.errors.seek(0)
    said = [line for line in self.errors.read().splitlines() if line.strip()]
    raise ConfigError(f'{self.which} ended with {code}: {" ".join(said[-3:])[-400:]}')

  def end(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()     # which ends it
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self.errors.close()


def train(flags) -> None:
  """Prints training tokens per second of ours, the peers and the machine's limit. On an accelerator one process at a
  time has the memory, each twice; on a CPU all wait for their turns."""
  if flags.width % 64:
    raise ConfigError(f'--width: expected a multiple of 64 (the width of a head), got {flags.width}')
  names = ['llm_jax']
  if flags.peer == 'torch':
    import_torch()
    names += ['torch eager', 'torch compiled'][:1 + flags.compiled]
  alone = machine.accelerated()
  turns = [n for n in (flags.rounds - flags.rounds // 2, flags.rounds // 2) if n] if alone else [1] * flags.rounds
  tokens = flags.steps * flags.batch * flags.length
  running, about, explained = {}, {}, None
  seconds = {name: [] for name in names}
  with tempfile.TemporaryDirectory() as folder:
    try:
      for turn, rounds in enumerate(turns):
        for name in list(seconds):
          try:
            run = running[name] = running.get(name) or Process(name, sizes_of(flags), folder)
            about.setdefault(name, run.about)
            seconds[name] += [run.ask(f'run {flags.steps}') for _ in range(rounds)]
            if name == 'llm_jax' and flags.explain and turn == len(turns) - 1:
              explained = run.ask(f'explain {flags.steps}')
          except ConfigError as e:
            if name == 'llm_jax':
              raise
            print(f'{e}', flush=True)
            del seconds[name]                    # the others go on
            if name in running:
              running.pop(name).end()
            continue
          if alone:
            print(f'{name:>24}  turn {turn + 1}: {tokens / statistics.median(seconds[name]):,.0f} tok/s', flush=True)
            running[name].end()
            del running[name]
    finally:
      for run in running.values():
        run.end()
  report(flags, seconds, about, explained, tokens)


def report(flags, seconds: dict, about: dict, explained: list | None, tokens: int) -> None:
  ours, mine = about['llm_jax'], seconds['llm_jax']
  print(f'train {flags.layers} x {flags.width}, {flags.batch} x {flags.length} tokens, vocabulary {flags.vocab}, '
        f'{flags.rounds} rounds of {flags.steps} steps, medians; {ours["hardware"]}\n{"":>24}  {ours["what"]}'
        f'{f"; loss in chunks of {flags.loss_chunk}" * bool(flags.loss_chunk)}'
        f'{"; a loop over the layers" * (not flags.unroll)}'
        f'{"; float8 in the layers, MFU of the peak in bfloat16" * flags.fp8}')
  for name, times in seconds.items():
    rate = tokens / statistics.median(times)
    ratio = statistics.median(theirs / own for theirs, own in zip(times, mine))
    print(f'{about[name]["name"]:>24}  {rate:>9,.0f} tok/s  MFU {rate * ours["causal"] / ours["peak"]:.1%} '
          f'({rate * ours["full"] / ours["peak"]:.1%} uncausal)  '
          f'ours/this {ratio:.2f}x  compile {about[name]["compile_s"]:.1f} s')
  if explained:
    rows, observed = explained
    for part, spent, share, least in rows:
      print(f'{part:>24}  {spent:>12}  {share:>6}' + (f'  roofline {least}' if least else ''))
    print(f'{"a step":>24}  {1e3 * observed:>9.2f} ms  of a profiled step; '
          f'{1e3 * statistics.median(mine) / flags.steps:.2f} ms of others')
  print(f'{"limit":>24}  {ours["peak"] / ours["causal"]:>9,.0f} tok/s  ({ours["source"]})')
