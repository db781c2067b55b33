"""Functions that a model may call: offered by its template, and read out of what it says."""
import json

import hypothesis
import openai
import pytest
import serving
from hypothesis import strategies as st

from llm_jax.serve import tools

TEMPLATE = ("{% if tools %}{{ '<|im_start|>system\nTools, called as <tool_call>...</tool_call>:\n' + tools | tojson + "
            "'<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
            "{% for c in m.tool_calls or () %}{{ c.function.name + '(' + c.function.arguments.city + ')' }}{% endfor %}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WEATHER = dict(type='function', function=dict(name='weather', parameters=dict(
    type='object', properties=dict(city=dict(enum=['Rome', 'Oslo'])), required=['city'], additionalProperties=False)))
CLOCK = dict(type='function', function=dict(name='clock', parameters=dict(type='object', properties={},
                                                                          additionalProperties=False)))
CALL = '{"name": "f", "arguments": {"x": [1, "</x>"]}}'
SAID = dict(hermes=f'<tool_call>\n{CALL}\n</tool_call>', mistral=f'[TOOL_CALLS] [{CALL}]',
            llama=CALL.replace('arguments', 'parameters'))


def read(kind, text, cuts=(), **options):
  reader, shown = tools.Reader(kind, **options), ''
  for start, end in zip([0, *cuts], [*cuts, len(text)]):
    shown += reader.feed(text[start:end])
  shown += reader.finish()
  return shown, [(c['function']['name'], json.loads(c['function']['arguments'])) for c in reader.calls]


@pytest.mark.parametrize('kind', SAID)
@hypothesis.given(st.sets(st.integers(1, 60)))
@hypothesis.settings(max_examples=30, deadline=None)
def test_calls_are_found_wherever_the_stream_is_cut(kind, cuts):
  cuts = sorted(c for c in cuts if c < len(SAID[kind]))
  assert read(kind, SAID[kind], cuts) == ('', [('f', {'x': [1, '</x>']})])


@pytest.mark.parametrize('kind', SAID)
@hypothesis.given(st.text('<>{}[]tool_cal/"TOL:;af \n', max_size=30), st.sets(st.integers(1, 30)))
@hypothesis.settings(max_examples=100, deadline=None)
def test_all_that_is_no_call_is_text(kind, text, cuts):
  shown, calls = read(kind, text, sorted(c for c in cuts if c < len(text)))
  assert shown == text if not calls else kind == 'mistral'


def test_text_before_calls_and_several_of_them():
  two = f'Let me see.\n{SAID["hermes"]}\n{SAID["hermes"]}'
  assert read('hermes', two) == ('Let me see.\n', [('f', {'x': [1, '</x>']})] * 2)
  assert len(read('hermes', two, only_one=True)[1]) == 1
  assert read('hermes', 'so: <tool_call>{"name": "f"') == ('so: <tool_call>{"name": "f"', [])
  assert read('llama', 'The set {1, 2}') == ('The set {1, 2}', [])
  assert read(None, SAID['hermes']) == (SAID['hermes'], [])


def test_the_notation_is_the_templates():
  assert tools.notation(TEMPLATE) == 'hermes'
  assert tools.notation('{% if tools %}[AVAILABLE_TOOLS]...[TOOL_CALLS]') == 'mistral'
  assert tools.notation('{% if tools %}{"name": ..., "parameters": ...}') == 'llama'
  assert tools.notation(serving.TEMPLATE) is None is tools.notation(None)


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  model = serving.make_model(tmp_path_factory.mktemp('tools'), length=1024, template=TEMPLATE)
  with serving.serve(model, '--no_warm_up', '--length=1024') as (_, address, _):
    yield openai.OpenAI(base_url=f'{address}/v1', api_key='-', _strict_response_validation=True)


def ask(client, **more):
  return client.chat.completions.create(
      model='tiny', messages=[dict(role='user', content='weather?')], max_tokens=200, temperature=1.5,
      tools=[WEATHER, CLOCK], **more)


@pytest.mark.parametrize('seed', range(3))
def test_a_call_that_must_be_is_one_streamed_or_not(client, seed):
  whole = ask(client, tool_choice='required', seed=seed).choices[0]
  assert whole.finish_reason == 'tool_calls' and whole.message.content is None
  called = whole.message.tool_calls[0].function
  assert called.name in ('weather', 'clock')
  assert json.loads(called.arguments) in ([{'city': 'Rome'}, {'city': 'Oslo'}] if called.name == 'weather' else [{}])
  events = [e.choices[0] for e in ask(client, tool_choice='required', seed=seed, stream=True)]
  made = [c for e in events for c in e.delta.tool_calls or []]
  assert [(c.index, c.function.name, c.function.arguments) for c in made] == [(0, called.name, called.arguments)]
  assert events[-1].finish_reason == 'tool_calls' and not ''.join(e.delta.content or '' for e in events)


def test_one_function_alone_may_be_named(client):
  choice = dict(type='function', function=dict(name='clock'))
  for seed in range(3):
    assert ask(client, tool_choice=choice, seed=seed).choices[0].message.tool_calls[0].function.name == 'clock'


def test_a_model_that_calls_nothing_says_text(client):
  for choice in ('auto', 'none'):
    answer = ask(client, tool_choice=choice).choices[0]
    assert answer.message.tool_calls is None and answer.message.content


def test_what_was_called_goes_on_in_the_conversation(client):
  call = dict(id='123456789', type='function', function=dict(name='weather', arguments='{"city": "Rome"}'))
  answer = client.chat.completions.create(model='tiny', max_tokens=2, tools=[WEATHER], messages=[
      dict(role='user', content='weather?'), dict(role='assistant', tool_calls=[call]),
      dict(role='tool', tool_call_id='123456789', content='sunny')])
  assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize('more, param', [
    (dict(tool_choice='always'), 'tool_choice'),
    (dict(tool_choice=dict(type='function', function=dict(name='no'))), 'tool_choice'),
    (dict(tool_choice='required', response_format=dict(type='json_object')), 'tool_choice'),
    (dict(parallel_tool_calls=3), 'parallel_tool_calls')])
def test_wrong_wishes_are_named(client, more, param):
  with pytest.raises(openai.BadRequestError) as e:
    ask(client, extra_body=more)
  assert e.value.body['param'] == param


def test_calls_with_arguments_that_are_no_json_are_refused(client):
  call = dict(id='1', type='function', function=dict(name='weather', arguments='{city'))
  with pytest.raises(openai.BadRequestError, match=r'tool_calls\[0\].function.arguments'):
    client.chat.completions.create(model='tiny', messages=[dict(role='assistant', tool_calls=[call])])
