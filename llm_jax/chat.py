"""Talks with a model in the terminal: python -m llm_jax.chat --model=PATH [--system='You are brief.']

Lines that begin with / are commands: /system TEXT sets what the model is told first and begins again, /regenerate asks
for another answer, /undo takes the last turn back, /save FILE and /load FILE keep the conversation, /new begins again,
/help, /quit (or Ctrl-D). Ctrl-C ends an answer.
"""
import json
import pathlib
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
  return parser.parse_args(args)


class Conversation:
  """What was said, and the engine, whose cache keeps it: a turn reads only what is new."""

  def __init__(self, model, flags, write):
    from llm_jax.generate import engine
    if not model.chat_template:
      raise ConfigError(f'--model: {flags.model} has no chat template; continue texts with llm_jax.sample')
    self.model, self.flags, self.write, self.turn = model, flags, write, 0
    self.engine = engine.Engine(model.shape, model.params, slots=1, length=flags.length,
                                vocab_size=model.tokenizer.vocab_size, ahead=0,
                                stops=engine.bucket(len(model.tokenizer.stop_ids), 8))
    self.begin(flags.system)

  def begin(self, system: str) -> None:
    self.messages = [dict(role='system', content=system)] if system else []

  def answer(self) -> None:
    """Streams the model's turn; Ctrl-C ends it there."""
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
      self.engine.run()
    except KeyboardInterrupt:
      self.engine.cancel(request)
    self.write(stream.finish(request.reason) + '\n')
    self.messages.append(dict(role='assistant', content=stream.text))
    speed = (len(request.tokens) - 1) / request.seconds if request.seconds else 0.0
    print(f'[{len(request.tokens)} tokens, {speed:,.0f} tok/s; {request.cached} of {len(ids)} from the cache'
          f'{", cut off" if request.reason != "stop" else ""}]', file=sys.stderr)

  def take_back(self, roles: tuple[str, ...]) -> bool:
    """Removes the messages at the end that are of these roles."""
    before = len(self.messages)
    while self.messages and self.messages[-1]['role'] in roles:
      self.messages.pop()
    return len(self.messages) < before

  def command(self, line: str) -> bool:
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
        self.answer()
      else:
        print('there is no answer yet', file=sys.stderr)
    elif name == '/undo':
      self.take_back(('assistant',))
      self.take_back(('user',))
    elif name == '/save' and rest:
      pathlib.Path(rest).expanduser().write_text(json.dumps(self.messages, indent=1, ensure_ascii=False))
      print(f'saved {len(self.messages)} messages in {rest}', file=sys.stderr)
    elif name == '/load' and rest:
      self.messages = read(pathlib.Path(rest).expanduser())
      print(f'loaded {len(self.messages)} messages', file=sys.stderr)
    else:
      print(__doc__.partition('\n\n')[2].strip(), file=sys.stderr)
    return True


def read(path: pathlib.Path) -> list[dict]:
  """The messages that /save wrote."""
  try:
    found = json.loads(path.read_text())
    assert all(m.keys() == {'role', 'content'} and isinstance(m['content'], str) for m in found)
  except (OSError, ValueError, AssertionError, AttributeError, TypeError) as e:
    raise ConfigError(f'{path}: expected what /save writes ({e})') from e
  return found


def main(args: list[str]) -> None:
  with config_lib.one_line_errors('--debug' in args):
    run(parse(args))


def run(flags) -> None:
  from llm_jax import api, hardware
  from llm_jax.data import store
  from llm_jax.generate import text
  hardware.keep_programs(store.cache_folder(config_lib.Data()))
  model = api.load(flags.model)
  sys.stdout.reconfigure(errors='backslashreplace')
  talk = Conversation(model, flags, lambda piece: print(text.shown(piece), end='', flush=True))
  print(f'{model.origin}; /help says what else there is', file=sys.stderr)
  while True:
    try:
      line = input('> ' if sys.stdin.isatty() else '').strip()
    except (EOFError, KeyboardInterrupt):
      print(file=sys.stderr)
      return
    try:
      if line.startswith('/'):
        if not talk.command(line):
          return
      elif line:
        talk.messages.append(dict(role='user', content=line))
        talk.answer()
    except ConfigError as e:                 # too long, or a file that is not there: the conversation goes on
      talk.take_back(('user',))
      print(f'error: {e}', file=sys.stderr)
    except OSError as e:
      print(f'error: {e.filename}: {e.strerror}', file=sys.stderr)


if __name__ == '__main__':
  main(sys.argv[1:])
