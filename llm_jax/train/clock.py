"""Where a run's wall time went, across restarts: time.json in the run directory, and the goodput that the report shows.

What a process did after its last checkpoint is done again by the next one: that time, and all that the next process
needs before its first new step, is 'lost'. Time in which no process ran is counted apart.
"""
import contextlib
import json
import pathlib
import time

import jax

from llm_jax import manifest

NAME = 'time.json'
PARTS = {   # in the words of the report
    'step': 'productive steps', 'compile': 'compile', 'input': 'data preparation and input wait', 'eval': 'evaluation',
    'sample': 'samples', 'checkpoint': 'checkpoints', 'lost': 'lost to restarts', 'other': 'other'}


class Clock:
  """Wall time by part: `with clock('eval'):`. Nested parts are not counted twice; what is in no part is 'other'.

  started: time.time() at which the process started. The sums are written on leaving a part, at most every 2 s.
  """

  def __init__(self, workdir, started: float | None = None):
    self.path = pathlib.Path(workdir) / NAME
    self.before = read(workdir)                 # what earlier processes of this run left
    self.restarts, self.down, self.ended = self.before['restarts'], self.before['down'], None
    self._accepted = False                      # nothing is written for a run that is refused
    self._sums = dict(self.before['parts'])
    self._began = time.time() if started is None else started
    self._stack = ['other']
    self._saved = time.monotonic()
    self._since = self._saved - max(0.0, time.time() - self._began)
    self._first = dict(self._sums)              # the sums when this process began

  def resume(self, at_checkpoint: dict[str, float], step: int = 0) -> None:
    """Call before the loop: the run goes on from the checkpoint of `step`, saved with these parts() ({} and 0: there is
    none). What came after it was lost, unless that process ended in order with this step."""
    self._accepted = True
    if self.before['at'] is None or self.before['ended'] == step:
      return
    here = {part: seconds - self._first[part] for part, seconds in self.parts().items()}
    kept = dict.fromkeys(PARTS, 0.0) | {k: v for k, v in at_checkpoint.items() if k in PARTS}
    lost = max(0.0, sum(self._first.values()) - sum(kept.values()))
    self._first = kept | dict(lost=kept['lost'] + lost)
    self._sums = {part: self._first[part] + here[part] for part in PARTS}

  def restart(self) -> None:
    """Call before the first new step of a resumed run: what led there is paid a second time, and so is lost."""
    now = self.parts()
    self._sums = self._first | dict(lost=self._first['lost'] + sum(now.values()) - sum(self._first.values()))
    self.restarts += 1
    if self.before['at'] is not None:
      self.down += max(0.0, self._began - self.before['at'])

  @contextlib.contextmanager
  def __call__(self, part: str):
    if part not in PARTS:
      raise ValueError(f'expected a part of {tuple(PARTS)}, got {part!r}')
    self._charge()
    self._stack.append(part)
    try:
      yield
    finally:
      self._charge()
      self._stack.pop()
      if self._since - self._saved > 2:
        with contextlib.suppress(OSError):      # a full disk is for the checkpoint to report
          self.save()

  def _charge(self):
    now = time.monotonic()
    self._sums[self._stack[-1]] += now - self._since
    self._since = now

  def parts(self) -> dict[str, float]:
    """Seconds by part until now, earlier processes of the same run included."""
    self._charge()
    return dict(self._sums)

  def total(self) -> float:
    return sum(self.parts().values())

  def save(self) -> None:
    self._saved = time.monotonic()
    if jax.process_index() == 0 and self._accepted:
      manifest.write_json(self.path, dict(
          parts={k: round(v, 3) for k, v in self.parts().items()}, restarts=self.restarts, down=round(self.down, 3),
          at=time.time(), ended=self.ended))

  def end(self, step: int) -> None:
    """Call once every step is saved: a later process that goes on from this one then loses nothing."""
    self.ended = step
    self.save()


def read(workdir) -> dict:
  """What a run's time.json holds: parts (seconds), restarts, down (seconds), at (when it was written; None: never) and
  ended (the last step of a process that ended in order). Zeros where there is none, or none that can be read."""
  out = dict(parts=dict.fromkeys(PARTS, 0.0), restarts=0, down=0.0, at=None, ended=None)
  with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
    found = json.loads((pathlib.Path(workdir) / NAME).read_text())
    parts = found.get('parts', found)           # before restarts were counted, the file held the parts alone
    out['parts'] |= {k: float(v) for k, v in parts.items() if k in PARTS}
    out |= {k: found[k] for k in out if k in found and k != 'parts'}
  return out


def goodput(parts: dict[str, float]) -> float:
  """The share of wall time that went into steps that count."""
  return parts['step'] / max(sum(parts.values()), 1e-9)
