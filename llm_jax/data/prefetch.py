"""Batches made ahead of the training loop by Grain, in threads or in worker processes.

The loop reads from a short queue that a thread fills, so it can look at the workers while it waits: a worker that is
killed becomes an error that names it, never a hang (Grain itself can wait for ever on half a message).
"""
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time

from llm_jax.config import ConfigError

STEPS = 1 << 40               # a source must have a length; no run is longer


class _Steps:
  """Grain's random-access source: element i is (start + i, the batch of that step)."""

  def __init__(self, batches, start, rows):
    self.batches, self.start, self.rows = batches, start, rows

  def __len__(self):
    return STEPS

  def __setstate__(self, state):                            # in a worker
    self.__dict__.update(state)
    threading.Thread(target=_end_with_parent, daemon=True).start()

  def __getitem__(self, i):
    return self.start + i, self.batches(self.start + i, self.rows)


def _end_with_parent():
  """A worker whose training process was killed would else wait for it for ever, with its memory."""
  if parent := multiprocessing.parent_process():
    parent.join()
    os._exit(1)


class Prefetch:
  """Iterator of (step, batch). `waited` is the seconds that next() has spent without a batch at hand, in all; `close()`
  ends threads and workers. A context manager. Raises ConfigError where a worker dies."""

  def __init__(self, batches, start_step: int, rows=None, workers: int = 0, buffer: int = 4):
    self.waited, self._workers = 0.0, {}
    self._before = {p.pid for p in multiprocessing.active_children()}
    self._queue, self._stop = queue.Queue(1), threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(_Steps(batches, start_step, rows), workers, buffer),
                                    name='prefetch', daemon=True)
    with _for_children() if workers else contextlib.nullcontext():
      self._thread.start()
      while len(self._workers) < workers and self._thread.is_alive():
        time.sleep(0.02)
        self._find_workers()

  def _fill(self, steps, workers, buffer):
    iterator = None
    try:
      iterator = _grain_iterator(steps, workers, buffer)
      while not self._stop.is_set():
        self._put((next(iterator), None))
    except BaseException as e:                             # handed to the loop, which raises it
      self._put((None, e))
    finally:
      if iterator is not None:
        iterator.close()

  def _put(self, item):
    while not self._stop.is_set():
      try:
        return self._queue.put(item, timeout=0.2)
      except queue.Full:
        pass

  def __iter__(self):
    return self

  def __next__(self):
    start = time.perf_counter()
    while True:
      if self._stop.is_set():
        raise ValueError('this Prefetch is closed')
      try:
        item, error = self._queue.get(timeout=0.5)
        break
      except queue.Empty:
        self._check_workers()
        if not self._thread.is_alive() and self._queue.empty():
          raise RuntimeError('the prefetch thread ended without a word') from None
    self.waited += time.perf_counter() - start
    if error is not None:
      self._check_workers()
      self.close()
      raise error
    return item

  def _find_workers(self):
    for p in multiprocessing.active_children():
      if p.pid not in self._before and p.name.startswith('grain'):
        self._workers[p.pid] = p

  def _check_workers(self):
    for pid, process in self._workers.items():
      if process.exitcode is not None:
        self._stop.set()                                   # no join: the thread may hang on the dead worker's message
        why = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f'exit code {process.exitcode}'
        raise ConfigError(f'config.data.workers: data worker process {pid} died ({why}; out of memory?); run again, '
                          'with fewer workers, or with 0 for threads')

  def close(self):
    """Ends threads and workers; may be called twice."""
    self._stop.set()
    dead = any(p.exitcode is not None for p in self._workers.values())
    self._thread.join(timeout=1 if dead else 10)           # it may wait for ever for the dead one's message
    for process in self._workers.values():
      process.terminate()                                  # only where the orderly end did not work

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


@contextlib.contextmanager
def _for_children():
  """What worker processes inherit: Ctrl-C, which a terminal sends to them too, is ignored (the loop ends them), and the
  main module is hidden.

  A new process would first import the caller's main module again: a script without a `__main__` guard would train in
  every worker, a program read from stdin has no file. Workers need nothing of it, so they are not told where it is."""
  main = sys.modules['__main__'].__dict__
  saved = {name: main[name] for name in ('__spec__', '__file__') if name in main}
  main['__spec__'] = None
  main.pop('__file__', None)
  ours = threading.current_thread() is threading.main_thread()
  before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ours else None
  try:
    yield
  finally:
    main.update(saved)
    if ours:
      signal.signal(signal.SIGINT, before)


def _grain_iterator(steps, workers, buffer):
  import grain
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()                           # Grain reads its flags; outside absl's app none are parsed
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=buffer)
  dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
  if workers:
    dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(buffer // workers, 1)))
  return iter(dataset)
