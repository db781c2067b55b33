"""Who sees whom, and every kernel against the plain one: values, gradients, the choice and its reasons."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import model, params, quick_jit

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.config import ConfigError, Mesh
from llm_jax.models import attention, layers, transformer
from llm_jax.models.attention import (
  BLOCK,
  attend_causal,
  attend_cudnn,
  attend_splash,
  attend_triton,
  attend_xla,
  choose,
)
from llm_jax.models.layers import alibi_slopes
from llm_jax.models.view import View, visible
from llm_jax.train import optimizer, step

SEGMENT_BT = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])      # two documents of five tokens, two of padding
POSITION_BT = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]])
PREFIX_BT = np.array([[1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]], bool)


def sees(kind, window, q, k, prefix=PREFIX_BT[0], segment=SEGMENT_BT[0]):
  """The rule in words: same document, not after the query unless bidirectional or in the prefix, within the window."""
  if segment[q] != segment[k]:
    return False
  if kind == 'bidirectional':
    return not window or abs(q - k) < window
  return (k <= q or (kind == 'prefix' and bool(prefix[k]))) and (not window or q - window < k)


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('kind', ['causal', 'prefix', 'bidirectional'])
def test_visible_is_the_rule(kind, window):
  view = View(kind, segment_BT=SEGMENT_BT, key_segment_BS=SEGMENT_BT, prefix_BS=PREFIX_BT)
  mask_TS = visible(view, window, 12, 12)[0]
  assert mask_TS.tolist() == [[sees(kind, window, q, k) for k in range(12)] for q in range(12)]
  assert visible(View('bidirectional'), 0, 12, 12) is None


LEAKS = {                                    # every kind of attention, window and position, with what else could leak
    'causal, rotary, qk norm, value and embedding skips': dict(qk_norm='full', value_skips=True, embedding_skips=True),
    'window, rotary with a local base': dict(windows=(3, 0), rope_base_local=100.0, attention_softcap=5.0),
    'window, learned, layer norm': dict(windows=(2,), positions='learned', norm='layer', norm_bias=True),
    'causal, alibi, parallel': dict(positions='alibi', parallel_residual=True),
    'prefix, sinusoidal': dict(attention='prefix', positions='sinusoidal'),
    'prefix, window, alibi': dict(attention='prefix', positions='alibi', windows=(4,), norm_position='both'),
    'bidirectional, learned': dict(attention='bidirectional', positions='learned', norm_position='post'),
    'bidirectional, window, none': dict(attention='bidirectional', positions='none', windows=(2,)),
}


@pytest.mark.parametrize('name', LEAKS)
def test_gradients_reach_exactly_what_may_be_seen(name):
  """Every token is its own row of the embedding, so d output[t] / d row[s] is zero exactly where t must not see s."""
  cfg = model(layers=2, vocab_size=12, tied_embeddings=False, width=16, unroll=True, **LEAKS[name])
  prefix_BT = PREFIX_BT if cfg.attention == 'prefix' else None
  weight_TV = np.random.default_rng(1).normal(size=(12, 12)).astype(np.float32)

  @quick_jit
  def jacobian_TVD(values):
    def outputs_T(embed_VD):
      bound = transformer.bind(cfg, dict(values, embed_VD=embed_VD))
      logits_BTV = bound(np.arange(12)[None], position_BT=POSITION_BT, segment_BT=SEGMENT_BT, prefix_BT=prefix_BT)
      return (logits_BTV[0] * weight_TV).sum(-1)
    return jax.jacrev(outputs_T)(values['embed_VD'])

  got = np.abs(jacobian_TVD(params(cfg))).sum(-1) > 0
  windows = [cfg.windows[i % len(cfg.windows)] for i in range(2)]
  first, second = (np.array([[sees(cfg.attention, w, q, k) for k in range(12)] for q in range(12)]) for w in windows)
  assert got.tolist() == (second.astype(int) @ first > 0).tolist()


def test_cross_attention_never_sees_padding():
  """Also where a row's whole source is padding: its queries then see nothing, rather than all of it evenly."""
  segment_BS = np.array([[1, 1, 1, 1, 0, 0], [0] * 6])
  q, k, v = qkv(2, 6, 2, 1, 8)
  view = transformer.memory_view(np.zeros((2, 6), int), None, segment_BS)
  o_BTNH, weight_BNTS = attend_xla(q, k, v, view, window=0, scale=1.0, softcap=0.0)
  assert ((weight_BNTS > 0) == (segment_BS == 1)[:, None, None]).all()
  assert not o_BTNH[1].any()


# Kernels ------------------------------------------------------------------------------------------------------------

def qkv(B, T, N, K, H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K)]


SPLASH = {
    'causal': dict(kind='causal', segments=False),
    'causal, window, segments, softcap': dict(kind='causal', window=40, softcap=3.0),
    'bidirectional, segments': dict(kind='bidirectional', K=4),
    'bidirectional, window, one kv head': dict(kind='bidirectional', window=40, segments=False, K=1),
    'causal, segments, mesh': dict(kind='causal', window=40, mesh=Mesh(2, 2, 2)),
    'causal, one kv head, mesh': dict(kind='causal', K=1, mesh=Mesh(2, 2, 2)),
}


@pytest.mark.parametrize('name', SPLASH)
def test_splash_is_xla(name):
  case = dict(window=0, softcap=0.0) | SPLASH[name]
  check_flash(functools.partial(attend_splash, interpret=True), dict(H=128) | case, T=128,
              options=dict(window=case['window'], scale=0.1, softcap=case['softcap']))


TRITON = {
    'causal, segments': dict(kind='causal'), 'causal, one kv head': dict(kind='causal', K=1, segments=False, H=128),
    'bidirectional, segments': dict(kind='bidirectional', K=4),
    'causal, segments, mesh': dict(kind='causal', mesh=Mesh(2, 2, 2))}


@pytest.mark.parametrize('name', TRITON)
def test_triton_is_xla(name):
  triton = lambda *args, window, softcap, **options: attend_triton(*args, **options, interpret=True)
  check_flash(triton, {'H': 48} | TRITON[name], T=256, options=dict(window=0, scale=0.1, softcap=0.0))


def test_triton_in_bfloat16_errs_like_xla():
  """In the dtype of its use: gradients at most twice as far from float32's as the plain kernel's in bfloat16."""
  operands = qkv(2, 256, 4, 2, 64, jnp.bfloat16)
  weight = np.random.default_rng(1).normal(size=operands[0].shape)
  segment_BT = np.repeat([[1, 2, 0]], 2, 0).repeat([100, 100, 56], 1).astype(np.int32)
  view = View('causal', segment_BT=segment_BT, key_segment_BS=segment_BT)
  plain = lambda *a: attend_xla(*a, view, window=0, scale=0.125, softcap=0.0)[0]

  def grads(kernel, operands):
    loss = lambda *a: (kernel(*a).astype(jnp.float32) * weight).sum()
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)

  exact = grads(plain, [x.astype(jnp.float32) for x in operands])
  triton = grads(lambda *a: attend_triton(*a, view, scale=0.125, interpret=True), operands)
  error = lambda got: [np.linalg.norm(np.float32(g) - e) / np.linalg.norm(e) for g, e in zip(got, exact)]
  for ours, theirs in zip(error(triton), error(grads(plain, operands))):
    assert ours < 2 * theirs < 0.02


def check_flash(kernel, case, T, options):
  """A kernel's outputs and gradients are those of attend_xla."""
  case = dict(segments=True, K=2, mesh=None) | case
  operands = qkv(4 if case['mesh'] else 1, T, 4, case['K'], case['H'])
  weight = np.random.default_rng(1).normal(size=operands[0].shape)
  segment_BT = np.repeat(np.repeat([[1, 2, 2, 0]], T // 4, 1), len(weight), 0).astype(np.int32)
  segment_BT = segment_BT if case['segments'] else None

  def value_and_grads(kernel):
    def loss(q, k, v):
      o_BTNH = kernel(q, k, v, View(case['kind'], segment_BT=segment_BT, key_segment_BS=segment_BT))
      return (o_BTNH * weight).sum(), o_BTNH
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)

  want = value_and_grads(lambda *a: attend_xla(*a, **options)[0])
  flash = lambda *a: kernel(*a, **options)
  if case['mesh']:
    with jax.set_mesh(sharding.make_mesh(case['mesh'])):
      got = value_and_grads(flash)
  else:
    got = value_and_grads(flash)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


BLOCKS = {
    'causal': {}, 'window': dict(window=40), 'window longer than a block': dict(window=200),
    'segments, softcap': dict(segments=True, softcap=3.0), 'window, segments': dict(window=150, segments=True),
    'alibi': dict(alibi=True)}


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_of_queries_are_the_whole(name):
  """Outputs and gradients; and across documents the gradients are zero to the bit."""
  case = dict(window=0, softcap=0.0, segments=False, alibi=False) | BLOCKS[name]
  T = 3 * BLOCK
  operands = qkv(2, T, 4, 2, 8)
  weight = np.random.default_rng(1).normal(size=operands[0].shape)
  lengths = [100, 90, T - 200, 10]                               # documents that blocks cut, and padding
  segment_BT = np.repeat([[1, 2, 3, 0]], 2, 0).repeat(lengths, 1).astype(np.int32) if case['segments'] else None
  view = View('causal', segment_BT=segment_BT, key_segment_BS=segment_BT)
  options = dict(window=case['window'], scale=0.3, softcap=case['softcap'],
                 slopes_N=alibi_slopes(4) if case['alibi'] else None)

  def value_and_grads(kernel, weight):
    def loss(q, k, v):
      o_BTNH = kernel(q, k, v, view, **options)
      return (o_BTNH * weight).sum(), o_BTNH
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)

  want = value_and_grads(lambda *a, **o: attend_xla(*a, **o)[0], weight)
  for a, b in zip(jax.tree.leaves(value_and_grads(attend_causal, weight)), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
  if case['segments']:
    second = np.repeat([[0, 1, 0, 0]], 2, 0).repeat(lengths, 1)[..., None, None]
    (_, dk, dv), _ = value_and_grads(attend_causal, weight * second)
    for d in (dk, dv):
      assert np.abs(d * second).max() > 0 and not (d * (1 - second)).any()


def test_weights_are_probabilities_and_softcap_bounds_the_scores():
  q, k, v = qkv(1, 6, 2, 1, 8)
  _, weight_BNTS = attend_xla(100 * q, k, v, View('causal'), window=0, scale=1.0, softcap=2.0)
  np.testing.assert_allclose(weight_BNTS.sum(-1), 1, rtol=1e-5)
  assert weight_BNTS.max(-1)[0, 0, 5] <= math.exp(4) / (math.exp(4) + 5)    # scores in [-2, 2]
  assert weight_BNTS[0, :, 0, 0].tolist() == [1, 1]


def test_alibi_slopes_are_the_papers():
  from llm_jax.models.layers import alibi_slopes
  assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]                # section 3
  extra = [2.0**(-0.5 * i) for i in (1, 3, 5, 7)]                                    # every other one of 16 heads
  np.testing.assert_allclose(alibi_slopes(12), [2.0**-i for i in range(1, 9)] + extra, rtol=1e-6)


@pytest.fixture
def no_gpu():
  if jax.default_backend() == 'gpu':
    pytest.skip('this machine has a GPU, where cudnn is not refused')


FULL = model(width=512, head_dim=128)
PACKED = 'cudnn not used: packed documents would become a dense mask'


def neither(reason):
  return f'cudnn not used: {reason}; triton not used: {reason}'


@pytest.mark.parametrize('fields, platform, dtype, length, packed, kernel, reason', [
    (dict(), 'cpu', 'float32', 256, True, 'xla', 'the fastest on cpu'),
    (dict(), 'gpu', 'bfloat16', 256, False, 'cudnn', 'the fastest on gpu'),
    (dict(windows=(64, 0)), 'cuda', 'bfloat16', 100, False, 'cudnn', 'the fastest on cuda'),
    (dict(), 'gpu', 'bfloat16', 256, True, 'triton', PACKED),
    (dict(windows=(64, 0)), 'gpu', 'bfloat16', 256, True, 'xla', f'{PACKED}; triton not used: it has no windows'),
    (dict(), 'gpu', 'bfloat16', 200, True, 'xla', f'{PACKED}; triton not used: length 200 is no multiple of 128'),
    (dict(), 'gpu', 'float32', 256, False, 'xla', neither('it needs bfloat16, the compute dtype is float32')),
    (dict(attention_softcap=50.0), 'gpu', 'bfloat16', 256, False, 'xla', neither('it has no softcap')),
    (dict(head_dim=12), 'gpu', 'bfloat16', 256, False, 'xla', 'cudnn not used: head_dim 12 is no multiple of 8 up to '
     '256; triton not used: head_dim 12 is no multiple of 16 up to 128'),
    (dict(attention='bidirectional', windows=(4,)), 'gpu', 'bfloat16', 256, False, 'xla',
     'cudnn not used: its window needs causal attention; triton not used: it has no windows'),
    (dict(attention='prefix'), 'gpu', 'bfloat16', 256, False, 'xla', neither('it has no prefix mask')),
    (dict(positions='alibi'), 'tpu', 'bfloat16', 256, True, 'xla', 'splash not used: it has no ALiBi bias'),
    (dict(encoder_layers=1), 'tpu', 'bfloat16', 256, True, 'xla', 'splash not used: it has no cross-attention here'),
    (dict(), 'tpu', 'bfloat16', 256, True, 'splash', 'the fastest on tpu'),
    (dict(attention_softcap=50.0, windows=(64, 0)), 'tpu', 'float32', 384, True, 'splash', 'the fastest on tpu'),
    (dict(), 'tpu', 'bfloat16', 200, True, 'xla', 'splash not used: length 200 is no multiple of 128'),
    (dict(head_dim=64), 'tpu', 'bfloat16', 256, True, 'xla', 'splash not used: head_dim 64 is no multiple of 128'),
    (dict(kernel='xla'), 'tpu', 'bfloat16', 256, True, 'xla', 'as configured'),
    (dict(kernel='splash'), 'tpu', 'bfloat16', 256, True, 'splash', 'as configured'),
])
def test_choose(fields, platform, dtype, length, packed, kernel, reason, no_gpu):
  cfg = dataclasses.replace(FULL, **fields)
  assert choose(cfg, platform, dtype, length, packed) == (kernel, reason)
  for passed_over in reason.split('; ') if ' not used: ' in reason else ():
    best, _, why = passed_over.partition(' not used: ')           # is an error where it was asked for
    with pytest.raises(ConfigError, match=f"config.model.kernel: '{best}' cannot be used: {why}"):
      choose(dataclasses.replace(cfg, kernel=best), platform, dtype, length, packed)


def test_a_kernel_asked_for_on_a_cpu_is_refused(no_gpu):
  gpu = 'it needs an NVIDIA GPU, this is cpu'
  for kernel, reason in dict(cudnn=gpu, triton=gpu, splash='it needs a TPU, this is cpu').items():
    with pytest.raises(ConfigError, match=reason):
      choose(dataclasses.replace(FULL, kernel=kernel), jax.default_backend(), 'bfloat16', 256, False)


def test_old_gpus_take_neither_cudnn_nor_bfloat16(monkeypatch, no_gpu):
  monkeypatch.setattr(attention, 'capability', lambda: 7.5)           # Colab's T4
  assert 'Ampere' in choose(FULL, 'gpu', 'bfloat16', 256, False)[1]
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert attention.compute_dtype('auto') == 'float32'
  monkeypatch.setattr(attention, 'capability', lambda: 8.0)           # A100: heads up to 128
  assert attention.compute_dtype('auto') == 'bfloat16'
  assert choose(FULL, 'gpu', 'bfloat16', 256, False)[0] == 'cudnn'
  assert 'up to 128' in choose(dataclasses.replace(FULL, head_dim=256), 'gpu', 'bfloat16', 256, False)[1]


def test_cudnn_never_drops_a_mask():
  q, k, v = qkv(1, 10, 2, 1, 64, jnp.bfloat16)
  segment_BT = SEGMENT_BT[:, :10]
  with pytest.raises(ConfigError, match='neither a prefix nor segments'):
    attend_cudnn(q, k, v, View('causal', segment_BT=segment_BT, key_segment_BS=segment_BT), window=0, scale=1.0)


def test_cudnn_lowers_for_a_gpu(monkeypatch):
  """Lowered for CUDA as if cuDNN were installed: its flash attention, causal, with a window of the 32 newest keys."""
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91_000, raising=False)

  def loss(q, k, v):
    return attend_cudnn(q, k, v, View('causal'), window=32, scale=0.25).astype(jnp.float32).sum()
  try:
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv(2, 128, 4, 2, 64, jnp.bfloat16))
    text = traced.lower(lowering_platforms=('cuda',)).as_text().replace('\\22', '"')
  except RuntimeError as e:
    pytest.skip(f'this jax lowers cuDNN attention only where cuDNN is installed: {e}')
  for call in ('fmhaSoftmax(', 'fmhaSoftmaxBackward('):
    line = next(line for line in text.splitlines() if call in line)
    assert '"mask_type": "CAUSAL"' in line and '"fmha_scale": 0.25' in line and '"sliding_window_length": 32' in line


def step_text(kernel: str, **train) -> str:
  """The training step of a model of two layers, lowered for CUDA as if cuDNN were installed; triton's with packed
  documents."""
  model = dataclasses.replace(FULL, dtype='bfloat16', kernel=kernel, qk_norm='head')
  cfg = config_lib.Config(model=model, data=config_lib.Data(length=128), train=config_lib.Train(batch_size=2, **train))
  tx = optimizer.make(cfg.optimizer, jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))))
  state = jax.eval_shape(lambda: step.init_state(cfg, model, tx, jax.random.key(0)))
  packed = dict(position_BT=jnp.int32, segment_BT=jnp.int32) if kernel == 'triton' else {}
  batch = {name: jax.ShapeDtypeStruct((2, 128), dtype) for name, dtype in dict(
      token_BT=jnp.int32, target_BT=jnp.int32, mask_BT=jnp.float32, **packed).items()}
  traced = jax.jit(step.make_train_step(cfg, model, tx, kernel)).trace(state, batch)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


def step_text_or_skip(kernel: str) -> str:
  try:
    return step_text(kernel)
  except RuntimeError as e:
    if not re.search('cuDNN|No supported GPU', str(e)):
      raise
    pytest.skip(f'this jax lowers {kernel} only where there is a GPU: {e}')


def test_the_kernel_of_the_banner_is_in_the_step(monkeypatch):
  """A whole step for a GPU: flash attention forward and backward; a step without either is refused."""
  monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91_000, raising=False)
  text = step_text_or_skip('cudnn')
  attention.verify('cudnn', text)
  assert 'custom_call @__cudnn$fmhaSoftmax(' in text and 'custom_call @__cudnn$fmhaSoftmaxBackward(' in text
  with pytest.raises(RuntimeError, match="attention does not run by 'cudnn'.*kernel=xla trains without it"):
    attention.verify('cudnn', text.replace('fmhaSoftmaxBackward', 'other'))


def test_a_step_without_the_kernel_of_the_banner_is_refused():
  plain = step_text('xla')
  attention.verify('xla', plain)
  for kernel in ('cudnn', 'triton', 'splash', 'ring'):
    with pytest.raises(RuntimeError, match=f"attention does not run by '{kernel}'.*kernel=xla trains without it"):
      attention.verify(kernel, plain)


def test_packed_documents_run_by_triton():
  packed = step_text_or_skip('triton')
  attention.verify('triton', packed)
  assert 'mha_forward' in packed and 'mha_backward' in packed


@pytest.mark.parametrize('chunk', [0, 64])
def test_a_bfloat16_step_multiplies_nothing_in_float32(chunk, monkeypatch):
  """Forward and backward, attention's scores and the logits too, whose results are in float32: products of float32
  operands run as TF32 on a GPU, at half the peak of bfloat16."""
  monkeypatch.setattr(layers, 'on_one_cpu', lambda: False)
  products = [line for line in step_text('xla', loss_chunk=chunk).splitlines() if 'stablehlo.dot_general' in line]
  operands = [re.search(r': \((.*)\) -> ', line)[1] for line in products]
  assert len(products) >= 3 * (1 + 2 + 6) and all(of.count('bf16') == 2 for of in operands), products
