"""The typed configuration. A config file returns an ml_collections.ConfigDict; `parse` applies `--config.a.b=value`
overrides to it and `build` turns it, once, into the frozen dataclasses that the rest of the code reads. What each key
means is written in configs/base.py.

`ConfigError` is the one exception for what a user can put right: commands print it as one line and exit with status 2.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
import sys
import traceback
import types
import typing

from ml_collections import ConfigDict


class ConfigError(ValueError):
  """Something the user can put right; the message is one line: what was expected, what came, what to do."""


@dataclasses.dataclass(frozen=True)
class Model:
  """One Transformer. Letters are those of the legend in models/transformer.py."""
  vocab_size: int = 0
  layers: int = 4
  width: int = 256
  heads: int = 4
  kv_heads: int = 0
  head_dim: int = 0
  mlp_dim: int = 0
  max_length: int = 0
  norm: str = 'rms'
  norm_position: str = 'before'
  norm_eps: float = 1e-6
  norm_bias: bool = False
  norm_learned: bool = True
  norm_unit_offset: bool = False
  qk_norm: str = 'none'
  positions: str = 'rotary'
  rope_base: float = 10_000.0
  rope_base_local: float = 0.0
  rope_fraction: float = 1.0
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_original_length: int = 0
  rope_low_freq: float = 1.0
  rope_high_freq: float = 4.0
  rope_beta_fast: float = 32.0
  rope_beta_slow: float = 1.0
  rope_attention_factor: float = 0.0
  attention: str = 'causal'
  attention_bias: bool = False
  attention_out_bias: bool = False
  attention_scale: float = 0.0
  attention_softcap: float = 0.0
  windows: tuple[int, ...] = (0,)
  mlp: str = 'gelu'
  mlp_bias: bool = False
  experts: int = 0
  experts_per_token: int = 2
  expert_dim: int = 0
  shared_experts: int = 0
  expert_capacity: float = 0.0
  expert_exchange: str = 'fixed'
  expert_buffer: float = 0.0
  router: str = 'softmax'
  router_normalize: bool = True
  router_scale: float = 1.0
  router_bias: bool = False
  parallel_residual: bool = False
  tied_embeddings: bool = True
  embedding_scale: bool = False
  embedding_norm: bool = False
  logit_softcap: float = 0.0
  embedding_skips: bool = False
  value_skips: bool = False
  zero_init: bool = False
  init_scale: float = 1.0
  embedding_init: float = 0.02
  dropout: float = 0.0
  encoder_layers: int = 0
  dtype: str = 'auto'
  fp8: bool = False
  kernel: str = 'auto'
  remat: str = 'auto'
  unroll: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
  """One place documents come from; a mixture has several."""
  source: str = 'stdlib'
  path: str = ''
  field: str = 'text'
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Data:
  source: str = 'stdlib'
  path: str = ''
  field: str = 'text'
  mixture: tuple[Source, ...] = ()
  temperature: float = 1.0
  length: int = 256
  packing: str = 'concat'
  valid: str = 'hash'
  valid_fraction: float = 0.05
  valid_path: str = ''
  cache_dir: str = ''
  workers: int = 0
  max_bad_records: int = 0


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  kind: str = 'sentencepiece'
  path: str = ''
  vocab_size: int = 4096
  algorithm: str = 'bpe'
  train_mb: float = 8.0


@dataclasses.dataclass(frozen=True)
class Train:
  steps: int = 1000
  minutes: float = 0.0
  batch_size: int = 32
  accumulate: int = 0
  accumulate_dtype: str = 'float32'
  seed: int = 0
  objective: str = 'causal'
  z_loss: float = 0.0
  balance_loss: float = 0.01
  router_z_loss: float = 0.001
  router_bias_rate: float = 0.001
  label_smoothing: float = 0.0
  loss_chunk: int = 0
  ema: float = 0.0
  on_nonfinite: str = 'stop'
  spike_window: int = 0
  spike_sigmas: float = 6.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  name: str = 'adamw'
  learning_rate: float = 1e-3
  matrix_learning_rate: float = 0.02
  tuned_width: int = 0
  schedule: str = 'cosine'
  warmup_steps: int = 100
  decay_fraction: float = 0.4
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  momentum: float = 0.95
  muon_steps: int = 5
  muon_b2: float = 0.0
  weight_decay: float = 0.1
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices per axis; -1 on one axis takes what is left."""
  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  stage: int = 1
  interleave: int = 1
  distributed: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int = 500
  keep: int = 2
  keep_every: int = 0
  resume: bool = True
  verify: bool = True


@dataclasses.dataclass(frozen=True)
class Eval:
  every: int = 200
  batches: int = 16
  batch_size: int = 0
  prompts: tuple[str, ...] = ()
  samples: int = 0
  max_tokens: int = 128
  temperature: float = 0.8
  top_p: float = 0.95
  python: bool = False


@dataclasses.dataclass(frozen=True)
class Log:
  every: int = 10
  tensorboard: bool = True
  progress: str = 'auto'
  profile: str = ''
  compile_cache: bool = True
  co2_kg_per_kwh: float = 0.4
  cpu_watts_per_core: float = 10.0


@dataclasses.dataclass(frozen=True)
class Config:
  model: Model = Model()
  data: Data = Data()
  tokenizer: Tokenizer = Tokenizer()
  train: Train = Train()
  optimizer: Optimizer = Optimizer()
  mesh: Mesh = Mesh()
  checkpoint: Checkpoint = Checkpoint()
  eval: Eval = Eval()
  log: Log = Log()
  init_from: str = ''


CHOICES = {
    'model.norm': ('rms', 'layer'), 'model.norm_position': ('before', 'after', 'both', 'post'),
    'model.qk_norm': ('none', 'head', 'full'),
    'model.positions': ('rotary', 'learned', 'sinusoidal', 'alibi', 'none'),
    'model.rope_scaling': ('none', 'linear', 'yarn', 'llama3'),
    'model.attention': ('causal', 'prefix', 'bidirectional'),
    'model.mlp': ('gelu', 'gelu_exact', 'geglu', 'swiglu', 'relu2', 'relu'),
    'model.router': ('softmax', 'sigmoid'), 'model.expert_exchange': ('fixed', 'ragged'),
    'model.dtype': ('auto', 'float32', 'bfloat16'), 'model.kernel': ('auto', 'xla', 'cudnn', 'triton', 'splash'),
    'model.remat': ('auto', 'none', 'dots', 'full', 'offload'),
    'data.source': ('stdlib', 'text', 'jsonl', 'parquet', 'arrayrecord', 'tfds', 'mixture'),
    'data.packing': ('concat', 'pack'), 'data.valid': ('hash', 'tail', 'given'),
    'tokenizer.kind': ('byte', 'char', 'sentencepiece', 'hf'), 'tokenizer.algorithm': ('bpe', 'unigram'),
    'train.accumulate_dtype': ('float32', 'bfloat16'),
    'train.objective': ('causal', 'prefix', 'masked', 'span'), 'train.on_nonfinite': ('stop', 'skip'),
    'optimizer.name': ('adamw', 'adafactor', 'lion', 'muon'),
    'optimizer.muon_steps': (3, 4, 5, 6),
    'optimizer.schedule': ('constant', 'linear', 'cosine', 'inverse_sqrt', 'wsd'),
    'log.progress': ('auto', 'rich', 'lines'),
}
POSITIVE = ('model.layers', 'model.width', 'model.heads', 'data.length', 'data.temperature', 'train.batch_size',
            'checkpoint.keep', 'log.every', 'tokenizer.train_mb', 'tokenizer.vocab_size', 'model.init_scale',
            'model.rope_base', 'model.rope_factor', 'model.rope_fraction', 'eval.batches', 'eval.top_p',
            'train.spike_sigmas', 'model.router_scale', 'optimizer.eps')
AT_MOST_1 = ('model.rope_fraction', 'optimizer.decay_fraction', 'optimizer.final_fraction', 'eval.top_p')
BELOW_1 = ('model.dropout', 'train.label_smoothing', 'train.ema', 'optimizer.b1', 'optimizer.b2', 'optimizer.momentum',
           'optimizer.muon_b2')


def nearest(word: str, words) -> str:
  """'; nearest: x' for an error message, or every choice where nothing is near."""
  near = difflib.get_close_matches(str(word), list(map(str, words)), n=1, cutoff=0.5)
  return f'; nearest: {near[0]!r}' if near else f'; one of: {", ".join(map(str, words))}'


def load_file(spec: str) -> ConfigDict:
  """Runs a config file. 'configs/x.py' calls get_config(), 'configs/x.py:arg' calls get_config('arg')."""
  path, _, arg = spec.partition(':')
  if not pathlib.Path(path).is_file():
    near = [str(p) for p in pathlib.Path('configs').glob('*.py')]
    raise ConfigError(f'--config: no file {path!r}{nearest(path, near) if near else ""}')
  module_spec = importlib.util.spec_from_file_location('llm_jax_config_' + pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(module_spec)
  sys.path.insert(0, str(pathlib.Path(path).resolve().parent))    # so that a config can `import base`
  try:
    module_spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ConfigError(f'--config: {path} has no get_config()')
    return module.get_config(arg) if arg else module.get_config()
  except ConfigError:
    raise
  except Exception as e:
    raise ConfigError(f'--config: {path} failed: {type(e).__name__}: {e}') from e
  finally:
    sys.path.pop(0)


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets config.a.b from the text of `--config.a.b=text`, read as the type the key has."""
  node, *path, leaf = [config, *key.split('.')]
  for part in [*path, leaf]:
    if not isinstance(node, ConfigDict) or part not in node:
      names = list(node) if isinstance(node, ConfigDict) else []
      raise ConfigError(f'--config.{key}: no such key {part!r}{nearest(part, names)}')
    parent, node = node, node[part]
  if leaf == 'model' and not path:
    parent[leaf] = _model_group(text.removeprefix('preset(').removesuffix(')').strip('\'"'))
    return
  if isinstance(node, ConfigDict):
    raise ConfigError(f'--config.{key}: is a group; set one of its keys: {", ".join(node)}')
  with config.unlocked():
    parent[leaf] = text if isinstance(node, str) else _literal(key, text, type(node))


def _model_group(name: str) -> ConfigDict:
  """A preset by its name, or the shape of the model at a path."""
  if '/' in name or name.startswith('hf:') or pathlib.Path(name).exists():
    from llm_jax.interop import load
    return load.group(name)
  from llm_jax.models import presets
  return presets.preset(name)


def _literal(key, text, kind):
  if kind is bool and text.lower() in ('true', 'false', '1', '0'):
    return text.lower() in ('true', '1')
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError):
    value = text
  if kind is float and type(value) is int:
    value = float(value)
  if kind is int and type(value) is float and value.is_integer():
    value = int(value)
  if kind is tuple and not isinstance(value, (tuple, list)):
    value = (value,)
  value = tuple(value) if isinstance(value, list) else value
  if type(value) is not kind:
    raise ConfigError(f'--config.{key}: expected {kind.__name__}, got {text!r}')
  return value


def from_flags(args: list[str], flags: dict) -> tuple['Config', dict]:
  """(Config, values) of a command line: --config=FILE, --config.group.key=value, and the command's own flags, given as
  {name: default}; False is the default of one that takes no value. Raises ConfigError naming the nearest right one."""
  values, overrides, args = dict(config=None, **flags), [], list(args)
  while args:
    flag, args = args[0], args[1:]
    name, equals, value = flag.removeprefix('--').partition('=')
    if not flag.startswith('--'):
      raise ConfigError(f'unexpected argument {flag!r}; flags are --config.group.key, '
                        + ', '.join(f'--{name}' for name in values))
    if not name.startswith('config.') and name not in values:
      raise ConfigError(f'unknown flag --{name}{nearest(name, values)}')
    if flags.get(name) is False:
      if equals:
        raise ConfigError(f'--{name}: takes no value, got {value!r}')
      values[name] = True
      continue
    if not equals:
      if not args or args[0].startswith('--'):
        raise ConfigError(f'--{name}: expected a value, as --{name}=VALUE')
      value, args = args[0], args[1:]
    if name.startswith('config.'):
      overrides.append((name.removeprefix('config.'), value))
    else:
      values[name] = value
  if not values['config']:
    raise ConfigError('--config: expected a config file, as --config=configs/base.py')
  config = load_file(values['config'])
  for key, value in overrides:
    override(config, key, value)
  return build(config), values


def build(config: ConfigDict) -> Config:
  """The frozen, validated Config of a ConfigDict. Raises ConfigError naming the key and the nearest right one."""
  return check(_build(Config, config.to_dict() if isinstance(config, ConfigDict) else config, ''))


def _build(cls, values, prefix):
  if not isinstance(values, dict):
    raise ConfigError(f'config.{prefix.rstrip(".")}: expected a group of keys, got {values!r}')
  types_by_name = typing.get_type_hints(cls)
  for name in values:
    if name not in types_by_name:
      raise ConfigError(f'config.{prefix}{name}: no such key{nearest(name, types_by_name)}')
  return cls(**{name: _cast(types_by_name[name], value, prefix + name) for name, value in values.items()})


def _cast(kind, value, key):
  if dataclasses.is_dataclass(kind):
    return value if isinstance(value, kind) else _build(kind, value, key + '.')
  if isinstance(kind, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'config.{key}: expected a tuple, got {value!r}')
    return tuple(_cast(typing.get_args(kind)[0], v, f'{key}[{i}]') for i, v in enumerate(value))
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(f'config.{key}: expected {kind.__name__}, got {value!r}')
  return value


def check(config: Config) -> Config:
  """Contradictions that need no device: returns config, or raises ConfigError naming the key."""
  def get(key):
    group, name = key.split('.')
    return getattr(getattr(config, group), name)

  for key, choices in CHOICES.items():
    if get(key) not in choices:
      raise ConfigError(f'config.{key}: {get(key)!r} is not known{nearest(get(key), choices)}')
  for key in POSITIVE:
    if get(key) <= 0:
      raise ConfigError(f'config.{key}: expected a positive number, got {get(key)}')
  for group in ('model', 'data', 'tokenizer', 'train', 'optimizer', 'checkpoint', 'eval', 'log'):
    for name, value in vars(getattr(config, group)).items():
      if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ConfigError(f'config.{group}.{name}: expected 0 or more, got {value}')
      if isinstance(value, int) and value >= 2**31 - 1:
        raise ConfigError(f'config.{group}.{name}: expected less than 2**31 - 1, got {value}')
  for key in (*AT_MOST_1, *BELOW_1):
    if get(key) > 1 or key in BELOW_1 and get(key) == 1:
      raise ConfigError(f'config.{key}: expected {"less than" if key in BELOW_1 else "at most"} 1, got {get(key)}')
  m, d, t = config.model, config.data, config.train
  if m.head_dim == 0 and m.width % m.heads:
    raise ConfigError(f'config.model.heads: width {m.width} is not a multiple of {m.heads}; set model.head_dim')
  if m.kv_heads and m.heads % m.kv_heads:
    raise ConfigError(f'config.model.kv_heads: heads {m.heads} is not a multiple of {m.kv_heads}')
  if m.positions == 'rotary' and int(derive(m).head_dim * m.rope_fraction) % 2:
    raise ConfigError(f'config.model.head_dim: rotary positions need an even share, got {derive(m).head_dim} x '
                      f'{m.rope_fraction}')
  if m.rope_scaling in ('yarn', 'llama3') and not m.rope_original_length:
    raise ConfigError(f'config.model.rope_original_length: rope_scaling={m.rope_scaling!r} needs it')
  if not m.windows or min(m.windows) < 0:
    raise ConfigError(f'config.model.windows: expected at least one window >= 0, got {m.windows}')
  if m.experts and not 0 < m.experts_per_token <= m.experts:
    raise ConfigError(f'config.model.experts_per_token: expected 1 to {m.experts} (experts), got {m.experts_per_token}')
  if m.experts and m.mlp_bias:
    raise ConfigError('config.model.mlp_bias: experts have no bias; set it to False')
  if m.experts and m.encoder_layers:
    raise ConfigError('config.model.experts: an encoder-decoder has none; set it to 0')
  if m.expert_exchange == 'ragged' and m.expert_capacity:
    raise ConfigError("config.model.expert_capacity: slots are exchanged whole; set expert_exchange to 'fixed', or the "
                      'capacity to 0')
  if m.router_bias and not m.experts:
    raise ConfigError('config.model.router_bias: needs experts > 0')
  if m.rope_scaling == 'llama3' and m.rope_low_freq >= m.rope_high_freq:
    raise ConfigError(f'config.model.rope_low_freq: {m.rope_low_freq} must be below rope_high_freq {m.rope_high_freq}')
  if m.positions == 'sinusoidal' and m.width % 2:
    raise ConfigError(f'config.model.width: sinusoidal positions need an even width, got {m.width}')
  if t.steps < 0 or t.minutes < 0 or (t.steps == 0 and t.minutes == 0):
    raise ConfigError(f'config.train.steps: expected steps > 0, or minutes > 0; got {t.steps} and {t.minutes}')
  if t.batch_size % max(t.accumulate, 1):
    raise ConfigError(f'config.train.accumulate: batch_size {t.batch_size} is not a multiple of {t.accumulate}')
  if t.spike_window == 1:
    raise ConfigError('config.train.spike_window: 1 loss has no deviation; expected at least 2, or 0 for off')
  if m.max_length and m.max_length < d.length:
    raise ConfigError(f'config.model.max_length: {m.max_length} is shorter than data.length {d.length}')
  needs = {'causal': 'causal', 'prefix': 'prefix', 'masked': 'bidirectional', 'span': 'prefix'}[t.objective]
  if m.attention != needs:
    raise ConfigError(f'config.model.attention: objective {t.objective!r} needs {needs!r}, got {m.attention!r}')
  if (d.source == 'mixture') != bool(d.mixture):
    raise ConfigError(f"config.data.mixture: expected sources exactly when data.source='mixture', got {d.mixture}")
  for i, s in enumerate(d.mixture):
    if s.source not in CHOICES['data.source'][:-1] or not 0 < s.weight < math.inf:
      raise ConfigError(f'config.data.mixture[{i}]: expected a known source and a positive weight, got {s}')
    if s.source != 'stdlib' and not s.path:
      raise ConfigError(f'config.data.mixture[{i}].path: source {s.source!r} needs a path')
  if d.source not in ('stdlib', 'mixture') and not d.path:
    raise ConfigError(f'config.data.path: source {d.source!r} needs a path')
  if d.valid == 'given' and not d.valid_path:
    raise ConfigError("config.data.valid_path: data.valid='given' needs it")
  if d.valid != 'given' and not 0 < d.valid_fraction < 1:
    raise ConfigError(f'config.data.valid_fraction: expected between 0 and 1, got {d.valid_fraction}')
  if config.tokenizer.kind == 'hf' and not config.tokenizer.path:
    raise ConfigError("config.tokenizer.path: tokenizer.kind='hf' needs a tokenizer.json")
  if config.log.profile and not _is_range(config.log.profile):
    raise ConfigError(f"config.log.profile: expected 'first:last' steps such as '10:13', got {config.log.profile!r}")
  if config.log.profile and not t.minutes and int(config.log.profile.partition(':')[0]) >= t.steps:
    raise ConfigError(f'config.log.profile: {config.log.profile!r} starts after the last of {t.steps} steps')
  return config


def _is_range(text):
  first, _, last = text.partition(':')
  return first.isdecimal() and last.isdecimal() and int(first) < int(last)


def derive(model: Model, vocab_size: int = 0, length: int = 0) -> Model:
  """Fills fields that are 0 for 'derived': head_dim, kv_heads, mlp_dim, expert_dim, and, when given,
  vocab_size and max_length."""
  return dataclasses.replace(
      model, head_dim=model.head_dim or model.width // model.heads, kv_heads=model.kv_heads or model.heads,
      mlp_dim=model.mlp_dim or 4 * model.width,
      expert_dim=model.expert_dim or model.mlp_dim or 4 * model.width, max_length=model.max_length or length,
      vocab_size=model.vocab_size or -(-vocab_size // 64) * 64)


def to_dict(config: Config) -> dict:
  """Plain, JSON-serialisable nested dict (tuples become lists); `build` reads it back."""
  def plain(x):
    if isinstance(x, dict):
      return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (tuple, list)) else x
  return plain(dataclasses.asdict(config))


def diff(a: Config, b: Config) -> dict[str, tuple]:
  """{'group.key': (value in a, value in b)} for every key that differs."""
  def flat(node, prefix=''):
    for name, value in node.items():
      if isinstance(value, dict):
        yield from flat(value, f'{prefix}{name}.')
      else:
        yield prefix + name, value
  left, right = dict(flat(to_dict(a))), dict(flat(to_dict(b)))
  return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


INTERRUPTED = 'interrupted; the same command goes on from the newest checkpoint'


@contextlib.contextmanager
def one_line_errors(debug: bool = False):
  """What every command wraps its work in: a ConfigError or OSError becomes one line on stderr and exit status 2."""
  try:
    yield
  except (ConfigError, OSError) as e:
    if debug:
      traceback.print_exc()
    text = str(e) if isinstance(e, ConfigError) else f'{e.filename or "file"}: {e.strerror or e}'
    print('error: ' + ' '.join(text.split()) + ('' if debug else '  (--debug shows where)'), file=sys.stderr)
    raise SystemExit(2) from None


def command(args: list[str], parse, run) -> None:
  """main() of a command that writes to stdout: run(parse(args)), which ends where the reader leaves, as `head` does."""
  with one_line_errors('--debug' in args):
    try:
      run(parse(args))
      sys.stdout.flush()
    except BrokenPipeError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
  """Flags of a command, --debug among them: an error is a ConfigError that names the nearest flag."""

  def __init__(self, prog: str, description: str):
    super().__init__(prog=f'python -m {prog}', description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    self.add_argument('--debug', action='store_true', help='show where an error came from')

  def error(self, message):
    raise ConfigError(message)

  def parse_args(self, args=None, namespace=None):
    flags, unknown = self.parse_known_args(args, namespace)
    if unknown:
      known = [s for action in self._actions for s in action.option_strings if s.startswith('--')]
      raise ConfigError(f'unknown flag {unknown[0]}{nearest(unknown[0].partition("=")[0], known)}')
    return flags
