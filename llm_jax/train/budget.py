"""A budget in minutes becomes a number of steps while training, so that the learning rate's schedule can end with it.

Set once after CALIBRATE steps, and with the wsd schedule again every CALIBRATE steps until the decay starts, since its
stable phase does not depend on it.
"""
import time

import jax
import numpy as np

from llm_jax import config as config_lib

UNKNOWN = 2**30    # steps of a run whose budget in minutes has not been turned into steps yet
CALIBRATE = 20     # steps after which a budget in minutes is turned into a number of steps


class Budget:
  """`horizon`: how many steps the run has, as far as is known.

  first: the step this process starts at; earlier: seconds that earlier processes trained; saved: the horizon in the
  resumed state, None for a new run.
  """

  def __init__(self, cfg: config_lib.Config, first: int, earlier: float, saved: int | None):
    self.cfg, self.first, self.earlier, self.begun = cfg, first, earlier, time.monotonic()
    self.limit = cfg.train.steps or UNKNOWN
    self.horizon = saved if cfg.train.minutes and saved is not None else self.limit
    self.planned = self.horizon < self.limit      # the minutes have been turned into steps

  def seconds(self) -> float:
    """Training time so far, earlier processes included."""
    return self.earlier + time.monotonic() - self.begun

  def plan(self, step: int, wait) -> bool:
    """Whether `horizon` changed, after `step` steps. wait(): returns when they are done. All processes must agree, so
    process 0 decides."""
    if not self.cfg.train.minutes:
      return False
    done = step - self.first
    if done == 2:
      self.calibrated = time.monotonic(), step      # the first steps pay for warming up
    wsd = self.cfg.optimizer.schedule == 'wsd'
    decaying = step >= (1 - self.cfg.optimizer.decay_fraction) * self.horizon
    slow = done == 5                                # a first look: perhaps the budget ends before CALIBRATE steps
    if not slow and (done < CALIBRATE or step % CALIBRATE) or decaying or (self.planned and not wsd):
      return False
    wait()
    since, first = self.calibrated
    pace = (time.monotonic() - since) / (step - first)
    left = 60 * self.cfg.train.minutes - self.seconds()
    fits = _agree(min(step + max(1, round(left / pace)), self.limit))
    if slow and fits > step + 2 * CALIBRATE:
      return False
    self.planned, self.horizon = True, fits
    return True


def _agree(n: int) -> int:
  if jax.process_count() == 1:
    return n
  from jax.experimental import multihost_utils
  return int(multihost_utils.broadcast_one_to_all(np.int32(n)))
