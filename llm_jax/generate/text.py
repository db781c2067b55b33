"""From tokens to text as it is generated: whole characters only, cut before a stop string."""
import codecs
import sys

CONTEXT = 8     # tokens decoded before a new one: tokenizers join pieces by what comes before them


class TextStream:
  """The text of one row. push() tokens, take fresh() text at any time, finish() once; `text` is all of it so far.
  visible: {id: text} of special tokens that are text here, which otherwise none is."""

  def __init__(self, tokenizer, prompt_ids, stop: tuple[str, ...] = (), visible: dict[int, bytes] | None = None):
    self.tokenizer, self.stop, self.visible = tokenizer, stop, visible or {}
    self.text, self.stopped = '', False
    self._context = list(prompt_ids[-CONTEXT:])
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')   # keeps back the bytes of an unfinished character
    self._shown = 0

  def push(self, token: int) -> bool:
    """Adds a token; True where it completes a stop string, which is then cut off with all that follows it."""
    before = len(self.tokenizer.decode_bytes(self._context))
    self._context.append(token)
    piece = self.visible.get(token) or self.tokenizer.decode_bytes(self._context)[before:]
    self._context = self._context[-CONTEXT:]
    old = len(self.text)
    self.text += self._decoder.decode(piece)
    found = [at for s in self.stop if (at := self.text.find(s, max(old - len(s) + 1, 0))) >= 0]
    if found:
      self.text, self.stopped = self.text[:min(found)], True
    return self.stopped

  def fresh(self) -> str:
    """Text that was not taken yet, but for an end that may yet become a stop string."""
    return self._take(len(self.text) - (0 if self.stopped else self._held()))

  def finish(self, reason: str) -> str:
    """The rest. A character left unfinished is dropped where length ended the text, U+FFFD where the model did."""
    if reason == 'stop' and not self.stopped:
      self.text += self._decoder.decode(b'', final=True)
    return self._take(len(self.text))

  def _take(self, end):
    start, self._shown = self._shown, max(self._shown, end)
    return self.text[start:end]

  def _held(self):
    """Length of the longest end of the text that a stop string begins with."""
    return max((k for s in self.stop for k in range(1, len(s)) if self.text.endswith(s[:k])), default=0)


def shown(text: str) -> str:
  """Text as it may go to stdout: on a terminal, control characters (escape sequences) are made visible."""
  if not sys.stdout.isatty():
    return text
  return ''.join(c if c in '\n\t' or c.isprintable() else repr(c)[1:-1] for c in text)
