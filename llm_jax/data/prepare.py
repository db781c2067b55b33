"""From a config to what training reads: the tokenizer, trained once on the data and cached, and the token stores."""
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

from llm_jax import config as config_lib
from llm_jax.data import sources, store
from llm_jax.data import tokenizer as tokenizer_lib

PIECE = 1 << 14      # characters of a document taken at a time, so that a sample is spread over long files
READ_AT_MOST = 64    # times the sample: how much of a huge source is read to sample it


def tokenizer(cfg: config_lib.Config):
  """The config's tokenizer: loaded, or trained on the training documents. A trained one is kept in the cache folder
  under a name made of everything that decides it."""
  if cfg.tokenizer.kind == 'byte' or cfg.tokenizer.path:
    return tokenizer_lib.build(cfg.tokenizer, ())
  origins = [(s, 'train') for s in
             cfg.data.mixture or (config_lib.Source(cfg.data.source, cfg.data.path, cfg.data.field),)]
  if cfg.tokenizer.kind == 'char' and cfg.data.valid == 'given':
    (source, _), path = origins[0], cfg.data.valid_path
    origins.append((source, path) if source.source == 'tfds' else (dataclasses.replace(source, path=path), 'train'))
  key = json.dumps([tokenizer_lib.FORMAT, cfg.tokenizer.__dict__, cfg.data.valid, cfg.data.valid_fraction,
                    [[s.field, s.weight, sources.signature(s, split)] for s, split in origins]])
  folder = store.cache_folder(cfg.data) / 'tokenizers' / hashlib.sha256(key.encode()).hexdigest()[:20]
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)      # first: where it cannot be made, that is known at once
    made = tokenizer_lib.build(cfg.tokenizer, texts(cfg, origins))
    temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    made.save(temporary)
    try:
      os.rename(temporary, folder)
    except OSError:                       # another process was first
      shutil.rmtree(temporary)
  return tokenizer_lib.load(folder)


def texts(cfg: config_lib.Config, origins):
  """What a tokenizer learns from: all text for characters (their alphabet must cover the held-out text too), else
  train_mb of the training documents, spread evenly, each source by its weight. origins: (source, split) pairs."""
  if cfg.tokenizer.kind == 'char':
    return (d.text for s, split in origins for d in sources.documents(s, split, cfg.data.max_bad_records))
  total = sum(s.weight for s, _ in origins)
  return [text for s, _ in origins for text in _spread(cfg, s, int(cfg.tokenizer.train_mb * 1e6 * s.weight / total))]


def _spread(cfg, source, budget):
  """About `budget` characters in pieces of equal distance, in one pass: with too many held, every second goes."""
  kept, size, stride, index, read, left = [], 0, 1, 0, 0, sys.maxsize
  if cfg.data.valid == 'tail':                    # the same cut as the store's
    count = sum(len(d.text) for d in sources.documents(source, max_bad_records=cfg.data.max_bad_records))
    left = int(count * (1 - cfg.data.valid_fraction))
  for document in sources.documents(source, max_bad_records=cfg.data.max_bad_records):
    if cfg.data.valid == 'hash' and sources.split_of(document.name, cfg.data.valid_fraction) == 'valid':
      continue
    text = document.text[:max(left, 0)]
    left -= len(document.text)
    for start in range(0, len(text), PIECE):
      piece = text[start:start + PIECE]
      read += len(piece)
      if index % stride == 0:
        kept.append(piece)
        size += len(piece)
      index += 1
      if size > 2 * budget:
        kept, stride = kept[::2], 2 * stride
        size = sum(map(len, kept))
    if read > READ_AT_MOST * budget:
      break
  while size > budget and len(kept) > 1:          # between budget and twice as much is left: thin evenly to it
    keep = budget / size
    kept = [piece for i, piece in enumerate(kept) if int((i + 1) * keep) > int(i * keep)]
    if sum(map(len, kept)) == size:
      break
    size = sum(map(len, kept))
  return kept
