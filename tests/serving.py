"""A tiny chat model in a directory, and a real server process over it."""
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import httpx
import jax
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llm_jax import api
from llm_jax import config as config_lib
from llm_jax.interop import load, save, vocabulary
from llm_jax.models import transformer

pytest.importorskip('uvicorn', reason="serving needs pip install '.[serve]'")

HELLO = [dict(role='user', content='hello there')]
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


def make_model(folder, layers=1, length=256, template=TEMPLATE):
  """A Hugging Face directory: bytes and three special tokens, random weights, ChatML."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  made.add_special_tokens(SPECIAL)
  (folder / 't').mkdir(parents=True)
  (folder / 't/tokenizer.json').write_text(made.to_str())
  (folder / 't/tokenizer_config.json').write_text(json.dumps(dict(eos_token='<|im_end|>', bos_token='<|endoftext|>')))
  shape = config_lib.derive(config_lib.Model(vocab_size=264, layers=layers, width=32, heads=4, kv_heads=2, mlp_dim=48,
                                             max_length=length, mlp='swiglu', embedding_init=0.5))
  params = jax.jit(lambda: transformer.init(shape, jax.random.key(0)))()
  tokenizer = vocabulary.from_folder(folder / 't')
  save.to_hf(load.Loaded(load.config_of(shape, None), tokenizer, template, 'llama', 'float32', 'made', params),
             folder / 'tiny')
  return folder / 'tiny'


@contextlib.contextmanager
def serve(model, *flags, code='', env=None, ready='serving .* at (http://\\S+)'):
  """(process, address, lines of stderr) of a server, which is stopped at the end."""
  env = {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_PLATFORMS': 'cpu', **(env or {})}
  env.pop('JAX_NUMPY_RANK_PROMOTION', None)
  program = ['-c', f'{code}\nimport runpy; runpy.run_module("llm_jax.serve", run_name="__main__")'] if code else (
      ['-m', 'llm_jax.serve'])
  process = subprocess.Popen([sys.executable, *program, f'--model={model}', '--port=0', *flags], env=env, text=True,
                             stderr=subprocess.PIPE)
  lines, found = [], None
  for line in process.stderr:
    lines.append(line)
    if found := re.match(ready, line):
      break
  assert found, ''.join(lines)
  drain = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)      # a full pipe would stop it
  drain.start()
  try:
    yield process, found.group(1), lines
  finally:
    process.terminate()
    try:
      process.wait(40)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
    drain.join(5)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return make_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def server(model, tmp_path_factory):
  """(address, lines of its stderr) of a server with two slots and a queue of four."""
  env = dict(XDG_CACHE_HOME=str(tmp_path_factory.mktemp('cache')))
  with serve(model, '--slots=2', '--queue=4', '--length=256', env=env) as (_, address, lines):
    yield address, lines


@pytest.fixture
def client(server):
  with openai.OpenAI(base_url=f'{server[0]}/v1', api_key='none', max_retries=0, timeout=60,
                     _strict_response_validation=True) as client:
    yield client


@pytest.fixture(scope='module')
def local(model):
  return api.load(model)


def post(server, path, body, **options):
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  return httpx.post(server[0] + path, content=content, timeout=60, **options)


def error(response, status=400):
  assert response.status_code == status, response.text
  found = response.json()['error']
  assert set(found) == {'message', 'type', 'param', 'code'} and '\n' not in found['message']
  return found


def alive(server):
  start = time.monotonic()
  assert httpx.get(server[0] + '/health', timeout=5).json() == dict(status='ok')
  assert time.monotonic() - start < 2
