"""SIGTERM, preemption notices and Ctrl-C: the run saves at the end of the step and ends; a second one ends it at once.

With several processes they must all stop after the same step, else some wait for ever in a collective: JAX's preemption
service takes the SIGTERM that any of them gets and agrees on the step. Ctrl-C is passed on to it.
"""
import os
import signal
import sys

import jax
from jax.experimental import multihost_utils

from llm_jax import config as config_lib


class Stop:
  """A context manager: listens to signals inside it. `asked`: one came; `by`: its name. own_process: a second one ends
  the process itself, for what is cleaned up on the way of an exception may wait for a write; else KeyboardInterrupt."""

  def __init__(self, own_process: bool = False):
    self.asked, self.by, self.own_process, self._old = False, '', own_process, {}

  def reached(self, step: int) -> bool:
    """Whether to stop before `step`, the same on every process. Each must call it once per step."""
    if jax.process_count() > 1 and not self.asked and multihost_utils.reached_preemption_sync_point(step):
      self.asked, self.by = True, self.by or 'a preemption notice'
      print(f'{self.by}: saving step {step}', file=sys.stderr)
    return self.asked

  def _handle(self, number, frame):
    name = signal.Signals(number).name
    if self.by and self.own_process:
      print(config_lib.INTERRUPTED, file=sys.stderr)
      sys.stdout.flush()
      os._exit(130)
    if self.by:
      raise KeyboardInterrupt
    self.by = name
    print(f'{name}: saving at the end of this step (again: stop at once)', file=sys.stderr)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)      # to the preemption service
    else:
      self.asked = True

  def __enter__(self):
    # With several processes SIGTERM belongs to the preemption service, whose handler is not one of Python's.
    wanted = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    try:
      self._old = {number: signal.signal(number, self._handle) for number in wanted}
    except ValueError:                          # not the main thread (a notebook server): leave the signals alone
      pass
    return self

  def __exit__(self, *_):
    while self._old:
      signal.signal(*self._old.popitem())
