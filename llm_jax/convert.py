"""Converts a model between formats: python -m llm_jax.convert SRC DST --to=hf|gguf|orbax

SRC: a run directory or checkpoint of llm_jax, a Hugging Face directory, a .gguf file, or hf:org/name. DST: a new
directory (hf, orbax), a file (gguf), or hf:org/name to upload to. What was written is read back and its logits compared
before this says so.
"""
import sys
import time

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

DTYPES = ('float32', 'bfloat16', 'float16')


def parse(args):
  parser = config_lib.Parser('llm_jax.convert', __doc__)
  parser.add_argument('source')
  parser.add_argument('target')
  parser.add_argument('--to', choices=('hf', 'gguf', 'orbax'), help='default: gguf for a name that ends so, else hf')
  parser.add_argument('--dtype', choices=DTYPES, default='', help='of the weights; default: that of the source')
  parser.add_argument('--quantize', choices=('q8_0', 'q4_0'), default='', help='of the matrices of a GGUF file')
  parser.add_argument('--step', type=int, help="the run's checkpoint; default: the newest")
  parser.add_argument('--ema', action='store_true', help="the parameters' moving average, where the run keeps one")
  flags = parser.parse_args(args)
  flags.to = flags.to or ('gguf' if flags.target.endswith('.gguf') else 'hf')
  if flags.quantize and flags.to != 'gguf':
    raise ConfigError('--quantize: only GGUF files are quantised; use --to=gguf, or --dtype')
  if flags.quantize and flags.dtype:
    raise ConfigError('--quantize: already says how weights are stored; leave --dtype out')
  if flags.dtype and flags.to == 'orbax':
    raise ConfigError('--dtype: our checkpoints are float32; leave it out')
  return flags


def main(args: list[str]) -> None:
  with config_lib.one_line_errors('--debug' in args):
    run(parse(args))


def run(flags) -> None:
  from llm_jax.interop import load
  start = time.perf_counter()
  model = load.find(flags.source, step=flags.step, ema=flags.ema, dtype='float32')
  print(f'read {flags.source}: {model.origin}', flush=True)
  upload = flags.target.removeprefix('hf:') if flags.target.startswith('hf:') else ''
  if upload:
    from llm_jax.interop import hub
    saved = hub.upload(upload, lambda folder, file: write(
        model, folder / file if flags.to == 'gguf' else folder, flags))
  else:
    saved = write(model, flags.target, flags)
  for note in saved.notes:
    print(f'note: {note}')
  print(f'wrote {saved.path} in {time.perf_counter() - start:.1f} s; read back, logits differ by at most '
        f'{saved.error:.2g} (the largest is {saved.largest:.2g})')


def write(model, target, flags):
  from llm_jax.interop import save
  if flags.to == 'orbax':
    return save.to_orbax(model, target)
  if flags.to == 'hf':
    return save.to_hf(model, target, flags.dtype)
  return save.to_gguf(model, target, flags.quantize or flags.dtype)


if __name__ == '__main__':
  main(sys.argv[1:])
