"""Beam search against transformers' and against trying everything."""
import itertools

import numpy as np
import pytest
import tiny
from theirs import theirs

from llm_jax import api
from llm_jax.config import ConfigError
from llm_jax.generate import beam
from llm_jax.interop import load
from llm_jax.models import transformer


@pytest.mark.parametrize('penalty', [0.0, 1.0, 2.0])
def test_the_texts_of_transformers(penalty, tmp_path, tokenizer_json):
  """Tokens and scores of all beams, with a stop id that some of them meet."""
  reference, torch = theirs('llama', tmp_path, tokenizer_json)
  model, prompt = load.load(tmp_path), [5, 9, 33, 2]
  for stop in (7, 60):
    found = beam.search(model.shape, model.params, prompt, beams=4, max_tokens=12, stop_ids=(stop,),
                        length_penalty=penalty)
    with torch.no_grad():
      out = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), num_beams=4,
                               num_return_sequences=4, max_new_tokens=12, do_sample=False, eos_token_id=stop,
                               pad_token_id=0, length_penalty=penalty, return_dict_in_generate=True, output_scores=True)
    for (tokens, score), row, expected in zip(found, out.sequences[:, 4:].tolist(), out.sequences_scores.tolist()):
      assert tokens == row[:len(tokens)] and not any(row[len(tokens):])
      np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-4)


def test_with_a_beam_for_everything_it_is_the_best_of_all():
  cfg = tiny.model(layers=1, max_length=64, vocab_size=5, tied_embeddings=False)
  params = tiny.params(cfg, seed=3)
  (best, score), *_ = beam.search(cfg, params, [1, 2], beams=125, max_tokens=3)
  scores = {}
  for tokens in itertools.product(range(5), repeat=3):
    logits = np.asarray(transformer.logits(cfg, params, np.array([[1, 2, *tokens]], np.int32)))[0].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores[tokens] = sum(logp[1 + i, t] for i, t in enumerate(tokens)) / 3
  assert tuple(best) == max(scores, key=scores.get)
  np.testing.assert_allclose(score, max(scores.values()), atol=1e-4)


def test_by_text_and_refusals(tmp_path, tokenizer_json):
  theirs('llama', tmp_path, tokenizer_json)
  model = api.load(tmp_path)
  found = model.beam_search('the fox', beams=3, max_tokens=6)
  assert len(found) == 3 and found[0][1] >= found[1][1] >= found[2][1]
  assert found[0][1] >= model.beam_search('the fox', beams=1, max_tokens=6)[0][1]
  with pytest.raises(ConfigError, match='at least 1'):
    model.beam_search('x', beams=0)
