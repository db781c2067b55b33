"""The engine's thread, and what stands between it and the requests of the event loop."""
import asyncio
import collections
import contextlib
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import jax

from llm_jax.config import ConfigError
from llm_jax.generate import engine as engine_lib
from llm_jax.generate.text import TextStream


class Full(Exception):
  """No more requests are taken."""


class Choice:
  """One text in the making: tokens come in on the engine's thread, pieces go out on the event loop's. A piece is
  (text, tokens, logprobs); the last is followed by None."""

  def __init__(self, tokenizer, ids, options, visible=None, **keys):
    self.request = engine_lib.Request(ids, options, watch=self._watch, ended=self._ended, **keys)
    self._stream = TextStream(tokenizer, ids, options.stop, visible)
    self._stops = options.stop_ids or ()
    self.refused = False                               # by a moderation hook
    self._loop, self._pieces, self._sent = asyncio.get_running_loop(), asyncio.Queue(), 0

  def _watch(self, tokens):
    kept = next((k for k, t in enumerate(tokens, 1) if t not in self._stops and self._stream.push(t)), None)
    self._put(self._stream.fresh(), tokens[:kept])
    return kept

  def _put(self, text, tokens):
    found = self.request.logprobs[self._sent:self._sent + len(tokens)]
    self._sent += len(tokens)
    self._send((text, tokens, found))

  def _ended(self):
    if rest := self._stream.finish(self.request.reason):
      self._put(rest, [])
    self._send(None)

  def _send(self, piece):
    with contextlib.suppress(RuntimeError):            # the loop is gone: so is who asked
      self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

  async def pieces(self):
    while (piece := await self._pieces.get()) is not None:
      yield piece

  @property
  def finish_reason(self) -> str:
    return 'content_filter' if self.refused else self.request.reason

  @property
  def text(self) -> str:
    return self._stream.text


class Worker(threading.Thread):
  """Runs the engine while there is something to do, and other calls between its steps. queue: requests and calls that
  may wait."""

  def __init__(self, engine: engine_lib.Engine, queue: int, mesh=None):
    super().__init__(name='engine', daemon=True)
    self.engine, self.queue, self.mesh, self.error = engine, queue, mesh, None
    self._inbox, self._wake, self._stopping = collections.deque(), threading.Condition(), False
    self._open: set[engine_lib.Request] = set()
    self._calls: collections.deque[tuple[Callable, Future]] = collections.deque()

  @property
  def waiting(self) -> int:
    """Requests and calls that wait."""
    return len(self.engine.waiting) + len(self._calls) + sum(kind == 'submit' for kind, _ in self._inbox)

  @property
  def most(self) -> int:
    """That are taken at once."""
    return self.queue + len(self.engine.slots)

  def submit(self, requests: list[engine_lib.Request]) -> None:
    """All of them or, with Full, none."""
    with self._wake:
      self._check_room(len(requests))
      self._tell(*(('submit', request) for request in requests))

  def calls(self, functions: list[Callable]) -> list[Future]:
    """Runs each between two steps of the engine, unless its future is cancelled before: all or, with Full, none."""
    with self._wake:
      self._check_room(len(functions))
      self._tell()
      found = [(f, Future()) for f in functions]
      self._calls.extend(found)
    return [future for _, future in found]

  def _check_room(self, n: int) -> None:
    if self.waiting + n > self.queue + max(len(self.engine.slots) - self.engine.active, 0):
      raise Full

  def cancel(self, request: engine_lib.Request) -> None:
    with self._wake:
      self._tell(('cancel', request))

  def stop(self) -> None:
    with self._wake:
      self._stopping = True
      self._wake.notify()

  def _tell(self, *messages):
    if self.error:
      raise RuntimeError('the engine has stopped')
    self._inbox.extend(messages)
    self._wake.notify()

  def run(self) -> None:
    with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
      try:
        while self._read():
          self.engine.step()
      except Exception as e:                           # whoever waits is told; /health says so from here on
        traceback.print_exc()
        self._fail(e)

  def _read(self) -> bool:
    """Takes what the event loop has sent, waiting for something to do; False to end."""
    while True:
      with self._wake:
        while not (self._inbox or self._calls or self.engine.waiting or self.engine.active or self._stopping):
          self._wake.wait()
        if self._stopping:
          return False
        messages, self._inbox = self._inbox, collections.deque()
      for kind, what in messages:
        if kind == 'submit':
          self._open.add(what)
          try:
            self.engine.submit(what)
          except ConfigError:                          # the routes have checked it: this one alone is lost
            what.reason = 'error'
            what.ended()
        else:
          self.engine.cancel(what)
      self._one_call()
      self._open = {request for request in self._open if not request.reason}
      if self.engine.waiting or self.engine.active:
        return True

  def _one_call(self) -> None:
    while self._calls:
      f, future = self._calls.popleft()
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(f())
        except Exception as e:
          future.set_exception(e)
        return

  def _fail(self, error) -> None:
    with self._wake:
      self.error = error
      messages, self._inbox = self._inbox, collections.deque()
      calls, self._calls = self._calls, collections.deque()
    for _, future in calls:
      if future.set_running_or_notify_cancel():
        future.set_exception(error)
    for request in self._open | {what for kind, what in messages if kind == 'submit'}:
      if not request.reason:
        request.reason = 'error'
        request.ended()
