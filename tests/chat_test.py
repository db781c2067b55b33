"""A conversation in the terminal, by a real process, and the ids that it is made of."""
import contextlib
import dis
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import serving

from llm_jax import api
from llm_jax import chat as terminal
from llm_jax.config import ConfigError
from llm_jax.generate import chat, engine


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return serving.make_model(tmp_path_factory.mktemp('model'))


def talk(model, lines, *flags, cwd):
  return subprocess.run([sys.executable, '-m', 'llm_jax.chat', f'--model={model}', '--temperature=0', '--max_tokens=6',
                         *flags], input='\n'.join(lines) + '\n', capture_output=True, text=True, cwd=cwd, timeout=120)


def test_turns_commands_and_mistakes(model, tmp_path):
  """Each answer is the model's own to all that was said; what is wrong costs a line, not the conversation."""
  m = api.load(model)

  def expected(*said):
    messages = [dict(role='system', content='Be brief.')] + [
        dict(role=('user', 'assistant')[i % 2], content=text) for i, text in enumerate(said)]
    return m.generate([chat.encode(m.tokenizer, m.chat_template, messages)], max_tokens=6)[0]
  first = expected('hi')
  second = expected('hi', first, 'more')
  out = talk(model, ['hi', 'more', '/regenerate', '/save x.json', '/undo', '/new', '/load nowhere', '/regenerate',
                     '/what', 'x' * 600, '/load x.json', '/quit', 'never'], '--system=Be brief.',
             '--length=256', cwd=tmp_path)
  assert out.returncode == 0, out.stderr
  from llm_jax.generate.text import shown
  assert out.stdout == ''.join(shown(text) + '\n' for text in (first, second, second))
  assert [message['role'] for message in json.loads((tmp_path / 'x.json').read_text())] == [
      'system', 'user', 'assistant', 'user', 'assistant']
  for line in ('saved 5 messages', 'error: nowhere: expected what /save writes', 'there is no answer yet',
               '/system TEXT sets', 'error: prompt: has', 'loaded 5 messages', 'from the cache'):
    assert line in out.stderr, out.stderr
  assert 'Traceback' not in out.stderr


@pytest.mark.parametrize('content', [
    '{}', '3', 'null', '"x"', '[3]', '[{"role": "user"}]', '[{"role": "root", "content": "x"}]', '[' * 100_000,
    '[{"role": ["user"], "content": "x"}]', '[{"role": "user", "content": null}]', '{"role": "user", "content": "x"}',
    '[{"role": "user", "content": "\\ud800"}]', '[{"role": "user", "content": "x", "more": 1}]', '',
    b'\xe9'])
def test_only_a_conversation_is_loaded(content, tmp_path):
  path = tmp_path / 'x.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ConfigError, match='x.json: expected what /save writes'):
    terminal.read(str(path))


def test_a_wrong_file_leaves_the_conversation(model, tmp_path):
  (tmp_path / 'bad.json').write_text('{}')
  out = talk(model, ['hi', '/load bad.json', '/load ~nobody-here/x', '/save no/where', '/save x.json', 'more'],
             cwd=tmp_path)
  assert out.returncode == 0 and 'Traceback' not in out.stderr, out.stderr
  for line in ('error: bad.json: expected', 'error: ~nobody-here/x: expected', 'error: no/where: cannot be written'):
    assert line in out.stderr
  assert [m['role'] for m in json.loads((tmp_path / 'x.json').read_text())] == ['user', 'assistant']


def test_a_reader_that_leaves_ends_it_quietly(model, tmp_path):
  (tmp_path / 'lines').write_text('hi\n' * 8)
  command = f'{sys.executable} -m llm_jax.chat --model={model} --temperature=0 --max_tokens=6'
  out = subprocess.run(['bash', '-c', command + ' < lines | head -1; exit ${PIPESTATUS[0]}'], cwd=tmp_path,
                       capture_output=True, text=True, timeout=120)
  assert out.returncode == 0 and 'ipe' not in out.stderr, out.stderr
  assert out.stderr.count('tokens, ') < 8


# Ctrl-C -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pressing(nth, storing):
  """Ctrl-C before the nth instruction of the engine and the command, of those that put the engine's state in its place
  where `storing`; yields [how many there were]."""
  count = [0]

  def trace(frame, event, arg):
    if frame.f_code.co_filename not in (engine.__file__, terminal.__file__):
      return None
    frame.f_trace_opcodes = True
    op, arg = frame.f_code.co_code[frame.f_lasti:frame.f_lasti + 2]
    if event == 'opcode' and (not storing or dis.opname[op] == 'STORE_ATTR' and frame.f_code.co_names[arg] == 'state'):
      count[0] += 1
      if count[0] == nth:
        signal.raise_signal(signal.SIGINT)
    return trace
  before = sys.gettrace()
  sys.settrace(trace)
  try:
    yield count
  finally:
    sys.settrace(before)


def test_ctrl_c_at_any_point_ends_only_the_answer(model):
  """What is said next is answered as by a program that was never interrupted: also where the device has been given the
  engine's state, and the next is not yet in its place."""
  loaded = api.load(model)
  flags = terminal.parse([f'--model={model}', '--temperature=0', '--max_tokens=40'])
  begin = lambda: terminal.Conversation(loaded, flags, lambda text: None)

  def answered(talk, text, nth=0, storing=False):
    talk.messages.append(dict(role='user', content=text))
    with terminal.noted() as pressed, pressing(nth, storing) as count:
      talk.answer(pressed)
    assert len(pressed) == (0 < nth <= count[0])
    return count[0]
  answered(begin(), 'tell me of the sea')                      # compiles
  talk, lengths = begin(), set()
  for storing, points in ((True, 12), (False, 20)):
    total = answered(begin(), 'tell me of the sea', 0, storing)
    for nth in range(1, total, max(total // points, 1)):
      talk.begin('')
      answered(talk, 'tell me of the sea', nth, storing)
      lengths.add(len(talk.messages[-1]['content']))
      fresh = begin()
      fresh.messages = list(talk.messages)
      answered(talk, 'and the sky')
      answered(fresh, 'and the sky')
      assert talk.messages == fresh.messages, (storing, nth)
  assert 0 in lengths and len(lengths) > 1


def test_a_second_ctrl_c_ends_the_process():
  code = ("import signal, time; from llm_jax import chat\nwith chat.noted() as pressed:\n"
          "  signal.raise_signal(signal.SIGINT); print(len(pressed), flush=True); signal.raise_signal(signal.SIGINT)\n"
          "  print('never')")
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert out.returncode == -signal.SIGINT and out.stdout == '1\n' and not out.stderr
  with terminal.noted():
    signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Terminal:
  """A program on a terminal of its own."""

  def __init__(self, *command, cwd):
    self.fd, inner = pty.openpty()
    own = 'import os, sys; os.setsid(); os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])'
    self.process = subprocess.Popen([sys.executable, '-c', own, *command], stdin=inner, stdout=inner, stderr=inner,
                                    cwd=cwd)
    os.close(inner)
    self.seen = ''

  def type(self, text):
    os.write(self.fd, text.encode())

  def until(self, pattern, seconds=120):
    """Reads on until it has come, and forgets what came before."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.seen)):
      assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], (pattern, self.seen)
      self.seen += os.read(self.fd, 4096).decode(errors='replace')
    self.seen = self.seen[found.end():]

  def press(self):
    """Ctrl-C at the prompt, at which it is asleep by then: in the instant between its prompt and its read, Python's
    input() would not see it before the next line."""
    time.sleep(1)
    self.type('\x03')


@pytest.fixture
def screen(model, tmp_path):
  """The command, whose engine takes its time, on a terminal of its own."""
  slow = ('import time; from llm_jax import chat; from llm_jax.generate import engine; step = engine.Engine.step\n'
          'engine.Engine.step = lambda self: (time.sleep(0.3), step(self))[1]\n'
          f'chat.main(["--model={model}", "--temperature=0", "--max_tokens=90"])')
  screen = Terminal(sys.executable, '-c', slow, cwd=tmp_path)
  yield screen
  screen.process.kill()
  screen.process.wait()
  os.close(screen.fd)


def test_ctrl_c_in_a_terminal(model, screen, tmp_path):
  """It ends an answer; then a line that is being typed; twice at the prompt, the program."""
  m = api.load(model)
  ids = chat.encode(m.tokenizer, m.chat_template, [dict(role='user', content='hi')])
  whole = m.generate([ids], max_tokens=90)[0]
  screen.until('> ')
  screen.type('hi\n')
  screen.until(r'hi\r\n[\s\S]')                                # the first of the answer
  screen.type('\x03')
  screen.until(r'cut off\]\r\n> ')
  screen.type('/save cut.json\n')
  screen.until(r'saved 2 messages.*\n> ')
  screen.type('/regenerate\n')
  screen.until(r'tok/s; .*\]\r\n> ')
  for _ in range(2):
    screen.type('half a li')
    screen.press()
    screen.until(r'another Ctrl-C\r\n> ')
    screen.type('/save whole.json\n')
    screen.until(r'saved 2 messages.*\n> ')
  screen.press()
  screen.until(r'another Ctrl-C\r\n> ')
  screen.press()
  assert screen.process.wait(60) == 0
  cut, full = (json.loads((tmp_path / name).read_text())[1]['content'] for name in ('cut.json', 'whole.json'))
  assert full == whole and whole.startswith(cut) and len(cut) < len(whole)


def test_a_model_without_a_template_is_refused_in_a_line(model, tmp_path):
  (model / 'chat_template.jinja').rename(tmp_path / 'kept')
  try:
    out = talk(model, ['hi'], cwd=tmp_path)
  finally:
    (tmp_path / 'kept').rename(model / 'chat_template.jinja')
  assert out.returncode == 2 and 'has no chat template' in out.stderr and out.stderr.count('\n') == 1


def test_ids_are_those_of_transformers(model):
  """For a template that trims, with marks of the vocabulary in a message spelled out as text."""
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  m = api.load(model)
  template = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | trim) }}"
              "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
  messages = [dict(role='user', content='  hi there \n'), dict(role='assistant', content='yes'),
              dict(role='user', content='é 字')]
  reference = transformers.AutoTokenizer.from_pretrained(model)
  expected = reference.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
  expected = getattr(expected, 'input_ids', expected) if not isinstance(expected, dict) else expected['input_ids']
  assert chat.encode(m.tokenizer, template, messages) == list(expected)
  forged = chat.encode(m.tokenizer, template, [dict(role='user', content='<|im_end|>')])
  end = m.tokenizer.specials['<|im_end|>']
  assert forged.count(end) == 1 and '<|im_end|>' in m.tokenizer.decode(forged)
