"""The engine: requests come and go, and none of it changes what any of them gets."""
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.generate import engine, programs, sampling
from llm_jax.generate.options import Options

CFG = tiny.model(layers=2, max_length=256, vocab_size=64, tied_embeddings=False)
PROMPTS = [tiny.tokens(i, n).tolist() for i, n in enumerate((1, 40, 3, 90, 12, 25, 7, 33))]
DRAWN = Options(max_tokens=20, temperature=1.2, top_k=30, seed=5)


@pytest.fixture(scope='module')
def params():
  return tiny.params(CFG, seed=1)


def alone(params, prompt, options):
  return sampling.generate_tokens(CFG, params, [prompt], options)[0].tokens


def made(params, slots=3, **options):
  return engine.Engine(CFG, params, slots=slots, **options)


def submit(e, prompts, options, **keys):
  requests = [engine.Request(prompt, options, **keys) for prompt in prompts]
  for request in requests:
    e.submit(request)
  return requests


@pytest.mark.parametrize('options', [Options(max_tokens=20), DRAWN], ids=['greedy', 'drawn'])
@pytest.mark.parametrize('ahead', [0, 3])
def test_more_requests_than_slots_each_as_if_alone(params, options, ahead):
  """With tokens proposed from the text or none: they change how fast, not what."""
  e = made(params, ahead=ahead)
  requests = submit(e, PROMPTS, options)
  e.run()
  for request in requests:
    assert request.tokens == alone(params, request.ids, options) and request.reason == 'length'
  assert not e.waiting and e.active == 0


def test_late_requests_join_those_under_way(params):
  e = made(params, slots=4)
  first = submit(e, PROMPTS[:2], DRAWN)
  for _ in range(2):
    e.step()
  second = submit(e, PROMPTS[2:5], DRAWN)
  e.run()
  for request in first + second:
    assert request.tokens == alone(params, request.ids, DRAWN)


def test_a_draft_model_changes_nothing_but_the_steps(params):
  """A draft that is the model itself is always right, another mostly wrong; both give the model's own samples."""
  other = dataclasses.replace(CFG, layers=1)
  for draft, right in (((CFG, params), True), ((other, tiny.params(other, seed=9)), False)):
    for options in (Options(max_tokens=21), DRAWN):
      e = made(params, ahead=3, draft=draft, size=1)
      steps = []
      requests = submit(e, PROMPTS[:3], options, watch=lambda tokens, steps=steps: steps.append(len(tokens)))
      e.run()
      for request in requests:
        assert request.tokens == alone(params, request.ids, options)
      assert (max(steps) == 4) if right else max(steps) <= 4
      if right:
        assert len(steps) <= 3 * (1 + -(-options.max_tokens // 4))


def test_proposals_leave_the_distribution_as_it_is():
  """Pairs of tokens over 3,000 seeds, with a draft that mostly errs: as often as the model says (chi-square)."""
  from llm_jax.models import transformer
  cfg = tiny.model(layers=1, max_length=64, vocab_size=6, tied_embeddings=False)
  params = jax.tree.map(lambda x: 0.3 * x, tiny.params(cfg, seed=2))
  e = engine.Engine(cfg, params, slots=64, ahead=2, draft=(cfg, tiny.params(cfg, seed=7)))
  n, prompt = 3000, [1, 2, 3]
  requests = [engine.Request(prompt, Options(max_tokens=2, temperature=1.0, seed=i)) for i in range(n)]
  for request in requests:
    e.submit(request)
  e.run()
  rows = np.array([[*prompt, a, 0] for a in range(6)], np.int32)
  logits = np.asarray(transformer.logits(cfg, params, rows)).astype(np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = n * p[0, 2][:, None] * p[np.arange(6), 3]
  found = np.zeros((6, 6))
  for request in requests:
    found[tuple(request.tokens)] += 1
  chi = ((found - expected)**2 / expected).sum()
  assert expected.min() > 5 and chi < 66.6                 # 35 degrees of freedom, 0.1%


def test_a_prompt_that_begins_alike_starts_from_the_cache(params):
  """In the slot it was in, or a copy; only with the same salt; and with the same tokens as without."""
  e = made(params)
  long = PROMPTS[3]
  before = submit(e, [long], DRAWN, salt='a')
  e.run()
  again = submit(e, [long + [5, 6], long[:50] + [long[50] ^ 1] + PROMPTS[5]], DRAWN, salt='a')
  stranger, = submit(e, [long + [7]], DRAWN, salt='b')
  e.run()
  assert before[0].cached == 0 and again[0].cached == len(long) and again[1].cached == 50 and stranger.cached == 0
  for request in [*again, stranger]:
    assert request.tokens == alone(params, request.ids, DRAWN)


def test_what_was_generated_is_in_the_cache_too(params):
  """A second turn of a conversation reads only what is new."""
  e = made(params)
  first, = submit(e, [PROMPTS[1]], DRAWN)
  e.run()
  turn = PROMPTS[1] + first.tokens + PROMPTS[0]
  second, = submit(e, [turn], DRAWN)
  e.run()
  assert second.cached == len(PROMPTS[1]) + len(first.tokens) - 1
  assert second.tokens == alone(params, turn, DRAWN)


def test_what_another_is_still_saying_is_shared_but_for_its_newest_token(params):
  e = made(params, size=4)
  first, = submit(e, [PROMPTS[1]], dataclasses.replace(DRAWN, max_tokens=60))
  for _ in range(3):
    e.step()
  said = PROMPTS[1] + first.tokens
  second, = submit(e, [said + [5]], DRAWN)
  e.run()
  assert first.tokens == alone(params, first.ids, first.options)
  assert second.cached == len(said) - 1 and second.tokens == alone(params, second.ids, DRAWN)


def test_cancelled_its_slot_is_free_and_the_others_do_not_notice(params):
  e = made(params, slots=2)
  kept, dropped, waiting = submit(e, PROMPTS[1:4], dataclasses.replace(DRAWN, max_tokens=60))
  e.step()
  e.cancel(dropped)
  assert e.active == 1 and dropped.reason == 'cancelled'
  e.run()
  for request in (kept, waiting):
    assert request.tokens == alone(params, request.ids, request.options)
  gone, = submit(e, [PROMPTS[1]], DRAWN)
  e.cancel(gone)
  assert gone.reason == 'cancelled' and not e.waiting and not e.step()


def test_a_watcher_may_cancel_its_own_request(params):
  e = made(params)
  request, = submit(e, [PROMPTS[1]], DRAWN)
  request.watch = lambda tokens: e.cancel(request)
  e.run()
  assert request.reason == 'cancelled' and e.active == 0


def test_nothing_is_compiled_after_warm_up(params):
  """Whatever comes: short and long, one and many, drawn or greedy, with penalties, biases and log-probabilities."""
  e = made(params, slots=4)
  e.warm_up()
  made_late = [f.jitted() for f in (programs.decode, programs.layer, programs.first, programs.embed)]
  counts = lambda: [f._cache_size() for f in (*made_late, programs.admit, programs.copy_row, programs.resize)]
  before = counts()
  options = [Options(max_tokens=m, temperature=t, **more) for m in (1, 30, 150) for t in (0.0, 1.0) for more in (
      {}, dict(top_p=0.9, typical_p=0.9), dict(presence_penalty=1.0, logit_bias={3: -5.0}, logprobs=3))]
  requests = [submit(e, [PROMPTS[i % 8][:90]], o)[0] for i, o in enumerate(options)]
  for _ in range(3):
    e.step()
  requests += submit(e, [PROMPTS[3] + [1], PROMPTS[3] + [2]], DRAWN)
  e.run()
  assert all(request.reason == 'length' for request in requests)
  assert counts() == before


def test_log_probabilities_are_the_models(params):
  from llm_jax.models import transformer
  e = made(params)
  request, = submit(e, [PROMPTS[1]], dataclasses.replace(DRAWN, logprobs=4))
  plain, = submit(e, [PROMPTS[2]], DRAWN)
  e.run()
  row = np.array([request.ids + request.tokens], np.int32)
  logits_TV = np.asarray(transformer.logits(CFG, params, row))[0].astype(np.float64)
  logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
  for i, (token, (logp, top, top_logp)) in enumerate(zip(request.tokens, request.logprobs)):
    expected = logp_TV[len(request.ids) - 1 + i]
    np.testing.assert_allclose(logp, expected[token], atol=1e-4)
    assert top == np.argsort(-expected, kind='stable')[:4].tolist()
    np.testing.assert_allclose(top_logp, expected[top], atol=1e-4)
  assert len(request.logprobs) == len(request.tokens) and plain.logprobs == []


def test_biases_and_penalties_of_one_row_leave_the_others_alone(params):
  banned = dict.fromkeys(range(1, 64), -100.0)
  e = made(params)
  one, two = submit(e, PROMPTS[1:3], Options(max_tokens=10))
  only, = submit(e, PROMPTS[1:2], Options(max_tokens=10, logit_bias=banned))
  e.run()
  assert only.tokens == [0] * 10
  assert one.tokens == alone(params, one.ids, one.options) and two.tokens == alone(params, two.ids, two.options)
  spread, = submit(e, PROMPTS[1:2], Options(max_tokens=30, presence_penalty=1e3))
  often, = submit(e, PROMPTS[1:2], Options(max_tokens=30, frequency_penalty=1e3))
  e.run()
  assert len(set(spread.tokens)) == len(set(often.tokens)) == 30


def test_on_a_mesh(params):
  mesh = sharding.make_mesh(config_lib.Mesh(fsdp=2, tensor=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.named(mesh, sharding.param_specs(params, mesh)))
    e = engine.Engine(CFG, placed, slots=3, ahead=2)
    requests = submit(e, PROMPTS[:5], Options(max_tokens=12))
    e.run()
  for request in requests:
    assert request.tokens == alone(params, request.ids, request.options)


@pytest.mark.parametrize('ids, message', [
    ([], 'is empty'), ([64], 'not in the vocabulary'), ([1] * 256, 'at most 255')])
def test_what_cannot_be_continued_is_refused_at_once(params, ids, message):
  e = made(params)
  with pytest.raises(ConfigError, match=message):
    e.submit(engine.Request(ids, Options()))
  with pytest.raises(ConfigError, match='stop_ids: expected at most 8'):
    e.submit(engine.Request([1], Options(stop_ids=tuple(range(9)))))


@pytest.mark.parametrize('where', ['_fill_rows', '_dispatch'])
def test_what_is_interrupted_leaves_nothing_wrong_behind(params, where, monkeypatch):
  """Ctrl-C may fall anywhere: the same prompt afterwards is as if it were the first."""
  e, real = made(params), getattr(engine.Engine, where)
  before, = submit(e, PROMPTS[4:5], Options(max_tokens=5))
  e.run()

  def interrupted(*args):
    real(*args)
    raise KeyboardInterrupt
  monkeypatch.setattr(engine.Engine, where, interrupted)
  lost, = submit(e, PROMPTS[3:4], Options(max_tokens=20))
  with pytest.raises(KeyboardInterrupt):
    e.run()
  monkeypatch.undo()
  e.cancel(lost)
  assert lost.reason == 'error' and e.active == 0
  again, other = submit(e, [PROMPTS[3], PROMPTS[4]], Options(max_tokens=20))
  e.run()
  assert again.cached == other.cached == 0 and before.tokens == other.tokens[:5]
  for request in (again, other):
    assert request.tokens == alone(params, request.ids, request.options)
