"""Talks with a model in the terminal: python -m llm_jax.chat --model=PATH [--system='You are brief.']

Lines that begin with / are commands: /system TEXT sets what the model is told first and begins again, /regenerate asks
for another answer, /undo takes the last turn back, /save FILE and /load FILE keep the conversation, /new begins again,
/help, /quit (or Ctrl-D). Ctrl-C ends an answer; a second one ends the program.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys

from llm_jax import config as config_lib
from llm_jax.config import ConfigError


def parse(args):
  parser = config_lib.Parser('llm_jax.chat', __doc__)
  parser.add_argument('--model', required=True, help='a run directory, a Hugging Face directory, a .gguf file, hf:...')
  parser.add_argument('--system', default='', help='what the model is told first')
  parser.add_argument('--max_tokens', type=int, default=512)
  parser.add_argument('--temperature', type=float, default=0.7, help='0 is greedy')
  parser.add_argument('--top_p', type=float, default=0.95)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--length', type=int, default=2048, help='tokens of the conversation at most')
  parser.add_argument('--weights', choices=('int8', 'int4'), default='', help='matrices in fewer bits: less memory, at '
                      "some of the model's quality")
  parser.add_argument('--cache', choices=('int8',), default='', help='keys and values in fewer bits')
  return parser.parse_args(args)


@contextlib.contextmanager
def noted():
  """A list that is no longer empty once Ctrl-C was pressed: an exception may come while the engine has no state, which
  the device was given, and not yet its next. Pressed again, it ends the process."""
  pressed = []

  def note(number, frame):
    pressed.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  before = signal.signal(signal.SIGINT, note)
  try:
    yield pressed
  finally:
    signal.signal(signal.SIGINT, before)


class Conversation:
  """What was said, and the engine, whose cache keeps it: a turn reads only what is new."""

  def __init__(self, model, flags, write):
    from llm_jax.generate import engine
    if not model.chat_template:
      raise ConfigError(f'--model: {flags.model} has no chat template; continue texts with llm_jax.sample')
    self.flags, self.write, self.turn = flags, write, 0
    self.engine = engine.Engine(model.shape, model.params, slots=1, length=flags.length,
                                vocab_size=model.tokenizer.vocab_size, weights=flags.weights, cache=flags.cache,
                                stops=engine.bucket(len(model.tokenizer.stop_ids), 8))
    self.model = dataclasses.replace(model, params={})             # the engine has its own
    self.begin(flags.system)

  def begin(self, system: str) -> None:
    self.messages = [dict(role='system', content=system)] if system else []

  def answer(self, pressed: list) -> None:
    """Streams the model's turn, and ends it where `pressed` has something in it (`noted`)."""
    from llm_jax.generate import chat, engine
    from llm_jax.generate.options import Options
    from llm_jax.generate.text import TextStream
    tokenizer, flags = self.model.tokenizer, self.flags
    ids = chat.encode(tokenizer, self.model.chat_template, self.messages)
    self.turn += 1
    options = Options(max_tokens=flags.max_tokens, temperature=flags.temperature, top_p=flags.top_p,
                      seed=flags.seed + self.turn, stop_ids=tokenizer.stop_ids)
    stream = TextStream(tokenizer, ids)

    def watch(tokens):
      for token in tokens:
        if token not in options.stop_ids:
          stream.push(token)
      self.write(stream.fresh())

    request = engine.Request(ids, options, watch=watch)
    self.engine.submit(request)
    try:
      while not pressed and self.engine.step():
        pass
    finally:
      if not request.reason:
        self.engine.cancel(request)
    self.write(stream.finish(request.reason) + '\n')
    self.messages.append(dict(role='assistant', content=stream.text))
    speed = (len(request.tokens) - 1) / request.seconds if request.seconds else 0.0
    print(f'[{len(request.tokens)} tokens, {speed:,.0f} tok/s; {request.cached} of {len(ids)} from the cache'
          f'{", cut off" if request.reason != "stop" else ""}]', file=sys.stderr)

  def take_back(self, roles: tuple[str, ...]) -> bool:
    before = len(self.messages)
    while self.messages and self.messages[-1]['role'] in roles:
      self.messages.pop()
    return len(self.messages) < before

  def command(self, line: str, pressed: list) -> bool:
    """Does what a line that begins with / says; False to end."""
    name, _, rest = line.partition(' ')
    if name in ('/quit', '/exit'):
      return False
    if name == '/system':
      self.begin(rest.strip())
    elif name == '/new':
      self.begin(next((m['content'] for m in self.messages if m['role'] == 'system'), ''))
    elif name == '/regenerate':
      if self.take_back(('assistant',)):
        self.answer(pressed)
      else:
        print('there is no answer yet', file=sys.stderr)
    elif name == '/undo':
      self.take_back(('assistant',))
      self.take_back(('user',))
    elif name == '/save' and rest:
      write(os.path.expanduser(rest), self.messages)
      print(f'saved {len(self.messages)} messages in {rest}', file=sys.stderr)
    elif name == '/load' and rest:
      self.messages = read(os.path.expanduser(rest))
      print(f'loaded {len(self.messages)} messages', file=sys.stderr)
    else:
      print(__doc__.partition('\n\n')[2].strip(), file=sys.stderr)
    return True


def write(path: str, messages: list[dict]) -> None:
  try:
    pathlib.Path(path).write_bytes(json.dumps(messages, indent=1, ensure_ascii=False).encode())
  except (OSError, ValueError) as e:
    raise ConfigError(f'{path}: cannot be written ({e})') from e


def read(path: str) -> list[dict]:
  """The messages that /save wrote."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    if not isinstance(found, list):
      raise ValueError('it is not a list of messages')
    for i, m in enumerate(found):
      if not isinstance(m, dict) or m.keys() != {'role', 'content'} or not isinstance(m['content'], str) or (
          m['role'] not in ('system', 'user', 'assistant')):
        raise ValueError(f'message {i} is not a role (system, user or assistant) and a content, which is text')
      m['content'].encode()                  # half a surrogate pair is no text
  except (OSError, ValueError, RecursionError) as e:
    raise ConfigError(f'{path}: expected what /save writes ({e})') from e
  return found


def main(args: list[str]) -> None:
  config_lib.command(args, parse, run)


def run(flags) -> None:
  from llm_jax import api, hardware
  from llm_jax.data import store
  from llm_jax.generate import text
  hardware.keep_programs(store.cache_folder(config_lib.Data()))
  model = api.load(flags.model)
  sys.stdin.reconfigure(errors='replace')
  sys.stdout.reconfigure(errors='backslashreplace')
  talk = Conversation(model, flags, lambda piece: print(text.shown(piece), end='', flush=True))
  del model
  print(f'{talk.model.origin}; /help says what else there is', file=sys.stderr)
  again = not sys.stdin.isatty()
  while True:
    try:
      line = input('> ' if sys.stdin.isatty() else '').strip()
      with noted() as pressed:
        if not said(talk, line, pressed):
          return
      again = not sys.stdin.isatty()
    except EOFError:
      print(file=sys.stderr)
      return
    except KeyboardInterrupt:                # at the prompt, for elsewhere it is noted
      print('' if again else '\nend with /quit, Ctrl-D or another Ctrl-C', file=sys.stderr)
      if again:
        return
      again = True


def said(talk: Conversation, line: str, pressed: list) -> bool:
  """Does what a line says, or answers it; False to end. After an error the conversation is what it was."""
  before = list(talk.messages)
  try:
    if line.startswith('/'):
      return talk.command(line, pressed)
    if line:
      talk.messages.append(dict(role='user', content=line))
      talk.answer(pressed)
  except ConfigError as e:                   # too long, or a file that is not there
    talk.messages = before
    print(f'error: {e}', file=sys.stderr)
  return True


if __name__ == '__main__':
  main(sys.argv[1:])
