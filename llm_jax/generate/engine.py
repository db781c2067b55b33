"""Continuous batching: requests come and go in a fixed number of slots, rows of one cache.

A step of the engine admits what waits into free slots, takes their prompts one chunk on, and decodes some tokens of all
live rows. Shapes are few (the chunks, the rows filled at once, powers of two of positions), so that after `warm_up`
nothing is compiled again. A slot keeps its cache when its request ends: a prompt that begins alike (with the same salt)
starts from there. Everything here is on the host; programs.py is what runs on the device.
"""
import collections
import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax.config import ConfigError
from llm_jax.generate import filters, programs
from llm_jax.generate.constrain import Constraint
from llm_jax.generate.options import Options
from llm_jax.sharding import ACT, axis_size

CHUNKS = (16, 64, 256)     # prompt positions per pass
FILLED = (1, 8)            # prompts per pass
PASS = 64                  # positions that would take as long as reading the weights once
DECODED = (1, 4, 16)       # rows decoded at once, or all
STREAM, WHOLE = 16, 256    # tokens per dispatch: while somebody watches, and otherwise
LATENCY = 0.1              # seconds between two looks at a streamed text, where the model is fast enough
SHORTEST = 128             # positions of a cache
COLDEST = 1e-4             # a temperature below is greedy: logits divided by it would overflow


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt and how to continue it. watch(tokens): called with each further tokens; returns None to go on, or how many
  of them to keep and end there. ended(): called once it has. salt: prompts share cached beginnings only with those of
  the same salt. constraint: what its text follows."""
  ids: list[int]                   # the source, of an encoder-decoder
  options: Options
  nth: int = 0                     # the same prompt again is another sample
  watch: Callable[[list[int]], int | None] | None = None
  ended: Callable[[], None] = lambda: None
  salt: str = ''
  constraint: Constraint | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[tuple] = dataclasses.field(default_factory=list)      # (logp, ids, logps) of each token, if wanted
  reason: str = ''                 # once it has ended: 'stop' | 'length' | 'cancelled' | 'error', with its constraint
  cached: int = 0                  # tokens of the prompt that were in the cache
  first: float = 0.0               # time.perf_counter() at the first token and the last, without what was compiled
  last: float = 0.0

  @property
  def seconds(self) -> float:
    return self.last - self.first


class Slot:
  """A row of the cache: the request in it, and the tokens whose keys and values it holds."""

  def __init__(self):
    self.request: Request | None = None
    self.prompt: tuple[int, ...] = ()
    self.done = 0                  # tokens of the prompt that are in the cache
    self.held: list[int] = []      # of the request before, or what of this one's prompt is done
    self.salt = ''
    self.used = 0                  # when, for the longest unused to be taken


class Engine:
  """See the module. cfg: derived; params: of any sharding, used on the mesh set by jax.set_mesh, if any.

  slots: rows at once; length: positions of a row at most; vocab_size: ids from here on are never sampled (0: the
  model's); start_id begins an encoder-decoder's target, source: positions of its encoder; stops: ids that end a row, at
  most; size: tokens per dispatch; ahead: tokens proposed per step, by a draft model (its config and parameters) or
  looked up in the text; mark: a watermark.Watermark for every text; weights: 'int8' or 'int4', cache: 'int8', to keep
  them in fewer bits.
  """

  def __init__(self, cfg: config_lib.Model, params, *, slots: int = 8, length: int = 0, vocab_size: int = 0,
               start_id: int = 0, size: int = STREAM, ahead: int = 0, draft: tuple | None = None, source: int = 0,
               stops: int = 8, mark=None, weights: str = '', cache: str = ''):
    if cfg.attention == 'bidirectional':
      raise ConfigError("config.model.attention: a 'bidirectional' model cannot generate text; expected 'causal' or "
                        "'prefix'")
    self.cfg, self.start_id = cfg, start_id
    self.params = params if cfg.encoder_layers else None       # of the encoder; the rest is in weights
    self.limit = min(length or cfg.max_length, cfg.max_length)
    self.vocab_size = min(vocab_size or cfg.vocab_size, cfg.vocab_size)
    self.plan = programs.Plan(cfg, self.vocab_size, size, ahead, draft and draft[0], mark, cache)
    self.weights = programs.unstack(cfg, params, weights)
    self.draft_weights = draft and programs.unstack(*draft)
    self.slots = [Slot() for _ in range(row_count(slots))]
    self.waiting: collections.deque[Request] = collections.deque()
    self.source, self.stops = source, stops
    self.state, self.length = None, 0          # made for the first requests
    self.rows = self._no_rows()
    self.compiled: set[tuple] = set()
    self.compiling = 0.0           # seconds
    self.clock = 0                 # dispatches
    self.pace = 0.0                # seconds per step of the last dispatch

  def _no_rows(self) -> filters.Row:
    B = len(self.slots)
    of = lambda dtype, value: np.full(B, value, dtype)
    return filters.Row(of(np.float32, 0), of(np.int32, 0), of(np.float32, 1), of(np.float32, 0), of(np.float32, 1),
                       of(np.float32, 1), of(np.float32, 0), of(np.float32, 0), of(np.uint32, 0), of(np.int32, 0),
                       of(bool, False), of(bool, False), of(np.int32, -1))

  # Requests -----------------------------------------------------------------------------------------------------------

  def submit(self, request: Request) -> None:
    """Raises ConfigError for a prompt that is empty, too long, or has ids that are not in the vocabulary."""
    check_prompt(self.cfg, request.ids, self.vocab_size, self.limit)
    if len(request.options.stop_ids or ()) > self.stops:
      raise ConfigError(f'stop_ids: expected at most {self.stops}, got {len(request.options.stop_ids)}')
    self.waiting.append(request)

  def cancel(self, request: Request) -> None:
    """Ends a request where it is; its slot is free before the next step."""
    if request in self.waiting:
      self.waiting.remove(request)
      request.reason = 'cancelled'
      request.ended()
    for i, slot in enumerate(self.slots):
      if slot.request is request:
        self._end(i, 'cancelled')

  @property
  def active(self) -> int:
    return sum(slot.request is not None for slot in self.slots)

  def run(self) -> None:
    while self.step():
      pass

  def step(self) -> bool:
    """Admits, fills, decodes; False where there was nothing to do."""
    try:
      return self._step()
    except BaseException:            # also Ctrl-C: the state may be half made, or given away
      self._lose()
      raise

  def _lose(self) -> None:
    """Ends what is in the slots, and forgets their cache."""
    self.state, self.length, self.rows = None, 0, self._no_rows()
    lost, self.slots = [slot.request for slot in self.slots if slot.request], [Slot() for _ in self.slots]
    for request in lost:
      request.reason = 'error'
      request.ended()

  def _step(self) -> bool:
    self._admit()
    filling = [i for i, slot in enumerate(self.slots) if slot.request and slot.done < len(slot.prompt)]
    if filling:
      self._fill(filling)
    if any(slot.request and slot.done == len(slot.prompt) for slot in self.slots):
      self._decode()
    elif not filling:
      return False
    return True

  # Into the slots -----------------------------------------------------------------------------------------------------

  def _admit(self) -> None:
    free = [i for i, slot in enumerate(self.slots) if slot.request is None]
    while self.waiting and free:
      request = self.waiting.popleft()
      prompt = self._prompt(request)
      self._fit(self._end_of(request, prompt))
      i, shared = self._place(request, prompt, free)
      free.remove(i)
      slot = self.slots[i]
      slot.request, slot.prompt, slot.salt, slot.done = request, prompt, request.salt, shared
      slot.held, request.cached = list(prompt), shared
      self._set_options(i, request)
      self._set_state(i, request, prompt)

  def _prompt(self, request) -> tuple[int, ...]:
    return (self.start_id,) if self.cfg.encoder_layers else tuple(request.ids)

  def _end_of(self, request, prompt) -> int:
    return min(len(prompt) + request.options.max_tokens, self.limit)

  def _place(self, request, prompt, free) -> tuple[int, int]:
    """(slot, tokens of the prompt that its cache holds): where most is shared, else the longest unused."""
    if self.cfg.attention == 'prefix' or self.cfg.encoder_layers:      # what lies there saw another prompt
      return min(free, key=lambda i: self.slots[i].used), 0
    shared = {i: self._shared(slot, request.salt, prompt) for i, slot in enumerate(self.slots)}
    best = max(shared, key=lambda i: (shared[i], i in free))
    target = best if best in free else min(free, key=lambda i: (shared[i], self.slots[i].used))
    if shared[best] < CHUNKS[0]:
      return min(free, key=lambda i: self.slots[i].used), 0
    if target != best:
      self.state = programs.copy_row(self.state, np.int32(best), np.int32(target))
    return target, shared[best]

  def _shared(self, slot: Slot, salt: str, prompt) -> int:
    """How many tokens of the prompt lie in the slot's cache; at least the last is left to be read."""
    if slot.salt != salt:
      return 0
    held = slot.held
    if slot.request:                 # what is not read yet, or the newest token, is not in its cache
      held = held[:slot.done] if slot.done < len(slot.prompt) else held[:-1]
    most = min(len(held), len(prompt) - 1, self.length)
    return next((n for n in range(most) if held[n] != prompt[n]), max(most, 0))

  def _set_options(self, i: int, request: Request) -> None:
    o = request.options
    temperature = o.temperature if o.temperature >= COLDEST else 0.0
    values = (temperature, o.top_k, o.top_p, o.min_p, o.typical_p, o.repetition_penalty, o.presence_penalty,
              o.frequency_penalty, o.seed & 0xffffffff, request.nth, bool(o.logit_bias), request.constraint is not None,
              -1 if o.logprobs is None else o.logprobs)
    for array, value in zip(self.rows, values):
      array[i] = value

  def _set_state(self, i: int, request: Request, prompt) -> None:
    V = self.cfg.vocab_size
    history, seen, bias = np.zeros(self.length, np.int32), np.zeros(V, bool), np.float32(0)
    history[:len(prompt)], seen[list(prompt)] = prompt, True
    if request.options.logit_bias:
      bias = np.zeros(V, np.float32)
      for token, value in request.options.logit_bias.items():
        bias[token] = value
    self._admit_row(i, history, len(prompt) - 1, self._end_of(request, prompt), seen, bias,
                    list(request.options.stop_ids or ()))
    self._constrain(i, request)
    if self.cfg.encoder_layers:
      source, segment = np.zeros((2, 1, self.source), np.int32)
      source[0, :len(request.ids)], segment[0, :len(request.ids)] = request.ids, 1
      self.state = programs.encode(self.cfg, self.params, self.state, np.int32(i), source, segment)

  def _constrain(self, i: int, request: Request) -> None:
    """Tells the device which tokens may come next; a proposed one cannot be checked, so there are none."""
    if request.constraint:
      allowed = request.constraint.allowed(self.state['allowed'].shape[1])
      if request.constraint.failed:
        self._end(i, 'error')
        return
      self.state = programs.admit(self.state, np.int32(i), dict(allowed=allowed, single=np.bool_(True)))

  def _admit_row(self, i, history, position, end, seen, bias, stops) -> None:
    row = dict(history=history, position=np.int32(position), live=np.bool_(False), end=np.int32(end),
               count=np.int32(0), seen=seen, bias=bias, single=np.bool_(False),
               stop=np.array(stops + [-1] * (self.stops - len(stops)), np.int32))
    self.state = programs.admit(self.state, np.int32(i), row)

  def _fit(self, end: int) -> None:
    """As many positions as the longest row needs: more at once, fewer when a quarter will do."""
    ends = [self._end_of(s.request, s.prompt) for s in self.slots if s.request]
    if self.state is None:
      ends += [self._end_of(r, self._prompt(r)) for r in self.waiting]
    needed = max([end, *ends]) + self.plan.ahead
    size = min(bucket(needed, SHORTEST), self.limit + self.plan.ahead)
    if size > self.length or 4 * size <= self.length:
      self._set_length(size)

  def _set_length(self, size: int) -> None:
    if self.state is None:
      self.state = programs.empty_state(self.plan, len(self.slots), size, self.stops, self.source)
    elif size != self.length:
      self.state = programs.resize(self.state, size)
    self.length = size
    for slot in self.slots:
      slot.held = slot.held[:size]

  # Prompts ------------------------------------------------------------------------------------------------------------

  def _fill(self, filling: list[int]) -> None:
    """Takes up to FILLED[-1] prompts one chunk on; where one is whole, its first token comes."""
    part = filling[:FILLED[-1]]
    left = [len(self.slots[i].prompt) - self.slots[i].done for i in part]
    R = row_count(next(n for n in FILLED if n >= len(part)))
    width = min(CHUNKS, key=lambda c: -(-max(left) // c) * (c * R + PASS))
    if self.cfg.attention == 'prefix':                       # a prompt sees all of itself: in one pass
      width = bucket(max(left), CHUNKS[0])
    token, slot_R = np.zeros((R, width), np.int32), np.full(R, len(self.slots), np.int32)
    start_R, last_R, length_R = np.zeros((3, R), np.int32)
    whole = []
    for r, i in enumerate(part):
      slot = self.slots[i]
      piece = slot.prompt[slot.done:slot.done + width]
      token[r, :len(piece)] = piece
      slot_R[r], start_R[r], last_R[r], length_R[r] = i, slot.done, len(piece) - 1, len(slot.prompt)
      if slot.done + len(piece) == len(slot.prompt):
        whole.append(r)
    out = self._fill_rows(token, slot_R, start_R, last_R, length_R, whole)
    for i in part:
      self.slots[i].done = min(self.slots[i].done + width, len(self.slots[i].prompt))
    if whole:
      tokens, live, found = np.asarray(out[0]), np.asarray(out[1]), None
      if any(self.rows.top_B[slot_R[whole]] >= 0):
        found = [np.asarray(x) for x in out[2]]
      for r in whole:
        i = int(slot_R[r])
        self.slots[i].request.first = self._now()
        self._take(i, [int(tokens[r])], bool(live[i]), found and [(x[r:r + 1]) for x in found])

  def _fill_rows(self, token, slot_R, start_R, last_R, length_R, whole):
    """Tokens of R prompts into the cache; (first token, live, logprobs) of those in `whole`, where there are any."""
    x = self.through(self.cfg, self.weights, 'cache', token, slot_R, start_R, length_R)
    if self.draft_weights:
      self.through(self.plan.draft, self.draft_weights, 'draft_cache', token, slot_R, start_R, length_R)
    if whole:
      ended_R = np.full(len(slot_R), len(self.slots), np.int32)
      ended_R[whole] = slot_R[whole]
      self.state, *out = programs.first(self.plan, self.weights[0], self.state, self.rows, ended_R, last_R, length_R, x)
      return out
    return None

  def through(self, cfg, weights, name, token, slot_R, start_R, length_R):
    """The layers' output over the tokens, whose keys and values are put into the cache."""
    prefix_R = length_R if cfg.attention == 'prefix' else None
    memory = (self.state['memory'], self.state['memory_segment']) if cfg.encoder_layers else None
    x, cache = programs.through(cfg, weights, token, start_R, self.state[name], slot_R, prefix_R, memory)
    self.state = self.state | {name: cache}
    return x

  # Decoding -----------------------------------------------------------------------------------------------------------

  def _decode(self) -> None:
    ready = [i for i, slot in enumerate(self.slots) if slot.request and slot.done == len(slot.prompt)]
    slot_A = self._rows_of(ready)
    self._compile(slot_A)
    watched = any(self.slots[i].request.watch for i in ready)
    steps = self.plan.size
    if watched and jax.process_count() == 1:      # clocks differ, and every process must dispatch the same
      steps = int(np.clip(LATENCY / self.pace, 1, steps)) if self.pace else 1
    if any(self.slots[i].request.constraint for i in ready):
      steps = 1
    before = time.perf_counter()
    made, made_A, live = self._dispatch(slot_A, steps)
    made_A, live, token_AC = np.asarray(made_A), np.asarray(live), np.asarray(made['token'])
    self.clock += 1
    self.pace = (time.perf_counter() - before) / max(int(made_A.max()), 1)
    wanted = (self.rows.top_B >= 0).any()
    found = [np.asarray(made[name]) for name in ('logp', 'top', 'top_logp')] if wanted else None
    for a, i in enumerate(slot_A.tolist()):
      if i in ready and made_A[a]:
        n = int(made_A[a])
        self._take(i, token_AC[a, :n].tolist(), bool(live[a]), found and [x[a, :n] for x in found])

  def _rows_of(self, ready: list[int]) -> np.ndarray:
    """The slots to decode: these, filled up to one of few sizes, or all."""
    mesh, B = jax.sharding.get_abstract_mesh(), len(self.slots)
    split = not mesh.empty and axis_size(mesh, ACT['B']) > 1           # rows lie on different devices
    size = B if split else next((n for n in DECODED if n >= len(ready)), B)
    if size >= B:
      return np.arange(B, dtype=np.int32)
    return np.array(ready + [B] * (size - len(ready)), np.int32)

  def _dispatch(self, slot_A, steps: int):
    rows = filters.Row(*(x[np.minimum(slot_A, len(self.slots) - 1)] for x in self.rows))
    self.state, *out = programs.decode(self.plan, self.weights, self.draft_weights, self.state, rows, slot_A,
                                       np.int32(steps))
    return out

  def _take(self, i: int, tokens: list[int], live: bool, found) -> None:
    """New tokens of a row: shown to who watches it, kept, and the row ended where it has."""
    slot, request = self.slots[i], self.slots[i].request
    if found and (n := request.options.logprobs) is not None:
      request.logprobs += [(float(lp), top[:n].tolist(), top_lp[:n].tolist()) for lp, top, top_lp in zip(*found)]
    kept = request.watch(tokens) if request.watch else None
    request.tokens += tokens[:kept]
    del request.logprobs[len(request.tokens):]
    request.last = self._now()
    slot.held += tokens[:kept]
    if slot.request is not request:              # cancelled by its watcher
      return
    going = all(request.constraint.take(token) for token in tokens) if request.constraint else True
    if going and live and kept is None:
      self._constrain(i, request)
    else:
      ended = kept is not None or not going or request.tokens[-1] in (request.options.stop_ids or ())
      failed = request.constraint is not None and request.constraint.failed
      self._end(i, 'error' if failed else 'stop' if ended else 'length')

  def _end(self, i: int, reason: str) -> None:
    slot = self.slots[i]
    slot.held = slot.held[:slot.done] if slot.done < len(slot.prompt) else slot.held[:-1]     # the newest is not there
    request, slot.request, slot.used = slot.request, None, self.clock
    request.reason = reason
    for array, value in zip(self.rows, self._no_rows()):
      array[i] = value[i]
    if np.asarray(self.state['live'])[i]:
      self.state = programs.admit(self.state, np.int32(i), dict(live=np.bool_(False)))
    request.ended()

  # Compiling ----------------------------------------------------------------------------------------------------------

  def lengths(self) -> list[int]:
    most = self.limit + self.plan.ahead
    return sorted({min(bucket(n, SHORTEST), most) for n in [SHORTEST << k for k in range(32)] if n <= 2 * most})

  def warm_up(self, progress: Callable[[str], None] = lambda text: None) -> None:
    """Compiles every program that any request may need."""
    lengths, B = self.lengths(), len(self.slots)
    for length in lengths:
      progress(f'compiling for {length} positions')
      self._set_length(length)
      for n in sorted({len(self._rows_of(list(range(n)))) for n in range(1, B + 1)}):
        self._compile(self._rows_of(list(range(n)) if n < B else list(range(B))))
      for R in sorted({row_count(n) for n in FILLED}):
        for shorter, width in zip((0, *CHUNKS), CHUNKS if self.cfg.attention != 'prefix' else ()):
          if shorter < length:
            self._fill_rows(np.zeros((R, width), np.int32), np.full(R, B, np.int32), *np.zeros((3, R), np.int32), [0])
    for length in lengths:                       # from every one to every other
      for other in lengths:
        self._set_length(length), self._set_length(other)
      self._set_length(length)
      self.state = programs.copy_row(self.state, np.int32(0), np.int32(0))
      for bias in (np.float32(0), np.zeros(self.cfg.vocab_size, np.float32)):
        self._admit_row(0, np.zeros(self.length, np.int32), 0, 0, np.zeros(self.cfg.vocab_size, bool), bias, [])
      self.state = programs.admit(self.state, np.int32(0), dict(live=np.bool_(False)))
      allowed = np.zeros(self.state['allowed'].shape[1], np.uint32)
      self.state = programs.admit(self.state, np.int32(0), dict(allowed=allowed, single=np.bool_(True)))
    self._set_length(lengths[0])

  def _now(self) -> float:
    return time.perf_counter() - self.compiling

  def _compile(self, slot_A) -> None:
    """Compiles decoding for so many rows of the cache's length, where that was not done: nothing is decoded."""
    if (shape := (self.length, len(slot_A))) in self.compiled:
      return
    start = time.perf_counter()
    self._dispatch(slot_A, 0)
    jax.block_until_ready(self.state['live'])
    self.compiled.add(shape)
    self.compiling += time.perf_counter() - start


def check_prompt(cfg: config_lib.Model, ids, vocab_size: int, limit: int = 0, name: str = 'prompt') -> None:
  """Raises ConfigError where a prompt cannot be continued."""
  limit = limit or cfg.max_length
  if len(ids) == 0:
    raise ConfigError(f'{name}: is empty; expected at least one token')
  room = limit if cfg.encoder_layers else limit - 1
  if len(ids) > room:
    raise ConfigError(f'{name}: has {len(ids)} tokens, expected at most {room}: the model reads {limit} and one is to '
                      'be generated; shorten the prompt')
  bad = next((t for t in ids if not 0 <= t < vocab_size), None)
  if bad is not None:
    raise ConfigError(f'{name}: token id {bad} is not in the vocabulary of {vocab_size}')


def row_count(n: int) -> int:
  """n rounded up to what the mesh's batch axes divide."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else axis_size(mesh, ACT['B'])
  return -(-n // ways) * ways


def bucket(n: int, least: int) -> int:
  """The smallest power of two that is at least n and `least`."""
  return 1 << (max(n, least) - 1).bit_length()
