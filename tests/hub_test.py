"""Models by name, against a stand-in for the hub on 127.0.0.1 that keeps files in memory."""
import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import pytest

from llm_jax import config as config_lib
from llm_jax.data.tokenizer import Byte
from llm_jax.interop import load, save
from llm_jax.models import transformer

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMIT = 'a' * 40


class Hub(http.server.BaseHTTPRequestHandler):
  """The calls of huggingface_hub that downloading and uploading small files make."""
  files: dict[str, bytes]

  def answer(self, status, body=b'', **headers):
    self.send_response(status)
    for name, value in dict(headers, Content_Length=len(body)).items():
      self.send_header(name.replace('_', '-'), str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def json(self, value):
    self.answer(200, json.dumps(value).encode(), Content_Type='application/json')

  def do_GET(self):
    if re.match(r'/api/models/org/name(/revision/[^/?]+)?(\?|$)', self.path):
      return self.json(dict(id='org/name', sha=COMMIT, private=False, siblings=[dict(rfilename=f) for f in self.files]))
    if self.path.startswith('/api/models/org/name/tree/'):
      return self.json([dict(type='file', path=name, size=len(data), oid=hashlib.sha1(data).hexdigest())
                        for name, data in self.files.items()])
    found = re.match(r'/org/name/resolve/[^/]+/([^?]+)', self.path)
    if found and found[1] in self.files:
      data = self.files[found[1]]
      return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
    self.answer(404, b'{}', X_Error_Code='RepoNotFound')

  do_HEAD = do_GET

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    if self.path == '/api/repos/create':
      return self.json(dict(url=f'http://{self.headers["Host"]}/org/name', id='org/name'))
    if self.path == '/api/validate-yaml':
      return self.json(dict(errors=[], warnings=[]))
    if '/preupload/' in self.path:
      return self.json(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                                   for f in json.loads(body)['files']]))
    for line in map(json.loads, body.decode().splitlines()):
      if line['key'] == 'file':
        self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
    self.json(dict(commitOid=COMMIT, commitUrl=f'http://{self.headers["Host"]}/org/name/commit/{COMMIT}', success=True))

  def log_message(self, *_):
    pass


@pytest.fixture
def hub():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('H', (Hub,), dict(files={})))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()


def run(hub, tmp_path, *args):
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'HF_HUB_OFFLINE')} | dict(
      HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_HOME=str(tmp_path / 'cache'), HF_TOKEN='made-up',
      HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', JAX_PLATFORMS='cpu', NO_PROXY='127.0.0.1')
  return subprocess.run([sys.executable, '-m', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
  """A run directory of ours is uploaded by name, with its card, and sampled from by name."""
  shape = config_lib.derive(config_lib.Model(vocab_size=320, layers=2, width=32, heads=4, mlp_dim=48, max_length=64,
                                             mlp='swiglu'))
  params = jax.jit(lambda: transformer.init(shape, jax.random.key(0)))()
  save.to_orbax(load.Loaded(load.config_of(shape, None), Byte(), None, '', 'float32', '', params), tmp_path / 'run')
  out = run(hub, tmp_path, 'llm_jax.convert', str(tmp_path / 'run'), 'hf:org/name')
  assert out.returncode == 0, out.stderr
  files = hub.RequestHandlerClass.files
  assert {'config.json', 'model.safetensors', 'README.md', 'tokenizer/meta.json'} <= files.keys()
  card = files['README.md'].decode()
  assert '## Training data' in card and 'stdlib' in card and '## Evaluation' in card and '## Limits' in card
  out = run(hub, tmp_path, 'llm_jax.sample', '--model=hf:org/name', '--prompt=def', '--max_tokens=4')
  assert out.returncode == 0 and out.stdout.startswith('def'), out.stderr
  assert (tmp_path / 'cache').is_dir()


@pytest.mark.parametrize('name, message', [('hf:org/none', 'no such model'), ('hf:org', 'expected hf:org/name')])
def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path, name, message):
  out = run(hub, tmp_path, 'llm_jax.sample', f'--model={name}', '--prompt=x')
  assert out.returncode == 2 and len(out.stderr.strip().splitlines()) == 1 and message in out.stderr, out.stderr
