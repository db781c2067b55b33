"""What watches over a server: a hook that sees every prompt and output, and a log of requests."""
import asyncio
import hmac
import json
import os
import sys
import time

from starlette.requests import Request

from llm_jax.serve.protocol import ApiError


class Oversight:
  """settings: app.Settings, whose log is a file, or '', and moderate f(kind, text) -> a reason, or None."""

  def __init__(self, settings, tokenizer):
    self.settings, self.tokenizer = settings, tokenizer
    self.key = os.urandom(32)              # hashes tell equal texts of one run apart from others, and nothing else

  async def refusal(self, kind: str, text: str) -> str:
    """Why a text must not pass, or ''. kind: 'prompt' or 'output'. A hook that fails lets nothing pass."""
    if self.settings.moderate is None:
      return ''
    try:
      return str(await asyncio.to_thread(self.settings.moderate, kind, text) or '')
    except Exception as e:
      return f'the moderation hook fails ({type(e).__name__})'

  async def check(self, texts) -> None:
    """Raises ApiError for a prompt that the hook refuses. Of a conversation it sees all that the model is to read."""
    for text in texts if self.settings.moderate else ():
      if reason := await self.refusal('prompt', text):
        raise ApiError(f'the request was refused: {reason[:200]}', None, code='content_policy_violation')

  def note(self, request: Request, route: str, status: int, start: float, choices=()) -> None:
    """One line of the log for a request. Prompts and texts are there as keyed hashes, unless text was asked for."""
    if not self.settings.log or getattr(request.state, 'noted', False):
      return
    request.state.noted = True
    digest = lambda text: hmac.new(self.key, text.encode('utf-8', 'surrogatepass'), 'sha256').hexdigest()[:32]
    written = (lambda text: text) if self.settings.log_text else digest
    key = request.headers.get('authorization', '')
    row = dict(time=round(time.time(), 3), route=route, status=status, seconds=round(time.perf_counter() - start, 4),
               model=self.settings.name, key=digest(key)[:8] if key else None)
    if choices:
      prompts = {id(c.request.ids): c.request.ids for c in choices}.values()          # each of them n times
      row |= dict(prompts=[written(self.tokenizer.decode(ids)) for ids in prompts],
                  prompt_tokens=[len(ids) for ids in prompts],
                  outputs=[written(c.text) for c in choices], reasons=[c.finish_reason for c in choices],
                  tokens=[len(c.request.tokens) for c in choices])
    try:
      with open(os.open(self.settings.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 'a', encoding='utf-8') as f:
        f.write(json.dumps(row) + '\n')                # JSON has no control characters: one line each
    except OSError as e:                               # a full disk must not end an answer
      print(f'warning: {self.settings.log}: {e.strerror}; a request was not logged', file=sys.stderr, flush=True)
