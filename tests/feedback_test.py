"""What people think of answers: kept whatever is in it, without secrets, bounded, and read again for tuning."""
import json
import subprocess
import sys
import threading
import time

import pytest

from llm_jax.config import ConfigError
from llm_jax.serve import feedback

ASKED = [dict(role='user', content='hi')]


def row(name, rating=1, answer='yes', **more):
  return dict(id=name, rating=rating, comment='', messages=ASKED, answer=answer, model='m') | more


@pytest.fixture
def kept(tmp_path):
  return feedback.Feedback(tmp_path / 'new/feedback.jsonl')


def test_any_text_is_kept_and_read_again(kept):
  """Characters at which Python ends lines, half a surrogate pair, and what an older version wrote."""
  odd = 'a\u2028b\u2029c\x85d\x1ce\x1df\x1eg\x0bh\x0ci\rj\nk\ud800l\x00m'
  kept.add(row('1', answer=odd, comment=odd, messages=[dict(role='user', content=odd)]))
  with open(kept.path, 'a', encoding='utf-8') as f:
    f.write(json.dumps(row('2', 1.0, answer='old\u2028\x85', comment=None), ensure_ascii=False) + '\n')
  kept.add(row('3'))
  first, second, third = kept.rows()
  assert first['answer'] == first['comment'] == first['messages'][0]['content'] == odd
  assert second['answer'] == 'old\u2028\x85' and second['rating'] == 1 and third['id'] == '3'
  assert kept.delete('3') and not kept.delete('3') and kept.rows() == [first, second]
  assert kept.path.stat().st_mode & 0o777 == 0o600


def test_a_later_rating_counts_and_costs_no_more(kept):
  kept.add(row('1'))
  kept.add(row('2'))
  before = kept.path.read_bytes()
  kept.add(row('1', -1, answer='no'))
  assert kept.path.read_bytes().startswith(before)            # it is not written anew
  assert [(r['id'], r['rating'], r['answer']) for r in kept.rows()] == [('2', 1, 'yes'), ('1', -1, 'no')]
  assert kept.delete('1') and [r['id'] for r in kept.rows()] == ['2']
  assert kept.path.read_bytes().count(b'\n') == 1             # the superseded line went with it


def test_several_write_at_once(kept):
  threads = [threading.Thread(target=lambda i=i: [kept.add(row(f'{i} {j}', comment='x' * 9999)) for j in range(20)])
             for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(kept.rows()) == 80


def test_the_file_is_bounded(kept, monkeypatch):
  monkeypatch.setattr(feedback, 'LARGEST', 1000)
  with pytest.raises(ConfigError, match='the file is full .* move it away'):
    for i in range(100):
      kept.add(row(str(i)))
  assert 2 < len(kept.rows()) < 10 and kept.path.stat().st_size <= 1000


@pytest.mark.parametrize('cut', [1, 20, -2])
def test_a_line_cut_short_is_dropped(kept, cut):
  kept.add(row('1'))
  line = feedback.written(row('2'))
  with open(kept.path, 'ab') as f:
    f.write(line[:cut])
  assert [r['id'] for r in kept.rows()] == ['1']
  kept.add(row('3'))
  assert [r['id'] for r in kept.rows()] == ['1', '3']


def test_a_last_line_without_an_end_is_kept_and_what_is_no_row_is_named(kept, capsys):
  kept.path.parent.mkdir()
  kept.path.write_bytes(feedback.written(row('1'))[:-1])
  kept.add(row('2'))
  assert [r['id'] for r in kept.rows()] == ['1', '2']
  for bad in ('3', '{}', 'notes', '[' * 100_000, json.dumps(row('1', True) | dict(id=3)), json.dumps(row('1', 2))):
    kept.path.write_text(json.dumps(row('1')) + '\n\n' + bad + '\n')
    with pytest.raises(SystemExit):
      feedback.main([str(kept.path), 'list'])
    assert 'line 3 is not a rated answer' in capsys.readouterr().err
  kept.path.write_text('my notes\nwithout an end')
  kept.add(row('1'))
  assert kept.path.read_text().startswith('my notes\nwithout an end\n{')      # not ours: nothing is cut off


KEY = '-----BEGIN RSA PRIVATE KEY-----\nhunter2\nhunter2=\n-----END RSA PRIVATE KEY-----'


@pytest.mark.parametrize('text,left', [
    ('my password: hunter2 it is', 'my password: [redacted] it is'), ('api_key=12345', 'api_key=[redacted]'),
    ('{"password": "hunter2", "user": "x"}', '{"password": "[redacted]", "user": "x"}'),
    ('{"password": "hun\\"ter2"}', '{"password": "[redacted]"}'),
    (r'"{\"password\": \"hunter 2\"}"', r'"{\"password\": \"[redacted]\"}"'),
    ("{'db_password' : 'hunter 2'}", "{'db_password' : '[redacted]'}"),
    ('os.environ["DB_PASSWORD"] = "hunter2"', 'os.environ["DB_PASSWORD"] = "[redacted]"'),
    ('password = """hunter2"""', 'password = """[redacted]"""'), ('PASSWD := hunter2', 'PASSWD := [redacted]'),
    ('**Password:** hunter2', '**Password:** [redacted]'), ('password => hunter2', 'password => [redacted]'),
    ('the passphrase is hunter2', 'the passphrase is [redacted]'),
    ('Authorization: Bearer abc123def456', 'Authorization: Bearer [redacted]'),
    ('"Authorization": "Basic aHVudGVyOjI="', '"Authorization": "Basic [redacted]"'),
    ('authorization: token abc', 'authorization: token [redacted]'),
    ("-H 'bearer abc123def456'", "-H 'bearer [redacted]'"),
    ('AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPx', 'AWS_SECRET_ACCESS_KEY=[redacted]'),
    ('export CLIENT_SECRET=abc', 'export CLIENT_SECRET=[redacted]'), ('X-Api-Key: abcd', 'X-Api-Key: [redacted]'),
    ('token: abc123', 'token: [redacted]'), ('"access_token": "abcdefghijklmnopqrst"', '"access_token": "[redacted]"'),
    ('GITHUB_TOKEN=ab12cd34', 'GITHUB_TOKEN=[redacted]'), ('secret = s3cr3t!', 'secret = [redacted]'),
    ('see AKIAIOSFODNN7EXAMPLE.', 'see [redacted].'), ('sk-abcdefghijklmnop', '[redacted]'),
    ('sk-proj-ab_cd-ef12-gh', '[redacted]'), ('ghp_abcdefghijklmnopqrstuvwxyz0123456789', '[redacted]'),
    ('github_pat_11ABCDEFG0abcdefghij_klmnopqrst', '[redacted]'), ('hf_abcdefghijklmnopqrstuvwxyz', '[redacted]'),
    ('xoxb-123456789012-abcdef', '[redacted]'), ('AIza' + 'a' * 35, '[redacted]'),
    ('a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN b', 'a [redacted] b'),
    (f'see {KEY}.', 'see [redacted].'), (f'private_key: {KEY}.', 'private_key: [redacted].'),
    (f'private_key="""{KEY}"""', 'private_key="""[redacted]"""'), (KEY[:50], '[redacted]'),
    ('pay 4111 1111 1111 1111 now', 'pay [redacted] now'), ('4111111111111111', '[redacted]'),
    ('3782-822463-10005', '[redacted]'), ('postgres://me:hunter2@db/x', 'postgres://[redacted]@db/x')])
def test_secrets_are_replaced(kept, text, left):
  assert feedback.redacted(text) == left and feedback.redacted(left) == left
  kept.add(row('1', answer=text, comment=text, messages=[dict(role='user', content=[dict(type='text', text=text)])]))
  found, = kept.rows()
  assert found['answer'] == found['comment'] == found['messages'][0]['content'][0]['text'] == left


def test_a_value_is_replaced_by_its_key(kept):
  assert feedback.redacted([dict(arguments=dict(db_password='x', city='Rome', n=1, api_key=None))]) == [
      dict(arguments=dict(db_password='[redacted]', city='Rome', n=1, api_key=None))]
  kept.add(row('sk-abcdefghijklmnop'))
  assert kept.delete('sk-abcdefghijklmnop')                   # the name of an answer stays what it is


@pytest.mark.parametrize('text', [
    'The password is wrong, is it not?', 'How do I reset my password?', 'A token: a unit of text.', 'Secret: she left.',
    'def f(password: str, token: str = None):', 'max_tokens=100, "max_tokens": 4096', '{"token": "hello", "n": 12345}',
    'pad_token = tokenizer.eos_token', 'token = next_token(x2)', 'token = logits2[0]', "eos_token='<|im_end|>'",
    'from huggingface_hub import hf_hub_download', 'SELECT pk_user_name FROM t', 'the secretary: Anna', 'PWD=/home/x',
    '1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16', 'from 2024-01-02 to 2024-03-04', '1700000000000 ms', '3.1415926535897932',
    '2019 2020 2021 2022', 'https://example.com:8080/a@b?c=d', 'mail anna@example.com', 'Authorization is required.',
    'the bearer of this letter', 'the key: practice', 'task-oriented risk-averse-2020s', 'call +49 30 1234 5678',
    'é 字 \u2028 \ud800', '-----BEGIN CERTIFICATE-----', 'import secrets; secrets.token_hex(16)'])
def test_ordinary_text_stays(text):
  assert feedback.redacted(text) == text


@pytest.mark.parametrize('piece', [
    'password', 'password:', 'password="', 'sk-', 'eyJ-', 'eyJaaaaaaaaaa.', 'token=(', 'secret=a1(', 'bearer ', '://a',
    '-----BEGIN PRIVATE KEY-----', '-----BEGIN ', '4111 ', '://a:', 'a', '\\', 'password=\\"', 'authorization: ', 'a_'])
def test_no_text_takes_long(piece):
  start = time.perf_counter()
  feedback.redacted((piece * 100_000)[:100_000] + '(')
  assert time.perf_counter() - start < 5


def test_preferences_for_tuning(kept, capsys):
  other = [dict(role='user', content='bye')]
  for name, rating, answer, messages in [
      ('1', 1, 'a', ASKED), ('2', -1, 'b', ASKED), ('3', -1, 'a', ASKED), ('4', 1, 'c', other), ('5', 1, 'd', ASKED)]:
    kept.add(row(name, rating, answer, messages=messages))
  kept.add(row('5', -1, 'd'))
  assert list(feedback.preferences(kept.path))[1] == dict(messages=ASKED, answer='b', rating=-1)

  def exported(what):
    feedback.main([str(kept.path), 'export', what])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  turn = lambda text: [dict(role='assistant', content=text)]
  assert exported('pairs') == [dict(prompt=ASKED, chosen=turn('a'), rejected=turn(x)) for x in 'bd']
  assert exported('labels') == [dict(prompt=p, completion=turn(x), label=label) for p, x, label in [
      (ASKED, 'a', True), (ASKED, 'b', False), (ASKED, 'a', False), (other, 'c', True), (ASKED, 'd', False)]]


def test_the_command(kept, capsys):
  kept.add(row('a\x1b\ud800', 1, 'x\x1b[2J'))
  with open(kept.path, 'a') as f:
    f.write(json.dumps({k: v for k, v in row('b', -1.0).items() if k != 'comment'}) + '\n')
  feedback.main([str(kept.path), 'list'])
  first, second = capsys.readouterr().out.splitlines()
  assert first == r"a\x1b\ud800  +1  'x\x1b[2J'  ''" and second == "b  -1  'yes'  ''"
  feedback.main([str(kept.path), 'delete', r'a\x1b\ud800'])
  assert [r['id'] for r in kept.rows()] == ['b']
  for args, error in [(['delete', 'x'], 'x: nothing is said'), (['delete'], 'expected the id'),
                      (['export'], 'expected pairs or labels'), (['export', 'x'], 'expected pairs or labels')]:
    with pytest.raises(SystemExit):
      feedback.main([str(kept.path), *args])
    assert error in capsys.readouterr().err
  with pytest.raises(SystemExit):
    feedback.main([str(kept.path) + 'x', 'list'])
  assert 'no such file' in capsys.readouterr().err


def test_a_reader_that_leaves(kept):
  kept.path.parent.mkdir()
  kept.path.write_bytes(b''.join(feedback.written(row(str(i), answer='x' * 60)) for i in range(2000)))
  out = subprocess.run(f'{sys.executable} -m llm_jax.serve.feedback {kept.path} list | head -1', shell=True, text=True,
                       capture_output=True, timeout=60)
  assert out.stdout.startswith('0  +1') and not out.stderr
