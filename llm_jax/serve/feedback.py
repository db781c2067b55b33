"""What people think of answers, kept in a file where that was asked for.

  python -m llm_jax.serve.feedback feedback.jsonl list            one line each
  python -m llm_jax.serve.feedback feedback.jsonl delete ID       takes out everything said of an answer
  python -m llm_jax.serve.feedback feedback.jsonl export pairs    prompt, chosen, rejected: for DPO and the like
  python -m llm_jax.serve.feedback feedback.jsonl export labels   prompt, completion, label: for KTO

A line is {id, time, model, messages, answer, rating (1 or -1), comment}; of two with the same id the later one counts.
What looks like a password or a key is replaced before it is written.
"""
import collections
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

LARGEST = 1 << 28          # bytes of the file

# Texts come from anybody and are long: repeats are bounded, or what follows them cannot fail, so that none takes long.
NAME = r'(?i:password|passwd|passphrase|pwd(?![:=]/)|\w[_-]?secret|secret[_-](?=\w)|(?:api|access|private)[_-]?key)'
IS = r'''[\\"'`*\])]{0,4}[ \t]{0,9}[:=]{1,2}+>?+[ \t*]{0,9}+'''                    # between a name and its value
WORD = r'[\w.~+/=-]'
SECRET = re.compile(rf'''
    -----BEGIN[ ][A-Z ]{{0,40}}PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]{{0,40}}PRIVATE[ ]KEY-----|\Z)
  | \b(?:sk|pk|rk|gh[opsur]|github_pat|glpat|hf|npm|xox[abeprs])[-_]
      (?:[A-Za-z0-9]{{16}}[\w-]*|(?=[\w-]{{0,99}}\d)[\w-]{{10,}})
  | \b(?:AKIA|ASIA)[0-9A-Z]{{16}}\b
  | \bAIza[\w-]{{35}}
  | \beyJ[\w-]{{10,500}}\.[\w-]{{1,9999}}\.[\w-]+                                   # a JSON web token
  | \b[3-6]\d{{3}}([ -]?)\d{{4}}\1\d{{4}}\1\d{{4}}\b                                # cards
  | \b3[47]\d\d([ -]?)\d{{6}}\2\d{{5}}\b
  | (?<=://)[^\s/:@]{{0,99}}:[^\s/@]{{1,99}}(?=@)
  | (?P<scheme>(?i:authorization\W{{1,9}}(?:bearer|basic|token)
      |\bbearer(?=\s{{1,9}}(?={WORD}{{8}}){WORD}{{0,99}}\d))\s{{1,9}}){WORD}+
  | (?P<said>(?i:password|passwd|passphrase)[ ]is[ ])(?=\S{{0,99}}\d)\S{{4,}}
  | (?P<name>{NAME}[\w-]{{0,40}}{IS})(?!["']{{0,3}}(?:-----BEGIN|\[redacted\]))
      (?:(?P<quote>\\{{0,3}}(?:"""|\'\'\'|["']))(?:(?!(?P=quote))(?:\\.|[^\n]))+
      |(?!(?i:str|string|none|null|true|false)\b)[^\s"'\\]\S*)
  | (?P<weak>(?i:token|secret|api[ ]key|credentials?){IS}\\{{0,3}}["']?)            # words that are also ordinary
      (?:(?={WORD}{{0,99}}\d){WORD}{{6,999}}+|[A-Za-z0-9+/=]{{16,999}}+)(?![(\[])[^\s"',;)}}\]]*''', re.S | re.X)


def redacted(value):
  """The value with what looks like a secret replaced, in every text inside."""
  if isinstance(value, str):
    kept = lambda m: ''.join(m[group] or '' for group in ('scheme', 'said', 'name', 'quote', 'weak'))
    return SECRET.sub(lambda m: kept(m) + '[redacted]', value)
  if isinstance(value, dict):
    return {key: '[redacted]' if isinstance(x, str) and re.search(NAME, key) else redacted(x)
            for key, x in value.items()}
  return [redacted(x) for x in value] if isinstance(value, list) else value


class Feedback:
  """The file. Several processes may write to it."""

  def __init__(self, path):
    self.path = pathlib.Path(path).expanduser()

  @contextlib.contextmanager
  def _locked(self):
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path.with_name(self.path.name + '.lock'), 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield

  def add(self, row: dict) -> None:
    """Appends a line, which counts instead of an earlier one of the same answer. ConfigError where the file is full."""
    texts = {name: redacted(x) for name, x in row.items() if name not in ('id', 'model')}
    line = written(row | texts | dict(time=round(time.time(), 3)))
    with self._locked(), open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), 'r+b') as f:
      end, last = f.seek(0, os.SEEK_END), unfinished(f)
      if last.startswith(b'{') and not parsed(last):         # its writer died
        end -= len(last)
      elif last:
        line = b'\n' + line
      if end + len(line) > LARGEST:
        raise ConfigError(f'feedback: the file is full ({LARGEST >> 20} MiB); move it away, and another is begun')
      f.truncate(end)
      f.seek(end)
      f.write(line)

  def delete(self, name: str) -> bool:
    """Whether anything was said of this answer; all of it is gone."""
    with self._locked():
      rows = self.rows()
      kept = [row for row in rows if name not in (row['id'], shown(row['id']))]
      if len(kept) < len(rows):
        part = self.path.with_name(self.path.name + '.part')
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'wb') as f:
          f.writelines(map(written, kept))
        part.replace(self.path)
    return len(kept) < len(rows)

  def rows(self) -> list[dict]:
    """What was said last of each answer, the newest at the end."""
    if not self.path.is_file():
      raise ConfigError(f'{self.path}: no such file')
    found = {}
    with open(self.path, 'rb') as f:
      for n, line in enumerate(f, 1):
        if row := parsed(line):
          found.pop(row['id'], None)
          found[row['id']] = row
        elif line.strip() and line.endswith(b'\n'):          # else it is being written, or its writer died
          raise ConfigError(f'{self.path}: line {n} is not a rated answer as JSON; take it out')
    return list(found.values())


def written(row: dict) -> bytes:
  """In ASCII, which has no other ends of lines, and keeps half a surrogate pair."""
  return json.dumps(row).encode() + b'\n'


def parsed(line: bytes) -> dict | None:
  """The row of a line; None where it is none."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or not isinstance(row.get('messages'), list) or row.get('rating') not in (1, -1) or not (
      isinstance(row.get('id'), str) and isinstance(row.get('answer'), str)):
    return None
  return row | dict(rating=int(row['rating']), comment=str(row.get('comment') or ''))


def unfinished(f) -> bytes:
  """What follows the last end of a line."""
  end = f.seek(0, os.SEEK_END)
  f.seek(max(end - 1, 0))
  if f.read() in (b'', b'\n'):
    return b''
  f.seek(0)
  return f.read().rpartition(b'\n')[2]


def shown(text: str) -> str:
  """The text for a terminal."""
  return ascii(text)[1:-1]


def preferences(path) -> Iterator[dict]:
  """messages, answer and rating (1 or -1) of each rated answer: what tuning reads."""
  for row in Feedback(path).rows():
    yield {name: row[name] for name in ('messages', 'answer', 'rating')}


def pairs(path) -> Iterator[dict]:
  """prompt, chosen, rejected: each good answer with each bad one to the same messages."""
  asked = collections.defaultdict(lambda: {1: [], -1: []})
  for row in preferences(path):
    asked[json.dumps(row['messages'], sort_keys=True)][row['rating']].append(row)
  for rated in asked.values():
    for good, bad in itertools.product(rated[1], rated[-1]):
      if good['answer'] != bad['answer']:
        yield dict(prompt=good['messages'], chosen=turn(good), rejected=turn(bad))


def labels(path) -> Iterator[dict]:
  """prompt, completion, label: each answer, and whether it is a good one."""
  for row in preferences(path):
    yield dict(prompt=row['messages'], completion=turn(row), label=row['rating'] == 1)


def turn(row: dict) -> list[dict]:
  return [dict(role='assistant', content=row['answer'])]


def main(args: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.serve.feedback', __doc__)
  parser.add_argument('file')
  parser.add_argument('command', choices=('list', 'delete', 'export'))
  parser.add_argument('what', nargs='?', default='', help='delete: the id of an answer; export: pairs or labels')
  config_lib.command(args, parser.parse_args, run)


def run(flags) -> None:
  if flags.command == 'list':
    for row in Feedback(flags.file).rows():
      print(f'{shown(row["id"])}  {row["rating"]:+d}  {ascii(row["answer"][:60])}  {ascii(row["comment"][:60])}')
  elif flags.command == 'export':
    if flags.what not in ('pairs', 'labels'):
      raise ConfigError('export: expected pairs or labels')
    for row in (pairs if flags.what == 'pairs' else labels)(flags.file):
      print(json.dumps(row))
  elif not flags.what:
    raise ConfigError('delete: expected the id of an answer; list shows them')
  elif not Feedback(flags.file).delete(flags.what):
    raise ConfigError(f'{flags.what}: nothing is said of this answer')
  else:
    print(f'deleted what was said of {shown(flags.what)}')


if __name__ == '__main__':
  main(sys.argv[1:])
