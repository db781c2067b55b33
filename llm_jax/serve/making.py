"""What the routes have made: texts, scores and embeddings, by way of the engine's thread, counted and watched over."""
import asyncio
import collections
import contextlib
import dataclasses
import time

import prometheus_client
from starlette.requests import ClientDisconnect, Request

from llm_jax.config import ConfigError
from llm_jax.generate import constrain, engine, score
from llm_jax.generate.options import Options
from llm_jax.serve import oversight, protocol, tools
from llm_jax.serve.protocol import ApiError
from llm_jax.serve.worker import Choice, Full, Worker


class Making:
  """One model at work. watch: the Oversight; name: what clients call the model."""

  def __init__(self, model, worker: Worker, name: str, watch: oversight.Oversight):
    self.tokenizer, self.worker, self.name, self.oversight = model.tokenizer, worker, name, watch
    self.shape, self.limit, self.draining = model.shape, worker.engine.limit, False
    self.longest = max(len(self.tokenizer.decode_bytes([i])) for i in range(self.tokenizer.vocab_size))
    self.notation = tools.notation(model.chat_template)
    self.grammars = constrain.Grammars(model.tokenizer, model.shape.vocab_size)
    self.scorer = score.Scorer(worker.engine)
    self.registry = prometheus_client.CollectorRegistry()
    self.tokens = prometheus_client.Counter(
        'llm_jax_tokens', 'Tokens read (prompt), reused from the cache (cached) and made (completion)',
        ['model', 'kind'], registry=self.registry)
    seconds = lambda name, text: prometheus_client.Histogram(
        f'llm_jax_{name}_seconds', text, ['model'], registry=self.registry,
        buckets=(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60))
    self.first, self.between = seconds('first_token', 'To the first token'), seconds('token', 'From token to token')
    gauge = lambda name, text, f: prometheus_client.Gauge(
        f'llm_jax_{name}', text, registry=self.registry).set_function(f)
    gauge('running', 'Requests in a slot', lambda: worker.engine.active)
    gauge('waiting', 'Requests that wait for one', lambda: worker.waiting)

  # Prompts ------------------------------------------------------------------------------------------------------------

  async def encode(self, texts: list[str], param: str, bounded: bool = True, begun: bool = True) -> list[list[int]]:
    """Their ids, made beside the event loop. bounded: what cannot fit is refused; begun: with bos, if there is one."""
    if bounded:
      self.check_size(max(map(len, texts), default=0), param)
    t = self.tokenizer
    bos = [] if t.bos_id is None or not t.adds_bos or not begun else [t.bos_id]
    try:
      found = await asyncio.to_thread(t.encode_batch, texts) if texts else []
    except ConfigError as e:
      raise ApiError(str(e), param) from e
    return [bos + ids.tolist() for ids in found]

  def check_size(self, characters: int, param: str) -> None:
    """A text need not be taken apart to know that it is too long."""
    if characters > self.limit * self.longest:
      raise ApiError(f"This model's maximum context length is {self.limit} tokens, the {param} has {characters} "
                     'characters; shorten it', param, code='context_length_exceeded')

  def check_prompt(self, ids, options: Options, param: str) -> None:
    """Against the context and the vocabulary, with both counts."""
    if len(ids) + 1 > self.limit:
      raise ApiError(f"This model's maximum context length is {self.limit} tokens, the {param} has {len(ids)} and one "
                     'is to be made; shorten it', param, code='context_length_exceeded')
    vocab_size = self.worker.engine.vocab_size
    try:
      engine.check_prompt(self.shape, ids, vocab_size, self.limit, param)
    except ConfigError as e:
      raise ApiError(str(e), param) from e
    bad = next((i for i in options.logit_bias if i >= vocab_size), None)
    if bad is not None:
      raise ApiError(f'logit_bias: token {bad} is not in the vocabulary of {vocab_size}', 'logit_bias')

  # Texts --------------------------------------------------------------------------------------------------------------

  async def choices(self, prompts, asked: protocol.Asked, salt: str) -> list[Choice]:
    """Submits n requests for each prompt; the same prompt again is another sample."""
    options = dataclasses.replace(asked.options, stop_ids=self.tokenizer.stop_ids, n=1)
    self.check_going()
    if len(prompts) * asked.options.n > self.worker.most:
      raise ApiError(f'n: {len(prompts)} prompts with n={asked.options.n} are more than the {self.worker.most} texts '
                     'that this server takes at once', 'n')
    out, came = [], collections.Counter()
    for ids in prompts:
      for _ in range(asked.options.n):
        try:
          grammar = await asyncio.to_thread(self.grammars.constraint, *asked.grammar[:2]) if asked.grammar else None
        except ConfigError as e:
          raise ApiError(str(e), asked.grammar[2]) from e
        out.append(Choice(self.tokenizer, ids, options, nth=came[tuple(ids)], salt=salt, constraint=grammar,
                          visible=tools.marks(self.notation, self.tokenizer.specials) if asked.tools else None))
        came[tuple(ids)] += 1
    with refused_when_full():
      self.worker.submit([choice.request for choice in out])
    return out

  def check_going(self) -> None:
    if self.worker.error or self.draining:
      raise ApiError('the server is going down; try another' if self.draining else 'the engine has stopped', None, 503,
                     'server_error')

  async def gather(self, request: Request, choices: list[Choice]) -> list[tuple[str, list, list]]:
    """The whole texts, with their tokens and log-probabilities; all are cancelled where the client has gone."""
    async def whole(choice):
      text, tokens, found = '', [], []
      async for piece in self.timed(choice):
        text, tokens, found = text + piece[0], tokens + piece[1], found + piece[2]
      return text, tokens, found
    with self.cancelling(choices, request):
      return await while_there(request, [whole(choice) for choice in choices])

  async def merged(self, request, choices):
    """(index, piece) of several texts as they come; (None, [], []) ends each. What waits for a slow reader is no more
    than the request may make."""
    queue: asyncio.Queue = asyncio.Queue()
    async def pump(i, choice):
      try:
        async for piece in self.timed(choice):
          await queue.put((i, piece))
        await queue.put((i, (None, [], [])))
      except ApiError as e:
        await queue.put((i, e))
    with self.cancelling(choices, request):
      tasks = [asyncio.ensure_future(pump(i, choice)) for i, choice in enumerate(choices)]
      left = len(choices)
      try:
        while left:
          i, piece = await queue.get()
          if isinstance(piece, ApiError):
            raise piece
          left -= piece[0] is None
          yield i, piece
      finally:
        for task in tasks:
          task.cancel()

  @contextlib.contextmanager
  def cancelling(self, choices, request: Request):
    """Frees the slots of what has not ended when this is left, and logs what came of it."""
    start, status = time.perf_counter(), 200
    try:
      yield
    except (ClientDisconnect, asyncio.CancelledError, GeneratorExit):
      status = 499
      raise
    except ApiError as e:
      status = e.status
      raise
    finally:
      for choice in choices:
        if not choice.request.reason:
          with contextlib.suppress(RuntimeError):
            self.worker.cancel(choice.request)
      self.count(prompt=sum(len(c.request.ids) for c in choices), cached=sum(c.request.cached for c in choices),
                 completion=sum(len(c.request.tokens) for c in choices))
      self.oversight.note(request, request.url.path, status, start, choices)

  def count(self, **tokens) -> None:
    for kind, n in tokens.items():
      self.tokens.labels(self.name, kind).inc(n)

  async def timed(self, choice: Choice):
    """Its pieces; how long they took is kept. Raises ApiError where the engine has died, or could not follow."""
    last, first, text = time.perf_counter(), True, ''
    async for piece in choice.pieces():
      now, text = time.perf_counter(), text + piece[0]
      if await self.oversight.refusal('output', text):
        choice.refused = True
        self.worker.cancel(choice.request)
        return
      if piece[1]:
        histogram = self.first if first else self.between
        histogram.labels(self.name).observe((now - last) / (1 if first else len(piece[1])))
        last, first = now, False
      yield piece
    if choice.finish_reason == 'error':
      if choice.request.constraint and choice.request.constraint.failed:
        raise ApiError('the grammar is too ambiguous to be followed; write it with fewer alternatives that begin alike')
      raise ApiError('the engine has stopped', None, 500, 'server_error')

  # Scores -------------------------------------------------------------------------------------------------------------

  async def scored(self, request: Request, prompts, f) -> list:
    """f(ids) of each prompt on the engine's thread, one at a time between its steps."""
    self.check_going()
    with refused_when_full():
      futures = self.worker.calls([lambda ids=ids: f(ids) for ids in prompts])
    self.count(prompt=sum(map(len, prompts)))
    return await while_there(request, [asyncio.wrap_future(future) for future in futures])


@contextlib.contextmanager
def refused_when_full():
  try:
    yield
  except Full as e:
    error = ApiError('too many requests are waiting; try again in a moment', None, 429, 'rate_limit_error')
    error.headers['Retry-After'] = '1'
    raise error from e
  except RuntimeError as e:
    raise ApiError('the engine has stopped', None, 503, 'server_error') from e


async def while_there(request: Request, awaitables) -> list:
  """What they give; all are cancelled, and ClientDisconnect raised, where the client has gone."""
  both, gone = asyncio.gather(*awaitables), asyncio.ensure_future(disconnected(request))
  try:
    await asyncio.wait([both, gone], return_when=asyncio.FIRST_COMPLETED)
    if not both.done():
      raise ClientDisconnect
    return both.result()
  finally:
    both.cancel()
    gone.cancel()


async def disconnected(request: Request) -> None:
  while not await request.is_disconnected():
    await asyncio.sleep(0.05)
