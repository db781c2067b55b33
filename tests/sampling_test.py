"""Decoding: equal to the full forward pass for every family and mesh, independent of the batch, right in its options.
"""
import dataclasses
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.generate import engine, filters, programs, sampling
from llm_jax.generate.options import Options
from llm_jax.generate.text import TextStream
from llm_jax.models import transformer

LETTERS = tokenizer_lib.Char('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567é')   # 61: a letter per id
PROMPTS = [tiny.tokens(i, n).tolist() for i, n in enumerate((1, 7, 3, 17, 12))]
GREEDY = Options(max_tokens=14)
DRAWN = dict(max_tokens=40, temperature=1.5, top_k=40)
THREE = PROMPTS[:3]     # the tests share shapes, and so compiled programs
hundred = hypothesis.settings(deadline=None, max_examples=100)


@pytest.fixture(scope='module')
def plain():
  """(cfg, params) of one small model."""
  cfg = tiny.model(layers=1, max_length=64, vocab_size=64, tied_embeddings=False)
  return cfg, tiny.params(cfg)


def check_greedy(cfg, params, prompts, generated, start_id=0) -> tuple[int, int]:
  """Asserts that each generated token is the argmax of the full forward pass over all before it. Returns how many
  positions there were, and how many were left out because their two largest logits differ by less than 1e-4."""
  sources, targets = (prompts, [[start_id]] * len(prompts)) if cfg.encoder_layers else (None, prompts)
  rows = [list(p) + g for p, g in zip(targets, generated)]
  inputs = {}
  if sources:
    inputs = dict(source_BS=padded(sources), source_segment_BS=padded([[1] * len(s) for s in sources]))
  if cfg.attention == 'prefix':
    inputs['prefix_BT'] = padded([[True] * len(p) for p in targets], padded(rows).shape[1]).astype(bool)
  forward = tiny.quick_jit(lambda params, token_BT, inputs: transformer.bind(cfg, params)(token_BT, **inputs))
  with jax.default_matmul_precision('highest'):
    logits_BTV = np.asarray(forward(params, padded(rows), inputs))
  positions = ties = 0
  for logits_TV, prompt, row in zip(logits_BTV, targets, rows):
    for t in range(len(prompt), len(row)):
      second, first = np.sort(logits_TV[t - 1])[-2:]
      positions += 1
      if first - second < 1e-4:
        ties += 1
      else:
        assert row[t] == logits_TV[t - 1].argmax(), f'position {t} of {len(row)}'
  print(f'{positions} positions, {ties} of them near ties')
  assert ties <= positions / 1000
  return positions, ties


def padded(rows, length=None):
  out = np.zeros((len(rows), length or max(map(len, rows))), np.int32)
  for i, row in enumerate(rows):
    out[i, :len(row)] = row
  return out


def tokens_of(outputs):
  return [request.tokens for request in outputs]


# Equal to the full forward pass --------------------------------------------------------------------------------------

FAMILIES = dict(        # with further fields; between them they have everything decoding treats apart
    gpt2_124m=dict(layers=2),
    gemma3_1b=dict(tied_embeddings=False, windows=(3, 0), attention_softcap=5.0, logit_softcap=30.0),
    transformer_encoder_decoder=dict(layers=2, tied_embeddings=False),
    alibi_prefix=dict(name='', layers=2, tied_embeddings=False, positions='alibi', attention='prefix'),
    skips_parallel=dict(name='', embedding_skips=True, value_skips=True, parallel_residual=True, kv_heads=1))
OTHERS = ('llama3_8b', 'llama3_2_1b', 'mistral_7b', 'qwen2_5_7b', 'qwen3_8b', 'olmo2_1b', 'phi3_mini')


@pytest.mark.parametrize('family', [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_greedy_with_cache_is_argmax_of_the_full_forward(family):
  cfg = tiny.model(**dict(name=family) | FAMILIES.get(family, {}))
  params = tiny.params(cfg, seed=1)
  generated = tokens_of(sampling.generate_tokens(cfg, params, PROMPTS, GREEDY))
  positions, _ = check_greedy(cfg, params, PROMPTS, generated)
  assert positions == len(PROMPTS) * GREEDY.max_tokens and len(set(sum(generated, []))) > 4


def test_long_prompts_and_many_positions():
  cfg = tiny.model(layers=2, max_length=1024, width=16, heads=2, tied_embeddings=False)
  params = tiny.params(cfg)
  prompts = [tiny.tokens(i, n).tolist() for i, n in enumerate((engine.CHUNKS[-1] + 90, 3, engine.CHUNKS[-1], 200))]
  generated = tokens_of(sampling.generate_tokens(cfg, params, prompts, Options(max_tokens=300)))
  positions, _ = check_greedy(cfg, params, prompts, generated)
  assert positions == 1200


def test_a_mesh_gives_the_tokens_of_one_device(plain):
  cfg, params = plain
  alone = sampling.generate_tokens(cfg, params, PROMPTS, GREEDY)
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh), warnings.catch_warnings():
    warnings.simplefilter('error')                         # a donated buffer that cannot be used
    placed = jax.device_put(params, sharding.named(mesh, sharding.param_specs(params, mesh)))
    before = programs.decode.jitted()._cache_size()
    meshed = sampling.generate_tokens(cfg, placed, PROMPTS, GREEDY, watch=lambda row, tokens: None)
    assert tokens_of(meshed) == tokens_of(alone)
    assert programs.decode.jitted()._cache_size() == before + 1     # five rows on 4 ways; one program for all of it
    model, blocks = programs.unstack(cfg, placed)
    w = blocks[0].mlp.w_up_DF[...]
    assert w.sharding.shard_shape(w.shape) == (cfg.width // 2, cfg.mlp_dim // 2)


def test_the_cache_is_updated_in_place():
  cfg = tiny.model(layers=2)
  e = engine.Engine(cfg, tiny.params(cfg), slots=1)
  state = programs.empty_state(e.plan, 1, 4096, 8, 0)
  args = e.plan, e.weights, None, state, e.rows, np.int32([0]), np.int32(16)
  compiled = programs.decode.jitted().lower(*args).compile()
  one = state['cache'][0][0].nbytes
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= 4 * one             # keys and values of both layers are donated
  assert memory.temp_size_in_bytes < 3 * one               # one layer's keys and values laid out for its two products


# What a row depends on -----------------------------------------------------------------------------------------------

def test_a_row_does_not_depend_on_its_neighbours(plain):
  options = Options(**DRAWN, seed=3)
  together = sampling.generate_tokens(*plain, THREE, options)
  for prompt, expected in zip(THREE, together):
    alone, = sampling.generate_tokens(*plain, [prompt], options)
    assert (alone.tokens, alone.reason) == (expected.tokens, expected.reason)


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed(plain):
  options = Options(**DRAWN, seed=1, n=3)
  three = tokens_of(sampling.generate_tokens(*plain, PROMPTS[1:2], options))
  assert len({tuple(t) for t in three}) == 3
  one_by_one = dataclasses.replace(options, n=1)
  assert tokens_of(sampling.generate_tokens(*plain, PROMPTS[1:2] * 3, one_by_one)) == three
  other = tokens_of(sampling.generate_tokens(*plain, PROMPTS[1:2], dataclasses.replace(options, seed=2)))
  assert not any(t in three for t in other)


def test_more_rows_than_one_batch(plain, monkeypatch):
  expected = tokens_of(sampling.generate_tokens(*plain, THREE, GREEDY))
  monkeypatch.setattr(sampling, 'ROWS', 1)
  seen = [[] for _ in THREE]
  outputs = sampling.generate_tokens(*plain, THREE, GREEDY, watch=lambda row, tokens: seen[row].extend(tokens))
  assert tokens_of(outputs) == expected == seen


# One token -----------------------------------------------------------------------------------------------------------

def rows_for(B, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition=1.0, presence=0.0,
             frequency=0.0, seed=0, biased=False, masked=False, top=-1):
  of = lambda x, dtype: np.full(B, x, dtype)
  return filters.Row(of(temperature, np.float32), of(top_k, np.int32), of(top_p, np.float32), of(min_p, np.float32),
                     of(typical_p, np.float32), of(repetition, np.float32), of(presence, np.float32),
                     of(frequency, np.float32), of(seed, np.uint32), np.arange(B, dtype=np.int32), of(biased, bool),
                     of(masked, bool), of(top, np.int32))


@jax.jit
def sampled(logits_BV, row, vocab_size, count_BV, seen_BV, bias_BV, allowed_BW):
  return filters.sample(logits_BV, jnp.full(len(logits_BV), 7), row, vocab_size, count_BV, seen_BV, bias_BV, allowed_BW)


def sample(logits_BV, row, vocab_size=None, count_BV=None, seen_BV=None, bias_BV=None, allowed_BW=None):
  B, V = logits_BV.shape
  given = lambda x, dtype, n=V: np.zeros((B, n), dtype) if x is None else x
  return np.asarray(sampled(logits_BV, row, vocab_size or V, given(count_BV, np.int32), given(seen_BV, bool),
                            given(bias_BV, np.float32), given(allowed_BW, np.uint32, -(-V // 32))))


KEEP = jax.jit(filters.keep)


@hundred
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from([0.05, 0.3, 0.9, 1.0]))
def test_ranked_filters_keep_what_their_definitions_say(seed, k, p):
  logits = np.random.default_rng(seed).normal(0, 3, 10)
  kept = np.asarray(KEEP(jnp.asarray(logits, jnp.float32)[None], rows_for(1, top_k=k, top_p=p)))[0] > -np.inf
  order = np.argsort(-logits)[:k or None]
  chances = np.exp(logits[order]) / np.exp(logits[order]).sum()
  before = np.concatenate([[0], np.cumsum(chances)[:-1]])
  hypothesis.assume(p == 1 or np.abs(before - p).min() > 1e-5)
  assert set(np.flatnonzero(kept)) == set(order[(before < p) | (p == 1)])


@hundred
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 0.9]))
def test_typical_keeps_what_its_definition_says(seed, p):
  """The tokens whose surprise is nearest to the entropy, until they have the share."""
  logits = np.random.default_rng(seed).normal(0, 3, 10)
  kept = np.asarray(KEEP(jnp.asarray(logits, jnp.float32)[None], rows_for(1, typical_p=p)))[0] > -np.inf
  chances = np.exp(logits) / np.exp(logits).sum()
  distance = np.abs(-np.log(chances) + (chances * np.log(chances)).sum())
  order = np.argsort(distance)
  before = np.concatenate([[0], np.cumsum(chances[order])[:-1]])
  hypothesis.assume(np.abs(before - p).min() > 1e-5 and np.diff(np.sort(distance)).min() > 1e-5)
  assert set(np.flatnonzero(kept)) == set(order[before < p])


def test_samples_follow_the_distribution_after_temperature_and_min_p():
  B, logits = 4000, np.array([2.0, 1.5, 0.3, -1.0, 9.0], np.float32)
  draw = lambda **options: np.bincount(sample(jnp.tile(logits, (B, 1)), rows_for(B, **options), vocab_size=4),
                                       minlength=5) / B                # id 4 is beyond the vocabulary
  expected = np.exp(logits[:4] / 0.7)
  np.testing.assert_allclose(draw(temperature=0.7)[:4], expected / expected.sum(), atol=0.03)
  expected[2:] = 0                                         # below 0.3 of the likeliest
  np.testing.assert_allclose(draw(temperature=0.7, min_p=0.3), [*expected / expected.sum(), 0], atol=0.03)


def test_repetition_penalty(plain):
  cfg, params = plain
  penalty, row = 1.7, list(PROMPTS[1])
  forward = tiny.quick_jit(lambda params, token_BT: transformer.bind(cfg, params)(token_BT))
  for _ in range(10):
    logits = np.array(forward(params, padded([row], 20))[0, len(row) - 1])
    seen = sorted(set(row))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    row.append(int(logits.argmax()))
  options = Options(max_tokens=10, repetition_penalty=penalty)
  assert tokens_of(sampling.generate_tokens(cfg, params, PROMPTS[1:2], options)) == [row[len(PROMPTS[1]):]]
  assert row[len(PROMPTS[1]):] != tokens_of(sampling.generate_tokens(cfg, params, PROMPTS[1:2], GREEDY))[0][:10]


def test_ids_beyond_the_vocabulary_are_never_sampled(plain):
  cfg, params = plain
  for options in (GREEDY, Options(max_tokens=40, temperature=50.0, top_p=0.99)):
    outputs = sampling.generate_tokens(cfg, params, [[1, 2]] * 3, options, vocab_size=5)
    assert max(sum(tokens_of(outputs), [])) < 5


# Text ----------------------------------------------------------------------------------------------------------------

@hundred
@hypothesis.given(st.one_of(st.text(), st.text('ab\n'), st.binary()), st.lists(st.text('ab\n', min_size=1), max_size=3),
                  st.integers(1, 5))
def test_streamed_text_is_whole_characters_before_the_first_stop(text, stops, every):
  data = text if isinstance(text, bytes) else text.encode()
  stream, shown, whole = TextStream(tokenizer_lib.Byte(), [256], tuple(stops)), '', data.decode('utf-8', 'replace')
  for i, byte in enumerate(data):
    if stream.push(byte):
      break
    if i % every == 0:
      shown += stream.fresh()
      assert whole.startswith(shown)                       # no U+FFFD that a further byte takes back
  shown += stream.finish('stop')
  ends = [whole.index(s) + len(s) for s in stops if s in whole]
  expected = whole
  if ends:                                                 # the earliest start among those that are complete first
    expected = whole[:min(whole.index(s) for s in stops if s in whole and whole.index(s) < min(ends))]
    expected = whole[:min(whole[:min(ends)].index(s) for s in stops if s in whole[:min(ends)])]
  assert shown == stream.text == expected


def test_a_character_cut_by_the_length_is_dropped():
  stream = TextStream(tokenizer_lib.Byte(), [256])
  for byte in 'é€'.encode()[:-1]:
    stream.push(byte)
  assert stream.fresh() == 'é' and stream.finish('length') == '' and stream.text == 'é'


def test_stop_strings_streaming_and_not(plain):
  full = sampling.generate(*plain, LETTERS, ['abc'], **DRAWN)[0]
  assert full.finish_reason == 'length' and len(full.text) == len(full.tokens) == 40 and full.n_prompt_tokens == 3
  stop = next(full.text[i:i + 3] for i in range(15, 30) if full.text.index(full.text[i:i + 3]) == i)   # of three tokens
  at = full.text.index(stop)
  pieces = []
  for on_text in (None, lambda row, text: pieces.append(text)):
    result = sampling.generate(*plain, LETTERS, 'abc', **DRAWN, stop=[stop, 'never'], on_text=on_text)[0]
    assert (result.text, result.finish_reason) == (full.text[:at], 'stop')
    assert result.tokens == full.tokens[:at + 3]
  assert ''.join(pieces) == full.text[:at] and len(pieces) > 1


def test_stop_ids(plain):
  full = sampling.generate(*plain, LETTERS, ['abc'], **DRAWN)[0].tokens
  last = next(t for i, t in enumerate(full) if i > 4 and full.index(t) == i)
  result = sampling.generate(*plain, LETTERS, ['abc'], **DRAWN, stop_ids=(last,))[0]
  assert result.tokens == full[:full.index(last) + 1] and result.finish_reason == 'stop'
  assert result.text == LETTERS.decode(result.tokens[:-1])
  one = sampling.generate(*plain, LETTERS, ['abc'], **DRAWN, stop_ids=(full[0],))[0]
  assert (one.tokens, one.text, one.finish_reason) == ([full[0]], '', 'stop')


def test_many_texts_are_streamed_to_their_rows(plain):
  pieces, prompts, options = {}, ['abc', 'Z', 'abc'], dict(DRAWN, stop='a')
  results = sampling.generate(*plain, LETTERS, prompts, **options,
                              on_text=lambda row, text: pieces.update({row: pieces.get(row, '') + text}))
  assert [r.text for r in results] == [pieces.get(i, '') for i in range(3)]
  assert [r.n_prompt_tokens for r in results] == [3, 1, 3] and results[0].text != results[2].text
  assert not any('a' in r.text for r in results) and any(r.finish_reason == 'stop' for r in results)
  assert [r.text for r in results] == [r.text for r in sampling.generate(*plain, LETTERS, prompts, **options)]


def test_texts_begin_with_bos():
  cfg = tiny.model(layers=1, vocab_size=320)
  params, byte = tiny.params(cfg), tokenizer_lib.Byte()
  texts = sampling.generate(cfg, params, byte, ['hi', ''], max_tokens=5, stop_ids=())
  ids = sampling.generate(cfg, params, byte, [[256, *b'hi'], [256]], max_tokens=5, stop_ids=())
  assert [(r.tokens, r.n_prompt_tokens) for r in texts] == [(r.tokens, r.n_prompt_tokens) for r in ids]
  assert texts[0].n_prompt_tokens == 3


# Errors --------------------------------------------------------------------------------------------------------------

def test_a_prompt_may_fill_all_but_one_position(plain):
  cfg, params = plain
  result = sampling.generate(cfg, params, LETTERS, ['a' * 60], max_tokens=50)[0]
  assert len(result.tokens) == 4 and result.finish_reason == 'length'
  with pytest.raises(ConfigError, match=r'prompt 1: has 64 tokens, expected at most 63\b'):
    sampling.generate(cfg, params, LETTERS, ['a', 'a' * 64])


@pytest.mark.parametrize('prompt,options,message', [
    ('', {}, r'prompt 0: is empty'), ([], {}, r'prompt 0: is empty'), ([61], {}, r'prompt 0: token id 61 .* 61'),
    ('a', dict(temperature=-1), r'temperature: expected 0 \(greedy\) or more, got -1'),
    ('a', dict(temperature=float('nan')), r'temperature: expected'), ('a', dict(top_p=0), r'top_p: expected above 0'),
    ('a', dict(max_tokens=0), r'max_tokens: expected at least 1, got 0'), ('a', dict(stop=['']), r'stop: expected'),
    ('a', dict(temprature=1), r"temprature: no such option; nearest: 'temperature'")])
def test_wrong_requests_are_refused(plain, prompt, options, message):
  with pytest.raises(ConfigError, match=message) as e:
    sampling.generate(*plain, LETTERS, [prompt], **options)
  assert '\n' not in str(e.value)


def test_a_bidirectional_model_cannot_generate(plain):
  with pytest.raises(ConfigError, match="config.model.attention: a 'bidirectional' model"):
    sampling.generate(dataclasses.replace(plain[0], attention='bidirectional'), plain[1], LETTERS, ['a'])
