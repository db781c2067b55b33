"""Continues prompts with a trained model: python -m llm_jax.sample --model=RUN_DIR --prompt='def main('

Prompts and texts go to stdout, everything else to stderr.
"""
import sys

from llm_jax import config as config_lib
from llm_jax.config import ConfigError


def parse(args):
  parser = config_lib.Parser('llm_jax.sample', __doc__)
  parser.add_argument('--model', required=True, help='a run directory, one of its checkpoints/STEP folders, '
                      'a Hugging Face directory, a .gguf file, or hf:org/name')
  parser.add_argument('--prompt', action='append', help="text to continue; may be repeated; '-' reads stdin")
  parser.add_argument('--max_tokens', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.8, help='0 is greedy')
  parser.add_argument('--top_k', type=int, default=0)
  parser.add_argument('--top_p', type=float, default=0.95)
  parser.add_argument('--min_p', type=float, default=0.0)
  parser.add_argument('--repetition_penalty', type=float, default=1.0)
  parser.add_argument('--stop', action='append', default=[], help='text to end before; may be repeated')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--n', type=int, default=1, help='samples per prompt')
  parser.add_argument('--stream', action='store_true', help='print the text as it comes (one prompt, n=1)')
  parser.add_argument('--step', type=int, help='the checkpoint; default: the newest')
  parser.add_argument('--fsdp', type=int, default=1, help='devices that share parameters and prompts')
  parser.add_argument('--tensor', type=int, default=1, help='devices that share each matrix and its heads')
  parser.add_argument('--ema', action='store_true', help="the parameters' moving average, where the run keeps one")
  parser.add_argument('--no_verify', action='store_true', help='trust the files without reading their hashes again')
  return parser.parse_args(args)


def read_prompt(prompt: str) -> str:
  """The text of a --prompt: '-' is all of stdin."""
  try:
    text = sys.stdin.buffer.read().decode() if prompt == '-' else prompt
    text.encode()
    return text
  except UnicodeError as e:
    raise ConfigError(f'--prompt: expected UTF-8, got {e}') from e


def main(args: list[str]) -> None:
  config_lib.command(args, parse, run)


def run(flags) -> None:
  prompts = [read_prompt(p) for p in flags.prompt or ['']]
  if flags.stream and (len(prompts) > 1 or flags.n > 1):
    raise ConfigError('--stream: expected one prompt and n=1; several texts would be mixed')
  options = dict(max_tokens=flags.max_tokens, temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p,
                 min_p=flags.min_p, repetition_penalty=flags.repetition_penalty, stop=tuple(flags.stop),
                 seed=flags.seed, n=flags.n)
  from llm_jax import api, hardware
  from llm_jax.data import store
  from llm_jax.generate.options import Options
  Options(**options)                # a wrong option fails before the model is read
  hardware.keep_programs(store.cache_folder(config_lib.Data()))
  with api.spread(flags.fsdp, flags.tensor):
    model = api.load(flags.model, flags.step, flags.ema, verify=not flags.no_verify)
    results = generate(model, prompts, flags, options)
  made = sum(len(r.tokens) for r in results)
  seconds = max(r.seconds for r in results)
  print(f'{made} tokens in {seconds:.2f} s ({made / max(seconds, 1e-9):,.0f} tok/s after compiling); '
        f'{model.origin}', file=sys.stderr)


def generate(model, prompts, flags, options) -> list:
  """Writes the texts to stdout and returns the results, in the order of the prompts."""
  from llm_jax.generate import sampling
  from llm_jax.generate import text as text_lib
  sys.stdout.reconfigure(errors='backslashreplace')    # a terminal that is not UTF-8
  write = lambda text: print(text_lib.shown(text), end='', flush=True)
  if flags.stream:
    write(prompts[0])
  results = sampling.generate(model.shape, model.params, model.tokenizer, prompts,
                              on_text=(lambda _, text: write(text)) if flags.stream else None, **options)
  if flags.stream:
    write('\n')
  else:
    for i, result in enumerate(results):
      write(('=' * 20 + '\n' if i else '') + prompts[i // flags.n] + result.text + '\n')
  return results


if __name__ == '__main__':
  main(sys.argv[1:])
