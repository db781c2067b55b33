"""The server's routes: OpenAI's, and a few of vLLM's, over one model. protocol.py checks what is asked, worker.py does
it.

Every answer that is an error has OpenAI's shape. Nothing of a prompt or an answer is kept or logged.
"""
import asyncio
import dataclasses
import hashlib
import hmac
import importlib.resources
import json
import time
import traceback
from collections.abc import Callable

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_jax.config import ConfigError
from llm_jax.generate import chat, score
from llm_jax.generate.options import Options
from llm_jax.serve import feedback, making, oversight, protocol, tools
from llm_jax.serve.protocol import ApiError
from llm_jax.serve.worker import Choice, Worker

PAGE = {'/': ('index.html', 'text/html'), '/page.js': ('page.js', 'text/javascript'),
        '/page.css': ('page.css', 'text/css')}
OPEN = {'/health', '/ready', '/openapi.json', *PAGE}   # without a key: they say nothing of anybody
# The page runs its own files and asks this server alone.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


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
    self.model, self.worker, self.settings, self.created = model, worker, settings, int(time.time())
    self.tokenizer, self.limit = model.tokenizer, worker.engine.limit
    self.oversight = oversight.Oversight(settings, self.tokenizer)
    self.making = making.Making(model, worker, settings.name, self.oversight)
    self.feedback = feedback.Feedback(settings.feedback) if settings.feedback else None
    self.requests = prometheus_client.Counter('llm_jax_requests', 'Requests by route and status',
                                              ['model', 'route', 'status'], registry=self.making.registry)

  def check_model(self, body: dict) -> None:
    if (name := body.get('model')) not in (None, '', self.settings.name):
      raise ApiError(f'the model {ascii(name)[:80]} does not exist; there is {self.settings.name}', 'model', 404,
                     code='model_not_found')

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
    asked = protocol.chat(body, self.limit)
    ids = await self.conversation(asked)
    self.making.check_prompt(ids, asked.options, 'messages')
    await self.oversight.check(map(self.tokenizer.decode, [ids]))
    if asked.must_call:
      asked = dataclasses.replace(asked, grammar=tools.grammar(self.making.notation, asked.tools,
                                                               self.tokenizer.specials))
    choices = await self.making.choices([ids], asked, salt_of(request))
    head = protocol.head('chat.completion', self.settings.name)
    if asked.stream:
      return stream(self.chat_events(request, head | dict(object='chat.completion.chunk'), asked, choices))
    out = []
    for i, (text, tokens, found) in enumerate(await self.making.gather(request, choices)):
      reader = self.reader(asked)
      message = dict(role='assistant', content=reader.feed(text) + reader.finish(), refusal=None)
      if reader.calls:
        message |= dict(content=message['content'].strip() or None, tool_calls=reader.calls)
      choice = dict(index=i, message=message, finish_reason=ended(choices[i], reader), logprobs=None)
      if asked.options.logprobs is not None:
        choice['logprobs'] = protocol.chat_logprobs(self.tokenizer, tokens, found)
      out.append(choice)
    return JSONResponse(head | dict(choices=out, usage=usage(choices)))

  async def conversation(self, asked: protocol.Asked) -> list[int]:
    if not self.model.chat_template:
      raise ApiError('this model has no chat template; use /v1/completions', 'messages')
    self.making.check_size(sum(len(message['content']) for message in asked.messages), 'messages')
    if asked.tools and not self.making.notation:
      raise ApiError("tools: this model's chat template has no place for them; leave them out", 'tools')
    try:
      return await asyncio.to_thread(chat.encode, self.tokenizer, self.model.chat_template, list(asked.messages),
                                     tools=list(asked.tools) if asked.tools else None, variables=asked.template)
    except ConfigError as e:
      raise ApiError(str(e), 'messages') from e

  def reader(self, asked) -> tools.Reader:
    return tools.Reader(self.making.notation if asked.tools else None, asked.only_one)

  async def chat_events(self, request, head, asked, choices):
    readers = [self.reader(asked) for _ in choices]
    delta = lambda i, reason=None, **said: head | dict(choices=[dict(index=i, delta=said, finish_reason=reason)])
    for i in range(len(choices)):
      yield delta(i, role='assistant', content='')
    async for i, (text, tokens, found) in self.making.merged(request, choices):
      if text is None:
        if rest := readers[i].finish():
          yield delta(i, content=rest)
        if calls := readers[i].calls:
          yield delta(i, tool_calls=[dict(call, index=k) for k, call in enumerate(calls)])
        yield delta(i, ended(choices[i], readers[i]))
      elif (text := readers[i].feed(text)) or found:
        choice = dict(index=i, delta=dict(content=text), finish_reason=None)
        if asked.options.logprobs is not None:
          choice['logprobs'] = protocol.chat_logprobs(self.tokenizer, tokens, found)
        yield head | dict(choices=[choice])
    if asked.usage:
      yield head | dict(choices=[], usage=usage(choices))

  async def completions(self, request: Request):
    body = await self.body(request)
    asked = protocol.completion(body, self.limit)
    encoded = iter(await self.making.encode([p for p in asked.prompts if isinstance(p, str)], 'prompt'))
    prompts = [next(encoded) if isinstance(p, str) else list(p) for p in asked.prompts]
    for ids in prompts:
      self.making.check_prompt(ids[:-1] if asked.score_only else ids, asked.options, 'prompt')
    await self.oversight.check(map(self.tokenizer.decode, prompts))
    head, scores = protocol.head('text_completion', self.settings.name), None
    if asked.echo and asked.options.logprobs is not None:
      scores = await self.making.scored(request, prompts,
                                        lambda ids: self.making.scorer(ids, asked.options.logprobs))
    if asked.score_only:
      out = [self.echoed(i // asked.options.n, asked, prompts, scores, '', [], [], 'length') | dict(index=i)
             for i in range(len(prompts) * asked.options.n)]
      return JSONResponse(head | dict(choices=out, usage=protocol.usage(sum(map(len, prompts)), 0, 0)))
    choices = await self.making.choices(prompts, asked, salt_of(request))
    if asked.stream:
      return stream(self.completion_events(request, head, asked, choices, prompts, scores))
    out = [self.echoed(i // asked.options.n, asked, prompts, scores, *made, choices[i].finish_reason) | dict(index=i)
           for i, made in enumerate(await self.making.gather(request, choices))]
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
    async for i, (text, tokens, found) in self.making.merged(request, choices):
      choice = dict(index=i, text=text or '', finish_reason=choices[i].finish_reason if text is None else None,
                    logprobs=None)
      if asked.options.logprobs is not None and tokens:
        choice['logprobs'] = protocol.completion_logprobs(self.tokenizer, tokens, found, offset[i])
        offset[i] += len(text)
      if text or found or text is None:
        yield head | dict(choices=[choice])
    if asked.usage:
      yield head | dict(choices=[], usage=usage(choices))

  async def embeddings(self, request: Request):
    body = await self.body(request)
    given, form = protocol.embeddings(body)
    prompts = await self.making.encode(given, 'input')
    for ids in prompts:
      self.making.check_prompt(ids, Options(), 'input')
    await self.oversight.check(given)
    found = await self.making.scored(request, prompts, self.making.scorer.embedding)
    data = [dict(object='embedding', index=i, embedding=score.written(x, form)) for i, x in enumerate(found)]
    n = sum(map(len, prompts))
    return JSONResponse(dict(object='list', model=self.settings.name, data=data,
                             usage=dict(prompt_tokens=n, total_tokens=n)))

  async def tokenize(self, request: Request):
    body = await self.body(request)
    text, add = body.get('prompt', body.get('text')), body.get('add_special_tokens', True)
    if body.get('messages') is not None:
      ids = await self.conversation(protocol.chat(dict(messages=body['messages']), self.limit))
    elif isinstance(text, str):
      ids, = await self.making.encode([text], 'prompt', bounded=False, begun=add)
    else:
      raise ApiError('prompt: expected a text', 'prompt')
    return JSONResponse(dict(tokens=ids, count=len(ids), max_model_len=self.limit))

  async def detokenize(self, request: Request):
    body = await self.body(request)
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
    if self.feedback is None:
      raise ApiError('feedback is not kept here; start the server with --feedback=FILE', None, 404)
    body = await self.body(request)
    row = {name: body.get(name) for name in ('id', 'rating', 'comment', 'messages', 'answer')}
    if not isinstance(row['id'], str) or not 0 < len(row['id']) <= 100:
      raise ApiError('id: expected the id of an answer', 'id')
    if type(row['rating']) is not int or row['rating'] not in (1, -1):
      raise ApiError('rating: expected 1 or -1', 'rating')
    for name in ('comment', 'answer'):
      if not isinstance(row[name], str) or len(row[name]) > 100_000:
        raise ApiError(f'{name}: expected a text', name)
    row['messages'] = list(protocol.chat(dict(messages=row['messages']), self.limit).messages)
    try:
      await asyncio.to_thread(self.feedback.add, row | dict(model=self.settings.name))
    except (ConfigError, OSError) as e:
      raise ApiError(f'the feedback was not kept: {e if isinstance(e, ConfigError) else e.strerror}', None, 507,
                     'server_error') from e
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
    ready = self.worker.is_alive() and not self.worker.error and not self.making.draining
    return JSONResponse(dict(status='ready' if ready else 'not ready'), 200 if ready else 503)

  async def metrics(self, request: Request):
    text = prometheus_client.generate_latest(self.making.registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def described(self, request: Request):
    return JSONResponse(protocol.description(self.settings.name))

  async def body(self, request: Request) -> dict:
    """The JSON object of a request, which may not be larger than settings.body, nor name another model."""
    parts, size = [], 0
    async for part in request.stream():
      parts.append(part)
      size += len(part)
      if size > self.settings.body:
        raise ApiError(f'the request has more than {self.settings.body:,} bytes', None, 413)
    body = protocol.parse_json(b''.join(parts))
    self.check_model(body)
    return body

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
    made = Starlette(routes=routes, exception_handlers={
        404: wrong(404, 'there is nothing here; see /openapi.json'), 405: wrong(405, 'not by this method')})
    made.router.redirect_slashes = False               # to whatever the Host header says
    return made

  def guarded(self, path, f):
    """A route that checks host and key, and turns errors into answers."""
    async def call(request: Request):
      status, start, response = 500, time.perf_counter(), None
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
      except Exception:                              # ours: the client is told no more than that
        traceback.print_exc()
        return answer(ApiError('the server has failed at this; its log says more', None, 500, 'server_error'))
      finally:
        self.requests.labels(self.settings.name, path, str(status)).inc()
        if not isinstance(response, StreamingResponse):              # which is noted once it has been made
          self.oversight.note(request, path, status, start)
    return call

  def check_access(self, request: Request, path: str) -> None:
    said = request.headers.get('host', '').lower()
    host = said.partition(']')[0] + ']' if said.startswith('[') else said.partition(':')[0]
    if self.settings.hosts and host not in self.settings.hosts:
      raise ApiError('this host name is not served; start with --host_name', None, 403)
    origin = request.headers.get('origin')             # browsers send it with whatever another site's page asks for
    if origin is not None and origin.lower().partition('://')[2] != said:
      raise ApiError("another site's page may not ask here", None, 403)
    if not self.settings.keys or path in OPEN:
      return
    kind, _, given = request.headers.get('authorization', '').partition(' ')
    given = given.strip().encode() if kind.lower() == 'bearer' else b''
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


def ended(choice: Choice, reader: tools.Reader) -> str:
  """Why a choice ended, where its text has been read for calls."""
  return 'tool_calls' if reader.calls and choice.finish_reason == 'stop' else choice.finish_reason


def salt_of(request: Request) -> str:
  """Cached beginnings are shared within a key alone: their timing would tell what others ask."""
  return hashlib.sha256(request.headers.get('authorization', '').encode()).hexdigest()


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
