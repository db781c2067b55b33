"""Speed, each figure beside a peer and the machine's limit, measured in one run:

  python -m llm_jax.bench train [--peer=torch] [--layers=6 --width=384 --length=256 --batch=16] [--rounds=7]
  python -m llm_jax.bench save [--mb=400] [--rounds=7]        checkpoints, beside Orbax alone
  python -m llm_jax.bench decode --model=PATH [--peer=torch] [--streams=32] [--new=64]   one stream and many, beside a
                                                              sweep over the weights, and transformers

  python -m llm_jax.bench serve --model=PATH [--streams=8] [--new=64]     a server under load: first and further tokens

Rounds alternate between ours and the peer's, so that a machine whose speed drifts slows both; medians are printed.
Results that were kept are in docs/benchmarks.md. The peer needs the `parity` extra.
"""
import math
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

VOCAB = 65       # characters of tiny Shakespeare
SIZES = dict(layers=6, width=384, length=256, batch=16, rounds=7, steps=2)


def model_of(flags) -> config_lib.Model:
  """nanoGPT's model: pre-norm LayerNorm without bias, learned positions, GELU, tied embeddings."""
  return config_lib.derive(config_lib.Model(
      vocab_size=VOCAB, layers=flags.layers, width=flags.width, heads=flags.width // 64, max_length=flags.length,
      norm='layer', norm_eps=1e-5, positions='learned', mlp='gelu_exact', dtype=flags.dtype))


def optimizer_of() -> config_lib.Optimizer:
  return config_lib.Optimizer(learning_rate=1e-3, b2=0.99, schedule='constant', warmup_steps=0)


class Ours:
  """The step that training runs, on a fixed random batch."""
  name = 'llm_jax'

  def __init__(self, flags, token_BT):
    import jax

    from llm_jax.models import attention, layers, transformer
    from llm_jax.train import optimizer as optimizer_lib
    from llm_jax.train import step as step_lib
    model = model_of(flags)
    cfg = config_lib.Config(model=model, data=config_lib.Data(length=flags.length), optimizer=optimizer_of(),
                            train=config_lib.Train(batch_size=flags.batch))
    kernel, self.note = attention.choose(model, jax.default_backend(), attention.compute_dtype(model.dtype),
                                         flags.length, False)
    tx = optimizer_lib.make(cfg.optimizer, jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))))
    self.state = jax.jit(lambda key: step_lib.init_state(cfg, model, tx, key))(jax.random.key(0))
    self.batch = dict(token_BT=token_BT[:, :-1], target_BT=token_BT[:, 1:], mask_BT=token_BT[:, 1:] * 0.0 + 1.0)
    self.batch = jax.device_put({k: v.astype('float32' if k == 'mask_BT' else 'int32') for k, v in self.batch.items()})
    start = time.perf_counter()
    step = step_lib.make_train_step(cfg, model, tx, kernel, step_lib.microbatches(cfg, 1))
    self.step = jax.jit(step, donate_argnums=0, compiler_options=layers.compiler_options()).lower(
        self.state, self.batch).compile()
    self.compile_s = time.perf_counter() - start

  def run(self, steps: int) -> float:
    """Loss after some steps; returns when they are done."""
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
    return float(metrics['loss/train'])


class Torch:
  """The same model and optimizer in PyTorch, eager or compiled, with its fused attention and AdamW."""

  def __init__(self, flags, token_BT, compiled: bool):
    try:
      import torch
    except ImportError as e:
      raise ConfigError("--peer=torch: PyTorch is not installed; pip install -e '.[parity]'") from e
    self.torch, self.name = torch, f'torch {torch.__version__} {"compiled" if compiled else "eager"}'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    self.dtype = torch.bfloat16 if device == 'cuda' and flags.dtype != 'float32' else torch.float32
    self.device, self.model = device, torch_gpt(torch, model_of(flags)).to(device)
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
                                       fused=True)
    token_BT = torch.from_numpy(token_BT).long().to(device)
    self.inputs, self.targets = token_BT[:, :-1].contiguous(), token_BT[:, 1:].contiguous()
    self.forward = torch.compile(self.model) if compiled else self.model
    start = time.perf_counter()
    self.run(1)
    self.compile_s = time.perf_counter() - start

  def run(self, steps: int) -> float:
    torch = self.torch
    for _ in range(steps):
      with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
        logits = self.forward(self.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      self.optimizer.step()
    return loss.item()


def torch_gpt(torch, cfg: config_lib.Model):
  """The bench's model as torch modules."""
  nn, functional = torch.nn, torch.nn.functional

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      D = cfg.width
      self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
      self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
      self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
      B, T, D = x.shape
      q, k, v = (y.view(B, T, cfg.heads, -1).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(D, -1))
      y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
      return x + self.down(functional.gelu(self.up(self.norm_2(x))))

  class Gpt(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed, self.position = nn.Embedding(cfg.vocab_size, cfg.width), nn.Embedding(cfg.max_length, cfg.width)
      self.blocks = nn.ModuleList(Block() for _ in range(cfg.layers))
      self.norm = nn.LayerNorm(cfg.width, bias=False)
      nn.init.normal_(self.embed.weight, std=0.02)
      nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, token):
      x = self.embed(token) + self.position.weight[:token.shape[1]]
      for block in self.blocks:
        x = block(x)
      return self.norm(x) @ self.embed.weight.T

  return Gpt()


def train(flags) -> None:
  """Prints training tokens per second of ours, the peers and the machine's limit."""
  import jax
  import numpy as np

  from llm_jax.train import metrics
  if flags.width % 64:
    raise ConfigError(f'--width: expected a multiple of 64 (the width of a head), got {flags.width}')
  token_BT = np.random.default_rng(0).integers(0, VOCAB, (flags.batch, flags.length + 1), dtype=np.int32)
  runs = [Ours(flags, token_BT)]
  if flags.peer == 'torch':
    runs += [Torch(flags, token_BT, compiled) for compiled in ((False, True) if flags.compiled else (False,))]
  peak = metrics.peak_flops()
  flops = metrics.flops_per_token(model_of(flags), flags.length)
  for run in runs:
    run.run(2)
  seconds = {run.name: [] for run in runs}
  for _ in range(flags.rounds):
    for run in runs:
      start = time.perf_counter()
      run.run(flags.steps)
      seconds[run.name].append(time.perf_counter() - start)
  tokens = flags.steps * flags.batch * flags.length
  print(f'train {flags.layers} x {flags.width}, {flags.batch} x {flags.length} tokens, {flags.rounds} rounds of '
        f'{flags.steps} steps, medians; {hardware()}, jax {jax.__version__}')
  ours = seconds[runs[0].name]
  for run in runs:
    rate = tokens / statistics.median(seconds[run.name])
    ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds[run.name], ours))
    print(f'{run.name:>24}  {rate:>9,.0f} tok/s  MFU {rate * flops["causal"] / peak.flops:.1%}  '
          f'ours/this {ratio:.2f}x  compile {run.compile_s:.1f} s')
  print(f'{"limit":>24}  {peak.flops / flops["causal"]:>9,.0f} tok/s  ({peak.source})')


def save(flags) -> None:
  """Prints how long a save holds the caller and how long it takes to be complete, ours and Orbax alone, and what
  verifying costs a restore."""
  import jax
  import orbax.checkpoint as ocp

  from llm_jax import checkpoint
  width = 1024
  layers = max(1, round(flags.mb * 1e6 / (3 * 4 * 4 * width * width)))
  params = lambda seed: {'w_up_DF': jax.random.normal(jax.random.key(seed), (layers, width, 4 * width))}
  state = dict(params=params(0), step=jax.numpy.int32(0), opt_state=dict(mu=params(1), nu=params(2)))
  jax.block_until_ready(state)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  held, whole = {'llm_jax': [], 'orbax': []}, {'llm_jax': [], 'orbax': []}
  with tempfile.TemporaryDirectory() as folder:
    run = pathlib.Path(folder) / 'run'
    (run / 'tokenizer').mkdir(parents=True)
    (run / 'tokenizer' / 'meta.json').write_text('{}')
    alone = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    with checkpoint.Checkpointer(run, 1, {}) as ours:
      for i in range(flags.rounds + 1):                  # the first warms up
        start = time.perf_counter()
        held['llm_jax'].append(ours.save(i + 1, state))
        ours.wait()
        whole['llm_jax'].append(time.perf_counter() - start)
        start = time.perf_counter()
        items = dict(params=state['params'], train={k: v for k, v in state.items() if k != 'params'})
        alone.save(pathlib.Path(folder) / f'{i}', args=ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}))
        held['orbax'].append(time.perf_counter() - start)
        alone.wait_until_finished()
        whole['orbax'].append(time.perf_counter() - start)
        shutil.rmtree(pathlib.Path(folder) / f'{i}')
    alone.close()
    print(f'save {size:.0f} MB, {flags.rounds} rounds, medians; {hardware()}, jax {jax.__version__}')
    for what, seconds in (('holds the caller', held), ('is complete after', whole)):
      ours_s, theirs_s = seconds['llm_jax'][1:], seconds['orbax'][1:]
      ratio = statistics.median(a / b for a, b in zip(ours_s, theirs_s))
      print(f'{what:>24}  {statistics.median(ours_s):.3f} s  orbax alone {statistics.median(theirs_s):.3f} s  '
            f'ours/orbax {ratio:.2f}x')
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    read = {True: [], False: []}
    for _ in range(flags.rounds):
      for verify in read:
        start = time.perf_counter()
        jax.block_until_ready(checkpoint.restore(run, None, abstract, verify=verify))
        read[verify].append(time.perf_counter() - start)
    print(f'{"restore, verified":>24}  {statistics.median(read[True]):.3f} s  not verified '
          f'{statistics.median(read[False]):.3f} s')


def decode(flags) -> None:
  """Prints tokens per second of one stream and of many, of a bare sweep over the same weights (what reading them once a
  token allows), and of transformers' generate; with --text, what few bits do to a text's perplexity."""
  import jax

  from llm_jax.generate import engine
  from llm_jax.generate.options import Options
  from llm_jax.interop import load
  if not flags.model:
    raise ConfigError('--model: expected the path of a model to decode with')
  found = load.load(flags.model, dtype=None if flags.dtype == 'auto' else flags.dtype)
  prompt = found.tokenizer.encode('The capital of France is').tolist()

  def streams(n, ahead=0):
    made = engine.Engine(found.shape, found.params, slots=n, vocab_size=found.tokenizer.vocab_size, ahead=ahead,
                         length=min(found.shape.max_length, 512), weights=flags.weights, cache=flags.cache)
    def run():
      requests = [engine.Request(prompt, Options(max_tokens=flags.new), salt=str(i)) for i in range(n)]
      start = time.perf_counter()
      for request in requests:
        made.submit(request)
      made.run()
      return sum(len(request.tokens) for request in requests) / (time.perf_counter() - start)
    return made, run

  made, one = streams(1)
  if flags.text:
    perplexity(made, found.tokenizer, flags)
  runs = {'llm_jax': one} if flags.weights else {'sweep': sweep(made, flags.new), 'llm_jax': one}
  runs[f'llm_jax, {flags.streams} streams'] = streams(flags.streams)[1]
  if flags.peer == 'torch':
    runs |= torch_generate(found, prompt, flags.new)
  for run in runs.values():
    run(), run()
  rates = {name: [] for name in runs}
  for _ in range(flags.rounds):
    for name, run in runs.items():
      rates[name].append(run())
  print(f'decode {os.path.basename(flags.model)}, {flags.new} tokens after {len(prompt)}, '
        f'{flags.weights or found.shape.dtype}, {flags.rounds} rounds, medians; {hardware()}, jax {jax.__version__}')
  for name, rate in rates.items():
    ratio = statistics.median(ours / this for ours, this in zip(rates['llm_jax'], rate))
    print(f'{name:>24}  {statistics.median(rate):>8.1f} tok/s  one stream/this {ratio:.2f}x')


def perplexity(made, tokenizer, flags) -> None:
  """Prints the perplexity of a text's first 16 windows of 512 tokens, read through the engine's weights and cache."""
  import numpy as np

  from llm_jax.generate import engine, programs, score
  from llm_jax.models import attention, quantize
  dtype = attention.compute_dtype(made.cfg.dtype)
  W, T, part = 16, 512, engine.CHUNKS[-1]
  with open(flags.text, encoding='utf-8') as f:
    ids = tokenizer.encode(f.read(W * T * 20))[:W * T]
  if len(ids) < W * T:
    raise ConfigError(f'--text: {flags.text} has {len(ids)} tokens, expected at least {W * T}')
  made.state = programs.empty_state(made.plan, len(made.slots), T, made.stops, 0)
  total = 0.0
  for window in ids.reshape(W, 1, T):
    for start in range(0, T, part):
      token_BT = window[:, start:start + part]
      x_BTD = made.through(made.cfg, made.weights, 'cache', token_BT, np.zeros(1, np.int32),
                           np.full(1, start, np.int32), np.full(1, T, np.int32))
      after = np.append(token_BT[:, 1:], window[:, start + part:start + part + 1], 1)
      logp, *_ = score.next_tokens(made.weights[0], np.pad(after, ((0, 0), (0, part - after.shape[1]))), x_BTD)
      total += float(np.asarray(logp, np.float64)[:after.shape[1]].sum())
  print(f'perplexity {math.exp(-total / (W * (T - 1))):.3f} of {W} x {T} tokens of {os.path.basename(flags.text)}; '
        f'weights {flags.weights or dtype}, {quantize.nbytes(made.weights) / 1e6:.0f} MB; cache '
        f'{flags.cache or dtype}')
  made.state = None


def serve(flags) -> None:
  """Starts a server and prints how long its clients wait for the first token and between tokens, one alone and many at
  the same time: medians and the slowest hundredth."""
  import re
  import subprocess
  if not flags.model:
    raise ConfigError('--model: expected the path of a model to serve')
  command = [sys.executable, '-m', 'llm_jax.serve', f'--model={flags.model}', '--port=0', f'--slots={flags.streams}',
             '--length=512', f'--queue={flags.streams}']
  server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  try:
    found = next((m for line in server.stderr if (m := re.search(r'at http://(.*):(\d+)', line))), None)
    if found is None:
      raise ConfigError(f'the server did not start; try {" ".join(command)}')
    print(f'serve {os.path.basename(flags.model)}, {flags.new} tokens after about 100, {flags.rounds} requests a '
          f'stream; {hardware()}')
    for n in (1, flags.streams):
      first, between, rate = _load(found.group(1), int(found.group(2)), n, flags.rounds, flags.new)
      of = lambda times: f'{1e3 * statistics.median(times):.0f} / {1e3 * sorted(times)[int(0.99 * len(times))]:.0f} ms'
      print(f'{n:>6} stream(s)  {rate:>7.1f} tok/s  first token {of(first)}  between tokens {of(between)} (p50 / p99)')
  finally:
    server.terminate()
    server.wait(60)


def _load(host: str, port: int, streams: int, rounds: int, tokens: int) -> tuple[list[float], list[float], float]:
  """(seconds to each first token, seconds per further token, tokens per second) of so many clients, each with several
  requests one after the other."""
  import concurrent.futures
  import http.client
  import json

  def client(i):
    first, between = [], []
    for r in range(rounds):
      body = dict(prompt=f'Request {r} of client {i}: ' + 'tell me more. ' * 22, max_tokens=tokens, stream=True, seed=r,
                  logit_bias={'2': -100}, logprobs=0)
      connection = http.client.HTTPConnection(host, port, timeout=300)
      start = last = time.perf_counter()
      connection.request('POST', '/v1/completions', json.dumps(body))
      made = 0
      for line in connection.getresponse():
        if not line.startswith(b'data: {'):
          continue
        logprobs = json.loads(line[6:])['choices'][0].get('logprobs')
        if n := len(logprobs['tokens']) if logprobs else 0:
          now = time.perf_counter()
          if not made:
            first.append(now - start)
          elif n:
            between.append((now - last) / n)
          last, made = now, made + n
      connection.close()
    return first, between
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(streams) as pool:
    found = list(pool.map(client, range(streams)))
  seconds = time.perf_counter() - start
  return [x for f, _ in found for x in f], [x for _, b in found for x in b], streams * rounds * tokens / seconds


def sweep(made, tokens: int):
  """A function that multiplies a vector with every matrix of the model, as often as there are tokens, and returns how
  often a second."""
  import jax
  import jax.numpy as jnp

  from llm_jax.models import layers
  model, blocks = made.weights
  names = ('w_q', 'w_k', 'w_v', 'w_o', 'w_up', 'w_gate', 'w_down')
  flat = [(str(path), x) for block in blocks for path, x in jax.tree_util.tree_leaves_with_path(block)]
  matrices = [x.reshape(-1, x.shape[-1]) if 'w_o' in path else x.reshape(x.shape[0], -1) for path, x in flat
              if x.ndim > 1 and any(name in path for name in names)]
  matrices.append(model.unembed_DV[...] if hasattr(model, 'unembed_DV') else model.embed_VD[...].T)

  def run(matrices):
    def token(_, s):
      for w in matrices:
        s = 1 + 1e-9 * layers.settle(layers.settle(jnp.full((1, w.shape[0]), s, w.dtype)) @ w).max()
      return s.astype(jnp.float32)
    return jax.lax.fori_loop(0, tokens, token, jnp.float32(1))
  compiled = jax.jit(run, compiler_options=layers.compiler_options()).lower(matrices).compile()

  def rate():
    start = time.perf_counter()
    compiled(matrices).block_until_ready()
    return tokens / (time.perf_counter() - start)
  return rate


def torch_generate(found, prompt, tokens: int) -> dict:
  """{name: tokens per second} of transformers with the same weights, in float32 and bfloat16."""
  try:
    import torch
    import transformers
  except ImportError as e:
    raise ConfigError("--peer=torch needs torch and transformers; pip install -e '.[parity]'") from e
  from llm_jax.interop import save
  transformers.utils.logging.set_verbosity_error()
  with tempfile.TemporaryDirectory() as folder:
    save.to_hf(found, pathlib.Path(folder) / 'x', 'float32')
    models = {dtype: transformers.AutoModelForCausalLM.from_pretrained(
        pathlib.Path(folder) / 'x', dtype=getattr(torch, dtype)).eval() for dtype in ('float32', 'bfloat16')}
  ids = torch.tensor([prompt])

  def run(model):
    start = time.perf_counter()
    with torch.no_grad():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                           do_sample=False, pad_token_id=0)
    return (out.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
  return {f'transformers, {dtype}': lambda model=model: run(model) for dtype, model in models.items()}


def hardware() -> str:
  """The device and host in a few words."""
  import jax
  device = jax.devices()[0]
  return f'{device.device_kind}, {len(os.sched_getaffinity(0))} cores {platform.machine()}'


def main(argv: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.bench', __doc__)
  parser.add_argument('what', choices=('train', 'save', 'decode', 'serve'))
  parser.add_argument('--peer', choices=('none', 'torch'), default='none')
  parser.add_argument('--compiled', action='store_true', help='also torch.compile (slow to start)')
  parser.add_argument('--model', help='that decode and serve run')
  parser.add_argument('--streams', type=int, default=32, help='of decode and serve, at the same time')
  parser.add_argument('--new', type=int, default=64, help='tokens that decode and serve make')
  parser.add_argument('--weights', choices=('int8', 'int4'), default='', help='that decode computes with')
  parser.add_argument('--cache', choices=('int8',), default='', help='of decode')
  parser.add_argument('--text', help='a file whose perplexity decode prints')
  parser.add_argument('--mb', type=int, default=400, help='of the state that save writes')
  parser.add_argument('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  with config_lib.one_line_errors('--debug' in argv):
    flags = parser.parse_args(argv)
    for name in ('mb', 'streams', 'new', *SIZES):
      if getattr(flags, name) <= 0:
        raise ConfigError(f'--{name}: expected a positive number, got {getattr(flags, name)}')
    dict(train=train, save=save, decode=decode, serve=serve)[flags.what](flags)


if __name__ == '__main__':
  main(sys.argv[1:])
