"""Plans: what is counted is what the compiler and arithmetic say, for this machine and for TPUs that are not here; the
configs for pods fit (slow)."""
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from llm_jax import config as config_lib
from llm_jax import hardware, plan
from llm_jax.config import ConfigError
from llm_jax.planner import program, search
from llm_jax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                                  reason="TPU programs need libtpu: pip install '.[plan]'")


def config(mesh=(), train=(), **model):
  return config_lib.Config(
      model=config_lib.Model(**dict(vocab_size=256, layers=4, width=64, heads=4, mlp_dim=256, mlp='swiglu',
                                    tied_embeddings=False, unroll=False) | model),
      data=config_lib.Data(length=64), mesh=config_lib.Mesh(**dict(fsdp=1) | dict(mesh)),
      train=config_lib.Train(**dict(batch_size=32, accumulate=1) | dict(train)),
      tokenizer=config_lib.Tokenizer(kind='byte'))


def compiled(cfg, devices):
  return program.compile_step(cfg, program.machine(hardware.topology(f'cpu:{devices}')))


def run(*args, timeout=300):
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS', 'JAX_NUMPY_RANK_PROMOTION')}
  return subprocess.run([sys.executable, '-m', 'llm_jax.plan', *args], cwd=ROOT, env=env, capture_output=True,
                        text=True, timeout=timeout)


@pytest.mark.parametrize('text, name', [('v5e:16x16', 'v5e:16x16'), ('v5e-256', 'v5e:16x16'), ('V5P-128', 'v5p:4x4x4'),
                                        ('v6e-16', 'v6e:4x4'), ('h100:64', 'h100:64'), ('cpu-8', 'cpu:8')])
def test_machines_by_either_name(text, name):
  assert hardware.topology(text).name == name


@pytest.mark.parametrize('text, message', [
    ('v5e:3x3', 'no .v5e:3x3.; v5e has 1x1, 2x2, .*16x16'), ('v5e-100', 'v5e has'), ('v9:2x2', 'known: v4:'),
    ('h100', 'expected h100:N'), ('cpu:0', 'expected cpu:N'), ('', 'known: v4:')])
def test_an_unknown_machine_lists_the_known(text, message):
  with pytest.raises(ConfigError, match=message) as e:
    hardware.topology(text)
  assert '\n' not in str(e.value)


def test_memory_adds_up_and_parameters_are_exact():
  """fsdp x tensor: parameters and moments per device are the sum of the shards; all categories together are what the
  compiler needs."""
  found = compiled(config(mesh=dict(fsdp=4, tensor=2)), 8)
  whole = found.parameters * 4
  assert whole / 8 <= found.memory['parameters'] <= 1.02 * whole / 8          # scales and norms are not split by 8
  assert found.memory['moments'] == pytest.approx(2 * found.memory['parameters'], rel=0.01)
  assert all(size >= 0 for size in found.memory.values())
  assert found.bytes > found.memory['parameters'] + found.memory['moments'] + found.memory['gradients']


def test_kept_for_the_backward_pass():
  """Full remat keeps the input of each layer; more is kept without. A stage keeps those of its layers, every tick."""
  full, none = (compiled(config(remat=remat), 1).memory['activations'] for remat in ('full', 'none'))
  layer = 32 * 64 * 64 * 4
  assert full == 4 * layer and none > 4 * full
  staged = compiled(config(mesh=dict(stage=2), train=dict(accumulate=4), remat='full'), 2).memory['activations']
  assert staged == 2 * (4 + 2 - 1) * layer / 4


@pytest.mark.parametrize('unroll', [False, True])
def test_flops_are_those_of_the_convention(unroll):
  """On one device, without remat: 6 x the parameters of matrix products and attention over every key, exactly; a scan
  counts all its trips."""
  cfg = config(unroll=unroll)
  found = compiled(cfg, 1)
  want = metrics.flops_per_token(found.model, 64)['full'] * found.tokens
  assert found.flops == pytest.approx(want, rel=1e-3) and not found.cost.unknown_loops


def test_collectives_of_fsdp_and_tensor():
  cost = compiled(config(mesh=dict(fsdp=4, tensor=2)), 8).cost
  sent = {(c.kind, c.axes): c.bytes for c in cost.collectives}
  layers = 4 * (4 * 64 * 64 + 3 * 64 * 256) * 4 / 2                           # bytes of a tensor half of all layers
  gathered = sum(n for (kind, axes), n in sent.items() if kind == 'all-gather' and axes == ('fsdp',))
  assert layers * 3 / 4 <= gathered <= 4 * layers                             # at least once, not more than each pass
  assert sent['all-reduce', ('tensor',)] > 0


def test_the_search_finds_what_fits_and_is_faster():
  """On 8 devices nothing that is ranked exceeds the limit, the first is no slower than the config's own, and with
  `nearest` it is what changes least."""
  found = compiled(config(mesh=dict(fsdp=8), train=dict(batch_size=64)), 8)
  cfg = found.cfg                           # with the remat that was chosen
  slack = search.slack_of(found)
  ranked = search.rank(cfg, found.machine, 2 * found.bytes, slack)
  assert len(ranked) > 20 and all(e.bytes <= 2 * found.bytes for e in ranked)
  own = search.estimate(cfg, found.machine)
  assert ranked[0].tokens_per_second >= 0.97 * own.tokens_per_second
  assert {e.cfg.model.remat for e in ranked} == {'none', 'dots', 'full'}
  tight = search.rank(cfg, found.machine, own.bytes / 3)
  assert all(e.bytes <= own.bytes / 3 for e in tight) and 0 < len(tight) < len(ranked)
  least = search.rank(cfg, found.machine, own.bytes / 3, nearest=True)
  changes = [len(config_lib.diff(e.cfg, cfg)) for e in least if e.cfg.train.batch_size == 64]
  assert changes == sorted(changes) and changes[0] <= len(config_lib.diff(tight[0].cfg, cfg))


def test_the_search_starts_from_the_mesh_as_it_lies():
  """mesh.context=-1 is the devices that are left."""
  cfg = config(mesh=dict(fsdp=2, context=-1), train=dict(batch_size=64))
  machine = program.machine(hardware.topology('cpu:8'))
  assert {e.cfg.mesh.context for e in search.rank(search.resolved(cfg, machine), machine, float('inf'))} == {4}


def test_the_roofline_names_what_binds():
  found = compiled(config(), 1)
  seconds, binding = found.step()
  assert seconds == max(found.times().values()) and found.times()[binding] == seconds
  assert found.mfu() == pytest.approx(found.model_flops * found.tokens / seconds / found.machine.chip.flops)


def test_the_command_on_cpu_devices():
  out = run('--config=configs/base.py', '--topology=cpu:4', '--tries=0', '--config.mesh.tensor=2')
  assert out.returncode == 0 and not out.stderr, out.stderr
  for text in ('machine    cpu:4: 4 devices', 'mesh       2 fsdp x 2 tensor', 'parameters', 'moments', 'activations',
               'all-gather         along fsdp', 'all-reduce         along tensor', 'roofline', 'bound by', 'MFU'):
    assert text in out.stdout, out.stdout


@pytest.mark.parametrize('args, message', [
    (['--topology=v5e:9x9'], 'v5e has 1x1'), ([], '--topology: expected a machine'),
    (['--topology=cpu:8', '--config.mesh.tensor=3'], 'needs a multiple of 3 devices, there are 8'),
    (['--topology=cpu:2', '--config.model.remat=offload'], "'offload' moves layer inputs"),
    (['--topology=h100:8', '--config.model.remat=offload'], "'offload' is planned for TPUs only"),
    (['--topology=cpu:8', '--config.mesh.tensor=4'], "axis 'tensor' (4 ways) does not divide N=2"),
    (['--topology=cpu:8', '--slices=2'], '--slices: cpu:8 has none'), (['--topology=cpu:8', '--tries=x'], '--tries'),
    (['--topolgy=cpu:8'], "unknown flag --topolgy; nearest: 'topology'")])
def test_bad_input_is_one_line(args, message):
  out = run('--config=configs/base.py', *args)
  assert out.returncode == 2 and message in out.stderr and out.stderr.count('\n') == 1, out.stderr


def test_out_of_memory_names_the_need_and_what_fits():
  """A T4 with 64 times the batch: limit, need and the nearest config that fits, in one line; exit status 1."""
  out = run('--config=configs/base.py', '--topology=t4:1', '--config.model.unroll=False', '--config.data.length=512',
            '--config.train.batch_size=1024', '--config.train.accumulate=1', '--tries=2')
  assert out.returncode == 1, out.stdout + out.stderr
  line = out.stderr.strip().splitlines()[-1]
  assert re.match(r'error: out of memory: t4:1 has 14.60 GiB per device, this config needs [\d.]+ GiB; nearest that '
                  r'fits: --config\.', line), line


TPU_MODEL = ['--config.model.layers=8', '--config.model.width=512', '--config.model.heads=4',
             '--config.model.unroll=False', '--config.model.remat=full', '--config.data.length=256',
             '--config.optimizer.name=adamw']


@needs_libtpu
def test_a_tpu_program_reduces_and_scatters_gradients():
  """Real compilation for 16 chips that are not here, without noise: FSDP gathers parameters and scatters gradients,
  attention is the Pallas kernel."""
  out = run('--config=configs/base.py', '--topology=v5e:4x4', '--tries=0', *TPU_MODEL, '--config.mesh.data=2',
            '--config.mesh.fsdp=8', '--config.train.batch_size=16')
  assert out.returncode == 0 and not out.stderr, out.stdout + out.stderr
  assert 'attention splash, bfloat16' in out.stdout
  assert re.search(r'all-gather +along fsdp', out.stdout) and re.search(r'reduce-scatter +along fsdp', out.stdout)


@needs_libtpu
def test_little_effort_changes_neither_flops_nor_what_is_sent():
  """What nears the memory (here: everything) is compiled again as training would, another program of the same work."""
  code = f"""
import os; os.environ['JAX_PLATFORMS'] = 'cpu'
from llm_jax import config, hardware
from llm_jax.planner import program
machine = program.machine(hardware.topology('v5e:4x4'))
cfg, _ = config.from_flags(['--config=configs/base.py', '--config.train.batch_size=16', *{TPU_MODEL}], dict())
program.Program.step = lambda self: (1.0, 'matrix products')         # so small a model is bound by traffic
quick = program.compile_step(cfg, machine)
program.ROOM = 0
again = program.compile_step(cfg, machine)
assert quick.quick and not again.quick, quick.times()
assert quick.times() != again.times()
assert abs(quick.flops / again.flops - 1) < 0.01, (quick.flops, again.flops)
sent = lambda p: {{(c.kind, c.axes): c.bytes for c in p.cost.collectives if c.bytes > 1e5}}
assert sent(quick).keys() == sent(again).keys(), (sent(quick), sent(again))
for kind, bytes in sent(quick).items():
  assert abs(bytes / sent(again)[kind] - 1) < 0.05, (kind, sent(quick), sent(again))
"""
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, env={
      k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')})
  assert out.returncode == 0, out.stderr


@needs_libtpu
def test_layer_inputs_wait_in_the_hosts_memory():
  """remat=offload: what full remat keeps on the device, 8 layers x 1 row x 256 x 512 in bfloat16, the host keeps."""
  out = run('--config=configs/base.py', '--topology=v5e:4x4', '--tries=0', *TPU_MODEL, '--config.train.batch_size=16',
            '--config.model.remat=offload')
  assert out.returncode == 0 and not out.stderr, out.stdout + out.stderr
  assert re.search(r'activations +0.000 GiB\n', out.stdout) and re.search(r'host memory +0.00[2-4] GiB', out.stdout)
  assert 'transfers to host memory' in out.stdout


@needs_libtpu
@pytest.mark.parametrize('exchange', [pytest.param('fixed', marks=pytest.mark.slow), 'ragged'])
def test_experts_compile_for_a_tpu(exchange):
  out = run('--config=configs/base.py', '--topology=v5e:4x4', '--tries=0', *TPU_MODEL, '--config.mesh.expert=4',
            '--config.train.batch_size=16', '--config.model.experts=8', '--config.model.expert_dim=512',
            '--config.model.mlp=swiglu', f'--config.model.expert_exchange={exchange}', '--config.model.kernel=xla')
  assert out.returncode == 0 and not out.stderr, out.stdout + out.stderr
  kind = {'fixed': 'all-to-all', 'ragged': 'ragged-all-to-all'}[exchange]
  assert re.search(rf'{kind} +along expert', out.stdout), out.stdout


@needs_libtpu
def test_slices_are_joined_by_the_data_axis():
  out = run('--config=configs/base.py', '--topology=v5e:2x2', '--slices=2', '--tries=0', *TPU_MODEL,
            '--config.mesh.data=2', '--config.train.batch_size=8', '--config.model.kernel=xla')
  assert out.returncode == 0, out.stdout + out.stderr
  assert '2 slices of v5e:2x2: 8 devices' in out.stdout and 'network between slices' in out.stdout


@needs_libtpu
def test_meshes_and_the_search_on_slices():
  """Two slices, also where an axis splits a dimension of the torus: every candidate can be laid out and estimated."""
  code = """
import os; os.environ['JAX_PLATFORMS'] = 'cpu'
from llm_jax import config, hardware, sharding
from llm_jax.planner import program, search
machine = program.machine(hardware.topology('v5e:16x16'), 2)
mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=64, tensor=4), machine.devices)
assert [{d.slice_index for d in part.ravel()} for part in mesh.devices] == [{0}, {1}]
cfg, _ = config.from_flags(['--config=configs/llama3_8b.py', '--config.train.batch_size=512'], {})
ranked = search.rank(search.resolved(cfg, machine), machine, machine.chip.memory)
assert len(ranked) > 100, len(ranked)
"""
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, env={
      k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')})
  assert out.returncode == 0, out.stderr


@needs_libtpu
@pytest.mark.slow
def test_out_of_memory_on_a_tpu_names_what_fits():
  """The compiler itself refuses; the line is the same, and what it names was compiled."""
  out = run('--config=configs/base.py', '--topology=v5e:2x2', '--tries=2', *TPU_MODEL, '--config.model.kernel=xla',
            '--config.train.batch_size=32768', '--config.train.accumulate=1')
  assert out.returncode == 1, out.stdout + out.stderr
  line = out.stderr.strip().splitlines()[-1]
  assert re.match(r'error: out of memory: v5e:2x2 has 15.75 GiB per device, this config needs [\d.]+ GiB; nearest that '
                  r'fits: --config\.', line), out.stdout + out.stderr


def test_commands_start_without_noise_beside_libtpu():
  """Whether libtpu is installed or not, what is not a plan starts on this machine's own device and prints nothing."""
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  out = subprocess.run([sys.executable, '-c', 'import llm_jax.api, jax; print(jax.devices()[0].platform)'], env=env,
                       capture_output=True, text=True, timeout=120)
  assert out.returncode == 0 and not out.stderr, out.stderr
  assert out.stdout.strip() in ('cpu', 'gpu', 'tpu')


PODS = [('llama3_8b.py:v5e-64', 'v5e-64'), ('llama3_8b.py:v6e-16', 'v6e-16'), ('llama3_8b.py:v5p-128', 'v5p-128'),
        ('llama3_70b.py:v5p-128', 'v5p-128'), ('llama3_70b.py:v6e-256', 'v6e-256'), ('mixtral_8x7b.py', 'v5p-64'),
        ('llama3_405b.py', 'v5p-1024')]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('name, topology', PODS)
def test_configs_for_pods_compile_and_fit(name, topology):
  out = run(f'--config=configs/{name}', f'--topology={topology}', '--tries=0', timeout=1800)
  print(out.stdout)
  assert out.returncode == 0 and ': fits' in out.stdout, out.stdout + out.stderr


def test_parse():
  cfg, flags = plan.parse(['--config', str(ROOT / 'configs/base.py'), '--topology', 'cpu:2', '--config.mesh.data=2'])
  assert cfg.mesh.data == 2 and flags['topology'] == 'cpu:2' and flags['tries'] == '2'
  assert jax.device_count() == 8                       # parsing starts nothing
