"""What the server offers, in OpenAPI's words."""
from llm_jax import __version__
from llm_jax.serve import protocol

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
  """The document at /openapi.json."""
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
  names = {'/v1/chat/completions': protocol.CHAT, '/v1/completions': protocol.COMPLETION,
           '/v1/embeddings': ('model', 'input', 'encoding_format'), '/tokenize': ('model', 'prompt', 'messages'),
           '/feedback': ('id', 'rating', 'comment', 'messages', 'answer'), '/detokenize': ('model', 'tokens')}[path]
  kind = lambda name: KINDS.get(name, 'number')
  return dict(type='object', properties={name: dict(type=kind(name)) if kind(name) else {} for name in names})
