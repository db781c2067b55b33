"""Text from a model: prefill, then a decoding loop on the device over a KV cache, for prompts of different lengths.

Prompts are padded on the right and a slot of the cache is a position, so every row goes on at its own length. Lengths
are rounded up to powers of two: few programs are compiled. Read `generate`, then `generate_tokens`, then `decode`.
"""
import collections
import dataclasses
import functools
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.generate.text import TextStream
from llm_jax.models import transformer
from llm_jax.models.attention import compute_dtype
from llm_jax.sharding import ACT, axis_size, shard

ROWS = 64              # rows per batch: more are generated one batch after another
PREFILL = 512          # prompt positions per pass: bounds the attention scores of long prompts
STREAM, WHOLE = 16, 256    # tokens per dispatch: while somebody watches, and otherwise
LATENCY = 0.1          # seconds between two looks at a streamed text, where the model is fast enough


@dataclasses.dataclass(frozen=True)
class Options:
  """How to continue a prompt. The filters apply in this order, to the distribution after the temperature."""
  max_tokens: int = 64
  temperature: float = 0.0         # 0: greedy
  top_k: int = 0                   # keep the k likeliest; 0: all
  top_p: float = 1.0               # keep the likeliest that together have this probability (arXiv 1904.09751)
  min_p: float = 0.0               # keep those at least this share of the likeliest (arXiv 2407.01082)
  repetition_penalty: float = 1.0  # logits of tokens seen so far, prompt included (CTRL, arXiv 1909.05858)
  stop: tuple[str, ...] = ()       # texts to end before
  stop_ids: tuple[int, ...] | None = None   # tokens to end at; None: the tokenizer's
  seed: int = 0
  n: int = 1                       # samples per prompt

  def __post_init__(self):
    stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
    object.__setattr__(self, 'stop', stop)
    for name, fits, expected in (
        ('max_tokens', self.max_tokens >= 1, 'at least 1'),
        ('temperature', 0 <= self.temperature < np.inf, '0 (greedy) or more'),
        ('top_k', self.top_k >= 0, '0 (off) or more'),
        ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
        ('min_p', 0 <= self.min_p <= 1, 'between 0 and 1'),
        ('repetition_penalty', 0 < self.repetition_penalty < np.inf, 'above 0'),
        ('n', self.n >= 1, 'at least 1'),
        ('stop', all(stop) and all(isinstance(s, str) for s in stop), 'texts that are not empty')):
      if not fits:
        raise ConfigError(f'{name}: expected {expected}, got {getattr(self, name)!r}')


@dataclasses.dataclass(frozen=True)
class Result:
  text: str              # what was generated, without the prompt, cut before a stop string
  tokens: list[int]      # all that was generated, with the stop id, or up to the token that completed the stop string
  finish_reason: str     # 'stop' | 'length'
  n_prompt_tokens: int
  seconds: float = 0.0   # from the first token to the last of its batch, without compiling


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
  rows = [p for p in ids for _ in range(options.n)]
  streams = [TextStream(tokenizer, row, options.stop) for row in rows]

  def watch(row, tokens):
    stream = streams[row]
    kept = next((k for k, t in enumerate(tokens, 1) if t not in options.stop_ids and stream.push(t)), None)
    if on_text and (text := stream.fresh()):
      on_text(row, text)
    return kept

  watched = on_text is not None or bool(options.stop)
  outputs = generate_tokens(model_cfg, params, ids, options, vocab_size=tokenizer.vocab_size,
                            start_id=tokenizer.bos_id or 0, watch=watch if watched else None)
  results = []
  for row, (tokens, reason, seconds) in enumerate(outputs):
    if not watched:
      watch(row, tokens)
    rest = streams[row].finish(reason)
    if on_text and rest:
      on_text(row, rest)
    results.append(Result(streams[row].text, tokens, reason, len(rows[row]), seconds))
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
                    start_id: int = 0, watch=None) -> list[tuple[list[int], str, float]]:
  """`generate` on ids: (tokens, finish_reason, seconds) of each row, n rows per prompt.

  vocab_size: ids from here on are never sampled (0: the model's). start_id begins an encoder-decoder's target.
  watch(row, tokens): called with each row's new tokens, every STREAM tokens or sooner; returns None to go on, or how
  many of them to keep and end the row there.
  """
  cfg = model_cfg
  vocab_size = min(vocab_size or cfg.vocab_size, cfg.vocab_size)
  _check(cfg, prompts, vocab_size)
  rows = [tuple(p) for p in prompts for _ in range(options.n)]
  nth, came = [], collections.Counter()
  for row in rows:
    nth.append(came[row])      # the same prompt again is another sample
    came[row] += 1
  weights = unstack(cfg, params)
  outputs = []
  for first in range(0, len(rows), ROWS):
    part = slice(first, first + ROWS)
    see = watch and (lambda row, tokens, first=first: watch(first + row, tokens))
    outputs += _batch(cfg, weights, rows[part], nth[part], options, vocab_size, start_id, see)
  return outputs


def _check(cfg, prompts, vocab_size):
  if cfg.attention == 'bidirectional':
    raise ConfigError("config.model.attention: a 'bidirectional' model cannot generate text; expected 'causal' or "
                      "'prefix'")
  for i, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise ConfigError(f'prompt {i}: is empty; expected at least one token')
    room = cfg.max_length if cfg.encoder_layers else cfg.max_length - 1
    if len(prompt) > room:
      raise ConfigError(f'prompt {i}: has {len(prompt)} tokens, expected at most {room}: the model reads '
                        f'{cfg.max_length} and one is to be generated; shorten the prompt')
    bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if bad is not None:
      raise ConfigError(f'prompt {i}: token id {bad} is not in the vocabulary of {vocab_size}')


def _batch(cfg, weights, rows, nth, options, vocab_size, start_id, watch):
  """generate_tokens for at most ROWS rows: pads them, then dispatches until every row has ended."""
  source = None
  if cfg.encoder_layers:
    source, rows = _source(rows), [(start_id,)] * len(rows)
  request, length_B = _request(cfg, rows, nth, options, vocab_size)
  plan = Plan(cfg, slots=bucket(int(request['end_B'].max()), 128), random=options.temperature > 0,
              ranked=options.top_k > 0 or options.top_p < 1, penalised=options.repetition_penalty != 1)
  state, token_B, live_B = prefill(plan, weights, request, _pad(rows), length_B, source)
  live_B = np.array(live_B)
  size = STREAM if watch else WHOLE
  out = [[] for _ in rows]
  cut = _extend(out, np.asarray(token_B)[:, None], live_B, watch)                  # shown before decode is compiled
  if live_B.any():
    state, *_ = decode(plan, size, weights, request, state, np.int32(0), live_B)   # compiles; generates nothing
  start = time.perf_counter()
  steps = 1 if watch else size
  while live_B.any():
    before = time.perf_counter()
    state, new_BC, made, live_B = decode(plan, size, weights, request, state, np.int32(steps), live_B)
    live_B, made = np.array(live_B), int(made)
    cut |= _extend(out, np.asarray(new_BC)[:, :made], live_B, watch)
    if watch and jax.process_count() == 1:      # clocks differ, and every process must dispatch the same
      steps = int(np.clip(LATENCY * made / (time.perf_counter() - before), 1, size))
    elif watch:
      steps = size
  seconds = time.perf_counter() - start
  stop_ids = options.stop_ids or ()
  return [(tokens, 'stop' if row in cut or tokens[-1] in stop_ids else 'length', seconds)
          for row, tokens in enumerate(out)]


def _extend(out, new_BC, live_B, watch) -> set[int]:
  """Appends each row's new tokens (-1: none); the rows that the watcher ended, which are then no longer live."""
  cut = set()
  for row, (tokens, new) in enumerate(zip(out, new_BC.tolist())):
    new = [t for t in new if t >= 0]
    kept = watch(row, new) if watch and new else None
    if kept is not None:
      live_B[row] = False
      cut.add(row)
    tokens += new[:kept]
  return cut


def _request(cfg, rows, nth, options, vocab_size):
  """What the programs need to know of each row, rows filled up to what the mesh divides; and the prompts' lengths."""
  B = row_count(len(rows))
  length_B, end_B, nth_B = np.ones((3, B), np.int32)        # rows that only fill up have ended from the start
  length_B[:len(rows)] = [len(r) for r in rows]
  end_B[:len(rows)] = np.minimum(length_B[:len(rows)] + options.max_tokens, cfg.max_length)
  nth_B[:len(rows)] = nth
  stop_ids = list(options.stop_ids or ())
  return dict(
      vocab_size=np.int32(vocab_size), seed=np.uint32(options.seed & 0xffffffff), nth_B=nth_B, end_B=end_B,
      stop_ids=np.array(stop_ids + [-1] * (bucket(len(stop_ids), 4) - len(stop_ids)), np.int32),
      temperature_B=np.full(B, options.temperature, np.float32), top_k_B=np.full(B, options.top_k, np.int32),
      top_p_B=np.full(B, options.top_p, np.float32), min_p_B=np.full(B, options.min_p, np.float32),
      penalty_B=np.full(B, options.repetition_penalty, np.float32)), length_B


def _source(rows):
  """(source_BS, source_segment_BS) of an encoder-decoder's prompts; segment 0 is padding."""
  return _pad(rows), _pad([(1,) * len(r) for r in rows])


def _pad(rows):
  """int32 [B, bucket of the longest], zeros on the right and in the rows that only fill up."""
  out = np.zeros((row_count(len(rows)), bucket(max(map(len, rows)), 16)), np.int32)
  for row, tokens in enumerate(rows):
    out[row, :len(tokens)] = tokens
  return out


def row_count(n: int) -> int:
  """n rounded up to what the mesh's batch axes divide."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else axis_size(mesh, ACT['B'])
  return -(-n // ways) * ways


def bucket(n: int, least: int) -> int:
  """The smallest power of two that is at least n and `least`."""
  return 1 << (max(n, least) - 1).bit_length()


# On the device --------------------------------------------------------------------------------------------------------

class Plan(typing.NamedTuple):
  """What is static of a request, beside shapes: one compiled program each."""
  cfg: config_lib.Model
  slots: int            # S of the cache
  random: bool          # some row has a temperature
  ranked: bool          # some row has top_k or top_p, which need the logits sorted
  penalised: bool       # some row has a repetition penalty


@functools.partial(jax.jit, static_argnums=0)
def unstack(cfg: config_lib.Model, params):
  """(model, blocks): the weights as decoding reads them, in the compute dtype, every layer's apart. Made once, before
  the loop, which would otherwise copy its slice of the stacked weights at every step."""
  model = transformer.bind(cfg, params)
  blocks = model.layers()
  for name, _, _ in transformer.stacks(cfg):
    delattr(model, name)
  return model, blocks


@functools.partial(jax.jit, static_argnums=0)
def prefill(plan: Plan, weights, request, token_BP, length_B, source=None):
  """Reads the prompts and samples their first tokens -> (state of `decode`, token_B, live_B)."""
  cfg, (model, blocks) = plan.cfg, weights
  B, P = token_BP.shape
  token_BP = shard(token_BP, 'BT')
  shape = (B, plan.slots, cfg.kv_heads, cfg.head_dim)
  zeros = lambda: shard(jnp.zeros(shape, compute_dtype(cfg.dtype)), 'BSKH')
  cache = [(zeros(), zeros()) for _ in blocks]
  memory = None if source is None else (model.encode(*source), source[1])
  prefix_BS = None
  if cfg.attention == 'prefix':
    prefix_BS = jnp.arange(plan.slots)[None] < length_B[:, None]
  width = P if prefix_BS is not None else min(P, PREFILL)    # a prefix sees all of itself: one pass

  def part(carry, start):
    cache, x_BD = carry
    token_BT = jax.lax.dynamic_slice_in_dim(token_BP, start, width, 1)
    x_BTD, cache = model.decode(blocks, token_BT, jnp.broadcast_to(start, B), cache, prefix_BS, memory)
    at_B = length_B - 1 - start
    last_BD = jnp.take_along_axis(x_BTD, jnp.clip(at_B, 0, width - 1)[:, None, None], 1)[:, 0]
    return (cache, jnp.where(((0 <= at_B) & (at_B < width))[:, None], last_BD, x_BD)), None

  x_BD = jnp.zeros((B, cfg.width), compute_dtype(cfg.dtype))
  (cache, x_BD), _ = jax.lax.scan(part, (cache, x_BD), jnp.arange(0, P, width))
  seen_BV = None
  if plan.penalised:
    valid_BP = jnp.arange(P)[None] < length_B[:, None]
    seen_BV = jnp.zeros((B, cfg.vocab_size), bool).at[jnp.arange(B)[:, None], token_BP].max(valid_BP)
  token_B = sample(plan, model.logits(x_BD[:, None])[:, 0], length_B, seen_BV, request)
  state = dict(cache=cache, memory=memory, seen_BV=seen_BV, token_B=token_B, position_B=length_B)
  return placed(state), everywhere(token_B), everywhere(going_on(token_B, length_B, request))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(plan: Plan, size: int, weights, request, state, steps, live_B):
  """Up to `steps` <= size further tokens of the live rows, until none is live.

  state: dict(cache, memory, seen_BV or None, token_B, position_B): the newest tokens and their positions, which are not
  in the cache yet. Returns (state, token_BC int32 [B, size] with -1 where a row had ended, tokens made, live_B).
  """
  model, blocks = weights
  rows = jnp.arange(live_B.shape[0])

  def more(carry):
    made, _, _, live_B = carry
    return (made < steps) & live_B.any()

  def step(carry):
    made, state, token_BC, live_B = carry
    x_B1D, cache = model.decode(blocks, state['token_B'][:, None], state['position_B'], state['cache'],
                                memory=state['memory'])
    seen_BV = state['seen_BV']
    if seen_BV is not None:
      seen_BV = seen_BV.at[rows, state['token_B']].set(True)
    position_B = state['position_B'] + live_B
    token_B = sample(plan, model.logits(x_B1D)[:, 0], position_B, seen_BV, request)
    token_BC = token_BC.at[:, made].set(jnp.where(live_B, token_B, -1))
    state = dict(state, cache=cache, seen_BV=seen_BV, token_B=token_B, position_B=position_B)
    return made + 1, state, token_BC, live_B & going_on(token_B, position_B, request)

  token_BC = jnp.full((live_B.shape[0], size), -1, jnp.int32)
  made, state, token_BC, live_B = jax.lax.while_loop(more, step, (0, state, token_BC, live_B))
  return placed(state), everywhere(token_BC), made, everywhere(live_B)


def going_on(token_B, position_B, request):
  """bool [B]: rows whose newest token, at position_B, is not their last."""
  stops_B = (token_B[:, None] == request['stop_ids'][None]).any(1)
  return ~stops_B & (position_B + 1 < request['end_B'])


def placed(state):
  """The state where its letters put it, so that each dispatch finds it as the one before: one program, no copies."""
  put = lambda x, dims: x if x is None else shard(x, dims)
  return dict(
      cache=[(put(k, 'BSKH'), put(v, 'BSKH')) for k, v in state['cache']],
      memory=state['memory'] and (put(state['memory'][0], 'BSD'), put(state['memory'][1], 'BS')),
      seen_BV=put(state['seen_BV'], 'BV'), token_B=put(state['token_B'], 'B'), position_B=put(state['position_B'], 'B'))


def everywhere(x):
  """Replicated over the mesh, so that every process can read it."""
  return shard(x, 'X' * x.ndim, {})


def sample(plan: Plan, logits_BV, position_B, seen_BV, request):
  """Token int32 [B] for position_B of each row; the key of a row is its seed, its number and this position."""
  V = logits_BV.shape[1]
  logits_BV = jnp.where(jnp.arange(V)[None] < request['vocab_size'], logits_BV, -jnp.inf)
  if seen_BV is not None:
    penalty_B1 = request['penalty_B'][:, None]
    logits_BV = jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)
  greedy_B = logits_BV.argmax(1).astype(jnp.int32)
  if not plan.random:
    return greedy_B
  temperature_B = request['temperature_B']
  logits_BV = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
  if plan.ranked:
    logits_BV = keep_ranked(logits_BV, request['top_k_B'][:, None], request['top_p_B'][:, None])
  least_B1 = logits_BV.max(1, keepdims=True) + jnp.log(request['min_p_B'])[:, None]
  logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)

  def noise(nth, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(request['seed']), nth), position)
    return jax.random.gumbel(key, (V,))

  drawn_B = (logits_BV + jax.vmap(noise)(request['nth_B'], position_B)).argmax(1).astype(jnp.int32)
  return jnp.where(temperature_B > 0, drawn_B, greedy_B)


def keep_ranked(logits_BV, top_k_B1, top_p_B1):
  """-inf for all but the k likeliest, and of these all but the likeliest whose predecessors have less than p."""
  sorted_BV = -jnp.sort(-logits_BV, axis=1)
  rank_1V = jnp.arange(logits_BV.shape[1])[None]
  kept_BV = (rank_1V < top_k_B1) | (top_k_B1 == 0)
  p_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), 1)
  kept_BV &= (jnp.cumsum(p_BV, 1) - p_BV < top_p_B1) | (top_p_B1 >= 1)
  least_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(1, keepdims=True)
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
