"""Costs counted from optimized HLO: programs of known cost on CPU, the text a TPU prints, a TPU's own compiler."""
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import hlo
from llm_jax.hlo import Collective

SHAPE = dict(data=2, fsdp=4)
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2)
WHOLE, ROWS = P(), P(('data', 'fsdp'))


def f32(*shape, spec=WHOLE):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))


def cost(f, *args):
  return hlo.count(jax.jit(f).lower(*args).compile().as_text(), SHAPE)


def shard_map(f):
  return jax.shard_map(f, mesh=MESH, in_specs=ROWS, out_specs=ROWS, check_vma=False)


def test_flops_of_products():
  assert cost(lambda a, b: a @ b, f32(32, 64), f32(64, 16)).flops == 2 * 32 * 64 * 16
  assert cost(lambda a, b: jnp.tanh(a @ b), f32(32, 64, spec=P('data')), f32(64, 16)).flops == 2 * 16 * 64 * 16
  batched = cost(lambda a, b: jnp.einsum('bqd,bkd->bqk', a, b), f32(4, 128, 32), f32(4, 256, 32))
  assert batched.flops == 2 * 4 * 128 * 256 * 32
  assert batched.bytes == 4 * 4 * (128 * 32 + 256 * 32 + 128 * 256)
  assert (batched.collectives, batched.custom_calls, batched.unknown_loops) == ((), {}, 0)


def test_flops_of_convolutions():
  conv = lambda groups, padding: lambda x, k: jax.lax.conv_general_dilated(
      x, k, (1,), padding, dimension_numbers=('NHC', 'HIO', 'NHC'), feature_group_count=groups)
  assert cost(conv(1, 'VALID'), f32(2, 10, 8), f32(3, 8, 16)).flops == 2 * 2 * 8 * 3 * 8 * 16
  assert cost(conv(8, 'VALID'), f32(2, 10, 8), f32(3, 1, 8)).flops == 2 * 2 * 8 * 3 * 8
  assert cost(conv(1, ((2, 0),)), f32(2, 10, 8), f32(3, 8, 16)).flops == 2 * 2 * (30 - 3) * 8 * 16   # not on padding


def scan(x, w, length, unroll=1):
  return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length, unroll=unroll)[0]


@pytest.mark.parametrize('f, products', [
    (lambda x, w: scan(x, w, 5), 5),
    (lambda x, w: scan(x, w, 6, unroll=2), 6),
    (lambda x, w: scan(x, w, 7, unroll=2), 7),
    (lambda x, w: jax.lax.scan(lambda x, _: (scan(x, w, 3), None), x, None, length=4)[0], 12),
    (lambda x, w: jax.lax.fori_loop(2, 9, lambda i, x: x @ w, x), 7),
    (lambda x, w: jax.grad(lambda w: jnp.sum(scan(x, w, 5)))(w), 15),
])
def test_loops_are_times_their_trips(f, products):
  counted = cost(f, f32(32, 32), f32(32, 32))
  assert (counted.unknown_loops, counted.flops) == (0, products * 2 * 32 ** 3)


def test_a_loop_of_unknown_length_counts_once():
  counted = cost(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x), f32(32, 32))
  assert (counted.unknown_loops, counted.flops) == (1, 2 * 32 ** 3)


def test_the_costliest_branch():
  branches = [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x]
  f = lambda x, i: jax.lax.switch(i, branches, x)
  i = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(MESH, P()))
  assert cost(f, f32(32, 32), i).flops == 2 * 2 * 32 ** 3
  assert cost(lambda x, i: jax.lax.fori_loop(0, 3, lambda _, x: f(x, i), x), f32(32, 32), i).flops == 12 * 32 ** 3


def test_only_slices_of_a_buffer_move():
  i = jax.ShapeDtypeStruct((), jnp.int32)
  row = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
  assert cost(row, f32(1000, 64), i).bytes < 3 * 4 * 64
  update = jax.jit(lambda x, y, i: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), donate_argnums=0)
  compiled = update.lower(f32(1000, 64), f32(64), i).compile()
  assert hlo.count(compiled.as_text(), SHAPE).bytes < 4 * 4 * 64
  stacked = cost(lambda x: jax.lax.scan(lambda c, x: (c, 2 * x), 0., x)[1], f32(1000, 64))
  assert 2 * 1000 * 64 * 4 <= stacked.bytes < 4 * 1000 * 64 * 4


SPARSECORE = '''HloModule m, is_scheduled=true

%inner (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %copy = f32[8,8]{1,0} copy(%p)
}, execution_thread="sparsecore"

%fused (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %negated = f32[8,8]{1,0} negate(%q)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} call(%x), to_apply=%inner
  ROOT %b = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
}
'''


def test_what_the_sparsecores_run_is_read_too():
  """v5p programs print such computations with another end; the one behind it must not be lost either."""
  assert hlo.count(SPARSECORE, SHAPE).bytes == 4 * 8 * 8 * 4


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize('f, kind, axes, sent', [
    (lambda x: jax.lax.psum(x, 'data'), 'all-reduce', ('data',), 2 * 2048 / 2),
    (lambda x: jax.lax.psum(x, ('data', 'fsdp')), 'all-reduce', ('data', 'fsdp'), 2 * 2048 * 7 / 8),
    (lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True), 'reduce-scatter', ('fsdp',), 2048 * 3 / 4),
    (lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True), 'all-gather', ('fsdp',), 2048 * 3),
    (lambda x: jax.lax.all_to_all(x, 'fsdp', 1, 0, tiled=True), 'all-to-all', ('fsdp',), 2048 * 3 / 4),
    (lambda x: jax.lax.ppermute(x, 'fsdp', RING), 'collective-permute', ('fsdp',), 2048),
    (lambda x: jax.lax.psum(x, 'fsdp', axis_index_groups=[[0, 1], [2, 3]]), 'all-reduce', ('?',), 2 * 2048 / 2),
])
def test_collectives(f, kind, axes, sent):
  x = f32(64, 64, spec=ROWS)                                  # 2048 bytes a device
  assert cost(shard_map(f), x).collectives == (Collective(kind, axes, sent, 1),)
  if kind == 'collective-permute':
    f = lambda x, f=f: jax.lax.fori_loop(0, 6, lambda i, x: f(x * 2), x)
    assert cost(shard_map(f), x).collectives == (Collective(kind, axes, 6 * sent, 6),)


def test_a_sharded_scan():
  counted = cost(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
                 f32(5, 64, 64, spec=P(None, 'fsdp')), f32(32, 64, spec=ROWS))
  assert counted.flops == 5 * 2 * 4 * 64 * 64
  assert counted.collectives == (Collective('all-gather', ('fsdp',), 5 * 64 * 64 * 4 * 3 / 4, 5),)


@pytest.mark.parametrize('printed, groups', [
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('{}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
])
def test_every_way_to_print_groups(printed, groups):
  assert hlo.groups_of(f', channel_id=1, replica_groups={printed}, dimensions={{1}}', 8) == groups


def test_axes_of_groups():
  shape = dict(data=2, one=1, fsdp=2, tensor=2)
  assert hlo.axes_of([[0, 2], [1, 3], [4, 6], [5, 7]], shape) == ('fsdp',)
  assert hlo.axes_of([[0, 1, 4, 5], [2, 3, 6, 7]], shape) == ('data', 'tensor')
  assert hlo.axes_of([[0, 3], [1, 2], [4, 7], [5, 6]], shape) == ('?',)
  assert hlo.axes_of([[0, 1], [2, 3], [4, 6], [5, 7]], shape) == ('?',)


TPU = '''HloModule jit_step, is_scheduled=true, num_partitions=8

%scatter (input: bf16[64,512]) -> bf16[16,512] {
  %input = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[64,512]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %partition-id.1 = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.1, %partition-id.1, %zero), dynamic_slice_sizes={16,512}
}

%start (p.0: bf16[16,512]) -> (bf16[16,512], bf16[64,512], u32[]) {
  %p.0 = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,512]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.1 = (bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[16,512], p.2: bf16[64,512], p.3: bf16[128,64], p.4: bf16[128,512]) -> (bf16[64,512], bf16[64,512]) {
  %p.1 = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p.3 = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(2)
  %p.4 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(3)
  %convolution.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} convolution(%p.3, %p.4), dim_labels=fb_io->bf
  %all-gather.2 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %tuple.1 = (bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%convolution.1, %all-gather.2)
}

%body (c: (s32[], bf16[16,512], bf16[128,64], bf16[128,512])) -> (s32[], bf16[16,512], bf16[128,64], bf16[128,512]) {
  %c = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, /*index=3*/bf16[128,512]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %w = bf16[16,512]{1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %x = bf16[128,64]{1,0} get-tuple-element(%c), index=2
  %y = bf16[128,512]{1,0} get-tuple-element(%c), index=3
  %s = (bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start
  %s.0 = bf16[16,512]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %s.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %b = (bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%s.0, %s.1, %x, %y), kind=kOutput, calls=%beside
  %b.0 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b), index=0
  %r = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} fusion(%b.0), kind=kCustom, calls=%scatter
  %kernel.3 = bf16[16,512]{1,0:T(8,128)(2,1)} custom-call(%r), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block":"{\\"q\\": 128}"
}}, metadata={op_name="jit(f)/while/body/flash_fwd/pallas_call"}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"flops":"1000","transcendentals":"0"}}}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, bf16[128,512]{1,0}) tuple(%next, %kernel.3, %x, %y)
}

%condition (d: (s32[], bf16[16,512], bf16[128,64], bf16[128,512])) -> pred[] {
  %d = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, bf16[128,512]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%d), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (q: bf16[16,512], u: bf16[128,64], v: bf16[128,512]) -> bf16[16,512] {
  %q = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(0)
  %u = bf16[128,64]{1,0} parameter(1)
  %v = bf16[128,512]{1,0} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)S(6)} copy(%zero.1)
  %tuple.2 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, bf16[128,512]{1,0}) tuple(%copy.1, %q, %u, %v)
  %while.1 = (s32[]{:T(128)}, bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, bf16[128,512]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[16,512]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
'''  # noqa: E501


def test_the_text_of_a_tpu():
  counted, shard = hlo.count(TPU, SHAPE), 16 * 512 * 2
  assert counted.flops == 6 * (2 * 64 * 128 * 512 + 1000)
  assert counted.collectives == (Collective('all-gather', ('fsdp',), 6 * 3 * shard, 6),
                                 Collective('reduce-scatter', ('fsdp',), 6 * 3 * shard, 6))
  assert counted.custom_calls == dict(flash_fwd=6)
  assert counted.unknown_loops == 0
  assert counted.bytes == 4 + 6 * (shard + 128 * (64 + 512) * 2 + shard + 12)   # w, x and y, the kernel's, the counter


def test_a_batch_printed_as_spatial_dimensions():
  op = hlo.parse_op('%c = bf16[2,4,256,256]{3,2,1,0:T(8,128)(2,1)} convolution(%a, %b), '
                    'window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf')
  assert hlo.convolution_flops(op, (2, 256, 4, 128), (2, 256, 4, 128)) == 2 * 8 * 256 * 256 * 128


COMPILE = '''
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from llm_jax import hlo
devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:4x4').devices
shape = dict(data=2, fsdp=8)
mesh = Mesh(np.array(devices).reshape(2, 8), tuple(shape), axis_types=(AxisType.Auto,) * 2)
named = lambda *spec: NamedSharding(mesh, P(*spec))
def loss(w, x):
  def layer(x, w):
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), named(('data', 'fsdp'))), None
  return jnp.sum(jnp.square(jax.lax.scan(layer, x, w)[0].astype(jnp.float32)))
w = jax.ShapeDtypeStruct((6, 1024, 1024), jnp.bfloat16, sharding=named(None, 'fsdp'))
x = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16, sharding=named(('data', 'fsdp')))
step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(named(), (w.sharding, x.sharding)))
cost = hlo.count(step.lower(w, x).compile().as_text(), shape)
assert cost.flops == 6 * 3 * 2 * 128 * 1024 * 1024, cost
assert cost.unknown_loops == 0, cost
sent = {(c.kind, c.axes): (c.bytes, c.count) for c in cost.collectives}
assert sent['reduce-scatter', ('fsdp',)] == (6 * 2 * 1024 * 1024 * 7 / 8, 6), cost
assert sent['all-gather', ('fsdp',)] == (12 * 2 * 1024 * 1024 * 7 / 8, 12), cost
'''


def test_a_program_compiled_for_a_tpu():
  pytest.importorskip('libtpu', reason='libtpu, which compiles for a TPU, is not installed')
  env = dict(os.environ, TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-16', TPU_WORKER_HOSTNAMES='localhost',
             JAX_PLATFORMS='cpu', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  done = subprocess.run([sys.executable, '-c', COMPILE], env=env, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-2000:]


FMHA = ('custom_call_target="__cudnn$fmhaSoftmax%s", backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.125,'
        '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","256","256"],"tuple_shapes":[]},'
        '"mask_type":"%s","bmm1_dot_dimension_numbers":{"lhs_contracting_dimensions":["3"]},'
        '"sliding_window_length":%d}}')
GEMM = ('(bf16[512,128]{1,0}, s8[33554432]{0}) custom-call(%%%s, %%%s), custom_call_target="__cublas$lt$matmul%s", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}')
GPU = """HloModule jit_train_step

ENTRY %%main (q: bf16[2,256,4,64]) -> (bf16[512,128], s8[33554432]) {
  %%q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  %%x = f8e4m3fn[512,64]{1,0} parameter(1)
  %%w = f8e4m3fn[64,128]{1,0} parameter(2)
  %%y = bf16[512,64]{1,0} parameter(3)
  %%v = bf16[64,128]{1,0} parameter(4)
  %%forward = (bf16[2,4,256,64]{3,2,1,0}, f32[2,4,256]{2,1,0}, u8[4096]{0}) custom-call(%%q, %%q, %%q), %s
  %%back = (bf16[2,4,256,64]{3,2,1,0}, bf16[2,4,256,64]{3,2,1,0}, u8[0]{0}) custom-call(%%q, %%q, %%q), %s
  %%eighth = %s
  ROOT %%plain = %s
}
"""


@pytest.mark.parametrize('mask, window, keys', [('CAUSAL', 0, 128), ('NO_MASK', 0, 256), ('CAUSAL', 64, 56)])
def test_what_a_gpu_calls_of_its_libraries(mask, window, keys):
  """cuDNN's attention by the scores that it computes (keys: a query's, on average); cuBLAS' products, in float8 too,
  whose room to work in is no traffic."""
  text = GPU % (FMHA % ('', mask, window), FMHA % ('Backward', mask, window), GEMM % ('x', 'w', '$f8'),
                GEMM % ('y', 'v', ''))
  program = hlo.Program(text, {})
  costs = {op.name: program.cost(comp, op, {}, False) for comp, op, _ in program.executed()}
  product = 2 * 2 * 4 * 256 * keys * 64
  assert costs['forward']['flops', ''] == 2 * product and costs['back']['flops', ''] == 5 * product
  for name, size in (('eighth', 1), ('plain', 2)):
    assert costs[name]['flops', ''] == 2 * 512 * 64 * 128
    assert costs[name]['bytes', ''] == size * (512 * 64 + 64 * 128) + 2 * 512 * 128
  assert costs['eighth']['flops8', ''] and not costs['plain']['flops8', '']
  assert hlo.products_in_float8(text) == 1 and not hlo.products_in_float8(text.replace('f8e4m3fn', 'bf16'))
