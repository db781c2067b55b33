"""Checkpoints: Orbax writes the arrays in the background; everything a model needs beside them lies in the same folder.

RUN/checkpoints/STEP/ holds state/{params,ema,train}/ (Orbax), meta.json (config, versions, every array's shape and
dtype), tokenizer/, and manifest.json (size and sha256 of every file), written last: a step without it does not exist.
A copied STEP folder is enough to sample from. `python -m llm_jax.checkpoint ls|verify RUN`.
"""
import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import sys
import time
import typing

import jax
from etils import epath

from llm_jax import config as config_lib
from llm_jax import sharding as sharding_lib
from llm_jax.config import ConfigError

FORMAT = 1      # raise it when older code can no longer read what is written; newer code keeps reading every older one
ITEMS = ('params', 'ema', 'train')   # folders of state/; 'train' is the rest: step, horizon, opt_state


class Meta(typing.NamedTuple):
  """What a checkpoint knows beside its arrays."""
  config: dict                 # config.to_dict(...)
  tokenizer: epath.Path        # a folder for tokenizer.load
  step: int
  extra: dict                  # what save() was given as `extra`


class Checkpointer:
  """Writes a run directory's checkpoints; one per run. Use as a context manager, or call close().

  Args: workdir, which already holds tokenizer/; keep: newest steps kept; config: config.to_dict(...), written to
  workdir/config.json and into every step; resume: False refuses a workdir that already has steps, so that none is lost.
  `stall_seconds` adds up how long save() and wait() held the caller.
  """

  def __init__(self, workdir, keep: int, config: dict, resume: bool = True):
    self.workdir, self.keep, self.config = _path(workdir), keep, config
    self.stall_seconds = 0.0
    self._pending, self._writing = None, None
    self._first = jax.process_index() == 0
    if not (self.workdir / 'tokenizer').is_dir():
      raise ConfigError(f'{self.workdir}/tokenizer: no such folder; save the tokenizer there before checkpointing')
    self._saved = latest_step(self.workdir)
    if self._saved is not None and not resume:
      raise ConfigError(f'{self.workdir}: already has checkpoints up to step {self._saved} and checkpoint.resume is '
                        'False; give another --workdir, or delete its checkpoints/')
    if self._first:
      (self.workdir / 'checkpoints').mkdir(parents=True, exist_ok=True)
      for folder in _folders(self.workdir):
        if not (folder / 'manifest.json').exists():   # left by a killed run
          folder.rmtree()
      _write_json(self.workdir / 'config.json', dict(format_version=FORMAT, config=config))
    ocp = _orbax()
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._executor = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')

  def save(self, step: int, state: dict, extra: dict | None = None) -> float:
    """Starts writing `state` and returns the seconds the caller was held: the end of the previous write and a copy to
    host memory. The buffers may be donated as soon as this returns. Saving the newest step again does nothing.

    Raises ConfigError where the previous write failed. `extra` is kept in meta.json (anything JSON can hold).
    """
    start = time.perf_counter()
    self._join()
    if step == self._saved:
      return self._stalled(start)
    ocp = _orbax()
    folder = self.workdir / 'checkpoints' / str(step)
    flat = _flat(state)
    self._writing = folder
    try:
      if self._first:
        if folder.exists():            # a damaged step that an older one was resumed in place of
          folder.rmtree()
        folder.mkdir(parents=True)
        _copy(self.workdir / 'tokenizer', folder / 'tokenizer')
        _write_json(folder / 'meta.json', dict(
            format_version=FORMAT, step=step, time=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
            versions={name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')},
            extra=extra or {}, config=self.config,
            arrays={path: [str(x.dtype), list(x.shape)] for path, x in flat.items()}))
      trees = _by_item(flat)
      self._orbax.save(folder / 'state', args=ocp.args.Composite(
          **{item: ocp.args.PyTreeSave(tree) for item, tree in trees.items()}))
    except Exception as e:
      raise self._failed(e) from e
    self._pending = self._executor.submit(self._commit, folder)
    self._saved = step
    return self._stalled(start)

  def wait(self) -> float:
    """Returns once everything saved is complete on disk, after so many seconds; raises ConfigError where it failed."""
    start = time.perf_counter()
    self._join()
    return self._stalled(start)

  def close(self) -> None:
    """wait(), then frees the background threads, also where the last write failed."""
    try:
      self.wait()
    finally:
      self._executor.shutdown()
      with contextlib.suppress(Exception):   # its own wait: the error was raised above, once
        self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _commit(self, folder):
    """In the background: after Orbax the manifest, after the manifest the retention."""
    self._orbax.wait_until_finished()
    if self._first:
      write_manifest(folder)
      for old in steps(self.workdir)[:-self.keep]:
        stale = self.workdir / 'checkpoints' / str(old)
        (stale / 'manifest.json').unlink()   # first: a kill halfway through leaves a leftover, not a damaged step
        stale.rmtree()

  def _join(self):
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as e:
        raise self._failed(e) from e

  def _failed(self, e):
    self._saved = None
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    return ConfigError(f'{self._writing}: this checkpoint could not be written ({reason}); earlier steps are intact: '
                       'make room or check the disk, then start the same command again to resume')

  def _stalled(self, start):
    seconds = time.perf_counter() - start
    self.stall_seconds += seconds
    return seconds


def steps(workdir) -> list[int]:
  """Complete steps, ascending: those with a manifest whose files are all there with their sizes. Reads no payload."""
  return [int(folder.name) for folder in _folders(_path(workdir)) if not problem(folder)]


def latest_step(workdir) -> int | None:
  """The newest complete step, or None; empty, half-written and truncated step folders do not count."""
  return next((int(f.name) for f in reversed(_folders(_path(workdir))) if not problem(f)), None)


def require_one_sound(workdir) -> None:
  """Raises ConfigError where a run has checkpoints and every one is damaged: starting again would write over it."""
  why = {folder.name: problem(folder) for folder in _folders(_path(workdir)) if (folder / 'manifest.json').exists()}
  if why and all(why.values()):
    reasons = '; '.join(f'step {n}: {w}' for n, w in why.items())
    raise ConfigError(f'{workdir}: every checkpoint is damaged ({reasons}); put a good copy back, or name another '
                      '--workdir')


def problem(folder) -> str:
  """Why a step folder is not complete, or ''. Compares sizes only; verify() compares contents."""
  folder = _path(folder)
  if not (folder / 'manifest.json').exists():
    return 'incomplete: no manifest.json, its write did not finish'
  try:
    manifest = _read_json(folder / 'manifest.json')
    if manifest['format_version'] > FORMAT:
      return ''                        # reading its meta.json says what to do
    sizes = {name: size for name, (size, _) in manifest['files'].items()}
  except (ValueError, KeyError, TypeError):
    return 'damaged: manifest.json is unreadable'
  for name, size in sizes.items():
    path = folder / name
    if not path.exists():
      return f'damaged: {name} is missing'
    if path.stat().length != size:
      return f'damaged: {name} has {path.stat().length} bytes, expected {size}'
  return ''


def verify(folder, items=ITEMS) -> str:
  """Why a step's files are not what was written (sha256 of each), or ''. Of state/ only `items` are read."""
  folder = _path(folder)
  if why := problem(folder):
    return why
  files = _read_json(folder / 'manifest.json')['files']
  left_out = tuple(f'state/{item}/' for item in ITEMS if item not in items)
  read = [name for name in files if not name.startswith(left_out)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    digests = pool.map(lambda name: _sha256(folder / name), read)
    bad = [name for name, digest in zip(read, digests) if digest != files[name][1]]
  return f'damaged: the contents of {", ".join(bad)} changed since they were written (sha256)' if bad else ''


def write_manifest(folder) -> None:
  """Writes manifest.json, which makes a step complete: {path: [bytes, sha256]} of every file in it."""
  folder = _path(folder)
  files = {name: path for name, path in _files(folder) if name != 'manifest.json'}
  _write_json(folder / 'manifest.json', dict(
      format_version=FORMAT, files={n: [p.stat().length, _sha256(p)] for n, p in sorted(files.items())}))


def read_meta(path, step: int | None = None) -> Meta:
  """Config, tokenizer folder, step and extras of a run directory (newest complete step by default) or a step folder."""
  folder, meta = _open(path, step)
  return Meta(meta['config'], folder / 'tokenizer', meta['step'], meta['extra'])


def restore(path, step: int | None = None, abstract_state=None, change_dtype: bool = False):
  """The saved state, verified against its manifest.

  Args: path: a run directory or a step folder; step: default the newest complete one; abstract_state: a tree of
  ShapeDtypeStructs (or arrays) whose shardings say where each leaf goes, on any number of devices; None gives the state
  as nested dicts on one device; change_dtype: cast to the dtypes of abstract_state instead of refusing.
  Raises ConfigError listing every path that is missing, unknown, or of another shape or dtype.
  """
  folder, meta = _open(path, step)
  _require_sound(folder, ITEMS)
  saved = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in meta['arrays'].items()}
  if abstract_state is None:
    return _nest(_read_arrays(folder, saved))
  wanted = _flat(abstract_state)
  _check_fit(folder, saved, wanted, change_dtype)
  placed = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=wanted[n].sharding) for n, s in saved.items()}
  arrays = _read_arrays(folder, placed)
  return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[n].astype(w.dtype) for n, w in wanted.items()])


def restore_params(path, step: int | None = None, mesh: jax.sharding.Mesh | None = None, ema: bool = False):
  """The parameters alone, as nested dicts; neither moments nor anything else of the state is read.

  Args: path, step: as restore(); mesh: shards them by their letters (None: one device); ema: their moving average
  where the checkpoint keeps one. Needs no model: the checkpoint knows its shapes.
  """
  folder, meta = _open(path, step)
  arrays = meta['arrays']
  item = 'ema' if ema and any(name.startswith('ema/') for name in arrays) else 'params'
  _require_sound(folder, (item,))
  tree = _nest({n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in arrays.items()
                if n.startswith(item + '/')})
  if mesh is not None:
    shardings = sharding_lib.named(mesh, sharding_lib.param_specs(tree[item], mesh))
    tree = {item: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree[item], shardings)}
  return _nest(_read_arrays(folder, _flat(tree)))[item]


def _open(path, step: int | None) -> tuple[epath.Path, dict]:
  """The folder of a complete step and its meta.json; else a ConfigError saying what is there and what to do."""
  path = _path(path)
  if not path.exists():
    raise ConfigError(f'{path}: no such directory; expected a run directory (a --workdir of training)')
  if (path / 'meta.json').exists():
    if why := problem(path):
      raise ConfigError(f'{path}: {why}; copy the folder again, or use another step')
    meta = _read_meta(path)
    if step is not None and step != meta['step']:
      raise ConfigError(f'{path}: holds step {meta["step"]}, not {step}; give its run directory')
    return path, meta
  if not (path / 'checkpoints').is_dir():
    raise ConfigError(f'{path}: not a run directory: expected checkpoints/ in it; give a --workdir of training or one '
                      'of its checkpoints/STEP folders')
  folders = _folders(path)
  problems = {int(f.name): problem(f) for f in folders}
  sound = [s for s, why in problems.items() if not why]
  if not sound:
    found = '; '.join(f'step {s} is {why}' for s, why in problems.items()) or 'checkpoints/ is empty'
    raise ConfigError(f'{path}: no complete checkpoint ({found}); train until one is saved (checkpoint.every)')
  if step is not None and step not in sound:
    raise ConfigError(f'{path}: no complete checkpoint of step {step}'
                      f'{f" (it is {problems[step]})" if step in problems else ""}; complete: {_list(sound)}')
  if step is None:
    step = sound[-1]
    for skipped in [s for s in problems if s > step]:
      print(f'warning: {path}/checkpoints/{skipped} is {problems[skipped]}; using step {step}', file=sys.stderr)
  folder = path / 'checkpoints' / str(step)
  return folder, _read_meta(folder)


def _check_fit(folder, saved, wanted, change_dtype):
  here, there = set(wanted), set(saved)
  both = [n for n in wanted if n in saved]
  shapes = [f'{n} {saved[n].shape} saved, {wanted[n].shape} here' for n in both if saved[n].shape != wanted[n].shape]
  dtypes = [f'{n} {saved[n].dtype} saved, {wanted[n].dtype} here' for n in both if saved[n].dtype != wanted[n].dtype]
  faults = {'not in the checkpoint': sorted(here - there), 'only in the checkpoint': sorted(there - here),
            'other shape': shapes, 'other dtype': [] if change_dtype else dtypes}
  if any(faults.values()):
    text = '; '.join(f'{kind}: {_list(names)}' for kind, names in faults.items() if names)
    raise ConfigError(f'{folder}: does not fit this config: {text}; set the config as it was or give another --workdir')


def _require_sound(folder, items):
  if why := verify(folder, items):
    others = [s for s in steps(folder.parent.parent) if str(s) != folder.name]
    then = f'; delete this folder to use step {others[-1]}' if others else ''
    raise ConfigError(f'{folder}: {why}{then}')


def _read_meta(folder) -> dict:
  try:
    meta = _read_json(folder / 'meta.json')
    version = int(meta['format_version'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError(f'{folder}/meta.json: expected what a checkpoint holds, got {type(e).__name__}: {e}') from e
  if version > FORMAT:
    raise ConfigError(f'{folder}: checkpoint format {version}, this llm_jax reads up to {FORMAT}; update llm_jax')
  return meta


def _read_arrays(folder, wanted: dict) -> dict:
  """{path: array} of whole items of state/; `wanted` gives shape, dtype and, or else the first device, sharding."""
  ocp = _orbax()
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  read = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    for item, tree in _by_item(wanted).items():
      args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding or one, global_shape=x.shape, dtype=x.dtype), tree)
      restored = checkpointer.restore(folder / 'state' / item, args=ocp.args.PyTreeRestore(tree, restore_args=args))
      read |= _flat(restored if item == 'train' else {item: restored})
  return read


def _flat(tree) -> dict:
  """{'params/blocks0/w_up_DF': leaf}: on disk there are only dicts, so no optimizer's class names outlive a release."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _nest(flat: dict) -> dict:
  tree = {}
  for name, x in flat.items():
    *parents, leaf = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = x
  return tree


def _by_item(flat: dict) -> dict:
  """The trees of state/: params and ema apart from the rest, so that they can be read without it."""
  tree = _nest(flat)
  trees = {item: tree.pop(item) for item in ('params', 'ema') if item in tree}
  return trees | ({'train': tree} if tree else {})


def _orbax():
  """Orbax, imported late (it takes a second) and silenced: its notes on shardings and barriers are not for users."""
  import orbax.checkpoint as ocp
  logger = logging.getLogger('absl')
  if _not_orbax not in logger.filters:
    logger.addFilter(_not_orbax)
  return ocp


def _not_orbax(record) -> bool:
  return 'orbax' not in record.pathname   # what fails there is raised by wait(), with its reason


def _path(path) -> epath.Path:
  path = epath.Path(path).expanduser()
  return path if '://' in str(path) or str(path).startswith('gs:') else path.resolve()   # Orbax wants absolute paths


def _folders(workdir) -> list[epath.Path]:
  root = workdir / 'checkpoints'
  return sorted((f for f in root.iterdir() if f.name.isdigit()), key=lambda f: int(f.name)) if root.is_dir() else []


def _files(folder, prefix=''):
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path, f'{prefix}{path.name}/')
    else:
      yield prefix + path.name, path


def _copy(source, target):
  for name, path in _files(source):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    path.copy(target / name)


def _sha256(path) -> str:
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _read_json(path):
  return json.loads(path.read_text())


def _write_json(path, value):
  part = path.parent / (path.name + '.part')
  part.write_text(json.dumps(value, indent=1))
  part.replace(path)


def _list(names) -> str:
  return ', '.join(map(str, names[:20])) + (f' and {len(names) - 20} more' if len(names) > 20 else '')


def main(argv: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.checkpoint', 'Lists or verifies checkpoints.')
  parser.add_argument('command', choices=('ls', 'verify'))
  parser.add_argument('run', help='a run directory')
  with config_lib.one_line_errors('--debug' in argv):
    flags = parser.parse_args(argv)
    run = _path(flags.run)
    folders = _folders(run) or [_open(run, None)[0]]
    bad = 0
    print('      step        MB  saved                      state')
    for folder in folders:
      why = verify(folder) if flags.command == 'verify' else problem(folder)
      bad += bool(why)
      meta = {'time': '-'} if why else _read_meta(folder)
      size = sum(path.stat().length for _, path in _files(folder)) / 1e6
      sound = 'verified' if flags.command == 'verify' else 'complete'
      print(f'{folder.name:>10}{size:>10.1f}  {meta["time"]:<25}  {why or sound}')
  if bad and flags.command == 'verify':
    raise SystemExit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
