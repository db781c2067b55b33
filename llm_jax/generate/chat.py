"""A conversation as token ids, by the model's own chat template.

Templates come out of model files: they are rendered in Jinja's sandbox, with bounds on time and size. Tokens that only
the program may write (<|im_end|>) come from the template alone: where a message spells one, it stays ordinary text.
"""
import contextlib
import datetime
import itertools
import json
import re
import sys
import time

from llm_jax.config import ConfigError

SECONDS, LARGEST = 2.0, 4_000_000        # of a template: time to render, characters that it may make


def encode(tokenizer, template: str, messages: list[dict], *, add_generation_prompt: bool = True, tools=None,
           variables: dict | None = None) -> list[int]:
  """Ids of the conversation, with what begins the assistant's turn. variables: further ones of the template's. Raises
  ConfigError for a template that fails, in its own words where it raises."""
  variables = variables or {}
  names = sorted(tokenizer.specials, key=len, reverse=True)
  special = re.compile('|'.join(map(re.escape, names))) if names else None
  mark = unused(json.dumps([messages, tools, variables], ensure_ascii=False, default=str))
  guard = (lambda text: special.sub(lambda m: m.group()[0] + mark + m.group()[1:], text)) if special else lambda t: t
  text = render(template, deep(variables, guard) | tokenizer.role_names | dict(
      messages=deep(messages, guard), tools=deep(tools, guard), add_generation_prompt=add_generation_prompt))
  ids, at = [], 0
  for found in special.finditer(text) if special else ():
    ids += plain(tokenizer, text[at:found.start()].replace(mark, ''))
    ids.append(tokenizer.specials[found.group()])
    at = found.end()
  return ids + plain(tokenizer, text[at:].replace(mark, ''))


def plain(tokenizer, text: str) -> list[int]:
  return tokenizer.encode(text).tolist() if text else []


def unused(text: str) -> str:
  """A character that is not in the text: one for private use."""
  here = set(text)
  for c in map(chr, itertools.chain(range(0xe000, 0xf900), range(0xf0000, 0xffffe))):
    if c not in here and f'\\u{ord(c):04x}' not in text:
      return c
  raise ConfigError('messages: hold every character for private use; leave one out')


def deep(value, f):
  """f of every string inside, keys too."""
  if isinstance(value, str):
    return f(value)
  if isinstance(value, dict):
    return {deep(key, f): deep(x, f) for key, x in value.items()}
  return [deep(x, f) for x in value] if isinstance(value, (list, tuple)) else value


def render(template: str, variables: dict) -> str:
  """What the template makes of the variables."""
  import jinja2
  environment = _environment()
  try:
    with deadline(SECONDS):
      parts, size = [], 0
      for part in environment.from_string(template).generate(variables):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
          raise ConfigError(f'the chat template makes more than {LARGEST} characters; shorten the conversation')
      return ''.join(parts)
  except ConfigError:
    raise
  except TimeoutError as e:
    raise ConfigError(f'the chat template takes more than {SECONDS:g} s') from e
  except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError,
          MemoryError, IndexError) as e:
    raise ConfigError(f'the chat template does not take this conversation: {" ".join(str(e).split())[:200]}') from e


def _environment():
  import jinja2.ext
  import jinja2.sandbox

  class Bounded(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(('*', '**', '%'))

    def is_safe_attribute(self, obj, attr, value):
      wide = isinstance(obj, str) and attr in ('ljust', 'rjust', 'center', 'zfill', 'expandtabs')
      return not wide and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator, left, right):
      numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
      if operator == '**' or operator == '*' and not numbers:
        sizes = [x if isinstance(x, int) else len(x) for x in (left, right) if isinstance(x, (int, str, list, tuple))]
        if operator == '**' and any(abs(s) > 64 for s in sizes) or operator == '*' and max(sizes) > 10_000:
          raise jinja2.sandbox.SecurityError('a product that is too large')
      if operator == '%' and isinstance(left, str) and re.search(r'\d{5}', left):
        raise jinja2.sandbox.SecurityError('a width that is too large')
      return super().call_binop(context, operator, left, right)

  environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
  del environment.filters['center']
  environment.filters['tojson'] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
  def fail(message):
    raise ConfigError(f'the chat template says: {" ".join(str(message).split())[:200]}')
  environment.globals |= dict(raise_exception=fail, strftime_now=lambda form: datetime.datetime.now().strftime(form))
  return environment


@contextlib.contextmanager
def deadline(seconds: float):
  """TimeoutError in Python code of this thread that takes longer."""
  end, before = time.monotonic() + seconds, sys.gettrace()

  def trace(frame, event, arg):
    if time.monotonic() > end:
      raise TimeoutError
    return trace
  sys.settrace(trace)
  try:
    yield
  finally:
    sys.settrace(before)
