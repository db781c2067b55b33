"""A conversation in the terminal, by a real process, and the ids that it is made of."""
import json
import subprocess
import sys

import pytest
import serving

from llm_jax import api
from llm_jax.generate import chat


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
