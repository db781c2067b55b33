"""Serves a model over HTTP, in OpenAI's words: python -m llm_jax.serve --model=PATH [--port=8000]

PATH: a run directory, a Hugging Face directory, a .gguf file, or hf:org/name. An API key is read from the variable
LLM_JAX_API_KEY (several: separated by commas); without one everybody on this machine may ask.
"""
import contextlib
import dataclasses
import importlib
import os
import socket
import sys

from llm_jax import config as config_lib
from llm_jax.config import ConfigError


def parse(args):
  parser = config_lib.Parser('llm_jax.serve', __doc__)
  parser.add_argument('--model', required=True, help='a run directory, a Hugging Face directory, a .gguf file, hf:...')
  parser.add_argument('--name', help='what clients call it; default: the last part of the path')
  parser.add_argument('--host', default='127.0.0.1')
  parser.add_argument('--port', type=int, default=8000)
  parser.add_argument('--host_name', action='append', default=[], help='a further name that the Host header may have')
  parser.add_argument('--slots', type=int, default=8, help='requests that are answered at the same time')
  parser.add_argument('--queue', type=int, default=64, help='requests that may wait')
  parser.add_argument('--length', type=int, default=2048, help='tokens of prompt and answer at most')
  parser.add_argument('--ahead', type=int, default=0, help="tokens proposed per step, looked up in the row's own text")
  parser.add_argument('--draft', help='a smaller model of the same vocabulary that proposes them')
  parser.add_argument('--watermark', choices=('green', 'tournament'), help='a mark in every text; see --watermark_key')
  parser.add_argument('--watermark_key', help="a file with the mark's secret")
  parser.add_argument('--log', default='', help='a file with a line for each request: hashes of texts, no texts')
  parser.add_argument('--log_text', action='store_true', help='the texts too')
  parser.add_argument('--moderate', default='', help='MODULE:FUNCTION, called with a kind (prompt, output) and a text, '
                      'that returns why it must not pass, or nothing')
  parser.add_argument('--feedback', default='', help='a file to keep what people think of answers (page, /feedback)')
  parser.add_argument('--weights', choices=('int8', 'int4'), default='', help='matrices in fewer bits: less memory, at '
                      "some of the model's quality")
  parser.add_argument('--cache', choices=('int8',), default='', help='keys and values in fewer bits')
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--tensor', type=int, default=1)
  parser.add_argument('--step', type=int)
  parser.add_argument('--no_warm_up', action='store_true', help='compile when the first request needs it')
  return parser.parse_args(args)


def main(args: list[str]) -> None:
  with config_lib.one_line_errors('--debug' in args):
    run(parse(args))


def run(flags) -> None:
  for name, least in dict(slots=1, queue=0, length=16, ahead=0).items():
    if getattr(flags, name) < least:
      raise ConfigError(f'--{name}: expected at least {least}, got {getattr(flags, name)}')
  if bool(flags.watermark) != bool(flags.watermark_key):
    raise ConfigError('--watermark and --watermark_key: each needs the other')
  try:
    import uvicorn

    from llm_jax.serve import app
  except ImportError as e:
    if (e.name or '').startswith('llm_jax'):
      raise
    raise ConfigError(f"serving needs {e.name}; pip install -e '.[serve]'") from e
  import jax

  from llm_jax import api, hardware
  from llm_jax.data import store
  from llm_jax.generate import watermark
  from llm_jax.serve.worker import Worker
  hardware.keep_programs(store.cache_folder(config_lib.Data()))
  moderate, listener = hook(flags.moderate), reserve(flags.host, flags.port)     # wrong ones are told before the wait
  mark = watermark.read(flags.watermark, flags.watermark_key) if flags.watermark else None
  with api.spread(flags.fsdp, flags.tensor):
    model, engine = load(flags, mark)
    mesh = jax.sharding.get_mesh()
    worker = Worker(engine, flags.queue, None if mesh.empty else mesh)
  name = flags.name or os.path.basename(os.path.normpath(flags.model)).removesuffix('.gguf')
  keys = map(str.strip, os.environ.get('LLM_JAX_API_KEY', '').split(','))
  local = ('127.0.0.1', 'localhost', '[::1]', flags.host.lower(), *map(str.lower, flags.host_name))
  everywhere = flags.host in ('0.0.0.0', '::') and not flags.host_name
  server = app.Server(model, worker, app.Settings(
      name, tuple(filter(None, keys)), () if everywhere else local, feedback=flags.feedback, log=flags.log,
      log_text=flags.log_text, moderate=moderate))
  worker.start()
  web = Web(uvicorn.Config(server.application(), host=flags.host, port=flags.port, log_level='warning',
                           timeout_graceful_shutdown=30, h11_max_incomplete_event_size=64 << 10, access_log=False,
                           server_header=False), server)
  with contextlib.suppress(KeyboardInterrupt):
    web.run([listener])
  worker.stop()
  worker.join(10)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def load(flags, mark):
  """(the model without its parameters, an engine that has them as it reads them), compiled."""
  from llm_jax import api
  from llm_jax.generate import engine, score
  model = api.load(flags.model, flags.step)
  say(f'read {flags.model}: {model.origin}')
  if model.shape.encoder_layers:
    raise ConfigError(f'{flags.model}: an encoder-decoder is not served; use llm_jax.sample')
  draft = None
  if flags.draft:
    small = api.load(flags.draft)
    if small.tokenizer.fingerprint != model.tokenizer.fingerprint:
      raise ConfigError(f'--draft: {flags.draft} has another tokenizer')
    draft = small.shape, small.params
  made = engine.Engine(model.shape, model.params, slots=flags.slots, length=flags.length,
                       vocab_size=model.tokenizer.vocab_size, ahead=flags.ahead or (4 if draft else 0), draft=draft,
                       stops=engine.bucket(len(model.tokenizer.stop_ids), 8), mark=mark, weights=flags.weights,
                       cache=flags.cache)
  if not flags.no_warm_up:
    made.warm_up(say)
    score.Scorer(made).warm_up()
  return dataclasses.replace(model, params={}), made


def reserve(host: str, port: int) -> socket.socket:
  """A socket at the address, which does not listen yet."""
  found = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
  found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    found.bind((host, port))
  except (OSError, OverflowError) as e:
    raise ConfigError(f'--host={host} --port={port}: cannot be listened at ({e}); choose another') from e
  return found


def hook(spec: str):
  """The function that --moderate names, None for ''."""
  if not spec:
    return None
  module, _, name = spec.partition(':')
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as e:
    raise ConfigError(f'--moderate: expected MODULE:FUNCTION, got {spec!r} ({e})') from e


def Web(config, server):
  """uvicorn, which tells when it listens, and from a signal on takes nothing new."""
  import uvicorn

  class Told(uvicorn.Server):
    async def startup(self, sockets=None):
      await super().startup(sockets)
      if self.started:
        port = self.servers[0].sockets[0].getsockname()[1]
        say(f'serving {server.settings.name} at http://{config.host}:{port}')

    def handle_exit(self, sig, frame):
      server.making.draining = True
      super().handle_exit(sig, frame)
  return Told(config)


if __name__ == '__main__':
  main(sys.argv[1:])
