"""The run directory: tried, locked against a second writer and measured before step 0.

Checkpoints go to `path` through etils.epath, local, gs:// or s3://. What is appended to by the line (metrics, samples,
events, TensorBoard) needs a file system: it goes to `local`, which is the same folder, or for a bucket a folder of the
cache that publish() copies to the bucket with every checkpoint and at the end.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
import socket
import sys
import time

import jax
import numpy as np
from etils import epath

from llm_jax import paths, sharding
from llm_jax.config import ConfigError

LOCK, STAGE = 'lock', 'stage'


class RunDirectory:
  """A context manager; opening raises ConfigError where the directory cannot be used."""

  def __init__(self, workdir, cache: pathlib.Path):
    self.bucket = '://' in str(workdir)
    if self.bucket:
      self.path = paths.open_path(workdir)
      self.local = cache / 'runs' / hashlib.sha256(str(self.path).encode()).hexdigest()[:20]
    else:
      self.local = pathlib.Path(workdir).expanduser().absolute()
      self.path = epath.Path(self.local)
    self._lock, self._published = None, {}

  def __enter__(self):
    secret = ''
    try:
      with sharding.fail_together():
        if jax.process_index() == 0:
          secret = self._open()
      if jax.process_count() > 1:
        self._check_shared(secret)
    except BaseException as e:
      self.__exit__(type(e))
      if isinstance(e, OSError):
        raise ConfigError(f'--workdir: cannot write to {self.local}: {e.strerror or e}; name another folder, or make '
                          'room or change its permissions') from e
      raise
    return self

  def _open(self) -> str:
    self.local.mkdir(parents=True, exist_ok=True)
    self._lock = self._take_lock()
    secret = secrets.token_hex(8)
    self._lock.truncate(0)
    self._lock.write(json.dumps(dict(host=socket.gethostname(), pid=os.getpid(), id=secret,
                                     since=time.strftime('%Y-%m-%d %H:%M:%S %Z'))))
    self._lock.flush()
    if self.bucket:
      self._fetch()
    return secret

  def _take_lock(self):
    """The open lock file; the system releases it when the process dies."""
    path = self.local / LOCK
    while True:
      lock = open(path, 'a+')
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        with lock:
          lock.seek(0)
          raise ConfigError(f'--workdir: {self.path} is in use by another run ({lock.read().strip()}); stop that one, '
                            'or name another folder') from None
      except OSError as e:
        print(f'warning: {self.local}: this file system has no locks ({e.strerror}); do not start a second run in it',
              file=sys.stderr)
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
          return lock
      lock.close()                                   # its holder ended, and removed it, between the two lines

  def _check_shared(self, secret):
    """Every process must see the directory of process 0: a folder of each host's own would lose the others' shards."""
    from jax.experimental import multihost_utils
    ours = np.frombuffer(secret.encode().ljust(16, b'0'), np.uint8)
    expected = bytes(multihost_utils.broadcast_one_to_all(ours)).decode()
    seen = self.bucket
    with contextlib.suppress(OSError, ValueError):
      seen = seen or json.loads((self.local / LOCK).read_text())['id'] == expected
    if not np.all(multihost_utils.process_allgather(np.bool_(seen))):
      raise ConfigError(f'--workdir: not every host sees the same {self.local}; name a shared folder (NFS) or a bucket '
                        '(gs://)')

  def check_room(self, size: int, keep: int, complete: int) -> None:
    """Raises ConfigError where the disk cannot hold the checkpoints of a run: `keep` and the one being written, of
    `size` bytes each, less the `complete` ones that are there. A bucket has room; a step for s3:// is made here."""
    if str(self.path).startswith('gs://') or jax.process_index():
      return
    needed, free = size * (1 if self.bucket else max(keep + 1 - complete, 1)), shutil.disk_usage(self.local).free
    if free < needed:
      raise ConfigError(f'--workdir: {self.local} has room for {_size(free)}, the checkpoints of this run need '
                        f'{_size(needed)} more (checkpoint.keep={keep} and the one being written, {_size(size)} each); '
                        'make room, lower checkpoint.keep, or name a folder on another disk')

  def publish(self) -> None:
    """Copies what changed to the bucket; nothing where the directory is local."""
    if not self.bucket or jax.process_index():
      return
    for path in sorted(p for p in self.local.rglob('*') if p.is_file() and p.name != LOCK and
                       p.suffix != '.part' and STAGE not in p.parts):
      stat = path.stat()
      if self._published.get(path) != (stat.st_size, stat.st_mtime_ns):
        with _bucket_errors(self.path):
          target = self.path / str(path.relative_to(self.local))
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(path.read_bytes())
        self._published[path] = stat.st_size, stat.st_mtime_ns

  def _fetch(self):
    """The bucket's logs, in place of what an earlier run on this machine left."""
    for path in self.local.iterdir():
      if path.name != LOCK:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with _bucket_errors(self.path):
      probe = self.path / f'{LOCK}.{os.getpid()}'
      probe.write_text('')
      probe.unlink()
      for path in self.path.iterdir() if self.path.exists() else ():     # a bucket has no empty folders
        if path.name.endswith(('.json', '.jsonl')):
          (self.local / path.name).write_bytes(path.read_bytes())

  def __exit__(self, kind, *_):
    if self._lock is None:
      return
    with contextlib.suppress(OSError):
      (self.local / LOCK).unlink()
      if kind is not None:
        self.local.rmdir()       # succeeds where it is empty: a run that could not start leaves no folder
    self._lock.close()


@contextlib.contextmanager
def _bucket_errors(path):
  """Each library raises its own kinds."""
  try:
    yield
  except Exception as e:
    raise ConfigError(f'--workdir: {path}: {type(e).__name__}: {" ".join(str(e).split())[:200]}; check the bucket\'s '
                      'name and your credentials') from e


def _size(n: float) -> str:
  units = ('bytes', 'kB', 'MB', 'GB', 'TB')
  power = min(int(math.log10(max(n, 1)) // 3), len(units) - 1)
  return f'{n / 1000 ** power:.3g} {units[power]}'
