"""The server's routes: OpenAI's, and a few of vLLM's, over one model. protocol.py checks what is asked, worker.py does
it.

Every answer that is an error has OpenAI's shape. Nothing of a prompt or an answer is kept or logged.
"""
import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.resources
import json
import time
from collections.abc import Callable

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_jax.config import ConfigError
from llm_jax.generate import chat, constrain, engine
from llm_jax.generate.options import Options
from llm_jax.serve import feedback, openapi, oversight, protocol, score
from llm_jax.serve.protocol import ApiError
from llm_jax.serve.worker import Choice, Full, Worker

PAGE = {'/': ('index.html', 'text/html'), '/page.js': ('page.js', 'text/javascript'),
        '/page.css': ('page.css', 'text/css')}
OPEN = {'/health', '/ready', '/openapi.json', *PAGE}   # without a key: they say nothing of anybody
# The page runs its own files and asks this server alone.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
MAKING = {'/v1/chat/completions', '/v1/completions'}
PATIENCE = 1000            # pieces of a stream that may wait for a slow reader


@dataclasses.dataclass
class Settings:
  """What the command line says."""
  name: str
  keys: tuple[str, ...] = ()
  hosts: tuple[str, ...] = ()          # of the Host header; () for any
  body: int = 4 << 20                  # bytes of a request at most
  log: str = ''                        # a file with a line for each request
  log_text: bool = False               # in which texts stand, not only their hashes
  moderate: Callable | None = None     # sees every prompt and output; see oversight.py
  feedback: str = ''                   # a file to keep what people think of answers; '': nothing is kept


class Server:
  """One model behind its routes."""

  def __init__(self, model, worker: Worker, settings: Settings):
    self.model, self.worker, self.settings = model, worker, settings
    self.tokenizer, self.shape, self.limit = model.tokenizer, model.shape, worker.engine.limit
    self.grammars = constrain.Grammars(model.tokenizer, model.shape.vocab_size)
    self.scorer = score.Scorer(model.shape, model.params)
    self.oversight = oversight.Oversight(settings.name, self.tokenizer, settings.log, settings.log_text,
                                         settings.moderate)
    self.feedback = feedback.Feedback(settings.feedback) if settings.feedback else None
    self.created, self.draining = int(time.time()), False
    self.registry = prometheus_client.CollectorRegistry()
    count = lambda name, text, *labels: prometheus_client.Counter(f'llm_jax_{name}', text, ['model', *labels],
                                                                  registry=self.registry)
    self.requests = count('requests', 'Requests by route and status', 'route', 'status')
    self.tokens = count('tokens', 'Tokens read (prompt), reused from the cache (cached) and made (completion)', 'kind')
    seconds = lambda name, text: prometheus_client.Histogram(
        f'llm_jax_{name}_seconds', text, ['model'], registry=self.registry,
        buckets=(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60))
    self.first, self.between = seconds('first_token', 'To the first token'), seconds('token', 'From token to token')
    gauge = lambda name, text, f: prometheus_client.Gauge(
        f'llm_jax_{name}', text, registry=self.registry).set_function(f)
    gauge('running', 'Requests in a slot', lambda: worker.engine.active)
    gauge('waiting', 'Requests that wait for one', lambda: len(worker.engine.waiting))

  # What is asked for -----------------------------------------------------------------------------------------------

  def check_model(self, body: dict) -> None:
    if (name := body.get('model')) not in (None, '', self.settings.name):
      raise ApiError(f'the model {ascii(name)[:80]} does not exist; there is {self.settings.name}', 'model', 404,
                     code='model_not_found')

  def check_prompt(self, ids, options: Options, param: str) -> None:
    """Against the context and the vocabulary, with both counts."""
    if len(ids) + 1 > self.limit:
      raise ApiError(f"This model's maximum context length is {self.limit} tokens, the {param} has {len(ids)} and one "
                     'is to be made; shorten it', param, code='context_length_exceeded')
    try:
      engine.check_prompt(self.shape, ids, self.worker.engine.vocab_size, self.limit, param)
    except ConfigError as e:
      raise ApiError(str(e), param) from e
    bad = next((i for i in options.logit_bias if i >= self.worker.engine.vocab_size), None)
    if bad is not None:
      raise ApiError(f'logit_bias: token {bad} is not in the vocabulary of {self.worker.engine.vocab_size}',
                     'logit_bias')

  async def choices(self, prompts, asked: protocol.Asked, salt: str) -> list[Choice]:
    """Submits n requests for each prompt."""
    options = dataclasses.replace(asked.options, stop_ids=self.tokenizer.stop_ids, n=1)
    if self.worker.error or self.draining:
      raise ApiError('the server is going down; try another' if self.draining else 'the engine has stopped', None, 503,
                     'server_error')
    most = self.worker.queue + len(self.worker.engine.slots)
    if len(prompts) * asked.options.n > most:
      raise ApiError(f'n: {len(prompts)} prompts with n={asked.options.n} are more than the {most} texts that this '
                     'server takes at once', 'n')
    out = []
    for ids in prompts:
      for nth in range(asked.options.n):
        try:
          grammar = await asyncio.to_thread(self.grammars.constraint, *asked.grammar) if asked.grammar else None
        except ConfigError as e:
          raise ApiError(str(e), 'response_format') from e
        out.append(Choice(self.tokenizer, ids, options, nth=nth, salt=salt, constraint=grammar))
    try:
      self.worker.submit([choice.request for choice in out])
    except Full as e:
      error = ApiError('too many requests are waiting; try again in a moment', None, 429, 'rate_limit_error')
      error.headers['Retry-After'] = '1'
      raise error from e
    return out

  async def gather(self, request: Request, choices: list[Choice]) -> list[tuple[str, list, list]]:
    """The whole texts, with their tokens and log-probabilities; all are cancelled where the client has gone."""
    async def whole(choice):
      text, tokens, found = '', [], []
      async for piece in self.timed(choice):
        text, tokens, found = text + piece[0], tokens + piece[1], found + piece[2]
      return text, tokens, found
    with self.cancelling(choices, request):
      tasks = [asyncio.ensure_future(whole(choice)) for choice in choices]
      gone = asyncio.ensure_future(disconnected(request))
      try:
        both = asyncio.gather(*tasks)
        await asyncio.wait([both, gone], return_when=asyncio.FIRST_COMPLETED)
        if not both.done():
          both.cancel()
          raise ClientDisconnect
        return both.result()
      finally:
        gone.cancel()

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
      self.count(choices)
      self.oversight.note(request, request.url.path, status, start, choices)

  def count(self, choices) -> None:
    for kind, n in dict(prompt=sum(len(c.request.ids) for c in choices), cached=sum(c.request.cached for c in choices),
                        completion=sum(len(c.request.tokens) for c in choices)).items():
      self.tokens.labels(self.settings.name, kind).inc(n)

  async def timed(self, choice: Choice):
    """Its pieces; how long they took is kept. Raises ApiError where the engine has died."""
    last, first, text = time.perf_counter(), True, ''
    async for piece in choice.pieces():
      now, text = time.perf_counter(), text + piece[0]
      if self.oversight.refusal('output', text):
        choice.refused = True
        self.worker.cancel(choice.request)
        return
      if piece[1]:
        histogram = self.first if first else self.between
        histogram.labels(self.settings.name).observe((now - last) / (1 if first else len(piece[1])))
        last, first = now, False
      yield piece
    if choice.finish_reason == 'error':
      raise ApiError('the engine has stopped', None, 500, 'server_error')

  # Routes -------------------------------------------------------------------------------------------------------------

  async def models(self, request: Request):
    entry = dict(id=self.settings.name, object='model', created=self.created, owned_by='llm_jax',
                 max_model_len=self.limit, feedback=self.feedback is not None)
    if (name := request.path_params.get('name')) is None:
      return JSONResponse(dict(object='list', data=[entry]))
    self.check_model(dict(model=name))
    return JSONResponse(entry)

  async def chat_completions(self, request: Request):
    body = await self.body(request)
    self.check_model(body)
    asked = protocol.chat(body, self.limit)
    self.oversight.check(message['content'] for message in asked.messages)
    ids = await self.conversation(asked)
    self.check_prompt(ids, asked.options, 'messages')
    choices = await self.choices([ids], asked, salt_of(request))
    head = protocol.head('chat.completion', self.settings.name)
    if asked.stream:
      return stream(self.chat_events(request, head | dict(object='chat.completion.chunk'), asked, choices))
    out = []
    for i, (text, tokens, found) in enumerate(await self.gather(request, choices)):
      choice = dict(index=i, message=dict(role='assistant', content=text, refusal=None),
                    finish_reason=choices[i].finish_reason, logprobs=None)
      if asked.options.logprobs is not None:
        choice['logprobs'] = protocol.chat_logprobs(self.tokenizer, tokens, found)
      out.append(choice)
    return JSONResponse(head | dict(choices=out, usage=usage(choices)))

  async def conversation(self, asked: protocol.Asked) -> list[int]:
    """The messages as ids, by the model's template."""
    if not self.model.chat_template:
      raise ApiError('this model has no chat template; use /v1/completions', 'messages')
    try:
      return await asyncio.to_thread(chat.encode, self.tokenizer, self.model.chat_template, list(asked.messages),
                                     tools=list(asked.tools) if asked.tools else None, **asked.template)
    except ConfigError as e:
      raise ApiError(str(e), 'messages') from e

  async def chat_events(self, request, head, asked, choices):
    for i in range(len(choices)):
      yield head | dict(choices=[dict(index=i, delta=dict(role='assistant', content=''), finish_reason=None)])
    async for i, (text, tokens, found) in self.merged(request, choices):
      if text is None:
        yield head | dict(choices=[dict(index=i, delta={}, finish_reason=choices[i].finish_reason)])
      elif text or found:
        choice = dict(index=i, delta=dict(content=text), finish_reason=None)
        if asked.options.logprobs is not None:
          choice['logprobs'] = protocol.chat_logprobs(self.tokenizer, tokens, found)
        yield head | dict(choices=[choice])
    if asked.usage:
      yield head | dict(choices=[], usage=usage(choices))

  async def completions(self, request: Request):
    body = await self.body(request)
    self.check_model(body)
    asked = protocol.completion(body, self.limit)
    texts = [p for p in asked.prompts if isinstance(p, str)]
    encoded = iter(await asyncio.to_thread(self.encode, texts))
    prompts = [next(encoded) if isinstance(p, str) else list(p) for p in asked.prompts]
    self.oversight.check(p if isinstance(p, str) else self.tokenizer.decode(p) for p in asked.prompts)
    for ids in prompts:
      self.check_prompt(ids[:-1] if asked.score_only else ids, asked.options, 'prompt')
    head = protocol.head('text_completion', self.settings.name)
    scores = await self.score(prompts, asked) if asked.echo else None
    if asked.score_only:
      out = [self.echoed(i // asked.options.n, asked, prompts, scores, '', [], [], 'length') | dict(index=i)
             for i in range(len(prompts) * asked.options.n)]
      return JSONResponse(head | dict(choices=out, usage=protocol.usage(sum(map(len, prompts)), 0, 0)))
    choices = await self.choices(prompts, asked, salt_of(request))
    if asked.stream:
      return stream(self.completion_events(request, head, asked, choices, prompts, scores))
    out = [self.echoed(i // asked.options.n, asked, prompts, scores, *made, choices[i].finish_reason) | dict(index=i)
           for i, made in enumerate(await self.gather(request, choices))]
    return JSONResponse(head | dict(choices=out, usage=usage(choices)))

  def echoed(self, p, asked, prompts, scores, text, tokens, found, reason) -> dict:
    """A choice, with its prompt before it where that was asked for."""
    before, ids = '', []
    if asked.echo:
      before = asked.prompts[p] if isinstance(asked.prompts[p], str) else self.tokenizer.decode(prompts[p])
      ids, found = prompts[p], [*(scores[p] if scores else [None] * len(prompts[p])), *found]
    logprobs = None
    if asked.options.logprobs is not None:
      logprobs = protocol.completion_logprobs(self.tokenizer, [*ids, *tokens], found)
    return dict(text=before + text, finish_reason=reason, logprobs=logprobs)

  async def completion_events(self, request, head, asked, choices, prompts, scores):
    n, offset = asked.options.n, [0] * len(choices)
    if asked.echo:
      for i in range(len(choices)):
        echo = self.echoed(i // n, asked, prompts, scores, '', [], [], None)
        offset[i] = len(echo['text'])
        yield head | dict(choices=[echo | dict(index=i)])
    async for i, (text, tokens, found) in self.merged(request, choices):
      choice = dict(index=i, text=text or '', finish_reason=choices[i].finish_reason if text is None else None,
                    logprobs=None)
      if asked.options.logprobs is not None and tokens:
        choice['logprobs'] = protocol.completion_logprobs(self.tokenizer, tokens, found, offset[i])
        offset[i] += len(text)
      if text or found or text is None:
        yield head | dict(choices=[choice])
    if asked.usage:
      yield head | dict(choices=[], usage=usage(choices))

  async def merged(self, request, choices):
    """(index, piece) of several texts as they come; (None, [], []) ends each."""
    queue: asyncio.Queue = asyncio.Queue(PATIENCE)
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

  def encode(self, texts: list[str]) -> list[list[int]]:
    bos = [] if self.tokenizer.bos_id is None or not self.tokenizer.adds_bos else [self.tokenizer.bos_id]
    try:
      return [bos + ids.tolist() for ids in self.tokenizer.encode_batch(texts)] if texts else []
    except ConfigError as e:
      raise ApiError(str(e), 'prompt') from e

  async def score(self, prompts, asked):
    """(logp, top ids, their logps) of each token of each prompt given those before it, None for the first; None where
    nobody asked."""
    if asked.options.logprobs is None:
      return None
    call = self.worker.call(lambda: [self.scorer(ids, asked.options.logprobs) for ids in prompts])
    return await asyncio.wrap_future(call)

  async def embeddings(self, request: Request):
    body = await self.body(request)
    self.check_model(body)
    given, form = body.get('input'), body.get('encoding_format', 'float')
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not 0 < len(given) <= protocol.MOST['prompts'] or not all(
        isinstance(x, str) for x in given):
      raise ApiError(f'input: expected a text or up to {protocol.MOST["prompts"]} texts', 'input')
    if form not in ('float', 'base64'):
      raise ApiError("encoding_format: expected 'float' or 'base64'", 'encoding_format')
    self.oversight.check(given)
    prompts = self.encode(given)
    for ids in prompts:
      self.check_prompt(ids, Options(), 'input')
    found = await asyncio.wrap_future(self.worker.call(lambda: [self.scorer.embedding(ids) for ids in prompts]))
    data = [dict(object='embedding', index=i, embedding=score.written(x, form)) for i, x in enumerate(found)]
    n = sum(map(len, prompts))
    return JSONResponse(dict(object='list', model=self.settings.name, data=data,
                             usage=dict(prompt_tokens=n, total_tokens=n)))

  async def tokenize(self, request: Request):
    body = await self.body(request)
    self.check_model(body)
    text, add = body.get('prompt', body.get('text')), body.get('add_special_tokens', True)
    if body.get('messages') is not None:
      ids = await self.conversation(protocol.chat(dict(messages=body['messages']), self.limit))
    elif isinstance(text, str):
      ids = self.encode([text])[0]
      if not add:
        ids = self.tokenizer.encode(text).tolist()
    else:
      raise ApiError('prompt: expected a text', 'prompt')
    return JSONResponse(dict(tokens=ids, count=len(ids), max_model_len=self.limit))

  async def detokenize(self, request: Request):
    body = await self.body(request)
    self.check_model(body)
    ids = body.get('tokens')
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.tokenizer.vocab_size for i in ids):
      raise ApiError(f'tokens: expected ids from 0 to {self.tokenizer.vocab_size - 1}', 'tokens')
    text = self.tokenizer.decode(ids)
    return JSONResponse(dict(prompt=text, text=text))

  async def tokenizer_info(self, request: Request):
    t = self.tokenizer
    return JSONResponse(dict(
        tokenizer_class=t.kind, vocab_size=t.vocab_size, bos_token_id=t.bos_id, eos_token_id=t.eos_id,
        stop_token_ids=list(t.stop_ids), adds_bos=t.adds_bos and t.bos_id is not None, **t.role_names,
        chat_template=self.model.chat_template, max_model_len=self.limit))

  async def rate(self, request: Request):
    """What somebody thinks of an answer, where that is kept."""
    if self.feedback is None:
      raise ApiError('feedback is not kept here; start the server with --feedback=FILE', None, 404)
    body = await self.body(request)
    row = {name: body.get(name) for name in ('id', 'rating', 'comment', 'messages', 'answer')}
    if not isinstance(row['id'], str) or not 0 < len(row['id']) <= 100:
      raise ApiError('id: expected the id of an answer', 'id')
    if row['rating'] not in (1, -1) or isinstance(row['rating'], bool):
      raise ApiError('rating: expected 1 or -1', 'rating')
    for name in ('comment', 'answer'):
      if not isinstance(row[name], str) or len(row[name]) > 100_000:
        raise ApiError(f'{name}: expected a text', name)
    row['messages'] = list(protocol.chat(dict(messages=row['messages']), self.limit).messages)
    await asyncio.to_thread(self.feedback.add, row | dict(model=self.settings.name))
    return JSONResponse(dict(id=row['id'], kept=True))

  async def page(self, request: Request):
    name, kind = PAGE[request.url.path]
    data = (importlib.resources.files('llm_jax.serve') / 'page' / name).read_bytes()
    return Response(data, media_type=kind, headers={
        'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
        'Cache-Control': 'no-cache'})

  async def health(self, request: Request):
    return JSONResponse(dict(status='dead' if self.worker.error else 'ok'), 503 if self.worker.error else 200)

  async def ready(self, request: Request):
    ready = self.worker.is_alive() and not self.worker.error and not self.draining
    return JSONResponse(dict(status='ready' if ready else 'not ready'), 200 if ready else 503)

  async def metrics(self, request: Request):
    return Response(prometheus_client.generate_latest(self.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def described(self, request: Request):
    return JSONResponse(openapi.description(self.settings.name))

  async def body(self, request: Request) -> dict:
    """The JSON object of a request, which may not be larger than settings.body."""
    parts, size = [], 0
    async for part in request.stream():
      parts.append(part)
      size += len(part)
      if size > self.settings.body:
        raise ApiError(f'the request has more than {self.settings.body:,} bytes', None, 413)
    return protocol.parse_json(b''.join(parts))

  # The application ----------------------------------------------------------------------------------------------------

  def application(self) -> Starlette:
    route = lambda path, f, *methods: Route(path, self.guarded(path, f), methods=list(methods) or ['POST'])
    routes = [
        route('/v1/models', self.models, 'GET'), route('/v1/models/{name:path}', self.models, 'GET'),
        route('/v1/chat/completions', self.chat_completions), route('/v1/completions', self.completions),
        route('/v1/embeddings', self.embeddings), route('/tokenize', self.tokenize),
        route('/detokenize', self.detokenize), route('/tokenizer_info', self.tokenizer_info, 'GET'),
        route('/health', self.health, 'GET'), route('/ready', self.ready, 'GET'),
        *(route(path, self.page, 'GET') for path in PAGE), route('/feedback', self.rate),
        route('/metrics', self.metrics, 'GET'), route('/openapi.json', self.described, 'GET')]
    wrong = lambda status, text: lambda request, e: answer(ApiError(text, None, status))
    return Starlette(routes=routes, exception_handlers={
        404: wrong(404, 'there is nothing here; see /openapi.json'), 405: wrong(405, 'not by this method')})

  def guarded(self, path, f):
    """A route that checks host and key, and turns errors into answers."""
    async def call(request: Request):
      status, start = 500, time.perf_counter()
      try:
        self.check_access(request, path)
        response = await f(request)
        status = response.status_code
        return response
      except ApiError as e:
        status = e.status
        return answer(e)
      except ClientDisconnect:
        status = 499
        return Response(status_code=499)
      finally:
        self.requests.labels(self.settings.name, path, str(status)).inc()
        if status >= 400 or path not in MAKING:      # what makes texts is logged when they are made
          self.oversight.note(request, path, status, start)
    return call

  def check_access(self, request: Request, path: str) -> None:
    host = request.headers.get('host', '').rpartition(':')[0] or request.headers.get('host', '')
    if self.settings.hosts and host not in self.settings.hosts:
      raise ApiError('this host name is not served; start with --host_name', None, 403)
    if not self.settings.keys or path in OPEN:
      return
    kind, _, given = request.headers.get('authorization', '').partition(' ')
    given = given.encode() if kind == 'Bearer' else b''
    right = [hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(key.encode()).digest())
             for key in self.settings.keys]
    if not any(right):
      raise ApiError('no or a wrong API key; send Authorization: Bearer KEY', None, 401, 'authentication_error',
                     'invalid_api_key')


def answer(e: ApiError) -> JSONResponse:
  return JSONResponse(e.body, e.status, e.headers)


def usage(choices: list[Choice]) -> dict:
  requests = [choice.request for choice in choices]
  prompts = {id(r.ids): len(r.ids) for r in requests}
  return protocol.usage(sum(prompts.values()), sum(len(r.tokens) for r in requests), max(r.cached for r in requests))


def salt_of(request: Request) -> str:
  """Cached beginnings are shared within a key alone: their timing would tell what others ask."""
  return hashlib.sha256(request.headers.get('authorization', '').encode()).hexdigest()


async def disconnected(request: Request) -> None:
  while not await request.is_disconnected():
    await asyncio.sleep(0.05)


def stream(events) -> StreamingResponse:
  """Server-sent events; an error inside is an event too, on which OpenAI's client raises."""
  async def lines():
    try:
      async for event in events:
        yield f'data: {json.dumps(event, ensure_ascii=False)}\n\n'
    except ApiError as e:
      yield f'data: {json.dumps(e.body)}\n\n'
    yield 'data: [DONE]\n\n'
  return StreamingResponse(lines(), media_type='text/event-stream', headers={
      'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'})
