"""TensorFlow Datasets by name, without TensorFlow: the ArrayRecord files of a split, prepared first where that works.

Preparing runs in a process of its own, because tfds waits without a limit for a network that is not there and its
threads cannot be stopped. That process ends itself when nothing moves.
"""
import contextlib
import importlib
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

from llm_jax.config import ConfigError, nearest

PATIENCE = 10.0      # seconds from the start for the first 100 kB to come; less is only what tfds notes about itself
SILENCE = 60.0       # seconds without any progress later on
BUILD = 'pip install tensorflow tensorflow-datasets && tfds build {} --file_format=array_record'
CONVERT = ('pip install tensorflow tensorflow-datasets && tfds convert_format --dataset_version_dir={} '
           '--out_file_format=array_record')


def files(name: str, split: str):
  """The ArrayRecord files of a split ('train', 'train[:90%]') of 'name', 'name/config' or 'name/config:version'.

  Prepared datasets are looked for in $TFDS_DATA_DIR, else ~/tensorflow_datasets. Raises ConfigError in one line for an
  unknown name or split, a dataset that needs TensorFlow (with the command that converts it), and, within 15 seconds,
  for a network that cannot be reached.
  """
  started = time.time()
  builder = _builder(name)
  if not _formats(builder):
    _prepare_apart(name, builder, started)
    builder = _builder(name)
  if 'array_record' not in _formats(builder):
    raise ConfigError(f'config.data.path: tfds {name!r} is stored as {", ".join(_formats(builder))}, expected '
                      f'array_record; convert it: {CONVERT.format(builder.data_path)}')
  if builder.info.file_format.value != 'array_record':     # stored in several
    builder = _builder(name, file_format='array_record')
  return _files_of(builder, name, split)


def _files_of(builder, name, split):
  from llm_jax.data.sources import File
  try:
    parts = builder.info.splits[split].file_instructions
  except (KeyError, ValueError, AssertionError) as e:
    near = nearest(split, list(builder.info.splits))
    raise ConfigError(f'config.data: tfds {name!r} has no split {split!r}{near}') from e
  found = []
  for part in parts:
    path = pathlib.Path(part.filename)
    if not path.is_file():
      raise ConfigError(f'config.data.path: tfds {name!r} lacks {path}; delete {path.parent} and prepare it again')
    found.append(File(path, path.name, part.skip, part.take if part.take >= 0 else part.examples_in_shard - part.skip))
  return found


def _builder(name, **options):
  os.environ.setdefault('NO_GCE_CHECK', 'true')        # no look-up of a cloud machine's metadata server
  logging.getLogger('absl').setLevel(logging.ERROR)    # "Variant folder has no dataset_info.json" is not news here
  import tensorflow_datasets
  for older in ('text', 'translate', 'summarization', 'question_answering', 'text_simplification', 'structured'):
    with contextlib.suppress(ImportError):
      importlib.import_module(f'tensorflow_datasets.{older}')    # registers its builders; tfds would on first use
  folder = os.environ.get('TFDS_DATA_DIR')     # tfds itself looks at it only when it is imported
  try:
    return tensorflow_datasets.builder(name, try_gcs=False, data_dir=folder, **options)
  except tensorflow_datasets.core.registered.DatasetNotFoundError as e:
    prepared = pathlib.Path(folder or '~/tensorflow_datasets').expanduser().glob('*/')
    known = [*tensorflow_datasets.list_builders(with_community_datasets=False), *(p.name for p in prepared)]
    near = nearest(name.split('/')[0].split(':')[0], known)
    near = near if near.startswith('; nearest') else ''      # not the list of all
    raise ConfigError(f'config.data.path: no tfds dataset {name!r}{near}') from e
  except (ImportError, AttributeError) as e:
    raise ConfigError(f'config.data.path: {_needs_tensorflow(name, e)}') from e
  except (ValueError, AssertionError, RuntimeError) as e:
    raise ConfigError(f'config.data.path: tfds {name!r}: {_line(e)}') from e


def _formats(builder):
  """File formats a dataset is prepared in."""
  folder = pathlib.Path(builder.data_path)
  if not (folder / 'dataset_info.json').is_file():
    return []
  return sorted(f.value for f in builder.info.available_file_formats())


def _prepare_apart(name, builder, started):
  """Runs `prepare` in another process; its one line of error becomes a ConfigError."""
  print(f'preparing tfds {name} in {builder.data_path}', file=sys.stderr)
  code = 'import sys; from llm_jax.data import tfds; tfds.prepare(sys.argv[1], float(sys.argv[2]))'
  here = str(pathlib.Path(__file__).resolve().parents[2])
  env = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, [here, os.environ.get('PYTHONPATH')]))}
  command = [sys.executable, '-c', code, name, str(started)]
  done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True)
  if done.returncode:
    lines = [line for line in done.stderr.decode(errors='replace').splitlines() if line.strip()]
    raise ConfigError(next((line for line in reversed(lines) if line.startswith('config.')), lines[-1] if lines else
                           f'config.data.path: tfds {name!r}: the process preparing it ended with {done.returncode}'))


def prepare(name: str, started: float) -> None:
  """Prepares a dataset as ArrayRecord, or ends with status 2 and one line on stderr: for a process of its own. PATIENCE
  counts from `started`, a time.time()."""
  logging.disable(logging.WARNING)     # ten retries of a download are not news
  import tensorflow_datasets
  tensorflow_datasets.disable_progress_bar()
  builder = _builder(name, file_format='array_record')
  threading.Thread(target=_watch, args=(name, builder, started + PATIENCE), daemon=True).start()
  try:
    _lend_files(builder)
    builder.download_and_prepare()
  except Exception as e:     # whatever a builder raises is the reason it gives
    if isinstance(e, ImportError | AttributeError) or 'tensorflow' in str(e).lower():
      _end(_needs_tensorflow(name, e))
    _end(f'tfds {name!r}: {_line(e)}')


def _lend_files(builder):
  """Gives a builder that uses TensorFlow only to open files (tiny_shakespeare does) Python's own in its place."""
  module = sys.modules[type(builder).__module__]
  try:
    import tensorflow  # noqa: F401
  except ImportError:
    if hasattr(module, 'tf'):
      files = types.SimpleNamespace(GFile=open, exists=os.path.exists, isdir=os.path.isdir, listdir=os.listdir)
      module.tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=files))


def _watch(name, builder, deadline):
  """Ends the process when nothing has come by the deadline, or later neither files nor CPU time move for SILENCE."""
  root = pathlib.Path(builder.data_path)
  while root.name and root.name != builder.name:
    root = root.parent
  folders = (root.parent / 'downloads', root)
  first = size(folders)
  seen, cpu, moved = first, time.process_time(), time.monotonic()
  while True:
    time.sleep(0.5)
    now, used = size(folders), time.process_time()
    if now != seen or used - cpu > 0.1:
      seen, moved = now, time.monotonic()
    cpu = used
    idle = time.monotonic() - moved
    if idle > SILENCE or (seen - first < 100_000 and time.time() > deadline and idle > 1):
      _end(f'tfds {name!r}: nothing has come from the network; is it reachable? Prepare the dataset where it is and '
           f'copy it to {root}, or give a file with config.data.source=text')


def size(folders) -> int:
  """Bytes of all files below folders."""
  total = 0
  for folder in folders:
    for path in folder.rglob('*'):
      with contextlib.suppress(OSError):
        total += path.stat().st_size if path.is_file() else 0
  return total


def _needs_tensorflow(name, error):
  return f'tfds {name!r} needs TensorFlow ({_line(error)}); where that is, run: {BUILD.format(name)}'


def _line(error):
  return ' '.join(str(error).split())[:300] or type(error).__name__


def _end(message):
  print('config.data.path: ' + message, file=sys.stderr, flush=True)
  os._exit(2)
