"""Every family against the float64 reference; scan, remat, packing, decoding, meshes against the plain forward."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from tiny import model, params, quick_jit, shapes, tokens

from llm_jax import sharding
from llm_jax.config import ConfigError, Mesh
from llm_jax.models import layers, quantize, transformer
from llm_jax.planner import program

FAMILIES = {
    'transformer': dict(), 'gpt2_124m': dict(), 'llama3_8b': dict(), 'llama3_2_1b': dict(rope_original_length=20),
    'mistral_7b': dict(), 'qwen2_5_0_5b': dict(), 'qwen3_0_6b': dict(), 'gemma2_2b': dict(),
    'gemma3_4b': dict(layers=5, windows=(3, 3, 0), rope_base=100.0, rope_base_local=20.0), 'olmo2_1b': dict(),
    'phi3_mini': dict(), 'mixtral_8x7b': dict(), 'olmoe_1b_7b': dict(),
    'experts, shared, sigmoid, bias, scale': dict(
        mlp='swiglu', experts=5, experts_per_token=2, expert_dim=20, shared_experts=2, router='sigmoid',
        router_bias=True, router_scale=2.5, expert_capacity=0.1),        # capacity: in training only
    'yarn, partial rotation, parallel': dict(
        rope_scaling='yarn', rope_factor=4.0, rope_original_length=12, rope_base=50.0, rope_fraction=0.5, head_dim=16,
        rope_beta_fast=2.0, parallel_residual=True, mlp='relu2', mlp_bias=True, attention_scale=0.3),
    'alibi, prefix, skips': dict(
        positions='alibi', attention='prefix', mlp='gelu_exact', embedding_norm=True, norm_learned=False,
        value_skips=True, embedding_skips=True, logit_softcap=2.0, kv_heads=1),
}


@pytest.mark.parametrize('name', FAMILIES)
def test_packed_family_is_the_reference_of_each_document_alone(name):
  """Three documents packed into a row with padding: each one's logits are those of the reference, which never saw the
  others; a second row holds one document. Proves the family's arithmetic and that packing changes nothing."""
  cfg = model('' if ',' in name else name, **FAMILIES[name])
  values, token_BT = params(cfg), tokens(1, 2, 12)
  lengths, prefixes = [[5, 4, 2], [12]], [[3, 2, 0], [4]]        # 1 of the first row's tokens is padding
  segment_BT, position_BT, prefix_BT = np.zeros((3, 2, 12), int)
  for b, start, n, length, prefix in spans(lengths, prefixes):
    segment_BT[b, start:start + length], position_BT[b, start:start + length] = n + 1, range(length)
    prefix_BT[b, start:start + prefix] = 1

  inputs = dict(position_BT=position_BT, segment_BT=segment_BT)
  if cfg.attention == 'prefix':
    inputs['prefix_BT'] = prefix_BT.astype(bool)
  got_BTV = quick_jit(lambda p: transformer.bind(cfg, p)(token_BT, **inputs))(values)
  assert got_BTV.dtype == jnp.float32
  for b, start, _, length, prefix in spans(lengths, prefixes):
    want_TV = reference.forward(cfg, values, token_BT[b, start:start + length], prefix)
    np.testing.assert_allclose(got_BTV[b, start:start + length], want_TV, rtol=0, atol=2e-6 * np.abs(want_TV).max())


def spans(lengths, prefixes):
  for b, row in enumerate(lengths):
    for n, length in enumerate(row):
      yield b, sum(row[:n]), n, length, prefixes[b][n]


@pytest.mark.parametrize('name', ['gpt2_124m', 'gemma2_2b', 'transformer'])
def test_plain_forward_is_the_reference(name):
  cfg = model(name)
  values, token_BT = params(cfg), tokens(1, 2, 11)
  got_BTV = quick_jit(lambda p: transformer.bind(cfg, p)(token_BT))(values)
  for row_T, got_TV in zip(token_BT, got_BTV):
    want_TV = reference.forward(cfg, values, row_T)
    np.testing.assert_allclose(got_TV, want_TV, rtol=0, atol=2e-6 * np.abs(want_TV).max())


@pytest.mark.parametrize('fields', [dict(), dict(norm_position='before', parallel_residual=True, qk_norm='head')])
def test_encoder_decoder_is_the_reference(fields):
  """Sources of different lengths, padded."""
  cfg = model('transformer_encoder_decoder', layers=2, **fields)
  values, token_BT, source_BS = params(cfg), tokens(1, 2, 6), tokens(2, 2, 8)
  segment_BS = np.array([[1] * 8, [1] * 5 + [0] * 3])
  inputs = dict(source_BS=source_BS, source_segment_BS=segment_BS)
  got_BTV = quick_jit(lambda p: transformer.bind(cfg, p)(token_BT, **inputs))(values)
  for b, length in enumerate((8, 5)):
    want_TV = reference.forward(cfg, values, token_BT[b], source=source_BS[b, :length])
    np.testing.assert_allclose(got_BTV[b], want_TV, rtol=0, atol=1e-5)


# Rotary scalings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fields', [
    dict(), dict(rope_fraction=0.25), dict(rope_scaling='linear', rope_factor=8.0),
    dict(rope_scaling='llama3', rope_factor=8.0, rope_original_length=8192),
    dict(rope_scaling='yarn', rope_factor=4.0, rope_original_length=32_768),
    dict(rope_scaling='yarn', rope_factor=16.0, rope_original_length=4096, rope_attention_factor=1.0,
         rope_fraction=0.5),
])
def test_rope_scalings_at_real_sizes(fields):
  cfg = model(heads=2, head_dim=128, rope_base=500_000.0, **fields)
  freq, factor = layers.rope_frequencies(cfg, cfg.rope_base)
  want, want_factor = reference.rope(cfg, cfg.rope_base)
  np.testing.assert_allclose(freq, want, rtol=1e-12)
  assert factor == pytest.approx(want_factor, rel=1e-12)
  assert layers.rope_frequencies(cfg, 10_000.0, scaled=False)[0][1] == pytest.approx(10_000 ** (-1 / len(freq)))


def test_rope_scaling_ends_are_the_papers():
  """Fast pairs are kept, slow pairs divided by the factor, others in between; YaRN's temperature is 0.1 ln s + 1."""
  for scaling in ('llama3', 'yarn'):
    cfg = model(head_dim=128, rope_base=500_000.0, rope_scaling=scaling, rope_factor=8.0, rope_original_length=8192)
    plain = 500_000.0 ** (-np.arange(64) / 64)
    ratio = layers.rope_frequencies(cfg, 500_000.0)[0] / plain
    assert ratio[0] == 1 and ratio[-1] == 1 / 8 and (np.diff(ratio) <= 0).all() and len(set(ratio)) > 5
  assert layers.rope_frequencies(cfg, 500_000.0)[1] == pytest.approx(0.1 * math.log(8) + 1)


# One forward, several ways to run it --------------------------------------------------------------------------------

DEEP = model(layers=4, windows=(3, 0), value_skips=True, embedding_skips=True, dropout=0.2, unroll=True,
             logit_softcap=5.0)


def loss_and_grads(cfg, values, token_BT, key, jit=quick_jit):
  """(logits, gradients), both as NumPy."""
  @jit
  def run(values, token_BT, key):
    def loss(values):
      logits_BTV = transformer.bind(cfg, values)(token_BT, key=key)
      return jnp.square(jax.nn.log_softmax(logits_BTV)).mean(), logits_BTV
    grads, logits_BTV = jax.grad(loss, has_aux=True)(values)
    return logits_BTV, grads
  return jax.tree.map(np.asarray, run(values, token_BT, key))


@functools.cache
def deep_baseline():
  return loss_and_grads(DEEP, params(DEEP), tokens(1, 2, 8), jax.random.key(3))


def assert_close(got, want, tolerance=1e-5):
  """Every leaf to `tolerance` of its norm."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize('unroll, remat', [(False, 'none'), (False, 'dots'), (True, 'full'), (False, 'offload')])
def test_scan_and_remat_change_nothing(unroll, remat):
  """Two repeats of a window pattern, with dropout: values and gradients of unrolled layers without remat."""
  cfg = dataclasses.replace(DEEP, unroll=unroll, remat=remat)
  got = loss_and_grads(cfg, params(DEEP), tokens(1, 2, 8), jax.random.key(3))
  assert_close(got, deep_baseline())


def test_remat_computes_again_what_it_does_not_keep():
  def products(remat):
    cfg = model(layers=2, remat=remat)
    run = lambda p: transformer.bind(cfg, p)(tokens(1, 2, 8)).sum()
    return str(jax.make_jaxpr(jax.grad(run))(shapes(cfg))).count('dot_general')
  assert products('full') > products('dots') > products('none')   # dots: only attention, with its batch axes


def test_layers_one_by_one_are_the_scan():
  """taps run the layers unstacked, and hold what they are named for."""
  taps, values, token_BT = {}, params(DEEP), tokens(1, 2, 8)

  @quick_jit
  def run(values):
    found = {}
    return transformer.bind(DEEP, values)(token_BT, key=jax.random.key(3), taps=found), found
  logits_BTV, taps = run(values)
  np.testing.assert_allclose(logits_BTV, deep_baseline()[0], atol=1e-5)
  assert set(taps) == {f'layer{i}/{n}' for i in range(4) for n in ('attention_weights', 'attention', 'mlp', 'residual')}
  weight_BNTS = np.asarray(taps['layer0/attention_weights'])
  assert weight_BNTS.shape == (2, 4, 8, 8)
  q, k = np.mgrid[:8, :8]
  assert ((weight_BNTS > 0) == ((k <= q) & (q - k < 3))).all()          # layer 0 has the window of 3, layer 1 has none
  assert ((np.asarray(taps['layer1/attention_weights']) > 0) == (k <= q)).all()


def test_decoding_with_a_cache_is_the_forward():
  cfg = model('gemma3_1b', layers=3, windows=(3, 0), value_skips=True, embedding_skips=True)
  values, token_BT = params(cfg), tokens(1, 2, 8)
  whole = quick_jit(lambda p: transformer.bind(cfg, p)(token_BT))(values)
  K, H = cfg.kv_heads, cfg.head_dim
  empty = [(jnp.zeros((2, K, H, 10)), jnp.zeros((2, K, 10, H))) for _ in range(cfg.layers)]

  @quick_jit
  def step(values, token_BT, start_B, cache):
    bound = transformer.bind(cfg, values)
    x_BTD, cache = bound.decode(bound.layers(), token_BT, start_B, cache)
    return bound.logits(x_BTD), cache
  cache, parts = empty, []
  for t in range(0, 8, 2):
    logits, cache = step(values, token_BT[:, t:t + 2], np.full(2, t), cache)
    parts.append(logits)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


MESHES = [Mesh(2, 2, 2), Mesh(1, 2, 4)]


@pytest.mark.parametrize('mesh', MESHES, ids=lambda m: f'{m.data}x{m.fsdp}x{m.tensor}')
def test_a_mesh_changes_nothing(mesh, capfd):
  """Logits and gradients, dropout mask included; and the partitioner never falls back to full rematerialisation."""
  cfg = dataclasses.replace(model('qwen3_0_6b', layers=2, vocab_size=64), dropout=0.3)
  values, token_BT, key = params(cfg), tokens(1, 8, 8), jax.random.key(3)
  want = mesh_baseline(cfg)
  mesh = sharding.make_mesh(mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(values, sharding.named(mesh, sharding.param_specs(values, mesh)))
    got = loss_and_grads(cfg, placed, sharding.put_batch(dict(token_BT=token_BT), mesh)['token_BT'], key)
  assert_close(got, want)
  assert 'rematerialization' not in capfd.readouterr().err


@functools.cache
def mesh_baseline(cfg):
  return loss_and_grads(cfg, params(cfg), tokens(1, 8, 8), jax.random.key(3))


# Fields of the config -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rows', [8, 128])
@pytest.mark.parametrize('spec, w_shapes', [('BTD,DNH->BTNH', [(6, 2, 4), (6, 1, 4), (6, 1, 4)]),
                                            ('BTNH,NHD->BTD', [(2, 4, 6)]), ('BTD,DF->BTF', [(6, 10), (6, 10)])])
def test_projections_are_einsums(spec, w_shapes, rows):
  """Joined, transposed ahead, or by few rows: values and gradients are those of each einsum alone."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x = draw(2, rows // 2, *([6] if 'BTD,' in spec else [2, 4]))
  ws = [draw(*shape) for shape in w_shapes]
  total = lambda outs: sum((jnp.sin(y) * (i + 1)).sum() for i, y in enumerate(outs))
  grads = lambda f: jax.grad(lambda x, ws: total(f(x, ws)), argnums=(0, 1))(x, ws)
  einsums = lambda x, ws: [jnp.einsum(spec, x, w) for w in ws]
  got = layers.project(spec, False, x, *ws), grads(lambda x, ws: layers.project(spec, False, x, *ws))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((einsums(x, ws), grads(einsums))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_keeps_the_mean():
  x = jnp.ones((64, 64))
  dropped = layers.dropout(x, 0.25, jax.random.key(0))
  assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
  assert 0.7 < (dropped > 0).mean() < 0.8
  assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x
  cfg = model(layers=1, dropout=0.25)
  values, token_BT = params(cfg), tokens(1, 2, 8)
  run = quick_jit(lambda p, key: transformer.bind(cfg, p)(token_BT, key=key))
  a, b = run(values, jax.random.key(3)), run(values, jax.random.key(4))
  assert (a == run(values, jax.random.key(3))).all() and not np.allclose(a, b)
  program = lambda cfg: str(jax.make_jaxpr(lambda p: transformer.bind(cfg, p)(token_BT))(shapes(cfg)))
  assert program(cfg) == program(dataclasses.replace(cfg, dropout=0.0))           # without a key nothing is dropped


def test_initial_values():
  cfg = model(layers=2, width=128, heads=2, head_dim=64, mlp_dim=512, vocab_size=1000, tied_embeddings=False,
              zero_init=True,
              norm_unit_offset=True, value_skips=True, embedding_skips=True, attention_bias=True)
  values = quick_jit(lambda: transformer.init(cfg, jax.random.key(0)))()
  block = values['blocks0']
  for zero in (values['unembed_DV'], block['attention']['w_o_NHD'], block['mlp']['w_down_FD'],
               block['norm_mlp']['scale_D'], block['attention']['b_q_NH'], block['skip_embed_D']):
    assert not zero.any()
  assert (block['skip_x_D'] == 1).all() and (block['attention']['value_mix_K'] == 0.5).all()
  assert np.std(values['embed_VD']) == pytest.approx(0.02, rel=0.02)
  assert np.std(block['attention']['w_q_DNH']) == pytest.approx(128**-0.5, rel=0.02)
  assert np.std(block['mlp']['w_up_DF']) == pytest.approx(128**-0.5, rel=0.02)
  assert not np.array_equal(block['mlp']['w_up_DF'][0], block['mlp']['w_up_DF'][1])     # layers differ


def test_projections_into_the_residual_shrink_with_depth():
  cfg = model(layers=8)
  assert layers.out_std(cfg, 48) == pytest.approx(48**-0.5 / 4)
  assert transformer.out_init(cfg) == pytest.approx(32**-0.5)


def test_bind_casts_matrices_only():
  """Norm scales stay float32 whatever their axes; logits are float32 from bfloat16 matrices."""
  cfg = model('olmo2_1b', dtype='bfloat16', attention_bias=True)
  bound = jax.eval_shape(lambda p: transformer.bind(cfg, p), shapes(cfg))
  attention = bound.blocks0.attention
  assert bound.embed_VD.dtype == attention.w_q_DNH.dtype == bound.blocks0.mlp.w_up_DF.dtype == jnp.bfloat16
  assert attention.norm_q.scale_NH.dtype == attention.b_q_NH.dtype == bound.norm_final.scale_D.dtype == jnp.float32
  out = jax.eval_shape(lambda p: transformer.bind(cfg, p)(tokens(1, 2, 8)), shapes(cfg))
  assert out.shape == (2, 8, 61) and out.dtype == jnp.float32
  hidden = jax.eval_shape(lambda p: transformer.bind(cfg, p).hidden(tokens(1, 2, 8)), shapes(cfg))
  assert hidden.dtype == jnp.bfloat16


def test_unused_parameters_are_not_made():
  """Every parameter of an encoder-decoder gets a gradient, wherever its norms lie."""
  for position in ('before', 'after', 'both', 'post'):
    cfg = model('transformer_encoder_decoder', norm_position=position)
    cross = {name for name in shapes(cfg)['blocks0'] if name.startswith('norm_cross')}
    assert cross == {name.replace('mlp', 'cross') for name in shapes(cfg)['blocks0'] if name.startswith('norm_mlp')}


def test_wrong_inputs_are_one_line():
  cfg = model('gpt2_124m', max_length=8)
  with pytest.raises(ConfigError, match='config.model.max_length: 9 tokens are more than its 8 learned positions'):
    jax.eval_shape(lambda p: transformer.bind(cfg, p)(tokens(1, 1, 9)), shapes(cfg))
  with pytest.raises(ConfigError, match='config.model.encoder_layers: 0; a source .* was given'):
    jax.eval_shape(lambda p: transformer.bind(cfg, p)(tokens(1, 1, 4), source_BS=tokens(1, 1, 4)), shapes(cfg))
  cfg = model('transformer_encoder_decoder')
  with pytest.raises(ConfigError, match='config.model.encoder_layers: 2; a source .* was missing'):
    jax.eval_shape(lambda p: transformer.bind(cfg, p)(tokens(1, 1, 4)), shapes(cfg))


def test_stacks_cover_the_depth_in_order():
  assert transformer.stacks(model(layers=26, windows=(4,) * 5 + (0,))) == (
      [(f'blocks{i}', 4, 4) for i in range(5)] + [('blocks5', 0, 4), ('tail0', 4, 1), ('tail1', 4, 1)])
  assert transformer.stacks(model(layers=6, windows=(4, 4))) == [('blocks0', 4, 6)]
  assert transformer.stacks(model(layers=1, windows=(4, 0))) == [('tail0', 4, 1)]


def test_encoder_decoder_learns_to_reverse():
  """The original Transformer on random sequences: greedy decoding gives at least 99% of the reversed tokens."""
  T, V, steps = 8, 16, 300
  cfg = model('transformer_encoder_decoder', layers=1, encoder_layers=1, heads=2, mlp_dim=64, vocab_size=V, unroll=True)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 50, steps))
  run = lambda values, source_BS, token_BT: transformer.bind(cfg, values)(token_BT, source_BS=source_BS)

  def loss(values, source_BS, token_BT):                               # 0 begins the output
    logits_BTV = run(values, source_BS, token_BT[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, token_BT[:, 1:]).mean()

  @quick_jit
  def step(values, state, source_BS, token_BT):
    updates, state = optimizer.update(jax.grad(loss)(values, source_BS, token_BT), state)
    return optax.apply_updates(values, updates), state

  def init():
    values = transformer.init(cfg, jax.random.key(0))
    return values, optimizer.init(values)

  def batch(i):
    source_BS = tokens(i, 32, T, vocab=V - 1) + 1
    return source_BS, np.pad(source_BS[:, ::-1], ((0, 0), (1, 0)))

  carry = quick_jit(init)()
  step = step.lower(*carry, *batch(0)).compile()                       # with compiler options a jit call is slow
  for i in range(steps):
    carry = step(*carry, *batch(i))

  source_BS, token_BT = tokens(steps, 256, T, vocab=V - 1) + 1, np.zeros((256, T + 1), np.int32)
  predict = quick_jit(lambda values, token_BT: run(values, source_BS, token_BT).argmax(-1))
  for t in range(T):
    token_BT[:, t + 1] = predict(carry[0], token_BT[:, :T])[:, t]
  assert (token_BT[:, 1:] == source_BS[:, ::-1]).mean() >= 0.99


@pytest.mark.parametrize('layer', [False, True])
@pytest.mark.parametrize('axes', [(-1,), (-2, -1)])
@pytest.mark.parametrize('learned', [False, True])
def test_a_norms_gradient_is_that_of_its_definition(layer, axes, learned):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, g = draw(2, 3, 4, 8) + 0.5, draw(2, 3, 4, 8)
  scale = draw(1, 1, *(1, 4)[len(axes) - 1:len(axes)], 8) if learned else None

  def plain(x, scale):
    y = x - x.mean(axes, keepdims=True) if layer else x
    y = y / jnp.sqrt((y ** 2).mean(axes, keepdims=True) + 1e-3)
    return y if scale is None else y * scale
  out, pull = jax.vjp(lambda *a: layers.normalise(layer, 1e-3, axes, *a), x, scale)
  want, pull_plain = jax.vjp(plain, x, scale)
  np.testing.assert_allclose(out, want, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), pull(g), pull_plain(g))


def test_products_in_a_wider_dtype_and_gates_have_the_gradients_of_their_definitions():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  wide = lambda *a: [x.astype(jnp.float32) for x in a]
  for spec, x, w, g in (('BTD,VD->BTV', draw(2, 4, 16), draw(8, 16), draw(2, 4, 8)),
                        ('BKGTH,BKSH->BKGTS', draw(2, 2, 3, 4, 16), draw(2, 2, 5, 16), draw(2, 2, 3, 4, 5))):
    out, pull = jax.vjp(lambda x, w, spec=spec: quantize.einsum(spec, x, w, jnp.float32), x, w)
    want, pull_wide = jax.vjp(lambda x, w, spec=spec: jnp.einsum(spec, x, w), *wide(x, w))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, want, atol=1e-4)
    for got, exact in zip(pull(*wide(g)), pull_wide(*wide(g))):
      np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))
  h, gate, g = wide(draw(2, 4, 8), draw(2, 4, 8), draw(2, 4, 8))
  for kind in ('swiglu', 'geglu'):
    got, want = (jax.vjp(f, h, gate) for f in (functools.partial(layers.gated, kind),
                                               lambda h, gate, kind=kind: h * layers.ACTIVATIONS[kind](gate)))
    for a, b in zip((got[0], *got[1](g)), (want[0], *want[1](g))):
      np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('more, bytes_per_width', [
    (dict(norm='layer', mlp='gelu'), 2 * (2 + 4 + 2 + 2 * 4)),                    # two norms, q k v o, MLP twice
    (dict(norm='rms', mlp='swiglu', qk_norm='head'), 2 * (2 + 4 + 2 + 2 + 3 * 4))])
def test_a_layer_keeps_little_in_bfloat16(more, bytes_per_width):
  """For the backward pass, without recomputation: no array in float32 but numbers of a position or a head."""
  cfg = model(layers=3, width=64, heads=1, head_dim=64, kv_heads=1, mlp_dim=256, dtype='bfloat16', remat='none', **more)
  weights = transformer.init(cfg, jax.random.key(0))
  loss = lambda w: transformer.bind(cfg, w)(jnp.zeros((8, 4), jnp.int32)).sum()
  kept = program.kept_bytes(jax.make_jaxpr(jax.grad(loss))(weights).jaxpr, {3}) / (3 * 32 * 64)
  assert bytes_per_width <= kept < 1.2 * bytes_per_width
