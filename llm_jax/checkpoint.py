"""Checkpoints: Orbax writes the arrays in the background; everything a model needs beside them lies in the same folder.

RUN/checkpoints/STEP/ holds state/{params,ema,train}/ (Orbax), meta.json (config, versions, every array's shape and
dtype), tokenizer/, and manifest.json (manifest.py), written last: a step without it does not exist. What reads a
checkpoint verifies it first, and goes back to the newest sound step. A copied STEP folder is enough to sample from.
`python -m llm_jax.checkpoint ls|verify RUN`.
"""
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import itertools
import logging
import sys
import tempfile
import time
import typing
import warnings

import jax
from etils import epath

from llm_jax import config as config_lib
from llm_jax import manifest, paths
from llm_jax import sharding as sharding_lib
from llm_jax.config import ConfigError

FORMAT = 1      # raise it when older code can no longer read what is written; newer code keeps reading every older one
ITEMS = ('params', 'ema', 'train')   # folders of state/; 'train' is the rest: step, horizon, opt_state
BARRIER_MS = 30 * 60 * 1000          # how long a process waits for the others to hash; JAX notices dead ones earlier


class Step(typing.NamedTuple):
  """A sound step, and what it knows beside its arrays; from find()."""
  folder: epath.Path
  step: int
  config: dict                 # config.to_dict(...)
  tokenizer: epath.Path        # a local folder for tokenizer.load
  extra: dict                  # what save() was given as `extra`
  arrays: dict                 # {'params/...': (dtype, shape)}
  verified: str                # in words: how much was verified, and what that cost
  damaged: dict                # {newer step: what is wrong with it}


class Checkpointer:
  """Writes a run directory's checkpoints; one per run. Use as a context manager, or call close().

  Args: workdir; keep: newest steps kept; config: config.to_dict(...), written into every step and, for people, to
  workdir/config.json; tokenizer: its folder, default workdir/tokenizer; keep_every: steps that are multiples of it are
  never deleted; resumed: the step that was restored (default: the newest): later ones are damaged and are set aside;
  stage: a local folder to make the steps of an s3:// workdir in.
  `stall_seconds` adds up how long save() and wait() held the caller.
  """

  def __init__(self, workdir, keep: int, config: dict, *, tokenizer=None, keep_every: int = 0,
               resumed: int | None = None, stage=None):
    self.workdir, self.keep, self.keep_every, self.config = paths.open_path(workdir), keep, keep_every, config
    self.tokenizer = self.workdir / 'tokenizer' if tokenizer is None else paths.open_path(tokenizer)
    self.stall_seconds = 0.0
    self._pending, self._writing, self._count = None, None, itertools.count()
    self._stage = None if paths.native(self.workdir) else epath.Path(stage or tempfile.mkdtemp(prefix='llm_jax'))
    if self._stage and jax.process_count() > 1:
      raise ConfigError(f'--workdir: {self.workdir}: several processes cannot write there together; use gs:// or a '
                        'shared folder')
    self._first = jax.process_index() == 0
    if self._first and not self.tokenizer.is_dir():
      raise ConfigError(f'{self.tokenizer}: no such folder; save the tokenizer there before checkpointing')
    self._saved = latest_step(self.workdir) if resumed is None else resumed     # the newest, also while it is written
    if self._first:
      (self.workdir / 'checkpoints').mkdir(parents=True, exist_ok=True)
      for folder in _folders(self.workdir):
        if manifest.problem(folder).startswith('incomplete'):   # left by a killed run
          folder.rmtree()
        elif self._saved is not None and int(folder.name) > self._saved:
          _set_aside(folder)
      manifest.write_json(self.workdir / 'config.json', dict(format_version=FORMAT, config=config))
    self._orbax = self._new_orbax()
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
    self._writing = self.workdir / 'checkpoints' / str(step)
    folder = self._stage / str(step) if self._stage else self._writing
    leaves = flat(state)
    try:
      if self._first:
        if folder.exists():
          folder.rmtree()
        folder.mkdir(parents=True)
      self._orbax.save(folder / 'state', args=ocp.args.Composite(
          **{item: ocp.args.PyTreeSave(tree) for item, tree in _by_item(leaves).items()}))
    except Exception as e:
      raise self._failed(e) from e
    meta = dict(format_version=FORMAT, step=step, extra=extra or {}, config=self.config,
                time=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
                arrays={path: [str(x.dtype), list(x.shape)] for path, x in leaves.items()})
    self._pending = self._executor.submit(self._commit, folder, meta)
    self._saved = step
    return self._stalled(start)

  def check(self) -> None:
    """Raises ConfigError where the write in the background has failed; waits for nothing."""
    if self._pending is not None and self._pending.done():
      self._join()

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
      if self._stage and self._stage.exists():
        self._stage.rmtree()
      with contextlib.suppress(Exception):   # its own wait: the error was raised above, once
        self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is None or issubclass(kind, Exception):      # not where Ctrl-C asks to stop at once
      self.close()

  def _commit(self, folder, meta):
    """In the background: after Orbax what lies beside the arrays, then the manifest, then the retention."""
    error = None
    try:
      self._orbax.wait_until_finished()      # first: its errors are raised here, or else by the next save
      if self._first:
        paths.copy(self.tokenizer, folder / 'tokenizer')
        versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')}
        manifest.write_json(folder / 'meta.json', dict(meta, versions=versions))
    except Exception as e:
      error = e
    manifest.write(folder, self._barrier, error)
    if self._stage:
      paths.move(folder, self.workdir / 'checkpoints' / folder.name)
    if self._first:
      for old in self._stale():
        stale = self.workdir / 'checkpoints' / str(old)
        (stale / manifest.NAME).unlink()     # first: a kill halfway through leaves a leftover, not a damaged step
        stale.rmtree()

  def _stale(self) -> list[int]:
    """Steps to delete, once a newer one is complete. Unverified ones stay: nothing tells what they are worth."""
    root = self.workdir / 'checkpoints'
    known = [step for step in steps(self.workdir) if (root / str(step) / manifest.NAME).exists()]
    return [step for step in known[:-self.keep] if not (self.keep_every and step % self.keep_every == 0)]

  def _barrier(self, name):
    """Waits for all processes, on any thread."""
    wait = _orbax().multihost.get_barrier_sync_fn()
    wait(key=f'llm_jax.{name}.{next(self._count)}', timeout_ms=BARRIER_MS)

  def _join(self):
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as e:
        raise self._failed(e) from e

  def _new_orbax(self):
    return _orbax().AsyncCheckpointer(_orbax().CompositeCheckpointHandler())

  def _failed(self, e):
    self._saved = None
    with contextlib.suppress(Exception):     # what else it has to say of this write, it would say at the next one
      self._orbax.close()
    self._orbax = self._new_orbax()
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    reason = reason if len(reason) < 300 else f'{reason[:100]} ... {reason[-200:]}'      # the cause comes last
    return ConfigError(f'{self._writing}: this checkpoint could not be written ({reason}); earlier steps are intact: '
                       'make room or check the disk, then start the same command again to resume')

  def _stalled(self, start):
    seconds = time.perf_counter() - start
    self.stall_seconds += seconds
    return seconds


def steps(workdir) -> list[int]:
  """Steps that can be read, ascending: every file is there with its size. Reads no payload."""
  return [int(folder.name) for folder in _folders(paths.open_path(workdir)) if not manifest.problem(folder)]


def latest_step(workdir) -> int | None:
  """The newest of steps(), or None; empty, half-written and truncated step folders do not count."""
  return next((int(f.name) for f in reversed(_folders(paths.open_path(workdir))) if not manifest.problem(f)), None)


def verify(folder, items=ITEMS) -> str:
  """Why a step's files are not what was written (sha256 of each), or ''. Of state/ only `items` are read."""
  return manifest.verify(paths.open_path(folder), _all_but(items)).why


def find(path, step: int | None = None, items=ITEMS, verify: bool = True) -> Step:
  """The newest sound step of a run directory, walking back over damaged ones with a warning that names the file.

  Args: path: a run directory, a checkpoints/STEP folder, or a Step, which is returned as it is; step: this one, or an
  error; items: what will be read of state/; verify: False trusts names and sizes, for speed. Several processes share
  the reading and must all call it. Raises ConfigError saying what is there, what is wrong with it, and what to do.
  """
  if isinstance(path, Step):
    return path
  path = paths.open_path(path)
  if not path.exists():
    raise ConfigError(f'{path}: no such directory; expected a run directory (a --workdir of training)')
  if not (path / 'checkpoints').is_dir():
    return _only(path, step, items, verify)
  folders = {int(folder.name): folder for folder in _folders(path)}
  if step is not None and step not in folders:
    raise ConfigError(f'{path}: no checkpoint of step {step}; there are: {_list(sorted(folders)) or "none"}')
  wrong = {}
  for candidate in [step] if step is not None else sorted(folders, reverse=True):
    found, why = _try(folders[candidate], items, verify)
    if found:
      for bad, reason in wrong.items():
        _warn(f'{folders[bad]} is {reason}; going back to step {candidate}')
      return found._replace(damaged=wrong)
    wrong[candidate] = why
  reasons = '; '.join(f'step {s} is {why}' for s, why in wrong.items()) or 'checkpoints/ is empty'
  then = 'train until one is saved (checkpoint.every)' if all('damaged' not in w for w in wrong.values()) else (
      'put a good copy back, or name another directory')
  raise ConfigError(f'{path}: no sound checkpoint{f" of step {step}" if step is not None else ""} ({reasons}); {then}')


def find_to_resume(workdir, verify: bool = True) -> Step | None:
  """find(), or None where a run has not saved anything yet. Damaged steps alone are an error: starting again would
  write over them."""
  folders = _folders(paths.open_path(workdir))
  if all(manifest.problem(folder).startswith('incomplete') for folder in folders):
    if sum((folder / 'meta.json').exists() for folder in folders) > 1:       # a kill leaves one, a bad copy more
      raise ConfigError(f'{workdir}: no checkpoint has its {manifest.NAME}; copy them again with it, or delete '
                        'checkpoints/ to start from step 0')
    for folder in folders:
      _warn(f'{folder} is {manifest.problem(folder)}; starting from step 0')
    return None
  return find(workdir, verify=verify)


def _only(path, step, items, verify) -> Step:
  if not (path / 'meta.json').exists():
    raise ConfigError(f'{path}: not a run directory: expected checkpoints/ in it; give a --workdir of training or one '
                      'of its checkpoints/STEP folders')
  found, why = _try(path, items, verify)
  if not found:
    raise ConfigError(f'{path}: {why}; copy the folder again, or use another step')
  if step is not None and step != found.step:
    raise ConfigError(f'{path}: holds step {found.step}, not {step}; give its run directory')
  return found


def _try(folder, items, verify) -> tuple[Step | None, str]:
  """(the step, '') or (None, why not)."""
  start = time.perf_counter()
  if why := manifest.problem(folder):
    return None, why
  checked = manifest.verify(folder, _all_but(items)) if verify else None
  if checked and checked.why:
    return None, checked.why
  verified = 'not verified'
  if manifest.unverified(folder):
    _warn(f'{folder} is unverified: it is from before manifests, nothing tells whether its contents changed')
  elif checked:
    verified = f'{checked.bytes / 1e6:.1f} MB in {checked.files} files verified in {time.perf_counter() - start:.2f} s'
  try:
    meta = _read_meta(folder)
  except OSError as e:
    return None, f'damaged: meta.json is unreadable ({type(e).__name__})'
  return Step(folder, meta['step'], meta['config'], paths.local(folder / 'tokenizer'), meta['extra'], meta['arrays'],
              verified, {}), ''


def restore(path, step: int | None = None, abstract_state=None, change_dtype: bool = False, verify: bool = True):
  """The saved state of the step that find() finds.

  Args: path, step, verify: of find(); abstract_state: a tree of ShapeDtypeStructs (or arrays) whose shardings say where
  each leaf goes, on any number of devices; None gives the state as nested dicts on one device; change_dtype: cast to
  the dtypes of abstract_state instead of refusing.
  Raises ConfigError listing every path that is missing, unknown, or of another shape or dtype.
  """
  found = find(path, step, ITEMS, verify)
  saved = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in found.arrays.items()}
  if abstract_state is None:
    return nest(_read_arrays(found.folder, saved))
  wanted = flat(abstract_state)
  _check_fit(found.folder, saved, wanted, change_dtype)
  placed = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=wanted[n].sharding) for n, s in saved.items()}
  arrays = _read_arrays(found.folder, placed)
  return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[n].astype(w.dtype) for n, w in wanted.items()])


def restore_params(path, step: int | None = None, mesh: jax.sharding.Mesh | None = None, ema: bool = False,
                   verify: bool = True):
  """The parameters alone, as nested dicts; neither moments nor anything else of the state is read.

  Args: path, step, verify: of find(); mesh: shards them by their letters (None: one device); ema: their moving average
  where the checkpoint keeps one. Needs no model: the checkpoint knows its shapes.
  """
  found = find(path, step, ('params', 'ema') if ema else ('params',), verify)
  item = 'ema' if ema and any(name.startswith('ema/') for name in found.arrays) else 'params'
  tree = nest({n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in found.arrays.items()
                if n.startswith(item + '/')})
  if mesh is not None:
    shardings = sharding_lib.named(mesh, sharding_lib.param_specs(tree[item], mesh))
    tree = {item: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree[item], shardings)}
  return nest(_read_arrays(found.folder, flat(tree)))[item]


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


def config_of(found: Step) -> config_lib.Config:
  """The config that a step was trained with. Raises ConfigError where this llm_jax knows other keys."""
  try:
    return config_lib.build(found.config)
  except ConfigError as e:
    raise ConfigError(f'{found.folder}: was trained by another llm_jax, whose config does not fit: {e}') from e


def _read_meta(folder) -> dict:
  try:
    meta = dict(format_version=0, extra={}) | manifest.read_json(folder / 'meta.json')
    version = int(meta['format_version'])
    meta['step'], meta['config'], meta['arrays']  # noqa: B018
  except (ValueError, KeyError, TypeError) as e:
    raise OSError(f'{folder}/meta.json: expected what a checkpoint holds, got {type(e).__name__}: {e}') from e
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
      source = folder / 'state' / item
      source = source if paths.native(source) else paths.local(source)
      args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding or one, global_shape=x.shape, dtype=x.dtype), tree)
      restored = checkpointer.restore(source, args=ocp.args.PyTreeRestore(tree, restore_args=args))
      read |= flat(restored if item == 'train' else {item: restored})
  return read


def flat(tree) -> dict:
  """{'params/blocks0/w_up_DF': leaf}: on disk there are only dicts, so no optimizer's class names outlive a release."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def nest(leaves: dict) -> dict:
  """The inverse of `flat`, for dicts."""
  tree = {}
  for name, x in leaves.items():
    *parents, leaf = name.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = x
  return tree


def _by_item(leaves: dict) -> dict:
  """The trees of state/: params and ema apart from the rest, so that they can be read without it."""
  tree = nest(leaves)
  trees = {item: tree.pop(item) for item in ('params', 'ema') if item in tree}
  return trees | ({'train': tree} if tree else {})


def _orbax():
  """Orbax, imported late (it takes a second) and silenced: its notes on shardings and barriers are not for users, nor a
  traceback for each array of a write whose failure is reported in one line."""
  import orbax.checkpoint as ocp
  logger = logging.getLogger('absl')
  if _not_orbax not in logger.filters:
    logger.addFilter(_not_orbax)
    logging.getLogger('asyncio').addFilter(lambda record: 'exception was never retrieved' not in record.getMessage())
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)       # of writes given up
  return ocp


def _not_orbax(record) -> bool:
  return 'orbax' not in record.pathname   # what fails there is raised by wait(), with its reason


def _folders(workdir) -> list[epath.Path]:
  root = workdir / 'checkpoints'
  return sorted((f for f in root.iterdir() if f.name.isdigit()), key=lambda f: int(f.name)) if root.is_dir() else []


def _set_aside(folder):
  """A damaged step is kept for whoever wants to look at it, under a name that nothing reads."""
  aside = folder.parent / f'{folder.name}.damaged'
  if aside.exists():
    aside.rmtree()
  if '://' in str(folder):
    paths.move(folder, aside)
  else:
    folder.rename(aside)
  _warn(f'{aside}: set aside; delete it when you no longer need it')


def _all_but(items) -> tuple[str, ...]:
  return tuple(f'state/{item}/' for item in ITEMS if item not in items)


def _warn(text):
  if jax.process_index() == 0:
    print(f'warning: {text}', file=sys.stderr)


def _list(names) -> str:
  return ', '.join(map(str, names[:20])) + (f' and {len(names) - 20} more' if len(names) > 20 else '')


def main(argv: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.checkpoint', 'Lists or verifies checkpoints.')
  parser.add_argument('command', choices=('ls', 'verify'))
  parser.add_argument('run', help='a run directory, or one of its checkpoints/STEP folders')
  with config_lib.one_line_errors('--debug' in argv):
    flags = parser.parse_args(argv)
    run = paths.open_path(flags.run)
    folders = _folders(run) or [find(run, verify=False).folder]
    bad, start, size = 0, time.perf_counter(), 0.0
    print('      step        MB  saved                      state')
    for folder in folders:
      why = manifest.problem(folder)
      if not why and flags.command == 'verify':
        why = manifest.verify(folder).why
      bad += bool(why)
      found = None if why else _try(folder, ITEMS, verify=False)[0]
      saved = manifest.read_json(folder / 'meta.json').get('time', '-') if found else '-'
      mb = sum(path.stat().length for _, path in manifest.files_of(folder)) / 1e6
      sound = 'unverified' if manifest.unverified(folder) else 'verified' if flags.command == 'verify' else 'complete'
      size += mb
      print(f'{folder.name:>10}{mb:>10.1f}  {saved:<25}  {why or sound}', flush=True)
    if flags.command == 'verify':
      print(f'{size:.1f} MB in {time.perf_counter() - start:.2f} s')
  if bad and flags.command == 'verify':
    raise SystemExit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
