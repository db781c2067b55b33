"""What clients may ask, in OpenAI's words: each request checked field by field before anything is done for it.

A wrong one is an ApiError with the field's name: status 400, never 422 or 500. Source: the OpenAI API reference.
"""
import codecs
import dataclasses
import json
import math
import re
import time
import uuid

from llm_jax import __version__
from llm_jax.config import ConfigError, nearest
from llm_jax.generate.filters import TOP
from llm_jax.generate.options import Options

MOST = dict(n=16, prompts=64, messages=1000, stop=16, logit_bias=300, tools=128)
DEPTH = 64                 # of JSON
STRINGS, BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.S), re.compile(rb'[][{}]')


class ApiError(Exception):
  """An answer in OpenAI's shape."""

  def __init__(self, message: str, param: str | None = None, status: int = 400, kind: str = 'invalid_request_error',
               code: str | None = None):
    super().__init__(message)
    self.status, self.headers = status, {}
    self.body = dict(error=dict(message=message, type=kind, param=param, code=code))


def parse_json(data: bytes) -> dict:
  depth = most = 0
  for bracket in BRACKETS.findall(STRINGS.sub(b'', data)):             # json itself would recurse
    depth += 1 if bracket in b'[{' else -1
    most = max(most, depth)
  if most > DEPTH:
    raise ApiError(f'expected JSON of at most {DEPTH} levels')
  try:
    found = json.loads(data, parse_constant=lambda name: _no_constant(name))
  except (ValueError, RecursionError) as e:
    raise ApiError(f'expected JSON: {str(e)[:200]}') from e
  if not isinstance(found, dict):
    raise ApiError(f'expected a JSON object, got {type(found).__name__}')
  return found


def _no_constant(name):
  raise ValueError(f'{name} is no JSON')


class Fields:
  """A request's fields, taken one by one; what is left at the end is not known."""

  def __init__(self, values: dict):
    self.left = dict(values)

  def __call__(self, name: str, kind, default, low=-math.inf, high=math.inf):
    """A value of this kind within [low, high]; the default where it is missing or null."""
    value = self.left.pop(name, None)
    if value is None:
      return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
      raise ApiError(f'{name}: expected {kind.__name__}, got {_short(value)}', name)
    if kind in (int, float) and not low <= value <= high:
      raise ApiError(f'{name}: expected {low:g} to {high:g}, got {_short(value)}', name)
    return value

  def finish(self, known) -> None:
    for name in self.left:
      if self.left[name] is not None and name not in IGNORED:
        param = name[:60].encode('ascii', 'backslashreplace').decode()
        raise ApiError(f'{param}: is not known{nearest(param, known)}', param)


def _short(value) -> str:
  return ascii(value)[:80]


# Fields of other services that change nothing here.
IGNORED = {'user', 'store', 'metadata', 'service_tier', 'safety_identifier', 'prompt_cache_key',
           'tokenized_requests', 'type', 'eos_string', 'skip_special_tokens', 'reasoning_effort', 'verbosity'}
COMMON = ('model', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'typical_p',
          'repetition_penalty', 'presence_penalty', 'frequency_penalty', 'logit_bias', 'stop', 'seed', 'n', 'stream',
          'stream_options', 'logprobs', 'response_format', 'guided_regex', 'guided_grammar')
CHAT = (*COMMON, 'messages', 'top_logprobs', 'tools', 'tool_choice', 'parallel_tool_calls', 'chat_template_kwargs')
COMPLETION = (*COMMON, 'prompt', 'echo', 'suffix', 'best_of')


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request that was understood."""
  options: Options
  stream: bool
  usage: bool                        # whether a stream ends with it
  grammar: tuple | None              # (kind, source) for constrain.Grammars, and the field that asks for it
  prompts: tuple = ()                # completions: texts or lists of ids
  echo: bool = False
  score_only: bool = False           # max_tokens 0: the prompt's own log-probabilities alone
  messages: tuple = ()               # chat
  tools: tuple | None = None
  must_call: bool = False            # one of them, and nothing else is to be said
  only_one: bool = False             # call at most
  template: dict = dataclasses.field(default_factory=dict)      # chat_template_kwargs


def common(f: Fields, limit: int, chat: bool) -> dict:
  """(fields of Options, stream, usage, grammar)."""
  f('model', str, '')
  n, top = f('n', int, 1, 1, MOST['n']), None
  most = f('max_completion_tokens', int, None, 0, limit)
  most = f('max_tokens', int, most, 0, limit)
  if chat:
    wanted = f('logprobs', bool, False)
    top = f('top_logprobs', int, 0, 0, TOP)
    top = top if wanted else None
  else:
    top = f('logprobs', int, None, 0, TOP)
  bias = f('logit_bias', dict, {})
  if len(bias) > MOST['logit_bias']:
    raise ApiError(f'logit_bias: expected at most {MOST["logit_bias"]} tokens, got {len(bias)}', 'logit_bias')
  for key, value in bias.items():
    if not re.fullmatch('[0-9]{1,9}', key) or isinstance(value, bool) or not isinstance(value, (int, float)) or (
        not -100 <= value <= 100):
      raise ApiError(f'logit_bias: expected token ids with numbers from -100 to 100, got {_short(key)}: '
                     f'{_short(value)}', 'logit_bias')
  stop = f.left.pop('stop', None)
  stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or len(stop) > MOST['stop'] or not all(
      isinstance(s, str) and 0 < len(s) <= 1000 for s in stop):
    raise ApiError(f'stop: expected a text or up to {MOST["stop"]} texts of 1 to 1000 characters', 'stop')
  stream_options = f('stream_options', dict, {})
  options = dict(
      max_tokens=most, temperature=f('temperature', float, 1.0, 0, 100), top_p=f('top_p', float, 1.0, 1e-6, 1),
      top_k=max(f('top_k', int, 0, -1, 10**6), 0), min_p=f('min_p', float, 0.0, 0, 1),
      typical_p=f('typical_p', float, 1.0, 1e-6, 1), repetition_penalty=f('repetition_penalty', float, 1.0, 0.01, 100),
      presence_penalty=f('presence_penalty', float, 0.0, -2, 2),
      frequency_penalty=f('frequency_penalty', float, 0.0, -2, 2),
      logit_bias={int(k): float(v) for k, v in bias.items()}, stop=tuple(stop),
      seed=f('seed', int, uuid.uuid4().int & 0xffffffff, -2**63, 2**63 - 1), n=n, logprobs=top)
  return dict(options=options, stream=f('stream', bool, False), usage=stream_options.get('include_usage') is True,
              grammar=_grammar(f))


def _grammar(f: Fields) -> tuple | None:
  said = f('response_format', dict, {'type': 'text'})
  regex, grammar = f('guided_regex', str, None), f('guided_grammar', str, None)
  kind = said.get('type')
  if kind == 'json_schema':
    inner = said.get('json_schema')
    schema = inner.get('schema') if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
      raise ApiError('response_format: expected json_schema.schema, an object', 'response_format')
    return 'json_schema', schema, 'response_format'
  if kind == 'json_object':
    return 'json_object', '', 'response_format'
  if kind != 'text':
    raise ApiError(f'response_format: expected type text, json_object or json_schema, got {_short(kind)}',
                   'response_format')
  if regex is not None:
    return 'regex', regex, 'guided_regex'
  return None if grammar is None else ('grammar', grammar, 'guided_grammar')


def completion(body: dict, limit: int) -> Asked:
  """/v1/completions; limit: tokens that the model reads."""
  f = Fields(body)
  said = common(f, limit, chat=False)
  prompt, echo = f.left.pop('prompt', None), f('echo', bool, False)
  best_of = f('best_of', int, 1, 1, MOST['n'])
  if best_of > said['options']['n'] or f('suffix', str, ''):
    raise ApiError('best_of and suffix are not offered', 'best_of' if best_of > 1 else 'suffix')
  f.finish(COMPLETION)
  ids = lambda x: isinstance(x, list) and bool(x) and all(type(i) is int for i in x)
  if isinstance(prompt, str) or ids(prompt):
    prompt = [prompt]
  if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or ids(p) for p in prompt):
    raise ApiError('prompt: expected a text, a list of token ids, or a list of either', 'prompt')
  if len(prompt) > MOST['prompts']:
    raise ApiError(f'prompt: expected at most {MOST["prompts"]}, got {len(prompt)}', 'prompt')
  most = said['options']['max_tokens']
  if most == 0 and not echo:
    raise ApiError('max_tokens: expected at least 1; 0 goes with echo', 'max_tokens')
  said['options'] = _options(said['options'] | dict(max_tokens=16 if most is None else max(most, 1)))
  return Asked(**said, prompts=tuple(prompt), echo=echo, score_only=most == 0)


def chat(body: dict, limit: int) -> Asked:
  """/v1/chat/completions."""
  f = Fields(body)
  if 'chat_template' in body:
    raise ApiError("chat_template: only the model's own is used; leave it out", 'chat_template')
  said = common(f, limit, chat=True)
  messages, tools = f('messages', list, None), f('tools', list, None)
  choice, kwargs = f.left.pop('tool_choice', None), f('chat_template_kwargs', dict, {})
  parallel = f('parallel_tool_calls', bool, True)
  f.finish(CHAT)
  if not messages or len(messages) > MOST['messages']:
    raise ApiError(f'messages: expected 1 to {MOST["messages"]}, got {len(messages or ())}', 'messages')
  if reserved := {'messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token'} & kwargs.keys():
    raise ApiError(f'chat_template_kwargs: {sorted(reserved)[0]} is set by the server', 'chat_template_kwargs')
  if tools is not None and (len(tools) > MOST['tools'] or not all(
      isinstance(t, dict) and t.get('type') == 'function' and isinstance(t.get('function'), dict)
      and isinstance(t['function'].get('name'), str) for t in tools)):
    raise ApiError(f'tools: expected at most {MOST["tools"]} functions with names', 'tools')
  tools, must_call = _chosen(tools or [], choice)
  if must_call and said['grammar']:
    raise ApiError('tool_choice: a call and a response_format cannot both be asked for', 'tool_choice')
  if said['options']['max_tokens'] == 0:
    raise ApiError('max_tokens: expected at least 1', 'max_tokens')
  said['options'] = _options(said['options'] | dict(max_tokens=said['options']['max_tokens'] or limit))
  return Asked(**said, messages=tuple(map(_message, range(len(messages)), messages)), template=kwargs,
               tools=tuple(tools) or None, must_call=must_call, only_one=not parallel)


def _chosen(tools: list[dict], choice) -> tuple[list[dict], bool]:
  """(the tools that may be called, whether one must be)."""
  if choice in (None, 'auto'):
    return tools, False
  if choice == 'none':
    return [], False
  if choice == 'required' and tools:
    return tools, True
  function = choice.get('function') if isinstance(choice, dict) and choice.get('type') == 'function' else None
  named = [t for t in tools if isinstance(function, dict) and t['function']['name'] == function.get('name')]
  if not named:
    raise ApiError("tool_choice: expected 'none', 'auto', 'required' or a function of tools", 'tool_choice')
  return named, True


def embeddings(body: dict) -> tuple[list[str], str]:
  """/v1/embeddings: the texts, and the form of the numbers."""
  f = Fields(body)
  f('model', str, '')
  given, form = f.left.pop('input', None), f('encoding_format', str, 'float')
  f.finish(('model', 'input', 'encoding_format'))
  given = [given] if isinstance(given, str) else given
  if not isinstance(given, list) or not 0 < len(given) <= MOST['prompts'] or not all(isinstance(x, str) for x in given):
    raise ApiError(f'input: expected a text or up to {MOST["prompts"]} texts', 'input')
  if form not in ('float', 'base64'):
    raise ApiError("encoding_format: expected 'float' or 'base64'", 'encoding_format')
  return given, form


ROLES = ('system', 'developer', 'user', 'assistant', 'tool')


def _message(i: int, said) -> dict:
  where = f'messages[{i}]'
  if not isinstance(said, dict) or said.get('role') not in ROLES:
    raise ApiError(f'{where}.role: expected one of {", ".join(ROLES)}', f'{where}.role')
  content = said.get('content')
  if isinstance(content, list):
    if not all(isinstance(p, dict) and p.get('type') == 'text' and isinstance(p.get('text'), str) for p in content):
      raise ApiError(f'{where}.content: expected parts of type text alone', f'{where}.content')
    content = ''.join(p['text'] for p in content)
  calls = said.get('tool_calls')
  if not isinstance(content, str) and not (content is None and said['role'] == 'assistant' and calls):
    raise ApiError(f'{where}.content: expected a text', f'{where}.content')
  if isinstance(content, str):
    try:
      content.encode()
    except UnicodeEncodeError as e:
      raise ApiError(f'{where}.content: has half of a surrogate pair', f'{where}.content') from e
  out = dict(role='system' if said['role'] == 'developer' else said['role'], content=content or '')
  if calls is not None:
    if said['role'] != 'assistant' or not isinstance(calls, list):
      raise ApiError(f'{where}.tool_calls: expected functions, of an assistant', f'{where}.tool_calls')
    out['tool_calls'] = [_called(call, f'{where}.tool_calls[{k}]') for k, call in enumerate(calls)]
  for name in ('name', 'tool_call_id'):
    if isinstance(said.get(name), str):
      out[name] = said[name]
  return out


def _called(call, where: str) -> dict:
  """A call of an earlier turn: its arguments, which are JSON in a text, as templates want them, an object."""
  function = call.get('function') if isinstance(call, dict) else None
  try:
    arguments = parse_json(function['arguments'].encode()) if function['arguments'] else {}
    return dict(id=str(call.get('id', '')), type='function',
                function=dict(name=function['name'] + '', arguments=arguments))
  except (TypeError, KeyError, AttributeError, UnicodeError) as e:
    raise ApiError(f'{where}: expected a function with its name and arguments, JSON in a text', where) from e
  except ApiError as e:
    raise ApiError(f'{where}.function.arguments: {e}', f'{where}.function.arguments') from e


def _options(fields: dict) -> Options:
  try:
    return Options(**fields)
  except ConfigError as e:
    name = str(e).partition(':')[0]
    raise ApiError(str(e), name) from e


# Answers --------------------------------------------------------------------------------------------------------------

def head(kind: str, model: str) -> dict:
  """What every answer, and every piece of a stream, begins with."""
  prefix = 'chatcmpl' if kind.startswith('chat') else 'cmpl'
  return dict(id=f'{prefix}-{uuid.uuid4().hex}', object=kind, created=int(time.time()), model=model)


def usage(prompt: int, made: int, cached: int) -> dict:
  return dict(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made,
              prompt_tokens_details=dict(cached_tokens=cached))


def chat_logprobs(tokenizer, tokens, found) -> dict:
  """choices[].logprobs of a chat."""
  def entry(token, logp):
    data = tokenizer.decode_bytes([token])
    return dict(token=data.decode('utf-8', 'replace'), logprob=max(logp, -9999.0), bytes=list(data))
  return dict(content=[entry(token, logp) | dict(top_logprobs=[entry(*pair) for pair in zip(top, logps)])
                       for token, (logp, top, logps) in zip(tokens, found)], refusal=None)


def completion_logprobs(tokenizer, tokens, found, start: int = 0) -> dict:
  """choices[].logprobs of a completion. An echoed prompt's first token has none: 0.0, for clients want a number."""
  text = [tokenizer.decode_bytes([t]).decode('utf-8', 'replace') for t in tokens]
  decoder, offsets, at = codecs.getincrementaldecoder('utf-8')('replace'), [], start
  for token in tokens:                       # a character of several tokens counts at the last
    offsets.append(at)
    at += len(decoder.decode(tokenizer.decode_bytes([token])))
  name = lambda t: tokenizer.decode_bytes([t]).decode('utf-8', 'replace')
  tops = [{} if f is None else {name(t): max(lp, -9999.0) for t, lp in zip(f[1], f[2])} for f in found]
  return dict(tokens=text, token_logprobs=[0.0 if f is None else max(f[0], -9999.0) for f in found],
              top_logprobs=tops, text_offset=offsets)


# The description at /openapi.json -------------------------------------------------------------------------------------

ROUTES = {
    '/v1/models': ('get', 'The model'), '/v1/models/{name}': ('get', 'The model, by name'),
    '/v1/chat/completions': ('post', 'Goes on with a conversation'), '/v1/completions': ('post', 'Continues a text'),
    '/v1/embeddings': ('post', 'Texts as vectors'), '/tokenize': ('post', 'A text as token ids'),
    '/detokenize': ('post', 'Token ids as a text'), '/tokenizer_info': ('get', 'The tokenizer'),
    '/feedback': ('post', 'What somebody thinks of an answer, where that is kept'), '/': ('get', 'The chat page'),
    '/health': ('get', 'Whether the engine lives'), '/ready': ('get', 'Whether requests are taken'),
    '/metrics': ('get', 'Figures for Prometheus'), '/openapi.json': ('get', 'This')}
KINDS = dict(messages='array', prompt=None, stop=None, logit_bias='object', stream_options='object',
             response_format='object', chat_template_kwargs='object', tools='array', tool_choice=None, stream='boolean',
             echo='boolean', model='string', n='integer', seed='integer', max_tokens='integer', top_k='integer',
             max_completion_tokens='integer', best_of='integer', top_logprobs='integer', logprobs=None,
             suffix='string', guided_regex='string', guided_grammar='string')


def description(model: str) -> dict:
  error = {'$ref': '#/components/schemas/Error'}
  answers = {'200': dict(description='The answer'), '4XX': dict(
      description='What is wrong', content={'application/json': dict(schema=error)})}
  paths = {}
  for path, (method, summary) in ROUTES.items():
    entry = dict(summary=summary, responses=answers)
    if method == 'post':
      entry['requestBody'] = dict(required=True, content={'application/json': dict(schema=_schema(path))})
    if '{name}' in path:
      entry['parameters'] = [{'name': 'name', 'in': 'path', 'required': True, 'schema': dict(type='string')}]
    paths[path] = {method: entry}
  body = dict(type='object', properties=dict(error=dict(type='object', properties={
      name: dict(type=['string', 'null']) for name in ('message', 'type', 'param', 'code')})))
  return dict(openapi='3.1.0', info=dict(title=f'llm_jax: {model}', version=__version__), paths=paths,
              components=dict(schemas=dict(Error=body)))


def _schema(path: str) -> dict:
  names = {'/v1/chat/completions': CHAT, '/v1/completions': COMPLETION,
           '/v1/embeddings': ('model', 'input', 'encoding_format'), '/tokenize': ('model', 'prompt', 'messages'),
           '/feedback': ('id', 'rating', 'comment', 'messages', 'answer'), '/detokenize': ('model', 'tokens')}[path]
  kind = lambda name: KINDS.get(name, 'number')
  return dict(type='object', properties={name: dict(type=kind(name)) if kind(name) else {} for name in names})
