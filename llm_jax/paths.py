"""Paths of runs and steps, local or in a bucket, through etils.epath.

Orbax writes arrays to file systems and to gs://. For s3:// a step is made in a local folder and moved, and read from a
copy.
"""
import contextlib
import importlib.util
import json
import tempfile

from etils import epath

from llm_jax import manifest
from llm_jax.config import ConfigError

CLIENTS = dict(gs='gcsfs', s3='s3fs')      # what reaches a bucket


def open_path(path) -> epath.Path:
  """A local path, absolute as Orbax wants it, or a bucket's. Raises ConfigError for what cannot be reached."""
  scheme, separator, _ = str(path).partition('://')
  if not separator:
    return epath.Path(path).expanduser().resolve()
  if scheme not in CLIENTS:
    raise ConfigError(f'{path}: expected a local path, {" or ".join(s + "://" for s in CLIENTS)}')
  if importlib.util.find_spec(CLIENTS[scheme]) is None:
    raise ConfigError(f"{path} needs {CLIENTS[scheme]}; pip install -e '.[bucket]'")
  return epath.Path(str(path).rstrip('/'))


def native(path) -> bool:
  """Whether Orbax writes arrays there."""
  return '://' not in str(path) or str(path).startswith('gs://')


def move(folder, target):
  """A step to or within a bucket, its manifest last."""
  if target.exists():
    target.rmtree()
  copy(folder, target)
  if (folder / manifest.NAME).exists():
    (target / manifest.NAME).write_bytes((folder / manifest.NAME).read_bytes())
  folder.rmtree()


def copy(source, target):
  """Every file but a manifest."""
  for name, path in manifest.files_of(source):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    path.copy(target / name)


_downloads = []                # removed when the program ends


def local(folder) -> epath.Path:
  """The folder, or a copy of a bucket's, for libraries that open files by their names."""
  if '://' not in str(folder):
    return folder
  _downloads.append(tempfile.TemporaryDirectory(prefix='llm_jax'))
  target = epath.Path(_downloads[-1].name)
  copy(folder, target)
  return target


def read_jsonl(path) -> list[dict]:
  """The rows of a .jsonl file; [] where there is none. A line cut short by a kill is left out."""
  path, rows = epath.Path(path), []
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      rows.append(json.loads(line))
  return [r for r in rows if isinstance(r, dict)]
