"""A step's manifest: the size and sha256 of each of its files, written last, by atomic rename.

It says whether a step can be trusted. Without one a step is 'incomplete' (its write did not finish), unless its
meta.json is of format 0, from before manifests: then it is 'unverified', readable with a warning. With one it is
'damaged' where a file is missing, has another size, or, read by verify(), another content.
"""
import concurrent.futures
import hashlib
import json
import typing

import jax

FORMAT = 1      # raise it when older code can no longer read what is written; newer code keeps reading every older one
NAME = 'manifest.json'


class Verified(typing.NamedTuple):
  """What reading a step's files again found. why: '' where every file is what was written."""
  why: str
  files: int
  bytes: int


def write(folder, barrier: typing.Callable[[str], None] = lambda name: None) -> None:
  """Makes a step complete. Every process calls it once the arrays are committed: each hashes its own files; after
  `barrier` (which waits for all processes) process 0 joins what they found."""
  me, count = jax.process_index(), jax.process_count()
  names = [name for name, _ in files_of(folder) if _owner(name, count) == me]
  mine = {n: [(folder / n).stat().length, digest] for n, digest in zip(names, _digests(folder, names))}
  if count == 1:
    write_json(folder / NAME, dict(format_version=FORMAT, files=mine))
    return
  parts = [folder / f'{NAME}.{i}' for i in range(count)]
  write_json(parts[me], mine)
  barrier('hashed')
  if me == 0:
    files = {}
    for part in parts:
      files |= read_json(part)
    write_json(folder / NAME, dict(format_version=FORMAT, files=files))
    for part in parts:
      part.unlink()


def problem(folder) -> str:
  """Why a step cannot be read ('incomplete: ...', 'damaged: ...'), or ''. Compares sizes; verify() contents."""
  if not (folder / NAME).exists():
    return '' if unverified(folder) else f'incomplete: no {NAME}, its write did not finish'
  try:
    manifest = read_json(folder / NAME)
    if manifest['format_version'] > FORMAT:
      return ''                        # reading its meta.json says what to do
    sizes = {name: size for name, (size, _) in manifest['files'].items()}
  except (ValueError, KeyError, TypeError):
    return f'damaged: {NAME} is unreadable'
  for name, size in sizes.items():
    path = folder / name
    if not path.exists():
      return f'damaged: {name} is missing'
    if path.stat().length != size:
      return f'damaged: {name} has {path.stat().length} bytes, expected {size}'
  return ''


def unverified(folder) -> bool:
  """True for a step from before manifests that Orbax finished: nothing can tell whether its contents changed."""
  try:
    old = read_json(folder / 'meta.json').get('format_version', 0) < 1
  except (OSError, ValueError, TypeError, AttributeError):
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
  why = f'damaged: the contents of {names} changed since they were written (sha256)' if bad else ''
  return Verified(why, len(read), sum(files[name][0] for name in read))


def _owner(name: str, count: int) -> int:
  """The process that hashes a file: the one that wrote it, which Orbax names in its path; the first, for the rest."""
  for part in name.split('/'):
    before, _, number = part.rpartition('process_')
    if before in ('', 'ocdbt.') and number.isdigit() and part != number and int(number) < count:
      return int(number)
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


def _digests(folder, names) -> list[str]:
  """The sha256 of each file, several at a time."""
  def sha256(name):
    with (folder / name).open('rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
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
