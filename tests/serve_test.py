"""The server as its clients meet it: a real process on 127.0.0.1 and OpenAI's client in strict validation."""
import asyncio
import json
import signal
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import serving
from serving import HELLO, client, error, local, model, post, server  # noqa: F401

from llm_jax.generate import chat

# What it is for -------------------------------------------------------------------------------------------------------

def test_chat_is_what_the_model_itself_says(client, local):
  ids = chat.encode(local.tokenizer, local.chat_template, HELLO)
  expected, = local.generate([ids], max_tokens=20)
  answer = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=20, temperature=0, logprobs=True,
                                          top_logprobs=3, n=2)
  assert [c.message.content for c in answer.choices] == [expected] * 2
  assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 40
  content = answer.choices[0].logprobs.content
  assert len(content) == 20 and content[0].top_logprobs[0].logprob == max(t.logprob for t in content[0].top_logprobs)
  assert bytes(b for entry in content for b in entry.bytes).decode('utf-8', 'replace').startswith(expected[:5])


def test_a_stream_is_the_whole_in_pieces_S19(client):
  """Random bytes: characters split over tokens. No U+FFFD that the whole has not; stop strings never show."""
  ask = dict(model='tiny', messages=HELLO, max_tokens=60, temperature=1.5, seed=3)
  whole = client.chat.completions.create(**ask)
  events = list(client.chat.completions.create(**ask, stream=True, stream_options=dict(include_usage=True)))
  text = ''.join(e.choices[0].delta.content or '' for e in events if e.choices)
  assert text == whole.choices[0].message.content and events[-1].usage == whole.usage.model_copy(
      update=dict(prompt_tokens_details=events[-1].usage.prompt_tokens_details))
  stop = text[12:14]
  events = list(client.chat.completions.create(**ask, stream=True, stop=[stop]))
  assert ''.join(e.choices[0].delta.content or '' for e in events) == text[:text.index(stop)]
  assert [e.choices[0].finish_reason for e in events][-1] == 'stop'


def test_completions_by_text_and_ids_with_echo_and_scores(client, local):
  ids = local.tokenizer.encode('hello').tolist()
  answer = client.completions.create(model='tiny', prompt=['hello', 'you there'], max_tokens=4, temperature=0,
                                     logprobs=2, echo=True, n=1)
  by_ids = client.completions.create(model='tiny', prompt=ids, max_tokens=4, temperature=0, logprobs=2, echo=True)
  assert answer.choices[0].text.startswith('hello') and by_ids.choices[0].text == answer.choices[0].text
  scored = client.completions.create(model='tiny', prompt=ids, max_tokens=0, logprobs=1, echo=True).choices[0]
  assert scored.text == 'hello' and len(scored.logprobs.token_logprobs) == 5
  logits = np.asarray(local.logits([ids]))[0].astype(np.float64)
  logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  expected = [logp[i, t] for i, t in enumerate(ids[1:])]
  np.testing.assert_allclose(scored.logprobs.token_logprobs[1:], expected, atol=1e-4)
  np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs[1:5], expected, atol=1e-4)
  assert len(answer.choices[0].logprobs.tokens) == 9 and answer.choices[0].logprobs.text_offset[5] == 5


def test_a_schema_is_followed(client):
  schema = dict(type='object', properties=dict(a=dict(type='integer'), b=dict(enum=['x', 'y'])), required=['a', 'b'],
                additionalProperties=False)
  for seed in range(3):
    answer = client.chat.completions.create(
        model='tiny', messages=HELLO, temperature=1.0, seed=seed, max_tokens=200,
        response_format=dict(type='json_schema', json_schema=dict(name='s', schema=schema)))
    if answer.choices[0].finish_reason == 'stop':                    # a random model may fill its length with digits
      found = json.loads(answer.choices[0].message.content)
      assert type(found['a']) is int and found['b'] in ('x', 'y')
  regex = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=30,
                                         extra_body=dict(guided_regex='(yes|no)!'))
  assert regex.choices[0].message.content in ('yes!', 'no!') and regex.choices[0].finish_reason == 'stop'


def test_the_other_routes(client, server, local):
  assert [m.id for m in client.models.list()] == ['tiny'] and client.models.retrieve('tiny').id == 'tiny'
  found = client.embeddings.create(model='tiny', input=['a', 'b'], encoding_format='float').data
  assert len(found) == 2 and abs(sum(x * x for x in found[0].embedding) - 1) < 1e-4
  ids = post(server, '/tokenize', dict(prompt='hi<|im_end|>')).json()
  assert ids['tokens'] == local.tokenizer.encode('hi<|im_end|>').tolist() and ids['count'] == len(ids['tokens'])
  assert post(server, '/detokenize', dict(tokens=ids['tokens'])).json()['prompt'] == 'hi<|im_end|>'
  info = httpx.get(server[0] + '/tokenizer_info').json()
  assert info['eos_token'] == '<|im_end|>' and info['max_model_len'] == 256
  assert httpx.get(server[0] + '/ready').status_code == 200
  assert 'llm_jax_tokens_total' in httpx.get(server[0] + '/metrics').text
  document = httpx.get(server[0] + '/openapi.json').json()
  assert document['openapi'] == '3.1.0' and '/v1/chat/completions' in document['paths']


# Processes -----------------------------------------------------------------------------------------------------------

def test_S9_a_signal_drains_and_leaves_no_process(model, tmp_path):
  env = dict(XDG_CACHE_HOME=str(tmp_path))
  with serving.serve(model, '--slots=2', '--length=128', '--no_warm_up', env=env) as (process, address, _):
    found = []
    ask = dict(prompt='x', max_tokens=100, temperature=1.0)
    send = lambda: found.append(httpx.post(f'{address}/v1/completions', json=ask, timeout=60))
    thread = threading.Thread(target=send)
    thread.start()
    while not found and 'llm_jax_running 1.0' not in httpx.get(f'{address}/metrics').text:
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert found[0].status_code == 200 and len(found[0].json()['choices'][0]['text']) > 0
    assert process.wait(20) in (0, -signal.SIGTERM)
  with pytest.raises(httpx.HTTPError):
    httpx.get(f'{address}/health', timeout=2)


def test_S10_keys(model, tmp_path):
  env = dict(XDG_CACHE_HOME=str(tmp_path), LLM_JAX_API_KEY='right,second')
  with serving.serve(model, '--slots=1', '--length=128', '--no_warm_up', env=env) as (_, address, lines):
    for path in ('/v1/models', '/metrics', '/tokenizer_info'):
      for headers in ({}, dict(authorization='Bearer wrong'), dict(authorization='right'), dict(authorization='x')):
        error(httpx.get(address + path, headers=headers), 401)
      for key in ('right', 'second'):
        assert httpx.get(address + path, headers=dict(authorization=f'Bearer {key}')).status_code == 200
    assert httpx.get(address + '/health').status_code == 200
    assert error(httpx.post(address + '/v1/completions', json=dict(prompt='x')), 401)['code'] == 'invalid_api_key'
    assert not any('right' in line for line in lines)


BROKEN = """
from llm_jax.generate import engine
step, count = engine.Engine.step, [0]
def breaking(self):
  count[0] += self.active > 0
  if count[0] > 3:
    raise RuntimeError('the device is gone')
  return step(self)
engine.Engine.step = breaking
"""


def test_S8_S20_a_dead_engine_is_told_to_all(model, tmp_path):
  """In a stream by an event on which the client raises; /health says so; what comes later gets 503."""
  env = dict(XDG_CACHE_HOME=str(tmp_path))
  with serving.serve(model, '--slots=1', '--length=128', '--no_warm_up', code=BROKEN, env=env) as (_, address, _):
    c = openai.OpenAI(base_url=f'{address}/v1', api_key='none', max_retries=0, timeout=60)
    with pytest.raises(openai.APIError, match='the engine has stopped'):
      for _ in c.completions.create(model='tiny', prompt='x', max_tokens=100, stream=True):
        pass
    assert httpx.get(f'{address}/health').status_code == 503
    with pytest.raises(openai.APIStatusError) as e:
      c.completions.create(model='tiny', prompt='x', max_tokens=3)
    assert e.value.status_code == 503


@pytest.mark.slow
def test_memory_stays_flat_over_2000_requests(model, tmp_path):
  env = dict(XDG_CACHE_HOME=str(tmp_path))
  with serving.serve(model, '--slots=4', '--queue=64', '--length=128', env=env) as (process, address, _):
    def resident():
      lines = open(f'/proc/{process.pid}/status').read().splitlines()
      return int(next(line for line in lines if line.startswith('VmRSS')).split()[1]) / 1024

    async def many(first, n):
      async with httpx.AsyncClient(base_url=address, timeout=60) as c:
        gate = asyncio.Semaphore(16)
        async def ask(i):
          async with gate:
            body = dict(prompt=f'{i} ' * (i % 15 + 1), max_tokens=i % 20 + 1, temperature=1.0, stream=i % 3 == 0)
            return (await c.post('/v1/completions', json=body)).status_code
        return await asyncio.gather(*(ask(i) for i in range(first, first + n)))
    assert set(asyncio.run(many(0, 500))) == {200}
    before = resident()
    assert set(asyncio.run(many(500, 2000))) == {200}
    print(f'{before:.0f} MB after 500 requests, {resident():.0f} MB after 2,500')
    assert resident() < before + 45


# Oversight ------------------------------------------------------------------------------------------------------------

HOOK = """
import sys, types
module = types.ModuleType('hook')
def look(kind, text):
  if text == 'fail':
    raise ValueError
  if kind == 'prompt':
    return 'that word' if 'forbidden' in text else ''
  return 'too long' if len(text) > 20 else None
module.look = look
sys.modules['hook'] = module
"""


def test_a_hook_sees_prompts_and_outputs_and_the_log_has_no_text(model, tmp_path):
  env, log = dict(XDG_CACHE_HOME=str(tmp_path), LLM_JAX_API_KEY='k'), tmp_path / 'log.jsonl'
  with serving.serve(model, '--slots=1', '--length=128', '--no_warm_up', '--moderate=hook:look', f'--log={log}',
                     code=HOOK, env=env) as (_, address, _):
    c = openai.OpenAI(base_url=f'{address}/v1', api_key='k', max_retries=0, timeout=60)
    for prompt in ('forbidden', 'fail'):
      with pytest.raises(openai.BadRequestError) as e:
        c.completions.create(model='tiny', prompt=prompt, max_tokens=3)
      assert e.value.code == 'content_policy_violation'
    with pytest.raises(openai.BadRequestError):
      c.chat.completions.create(model='tiny', messages=[dict(role='user', content='a forbidden word')])
    short = c.completions.create(model='tiny', prompt='secret', max_tokens=5, temperature=0)
    again = c.completions.create(model='tiny', prompt='secret', max_tokens=5, temperature=0)
    long = c.completions.create(model='tiny', prompt='secret', max_tokens=100, temperature=0)
    assert short.choices[0].finish_reason == 'length' and long.choices[0].finish_reason == 'content_filter'
    assert len(long.choices[0].text) <= 20 and short.choices[0].text == again.choices[0].text
    events = list(c.completions.create(model='tiny', prompt='secret', max_tokens=100, temperature=0, stream=True))
    assert events[-1].choices[0].finish_reason == 'content_filter'
    assert len(''.join(e.choices[0].text for e in events)) <= 20
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  assert [row['status'] for row in rows] == [400, 400, 400, 200, 200, 200, 200]
  assert 'secret' not in log.read_text() and rows[3]['prompts'] == rows[4]['prompts'] != []
  assert rows[3]['outputs'] == rows[4]['outputs'] and rows[3]['tokens'] == [5]
  assert rows[5]['reasons'] == ['content_filter']
  assert log.stat().st_mode & 0o077 == 0


def test_S15_a_logged_text_is_one_line(model, tmp_path):
  env, log = dict(XDG_CACHE_HOME=str(tmp_path)), tmp_path / 'log.jsonl'
  with serving.serve(model, '--slots=1', '--length=128', '--no_warm_up', '--log_text', f'--log={log}', env=env) as (
      _, address, _):
    text = 'a\r\nb\x1b[31m\u2028c'
    assert httpx.post(f'{address}/v1/completions', json=dict(prompt=text, max_tokens=2), timeout=60).status_code == 200
  data = log.read_bytes()
  assert data.count(b'\n') == 1 and b'\r' not in data and b'\x1b' not in data
  assert json.loads(data)['prompts'] == [text]


def test_a_watermark_is_found_in_what_the_server_made(model, tmp_path, capsys):
  from llm_jax.generate import watermark
  (tmp_path / 'key').write_text('0123456789abcdef0123')
  with serving.serve(model, '--slots=1', '--length=256', '--no_warm_up', '--watermark=green',
                     f'--watermark_key={tmp_path / "key"}', env=dict(XDG_CACHE_HOME=str(tmp_path))) as (_, address, _):
    ask = dict(prompt='x', max_tokens=200, temperature=1.0, seed=1, n=4, frequency_penalty=2.0,
               guided_regex='[a-z ]{180}')                    # this model would say the same few bytes for ever
    choices = httpx.post(f'{address}/v1/completions', json=ask, timeout=90).json()['choices']
    text = ''.join(choice['text'] for choice in choices)
  (tmp_path / 'text').write_text(text)
  watermark.main([f'--model={model}', '--kind=green', f'--key_file={tmp_path / "key"}', str(tmp_path / 'text')])
  assert ': marked' in capsys.readouterr().out
