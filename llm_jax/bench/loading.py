"""bench load: how fast data arrives, beside what training consumes."""
import itertools
import pathlib
import tempfile

import numpy as np

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.bench import alternate, hardware, import_torch, medians, seconds_of, token_batch, training
from llm_jax.config import ConfigError
from llm_jax.data import batches, sources, store
from llm_jax.data import tokenizer as tokenizer_lib

SIZES = ((8, 256), (512, 1024))      # configs/base.py's batch, and a large one
MB = 4                               # of text, where no file is given
AIM = 10                             # times what training consumes
VOCAB = 2048                         # of the trained tokenizers, as in configs/base.py


def load(flags) -> None:
  """Prints how many MB/s are tokenised and how many tokens/s arrive in batches, as the training loop gets them:
  prefetched and put on the devices; and how many times what a training step consumes that is."""
  import jax
  pieces = text_of(flags.text)
  size = sum(len(piece.encode()) for piece in pieces) / 1e6
  tokenizers = {'byte': tokenizer_lib.Byte(), 'char': tokenizer_lib.Char(''.join(sorted(set(''.join(pieces))))),
                'sentencepiece': tokenizer_lib.train_sentencepiece(config_lib.Tokenizer(vocab_size=VOCAB), pieces)}
  encode = {name: made.encode_batch for name, made in tokenizers.items()}
  if flags.peer == 'torch':
    import_torch()
    encode['tokenizers, byte-level BPE'] = hugging_face(pieces)
  encoding = {name: lambda run=run: size / seconds_of(lambda: run(pieces)) for name, run in encode.items()}
  megabytes = medians(alternate(encoding, flags.rounds))

  ours = training.Ours(flags, token_batch(flags))
  ours.run(1)
  step = {'step': lambda: flags.steps * flags.batch * flags.length / seconds_of(lambda: ours.run(flags.steps))}
  mesh = sharding.make_mesh(config_lib.Mesh())
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    path = pathlib.Path(folder) / 'text'
    path.write_text(''.join(pieces))
    assembly = {}
    for (B, T), packing in itertools.product(SIZES, ('concat', 'pack')):
      data = config_lib.Data(source='text', path=str(path), valid='tail', length=T, packing=packing, cache_dir=folder)
      found = store.prepare(data, tokenizers['byte'], progress='none')
      made = batches.Batches(found.train, found.weights, data, config_lib.Train(batch_size=B), tokenizers['byte'])
      assembly[f'{packing}, {B} x {T}'] = lambda made=made, B=B, T=T: arriving(made, B, T, mesh)
    if flags.peer == 'torch':
      tokens = np.memmap(found.train[0].folder / 'train.tokens', np.uint16, 'r')
      assembly |= {f'nanoGPT, torch, {B} x {T}': lambda B=B, T=T: windows(tokens, B, T) for B, T in SIZES}
    rates = medians(alternate(step | assembly, flags.rounds))
  consumed = rates.pop('step')

  print(f'load {size:.1f} MB, {flags.rounds} rounds, medians; {hardware()}')
  for name, rate in megabytes.items():
    print(f'{name:>28}  {rate:>8.1f} MB/s tokenised')
  print(f'{"training consumes":>28}  {consumed / 1e6:>8.4f} M tok/s ({flags.layers} x {flags.width}, {flags.batch} x '
        f'{flags.length} tokens)')
  for name, rate in rates.items():
    print(f'{name:>28}  {rate / 1e6:>8.2f} M tok/s  {rate / consumed:,.0f} times what training consumes (aim {AIM})')


def text_of(file: str | None) -> list[str]:
  """A file, or the first 4 MB of the standard library's source, in pieces as its documents come."""
  source = config_lib.Source('text', file) if file else config_lib.Source('stdlib', '')
  pieces, size = [], 0
  for document in sources.documents(source):
    pieces.append(document.text)
    size += len(document.text)
    if size > MB * 1e6 and not file:
      break
  if not size:
    raise ConfigError(f'--text: {file} is empty; give a file of text')
  return pieces


def arriving(made: batches.Batches, B: int, T: int, mesh) -> float:
  """Tokens per second that come out of the prefetch; those that it holds ready once it has started are not counted."""
  import jax
  n = max(24, 2_000_000 // (B * T))
  with made.prefetch(0, sharding.local_rows(B, mesh)) as prefetch:
    get_batch = lambda: jax.block_until_ready(sharding.put_batch(next(prefetch)[1], mesh))
    for _ in range(8):
      get_batch()
    return n * B * T / seconds_of(lambda: [get_batch() for _ in range(n)])


def windows(tokens, B: int, T: int) -> float:
  """Tokens per second of nanoGPT's get_batch: random windows of the memory-mapped tokens, stacked."""
  import torch
  n = max(20, 2_000_000 // (B * T))

  def get_batch():
    start_B = torch.randint(len(tokens) - T, (B,))
    rows = lambda shift: torch.stack([torch.from_numpy(tokens[i + shift:i + shift + T].astype(np.int64))
                                      for i in start_B])
    return rows(0), rows(1)
  return n * B * T / seconds_of(lambda: [get_batch() for _ in range(n)])


def hugging_face(pieces: list[str]):
  """Encodes with a byte-level BPE of as many entries, which the tokenizers library trains on the same text."""
  import tokenizers
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.train_from_iterator(pieces, tokenizers.trainers.BpeTrainer(
      vocab_size=VOCAB, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return lambda texts: [np.array(found.ids, np.int32) for found in made.encode_batch(texts)]
