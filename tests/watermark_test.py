"""Marks are found where they are, not where they are not; the tournament leaves the distribution as it was."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llm_jax.config import ConfigError
from llm_jax.generate import engine, watermark
from llm_jax.generate.options import Options

CFG = tiny.model(layers=1, max_length=256, vocab_size=512, tied_embeddings=False)
MARKS = [watermark.Watermark('green', 12345), watermark.Watermark('tournament', 12345)]


@pytest.fixture(scope='module')
def texts():
  """{kind or None: token ids of texts} of one model, drawn with its mark or none."""
  params, out = jax.tree.map(lambda x: 0.2 * x, tiny.params(CFG, seed=1)), {}
  for mark in (None, *MARKS):
    e = engine.Engine(CFG, params, slots=8, mark=mark, ahead=2)
    requests = [engine.Request([1, 2, 3, 4, i], Options(max_tokens=150, temperature=1.0, seed=i)) for i in range(8)]
    for request in requests:
      e.submit(request)
    e.run()
    out[mark and mark.kind] = [request.ids + request.tokens for request in requests]
  return out


@pytest.mark.parametrize('mark', MARKS, ids=lambda m: m.kind)
def test_found_where_it_is_alone(texts, mark):
  """In every text of 150 tokens; in none without it, of another kind or of another key."""
  z = lambda kind, mark: [watermark.detect(mark, ids)[0] for ids in texts[kind]]
  assert min(z(mark.kind, mark)) > 4
  other = watermark.Watermark(mark.kind, 999)
  for found in (z(None, mark), z(mark.kind, other)):
    assert max(map(abs, found)) < 4


def test_a_half_of_a_text_is_enough_and_repetition_counts_once(texts):
  for mark in MARKS:
    ids = texts[mark.kind][0]
    assert watermark.detect(mark, ids[:20] + texts[None][0][20:90] + ids[90:])[0] > 2
    z, n = watermark.detect(mark, ids[:30] * 20)
    assert n < 30 + 2 * mark.context + 2
  assert watermark.detect(MARKS[0], [1]) == (0.0, 0)


def test_the_tournament_keeps_the_distribution():
  """Averaged over contexts, as over keys: each token's chance is what it was; a green list's is not."""
  logits = jnp.asarray([2.0, 1.0, 0.0, -1.0, 0.5, -jnp.inf])
  before = np.random.default_rng(0).integers(0, 512, (20_000, 4), np.int32)
  logits_BV = jnp.tile(logits[None], (len(before), 1))
  mean = lambda x_BV: np.asarray(jax.nn.softmax(x_BV, 1).mean(0))
  plain = np.asarray(jax.nn.softmax(logits))
  np.testing.assert_allclose(mean(watermark.compete(MARKS[1], logits_BV, before)), plain, atol=0.012)
  assert np.abs(mean(watermark.raise_green(MARKS[0], logits_BV, before)) - plain).max() > 0.012


def test_green_is_a_share_and_bits_are_fair():
  before = np.random.default_rng(1).integers(0, 512, (500, 4), np.int32)
  token_1V = jnp.arange(512)[None]
  share = np.asarray(watermark.green(MARKS[0], watermark.context_hash(MARKS[0], before), token_1V))
  assert abs(share.mean() - 0.25) < 0.005 and abs(np.corrcoef(share[0], share[1])[0, 1]) < 0.2


def test_a_short_secret_is_refused(tmp_path):
  (tmp_path / 'key').write_text('short')
  with pytest.raises(ConfigError, match='at least 16 characters'):
    watermark.read('green', tmp_path / 'key')


def test_a_file_that_is_not_a_text_is_refused_in_a_line(tmp_path, capsys):
  good, bad = tmp_path / 'good', tmp_path / 'bad'
  good.write_text('a' * 40)
  bad.write_bytes(b'caf\xe9 \x00')
  for key, text in ((good, bad), (bad, good), (good, tmp_path / 'none')):
    with pytest.raises(SystemExit):
      watermark.main(['--model=nowhere', '--kind=green', f'--key_file={key}', str(text)])
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and ('bad: expected a text in UTF-8' in error or 'none: No such file' in error)
