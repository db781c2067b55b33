"""What a run needs to be the same when it goes on from a checkpoint: the model, its ids, and the tokens of every step.

Everything else may change: paths (the text itself is compared), learning rates, budgets, meshes, what is logged. What
changes the numbers is said when the run starts.
"""
import pathlib

from llm_jax import checkpoint as checkpoint_lib
from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.data import batches, store
from llm_jax.data import tokenizer as tokenizer_lib

FIXED = ('model.', 'tokenizer.', 'data.', 'optimizer.name', 'train.batch_size', 'train.seed',
         'train.objective', 'train.ema', 'train.spike_window', 'init_from')
FREE = ('model.fp8', 'model.kernel', 'model.remat', 'model.unroll', 'model.dropout', 'tokenizer.path',
        'tokenizer.train_mb', 'data.source', 'data.path', 'data.field', 'data.valid_path', 'data.cache_dir',
        'data.workers', 'data.max_bad_records')     # may change: the text and the tokenizer themselves are compared
SILENT = ('log.', 'checkpoint.', 'eval.', 'mesh.', 'data.', 'tokenizer.')
MUON = ('optimizer.muon_', 'optimizer.momentum', 'optimizer.matrix_learning_rate')    # of no other optimizer
GO_ON = 'set it as it was, or name another --workdir (--config.init_from={} starts from these weights there)'


def check_config(found: checkpoint_lib.Step, cfg: config_lib.Config) -> str:
  """Raises ConfigError with the keys that must be as they were; returns what else changes the numbers, in words."""
  before = checkpoint_lib.config_of(found)
  fixed, noted = [], []
  for key, (old, new) in config_lib.diff(before, cfg).items():
    text = f'{key} was {old!r}, is {new!r}'
    if key == 'data.mixture' and [s['weight'] for s in old] == [s['weight'] for s in new]:
      continue
    if key == 'init_from' and not new:             # it has done its work
      continue
    if key.startswith(MUON) and cfg.optimizer.name != 'muon':
      continue
    moments = key == 'optimizer.muon_b2' and bool(old) != bool(new)
    if moments or key.startswith(FIXED) and key not in FREE:
      fixed.append(text)
    elif not key.startswith(SILENT):
      noted.append(text)
  if found.extra.get('batches', 1) != batches.VERSION and cfg.data.packing == 'concat':
    noted.append('where windows are cut in later epochs (by the version of llm_jax)')
  if fixed:
    raise ConfigError(f'--workdir: step {found.step} of {_run(found)} was trained with another config: '
                      f'{"; ".join(fixed)}; {GO_ON.format(_run(found))}')
  return '; '.join(noted)


def check_tokenizer(found: checkpoint_lib.Step, cfg: config_lib.Config, local: pathlib.Path):
  """The checkpoint's tokenizer; raises ConfigError where the config's file, or the run's copy, is another by now."""
  ours = tokenizer_lib.load(found.tokenizer)
  others = {}
  if cfg.tokenizer.path and cfg.tokenizer.kind != 'byte' and pathlib.Path(cfg.tokenizer.path).expanduser().exists():
    others[f'config.tokenizer.path: {cfg.tokenizer.path}'] = tokenizer_lib.build(cfg.tokenizer, ())
  if (local / 'tokenizer').is_dir():
    others[f'--workdir: {local / "tokenizer"}'] = tokenizer_lib.load(local / 'tokenizer')
  for name, other in others.items():
    if other.fingerprint != ours.fingerprint:
      raise ConfigError(
          f'{name} is not the tokenizer that step {found.step} was trained with: it was {_describe(ours)}, is '
          f'{_describe(other)}; put it back ({found.tokenizer} has it), or {GO_ON.format(_run(found))}')
  return ours


def check_data(found: checkpoint_lib.Step, stores: store.Stores, now: dict[str, list[str]]) -> None:
  """Raises ConfigError where a source's text is not what it was: step n would repeat some tokens and skip others.
  now: fingerprints(stores)."""
  saved = found.extra.get('data')
  if saved is None or saved == now:
    return
  changed = [f'{split} text of {store_.label} (it has {store_.n_tokens:,} tokens)'
             for split in ('train', 'valid') for i, store_ in enumerate(getattr(stores, split))
             if saved[split][i:i + 1] != [now[split][i]]]
  raise ConfigError(f'config.data: since step {found.step} changed: {"; ".join(changed)}; its steps would have other '
                    f'tokens: put the text back, or name another --workdir (--config.init_from={_run(found)} starts '
                    'from these weights there)')


def fingerprints(stores: store.Stores) -> dict[str, list[str]]:
  """What a checkpoint keeps to know its text again."""
  return {split: [s.fingerprint() for s in getattr(stores, split)] for split in ('train', 'valid')}


def _describe(tokenizer) -> str:
  return f'{tokenizer.kind}, {tokenizer.vocab_size} ids, {tokenizer.fingerprint[:8]}'


def _run(found):
  return found.folder.parent.parent
