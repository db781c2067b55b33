"""bench serve: a server under load."""
import os
import re
import statistics
import subprocess
import sys
import time

from llm_jax.bench import hardware
from llm_jax.config import ConfigError


def serve(flags) -> None:
  """Starts a server and prints how long its clients wait for the first token and between tokens, one alone and many at
  the same time: medians and the slowest hundredth."""
  if not flags.model:
    raise ConfigError('--model: expected the path of a model to serve')
  command = [sys.executable, '-m', 'llm_jax.serve', f'--model={flags.model}', '--port=0', f'--slots={flags.streams}',
             '--length=512', f'--queue={flags.streams}']
  server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  try:
    found = next((m for line in server.stderr if (m := re.search(r'at http://(.*):(\d+)', line))), None)
    if found is None:
      raise ConfigError(f'the server did not start; try {" ".join(command)}')
    print(f'serve {os.path.basename(flags.model)}, {flags.new} tokens after about 100, {flags.rounds} requests a '
          f'stream; {hardware()}')
    for n in (1, flags.streams):
      first, between, rate = _load(found.group(1), int(found.group(2)), n, flags.rounds, flags.new)
      of = lambda times: f'{1e3 * statistics.median(times):.0f} / {1e3 * sorted(times)[int(0.99 * len(times))]:.0f} ms'
      print(f'{n:>6} stream(s)  {rate:>7.1f} tok/s  first token {of(first)}  between tokens {of(between)} (p50 / p99)')
  finally:
    server.terminate()
    server.wait(60)


def _load(host: str, port: int, streams: int, rounds: int, tokens: int) -> tuple[list[float], list[float], float]:
  """(seconds to each first token, seconds per further token, tokens per second) of so many clients, each with several
  requests one after the other."""
  import concurrent.futures
  import http.client
  import json

  def client(i):
    first, between = [], []
    for r in range(rounds):
      body = dict(prompt=f'Request {r} of client {i}: ' + 'tell me more. ' * 22, max_tokens=tokens, stream=True, seed=r,
                  logit_bias={'2': -100}, logprobs=0)
      connection = http.client.HTTPConnection(host, port, timeout=300)
      start = last = time.perf_counter()
      connection.request('POST', '/v1/completions', json.dumps(body))
      made = 0
      for line in connection.getresponse():
        if not line.startswith(b'data: {'):
          continue
        logprobs = json.loads(line[6:])['choices'][0].get('logprobs')
        if n := len(logprobs['tokens']) if logprobs else 0:
          now = time.perf_counter()
          if not made:
            first.append(now - start)
          elif n:
            between.append((now - last) / n)
          last, made = now, made + n
      connection.close()
    return first, between
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(streams) as pool:
    found = list(pool.map(client, range(streams)))
  seconds = time.perf_counter() - start
  return [x for f, _ in found for x in f], [x for _, b in found for x in b], streams * rounds * tokens / seconds
