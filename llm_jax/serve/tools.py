"""Calls of functions in what a model says, in the notation that its chat template teaches it.

hermes: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call (Hermes, Qwen 2.5 and 3, SmolLM3);
mistral: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; llama: {"name": ..., "parameters": {...}} as the whole
text (Llama 3.1 and later).
"""
import dataclasses
import json
import uuid

OPENING = dict(hermes='<tool_call>', mistral='[TOOL_CALLS]', llama='{')
CLOSING = '</tool_call>'


def notation(template: str | None) -> str | None:
  """The notation of a chat template; None where it has no place for tools."""
  if not template or 'tools' not in template:
    return None
  return next((kind for kind in ('hermes', 'mistral') if OPENING[kind] in template), 'llama')


def marks(kind: str | None, specials: dict[str, int]) -> dict[int, bytes]:
  """{id: text} of the special tokens that a call is written with: without them it could not be seen in the text."""
  names = (OPENING['hermes'], CLOSING, OPENING['mistral']) if kind in ('hermes', 'mistral') else ()
  return {specials[name]: name.encode() for name in names if name in specials}


def grammar(kind: str, tools, specials: dict[str, int]) -> tuple[str, str, str]:
  """As Asked.grammar: of a text that is a call of one of the tools."""
  named = 'parameters' if kind == 'llama' else 'arguments'
  one = lambda f: dict(type='object', required=['name', named], additionalProperties=False, properties={
      'name': dict(const=f['name']), named: f.get('parameters') or dict(type='object')})
  call = json.dumps({'anyOf': [one(tool['function']) for tool in tools],
                     'x-guidance': {'whitespace_flexible': False}})       # a small model would not stop making it
  mark = lambda name: f'<[{specials[name]}]>' if name in specials else json.dumps(name)
  rule = dict(hermes=f'{mark(OPENING["hermes"])} "\\n" call "\\n" {mark(CLOSING)}',
              mistral=f'{mark(OPENING["mistral"])} "[" call "]"', llama='call')[kind]
  return 'grammar', f'start: {rule}\ncall: %json {call}', 'tools'


@dataclasses.dataclass
class Reader:
  """Takes calls out of a text as it comes. kind None: there are none to be taken."""
  kind: str | None
  only_one: bool = False           # the first call alone counts
  calls: list[dict] = dataclasses.field(default_factory=list)
  held: str = ''                   # what may be, or has begun, a call
  shown: bool = False              # whether there was text before

  def feed(self, text: str) -> str:
    """The next piece of the text, without what is kept for a call."""
    if self.kind is None:
      return text
    text, self.held = self.held + text, ''
    mark = OPENING[self.kind]
    if self.kind == 'llama':       # the whole text, or none of it
      at = 0 if text.lstrip()[:1] == mark and not self.shown else len(text) if text.strip() else 0
    elif (at := text.find(mark)) < 0:
      at = len(text) - next((k for k in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:k])), 0)
    self.held = text[at:]
    self.shown = self.shown or bool(text[:at].strip())
    return text[:at]

  def finish(self) -> str:
    """Reads what was kept: `calls` are the calls in it; the text back where it is none."""
    if self.kind is None or not self.held:
      return ''
    try:
      found = [_call(said) for said in _parts(self.kind, self.held)]
    except (ValueError, KeyError, TypeError, RecursionError):
      found = []
    self.calls = found[:1] if self.only_one else found
    return '' if found else self.held


def _parts(kind: str, text: str) -> list[dict]:
  if kind == 'hermes':
    return [json.loads(part.partition(CLOSING)[0]) for part in text.split(OPENING[kind])[1:]]
  if kind == 'mistral':
    said = json.loads(text.partition(OPENING[kind])[2])
    return said if isinstance(said, list) else [said]
  return [json.loads(part) for part in text.split(';') if part.strip()] if '};' in text else [json.loads(text)]


def _call(said: dict) -> dict:
  arguments = said['arguments'] if 'arguments' in said else said['parameters']
  if not isinstance(said['name'], str) or not isinstance(arguments, dict):
    raise TypeError
  return dict(id=uuid.uuid4().hex[:9], type='function',          # Mistral's template takes ids of 9 characters
              function=dict(name=said['name'], arguments=json.dumps(arguments, ensure_ascii=False)))
