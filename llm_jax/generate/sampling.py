"""Text from a model, for prompts of different lengths: `generate` for texts, `generate_tokens` for ids. The work is
done by the engine (engine.py), made for the call."""
import collections
import dataclasses

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.generate import engine as engine_lib
from llm_jax.generate.options import Options, Result
from llm_jax.generate.text import TextStream

ROWS = 64              # rows at once


def generate(model_cfg: config_lib.Model, params, tokenizer, prompts: list, *, on_text=None, **options) -> list[Result]:
  """Continues each prompt n times: results in the order of the prompts, n for each.

  model_cfg: derived; params: of any sharding, used on the mesh set by jax.set_mesh, if any. prompts: texts, which get
  the tokenizer's bos in front, or lists of ids, taken as they are; the source, for an encoder-decoder. options: the
  fields of Options. on_text(i, text): called with each further piece of result i: whole characters, never part of a
  stop string. A row's sample depends on the seed, its prompt, and how often the prompt came before, not on the batch.
  Raises ConfigError for an option out of range, an empty prompt without bos, a prompt that leaves no room.
  """
  unknown = [name for name in options if name not in Options.__dataclass_fields__]
  if unknown:
    raise ConfigError(f'{unknown[0]}: no such option{config_lib.nearest(unknown[0], Options.__dataclass_fields__)}')
  options = Options(**options)
  prompts = [prompts] if isinstance(prompts, str) else prompts
  if options.stop_ids is None:
    options = dataclasses.replace(options, stop_ids=tokenizer.stop_ids)
  ids = encode(model_cfg, tokenizer, prompts)
  streams = [TextStream(tokenizer, row, options.stop) for row in ids for _ in range(options.n)]

  def watch(row, tokens):
    stream = streams[row]
    kept = next((k for k, t in enumerate(tokens, 1) if t not in options.stop_ids and stream.push(t)), None)
    if on_text and (text := stream.fresh()):
      on_text(row, text)
    return kept

  watched = on_text is not None or bool(options.stop)
  requests = generate_tokens(model_cfg, params, ids, options, vocab_size=tokenizer.vocab_size,
                             start_id=tokenizer.bos_id or 0, watch=watch if watched else None)
  results = []
  for row, request in enumerate(requests):
    if not watched:
      watch(row, request.tokens)
    rest = streams[row].finish(request.reason)
    if on_text and rest:
      on_text(row, rest)
    results.append(Result(streams[row].text, request.tokens, request.reason, len(request.ids), request.seconds,
                          request.logprobs))
  return results


def encode(model_cfg: config_lib.Model, tokenizer, prompts) -> list[list[int]]:
  """Token ids of prompts (texts or ids); texts start with bos as documents do, except an encoder's source."""
  texts = [p for p in prompts if isinstance(p, str)]
  encoded = iter(tokenizer.encode_batch(texts) if texts else ())
  bos = [] if tokenizer.bos_id is None or model_cfg.encoder_layers else [tokenizer.bos_id]
  before = lambda text: bos if tokenizer.adds_bos or not text else []
  ids = [before(p) + [int(t) for t in next(encoded)] if isinstance(p, str) else [int(t) for t in p] for p in prompts]
  for i, (prompt, row) in enumerate(zip(prompts, ids)):
    if not row and isinstance(prompt, str):
      raise ConfigError(f'prompt {i}: is empty, and this model has no token that begins a text; expected at least one '
                        'character')
  return ids


def generate_tokens(model_cfg: config_lib.Model, params, prompts: list, options: Options, *, vocab_size: int = 0,
                    start_id: int = 0, watch=None) -> list[engine_lib.Request]:
  """`generate` on ids: the ended request of each row, n rows per prompt.

  vocab_size: ids from here on are never sampled (0: the model's). start_id begins an encoder-decoder's target.
  watch(row, tokens): called with each row's new tokens, every few tokens; returns None to go on, or how many of them to
  keep and end the row there.
  """
  cfg = model_cfg
  rows = [list(p) for p in prompts for _ in range(options.n)]
  for i, prompt in enumerate(prompts):
    engine_lib.check_prompt(cfg, prompt, min(vocab_size or cfg.vocab_size, cfg.vocab_size), name=f'prompt {i}')
  came, requests = collections.Counter(), []
  for i, row in enumerate(rows):
    see = (lambda tokens, i=i: watch(i, tokens)) if watch else None
    requests.append(engine_lib.Request(row, options, came[tuple(row)], see))
    came[tuple(row)] += 1
  source = engine_lib.bucket(max(map(len, rows)), 16) if cfg.encoder_layers else 0
  engine = engine_lib.Engine(cfg, params, slots=min(len(rows), ROWS), vocab_size=vocab_size, start_id=start_id,
                             size=engine_lib.STREAM if watch else engine_lib.WHOLE, source=source,
                             stops=engine_lib.bucket(len(options.stop_ids or ()), 4))
  for request in requests:
    engine.submit(request)
  engine.run()
  return requests
