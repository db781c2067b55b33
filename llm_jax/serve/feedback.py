"""What people think of answers, kept in a file where that was asked for.

  python -m llm_jax.serve.feedback feedback.jsonl list            one line each
  python -m llm_jax.serve.feedback feedback.jsonl delete ID       takes out everything said of an answer

A line is {id, time, model, messages, answer, rating (1 or -1), comment}: preferences for tuning. What looks like a
password or a key is replaced before it is written.
"""
import contextlib
import fcntl
import json
import os
import pathlib
import re
import sys
import time

from llm_jax import config as config_lib
from llm_jax.config import ConfigError

SECRET = re.compile(
    r'-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)'
    r'|\b(sk|pk|ghp|gho|hf|xox[abp])[-_][A-Za-z0-9_-]{10,}|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+'
    r'|(?i:password|passwd|secret|token|api[_-]?key)\s*[:=]\s*\S+|\b(?:\d[ -]?){13,19}\b', re.S)


def redacted(value):
  """The value with what looks like a secret replaced, in every text inside."""
  if isinstance(value, str):
    return SECRET.sub('[redacted]', value)
  if isinstance(value, dict):
    return {key: redacted(x) for key, x in value.items()}
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
    """Appends a line; an earlier one of the same answer is replaced."""
    with self._locked():
      rows = [r for r in self.rows() if r['id'] != row['id']]
      self._write([*rows, redacted(row | dict(time=round(time.time(), 3)))])

  def delete(self, name: str) -> int:
    """How many lines said something of this answer, and are gone."""
    with self._locked():
      rows = self.rows()
      kept = [r for r in rows if r['id'] != name]
      self._write(kept)
    return len(rows) - len(kept)

  def rows(self) -> list[dict]:
    if not self.path.exists():
      return []
    try:
      return [json.loads(line) for line in self.path.read_text(encoding='utf-8').splitlines()]
    except ValueError as e:
      raise ConfigError(f'{self.path}: expected a line of JSON for each answer ({e})') from e

  def _write(self, rows) -> None:
    part = self.path.with_name(self.path.name + '.part')
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w', encoding='utf-8') as f:
      f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    part.replace(self.path)


def main(args: list[str]) -> None:
  parser = config_lib.Parser('llm_jax.serve.feedback', __doc__)
  parser.add_argument('file')
  parser.add_argument('command', choices=('list', 'delete'))
  parser.add_argument('id', nargs='?')
  with config_lib.one_line_errors('--debug' in args):
    flags = parser.parse_args(args)
    kept = Feedback(flags.file)
    if not kept.path.is_file():
      raise ConfigError(f'{flags.file}: no such file')
    if flags.command == 'list':
      for row in kept.rows():
        print(f'{row["id"]}  {row["rating"]:+d}  {ascii(row["answer"][:60])}  {ascii(row["comment"][:60])}')
    elif not flags.id:
      raise ConfigError('delete: expected the id of an answer; list shows them')
    elif not kept.delete(flags.id):
      raise ConfigError(f'{flags.id}: nothing is said of this answer')
    else:
      print(f'deleted what was said of {flags.id}')


if __name__ == '__main__':
  main(sys.argv[1:])
