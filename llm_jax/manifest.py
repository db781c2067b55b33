"""A step's manifest: the size and sha256 of each of its files, written last, by atomic rename.

It says whether a step can be trusted. Without one a step is 'incomplete' (its write did not finish), unless its
meta.json is of format 0, from before manifests: then it is 'unverified', readable with a warning. With one it is
'damaged' where a file is missing, has another size, or, read by verify(), another content.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import re
import typing

import jax

from llm_jax.config import ConfigError

FORMAT = 1      # raise it when older code can no longer read what is written; newer code keeps reading every older one
NAME = 'manifest.json'


class Verified(typing.NamedTuple):
  """What reading a step's files again found. why: '' where every file is what was written."""
  why: str
  files: int
  bytes: int


def write(folder, barrier: typing.Callable[[str], None] = lambda name: None, error: Exception | None = None) -> None:
  """Makes a step complete. Every process calls it, on any thread, once the arrays are committed: each hashes its own
  files; after `barrier` (which waits for all processes) process 0 joins what they found. error: what went wrong before;
  an error of one process is raised on all."""
  me, count = jax.process_index(), jax.process_count()
  mine = {}
  try:
    if error:
      raise error
    names = [name for name, _ in files_of(folder) if _owner(name, count) == me]
    mine = {n: [(folder / n).stat().length, digest] for n, digest in zip(names, _digests(folder, names))}
    if None in (digest for _, digest in mine.values()):
      raise OSError(f'{folder}: a file that was just written cannot be read')
  except Exception as e:
    error = e
  if count == 1:
    if error:
      raise error
    write_json(folder / NAME, dict(format_version=FORMAT, files=mine))
    return
  parts = [folder / f'{NAME}.{i}' for i in range(count)]
  with contextlib.suppress(OSError):                 # the others will miss it
    write_json(parts[me], dict(error=str(error) if error else '', files=mine))
  barrier('hashed')
  if error:
    raise error
  found = [read_json(part) for part in parts]
  if wrong := '; '.join(f'process {i}: {part["error"]}' for i, part in enumerate(found) if part['error']):
    raise OSError(wrong)
  if me == 0:
    files = {name: entry for part in found for name, entry in part['files'].items()}
    if missing := {name for name, _ in files_of(folder)} - files.keys():
      raise OSError(f'{folder}: no process has hashed {sorted(missing)[:4]}')
    write_json(folder / NAME, dict(format_version=FORMAT, files=files))
  barrier('written')
  if not (folder / NAME).exists():
    raise OSError(f'{folder}: process 0 did not write {NAME}')
  if me == 0:
    for part in parts:
      part.unlink()


def problem(folder) -> str:
  """Why a step cannot be read ('incomplete: ...', 'damaged: ...'), or ''. Compares sizes; verify() contents.
  Raises ConfigError for a manifest of a newer llm_jax."""
  try:
    manifest = read_json(folder / NAME)
  except FileNotFoundError:
    return _without_manifest(folder)
  except (OSError, ValueError) as e:
    return f'damaged: {NAME} is unreadable ({type(e).__name__})'
  try:
    version, files = int(manifest['format_version']), [(name, size) for name, (size, _) in manifest['files'].items()]
  except (ValueError, KeyError, TypeError, AttributeError):
    return f'damaged: {NAME} is unreadable'
  if version > FORMAT:
    raise ConfigError(f'{folder / NAME}: format {version}, this llm_jax reads up to {FORMAT}; update llm_jax')
  for name, size in files:
    try:
      length = (folder / name).stat().length
    except FileNotFoundError:
      return f'damaged: {name} is missing'
    except OSError as e:
      return f'damaged: {name} cannot be read ({e.strerror})'
    if length != size:
      return f'damaged: {name} has {length} bytes, expected {size}'
  return ''


def _without_manifest(folder) -> str:
  try:
    return '' if unverified(folder) else f'incomplete: no {NAME}, its write did not finish'
  except (OSError, ValueError, AttributeError) as e:
    return f'damaged: meta.json is unreadable ({type(e).__name__})'


def unverified(folder) -> bool:
  """True for a step from before manifests that Orbax finished: nothing can tell whether its contents changed."""
  try:
    old = read_json(folder / 'meta.json').get('format_version', 0) < 1
  except FileNotFoundError:
    return False
  return old and not (folder / NAME).exists() and (folder / 'state' / '_CHECKPOINT_METADATA').exists()


def verify(folder, skip: tuple[str, ...] = ()) -> Verified:
  """Reads every file of a step again, but those whose names start with `skip`; several processes share the work, and
  all must then call it."""
  if (why := problem(folder)) or unverified(folder):
    return Verified(why, 0, 0)
  files = read_json(folder / NAME)['files']
  read = sorted(name for name in files if not name.startswith(skip))
  mine = range(jax.process_index(), len(read), jax.process_count())
  digests = _digests(folder, [read[i] for i in mine])
  bad = _gather({i for i, digest in zip(mine, digests) if digest != files[read[i]][1]}, len(read))
  names = ', '.join(read[i] for i in sorted(bad))
  why = f'damaged: the contents of {names} changed since they were written (sha256) or cannot be read' if bad else ''
  return Verified(why, len(read), sum(files[name][0] for name in read))


def _owner(name: str, count: int) -> int:
  """The process that hashes a file: the one that wrote it, which Orbax names in its path; the first, for the rest."""
  for part in name.split('/'):
    found = re.fullmatch(r'(?:ocdbt\.)?process_(\d+)', part)
    if found and int(found[1]) < count:
      return int(found[1])
  return 0


def _gather(found: set[int], size: int) -> set[int]:
  """The union of what each process found."""
  if jax.process_count() == 1 or not size:
    return found
  import numpy as np
  from jax.experimental import multihost_utils
  flags = np.isin(np.arange(size), sorted(found))
  return set(np.flatnonzero(np.any(multihost_utils.process_allgather(flags), axis=0)).tolist())


def files_of(folder, prefix=''):
  """(name, path) of every file of a step but the manifest."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from files_of(path, f'{prefix}{path.name}/')
    elif prefix or not path.name.startswith(NAME):
      yield prefix + path.name, path


def _digests(folder, names) -> list[str | None]:
  """The sha256 of each file, several at a time; None where it cannot be read."""
  def sha256(name):
    try:
      with (folder / name).open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
    except OSError:
      return None
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return list(pool.map(sha256, names))


def read_json(path):
  return json.loads(path.read_text())


def write_json(path, value) -> None:
  """Whole or not at all; an object of a bucket always is."""
  if '://' in str(path):
    path.write_text(json.dumps(value, indent=1))
    return
  part = path.parent / (path.name + '.part')
  part.write_text(json.dumps(value, indent=1))
  part.replace(path)
