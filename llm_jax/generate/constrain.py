"""Text that follows a JSON schema, a regular expression or a grammar (Lark's notation), by the llguidance library:
before each token it says which may come."""
import functools
import json
import threading

import numpy as np

from llm_jax.config import ConfigError

LARGEST = 100_000          # characters of a grammar
KEPT = 64                  # compiled grammars
# An ambiguous grammar could hold up every row for a second per token: about 0.3 ms of parsing and 4 of lexing.
BOUNDS = dict(step_max_items=5000, max_items_in_row=500, step_lexer_fuel=50_000, verbose_errors=False)


class Grammars:
  """What a tokenizer's texts can be held to. Thread-safe."""

  def __init__(self, tokenizer, vocab_size: int):
    self.tokenizer, self.vocab_size = tokenizer, min(vocab_size, tokenizer.vocab_size)
    self._lock = threading.Lock()
    self._compiled = functools.lru_cache(KEPT)(self._compile)

  @functools.cached_property
  def _library(self):
    try:
      import llguidance
    except ImportError as e:
      raise ConfigError("constrained decoding needs llguidance; pip install -e '.[serve]'") from e
    if not self.tokenizer.stop_ids:
      raise ConfigError('constrained decoding needs a token that ends a text, and this model has none')
    tokenizer, size = self.tokenizer, self.vocab_size

    class Wrapped:
      eos_token_id, bos_token_id = tokenizer.stop_ids[0], tokenizer.bos_id
      special_token_ids = sorted(tokenizer.specials.values())
      tokens = [tokenizer.decode_bytes([i]) or b'\xff<%d>' % i for i in range(size)]
      def __call__(self, text):
        return tokenizer.encode(text.decode('utf-8', 'replace') if isinstance(text, bytes) else text).tolist()
    return llguidance, llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapped()), n_vocab=size,
                                              eos_token=list(tokenizer.stop_ids))

  def constraint(self, kind: str, source) -> 'Constraint':
    """kind: json_schema (a dict), json_object (anything), regex or grammar (texts). Raises ConfigError for one that is
    wrong, too large or too complex."""
    text = source if isinstance(source, str) else json.dumps(source)
    if len(text) > LARGEST:
      raise ConfigError(f'{kind}: has {len(text)} characters, expected at most {LARGEST}')
    with self._lock:
      return Constraint(self._compiled(kind, text).deep_copy())

  def _compile(self, kind, text):
    library, tokenizer = self._library
    make = dict(json_schema=library.LLMatcher.grammar_from_json_schema, regex=library.LLMatcher.grammar_from_regex,
                grammar=library.LLMatcher.grammar_from_lark,
                json_object=lambda _: library.LLMatcher.grammar_from_json_schema('{"type": "object"}'))[kind]
    try:
      matcher = library.LLMatcher(tokenizer, make(text), limits=library.LLParserLimits(**BOUNDS))
      error = matcher.get_error() if matcher.is_error() else ''
    except Exception as e:          # the library's, of several classes
      error = str(e) or type(e).__name__
    if error:
      raise ConfigError(f'{kind}: cannot be followed: {" ".join(error.split())[:200]}')
    return matcher


class Constraint:
  """Where one text is in its grammar."""

  def __init__(self, matcher):
    self._matcher = matcher

  def allowed(self, words: int) -> np.ndarray:
    """uint32 [words]: bits of the tokens that may come next."""
    found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    out = np.zeros(words, np.uint32)
    out[:min(words, len(found))] = found[:words]
    return out

  @property
  def failed(self) -> bool:
    """Whether it has become too much to follow."""
    return self._matcher.is_error()

  def take(self, token: int) -> bool:
    """Goes on by a token; False once the text is whole, or cannot go on."""
    return self._matcher.consume_token(token) and not self._matcher.is_stopped()
