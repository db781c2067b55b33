"""Trains what a config says: python -m llm_jax.main --config=configs/base.py [--config.group.key=value ...]

--config=FILE[:ARG]      the config file, and the argument of its get_config
--config.GROUP.KEY=V     overrides one key; --config.model=llama3_8b takes a published shape, =PATH that of a model
--workdir=DIR            where the run lives: a folder (default runs/<config name>), gs://... or s3://...; an
                         existing run is resumed
--debug                  full tracebacks
"""
import time

START = time.time()    # before the imports: time to first loss counts from here

import os  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402

from llm_jax import config as config_lib  # noqa: E402


def parse(args: list[str]):
  """(Config, workdir, debug) of a command line. Raises ConfigError naming the flag and the nearest right one."""
  config, values = config_lib.from_flags(args, dict(workdir=None, debug=False))
  workdir = values['workdir'] or f'runs/{pathlib.Path(values["config"].partition(":")[0]).stem}'
  return config, workdir, values['debug']


def main(args: list[str], own_process: bool = False) -> None:
  if '--help' in args or '-h' in args:
    print(__doc__)
    return
  try:
    with config_lib.one_line_errors('--debug' in args):
      config, workdir, _ = parse(args)
      from llm_jax.train import loop
      loop.train(config, workdir, START, own_process)
  except KeyboardInterrupt:
    print(config_lib.INTERRUPTED, file=sys.stderr)
    raise SystemExit(130) from None


if __name__ == '__main__':
  try:
    main(sys.argv[1:], own_process=True)
  except SystemExit as e:
    if e.code == 130:
      sys.stdout.flush()
      os._exit(130)          # at once: Python would first wait for the threads of a checkpoint that is being written
    raise
