"""Speed, each figure beside a peer and the machine's limit, measured in one run:

  python -m llm_jax.bench train [--peer=torch] [--layers=6 --width=384 --length=256 --batch=16] [--rounds=7]
                                                              --explain: where a step's time goes
  python -m llm_jax.bench save [--mb=400] [--rounds=7]        checkpoints, beside Orbax alone
  python -m llm_jax.bench decode --model=PATH [--peer=torch] [--streams=32] [--new=64]   one stream and many, beside a
                                                              sweep over the weights, and transformers

  python -m llm_jax.bench serve --model=PATH [--streams=8] [--new=64]     a server under load: first and further tokens
  python -m llm_jax.bench learn --text=FILE [--recipe=cpu] [--rounds=3] [--learn_steps=2000] [--peer=torch]
                                                              what is learned from a text, beside nanoGPT's recipe
  python -m llm_jax.bench load [--text=FILE] [--peer=torch]   how fast text becomes tokens and tokens batches, and how
                                                              many times what training consumes that is
  python -m llm_jax.bench compile [--peer=torch] [--rounds=3] from the start of a process to the first loss, with empty
                                                              and with kept caches; peak memory
  python -m llm_jax.bench grow [--out=FILE.svg]               a step's time and memory against depth, width, context and
                                                              batch; what the host spends on one

Rounds alternate between ours and the peer's, so that a machine whose speed drifts slows both (train on an accelerator:
each has it alone, twice); medians are printed.
Results that were kept are in docs/benchmarks.md. The peer needs the `parity` extra.
"""
import importlib
import sys

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

SIZES = dict(layers=6, width=384, length=256, batch=16, vocab=65, rounds=7, steps=2)      # all above 0
COMMANDS = dict(train=('training', 'train'), save=('saving', 'save'), decode=('decoding', 'decode'),
                serve=('serving', 'serve'), learn=('learning', 'learn'), load=('loading', 'load'),
                compile=('compiling', 'compile_'), grow=('growing', 'grow'))


def main(argv: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.bench', __doc__)
  parser.add_argument('what', choices=tuple(COMMANDS))
  parser.add_argument('--peer', choices=('none', 'torch'), default='none')
  parser.add_argument('--compiled', action='store_true', help='also torch.compile (slow to start)')
  parser.add_argument('--remat', default='auto', choices=('auto', 'none', 'dots', 'full'),
                      help='of train and compile (auto: the lightest that fits) and grow (auto: none)')
  parser.add_argument('--explain', action='store_true', help="of train: where a step's time goes, by part")
  parser.add_argument('--model', help='that decode and serve run')
  parser.add_argument('--streams', type=int, default=32, help='of decode and serve, at the same time')
  parser.add_argument('--new', type=int, default=64, help='tokens that decode and serve make')
  parser.add_argument('--weights', choices=('int8', 'int4'), default='', help='that decode computes with')
  parser.add_argument('--cache', choices=('int8',), default='', help='of decode')
  parser.add_argument('--text', help='a file whose perplexity decode prints, from which learn learns, that load reads')
  parser.add_argument('--out', help='an .svg that grow draws')
  parser.add_argument('--recipe', default='cpu', help='of configs/shakespeare_char.py, for learn; several: '
                      "gpu,gpu_ours; the peer has the first's sizes")
  parser.add_argument('--learn_steps', type=int, default=2000, help='of learn')
  parser.add_argument('--mb', type=int, default=400, help='of the state that save writes')
  parser.add_argument('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'))
  parser.add_argument('--scan', dest='unroll', action='store_false',
                      help='of train, compile and grow: a loop over the layers, which compiles sooner')
  parser.add_argument('--fp8', action='store_true', help="of train, compile and grow: the layers' products in float8")
  parser.add_argument('--loss_chunk', type=int, default=0,
                      help='of the same: entries of the vocabulary at a time, as train.loss_chunk; 0: all')
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value)
  with config_lib.one_line_errors('--debug' in argv):
    flags = parser.parse_args(argv)
    for name in ('mb', 'streams', 'new', 'learn_steps', *SIZES):
      if getattr(flags, name) <= 0:
        raise ConfigError(f'--{name}: expected a positive number, got {getattr(flags, name)}')
    if flags.loss_chunk < 0:
      raise ConfigError(f'--loss_chunk: expected 0 or a number of entries of the vocabulary, got {flags.loss_chunk}')
    module, function = COMMANDS[flags.what]
    getattr(importlib.import_module(f'llm_jax.bench.{module}'), function)(flags)


if __name__ == '__main__':
  main(sys.argv[1:])
