"""The bench prints ours, the peer and the limit of one run, and its peer is the same model."""
import argparse
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import serving

from llm_jax.bench import __main__ as bench
from llm_jax.bench import growing, token_batch, torch_peer, training
from llm_jax.config import ConfigError
from llm_jax.models import transformer
from llm_jax.train import explain

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = ['train', '--layers=1', '--width=64', '--length=32', '--batch=2', '--rounds=2', '--steps=1']


def sizes(layers: int, batch: int):
  return argparse.Namespace(layers=layers, width=64, length=32, batch=batch, vocab=65, remat='none', dtype='float32',
                            fp8=False, unroll=True, loss_chunk=0)


def test_ours_beside_the_limit(capsys):
  bench.main(FLAGS)
  out = capsys.readouterr().out
  assert 'train 1 x 64, 2 x 32 tokens, vocabulary 65, 2 rounds of 1 steps' in out
  assert 'llm_jax' in out and 'ours/this 1.00x' in out and 'limit' in out and out.count('tok/s') == 2


def test_a_step_explained(capsys):
  """The parts are a whole step, its products and its attention among them."""
  bench.main([*FLAGS, '--explain'])
  rows = re.findall(r'^ +([a-z/]+) +([\d.]+) ms +([\d.]+)%', capsys.readouterr().out, re.M)
  assert {'matmul', 'attention', 'norm/elementwise', 'loss', 'optimizer'} <= {part for part, _, _ in rows}
  assert abs(sum(float(share) for _, _, share in rows) - 100) < 1


def test_a_save_beside_orbax_alone(capsys):
  bench.main(['save', '--mb=50', '--rounds=1'])
  out = capsys.readouterr().out
  assert 'save 50 MB, 1 rounds' in out and out.count('ours/orbax') == 2 and 'restore, verified' in out


def test_decoding_beside_a_sweep_and_the_peer(capsys, tmp_path):
  pytest.importorskip('transformers', reason="the peer needs pip install -e '.[parity]'")
  model = serving.make_model(tmp_path)
  bench.main(['decode', f'--model={model}', '--peer=torch', '--streams=3', '--new=4', '--rounds=1'])
  out = capsys.readouterr().out
  for name in ('sweep', 'llm_jax', 'llm_jax, 3 streams', 'transformers, float32', 'transformers, bfloat16'):
    assert f' {name}  ' in out, out
  assert out.count('tok/s') == 5


def test_a_server_under_load(capsys, tmp_path, monkeypatch):
  pytest.importorskip('uvicorn', reason="serving needs pip install '.[serve]'")
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  model = serving.make_model(tmp_path / 'm', length=512)
  bench.main(['serve', f'--model={model}', '--streams=2', '--new=4', '--rounds=2'])
  out = capsys.readouterr().out
  assert out.count('first token') == 2 and ' 1 stream(s)' in out and ' 2 stream(s)' in out and out.count(' ms') == 4


def test_what_is_learned_beside_the_peer(tmp_path):
  """On one device, as 12 rows want. After so few steps the peer knows little more than nothing, ln 28 = 3.3."""
  pytest.importorskip('torch', reason="the peer needs pip install -e '.[parity]'")
  (tmp_path / 'text').write_text('the quick brown fox jumps over the lazy dog. ' * 2000)
  out = subprocess.run(
      [sys.executable, '-m', 'llm_jax.bench', 'learn', f'--text={tmp_path / "text"}', '--recipe=cpu_ours', '--rounds=1',
       '--learn_steps=30', '--peer=torch'], env=os.environ | dict(XLA_FLAGS='', XDG_CACHE_HOME=str(tmp_path)),
      capture_output=True, text=True, timeout=600, cwd=ROOT)
  losses = [float(x) for x in re.findall(r'^ +(?:cpu_ours|nanoGPT, torch) +loss ([0-9.]+) ', out.stdout, re.M)]
  assert len(losses) == 2 and losses[0] < losses[1] < 3.3, out.stdout + out.stderr


def test_data_arrives_beside_what_training_consumes(capsys, tmp_path):
  (tmp_path / 'text').write_text('the quick brown fox jumps over the lazy dog. ' * 4000)
  bench.main(['load', f'--text={tmp_path / "text"}', '--layers=2', '--width=64', '--length=32', '--batch=4',
              '--rounds=1', '--steps=1'])
  out = capsys.readouterr().out
  tokenised = {name: float(x) for name, x in re.findall(r'(\w+) +([0-9.]+) MB/s tokenised', out)}
  assert set(tokenised) == {'byte', 'char', 'sentencepiece'} and min(tokenised.values()) > 0, out
  times = [float(x.replace(',', '')) for x in re.findall(r'([0-9,]+) times what training consumes', out)]
  assert len(times) == 4 and min(times) > 0, out


def test_a_second_start_compiles_less(capsys, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')                # one device, as 12 rows want
  bench.main(['compile', '--layers=2', '--width=64', '--length=32', '--batch=2', '--rounds=1'])
  out = capsys.readouterr().out
  rows = {name: (float(empty), float(kept)) for name, empty, kept in
          re.findall(r'^ +(?:step|first command)  +(\S.*?)  +([0-9.]+)  +([0-9.]+)$', out, re.M)}
  assert rows['programs from the cache'][0] == 0 < rows['programs from the cache'][1], out
  assert rows['compile, s'][1] < rows['compile, s'][0], out
  assert min(rows['programs kept on disk']) > 0 and min(rows['start to first loss, s']) > 0.5, out
  assert min(rows["host's peak memory, MB"]) > 100, out


def test_what_a_step_takes_as_a_model_grows(capsys, monkeypatch, tmp_path):
  """Memory is XLA's account, so its exponents do not depend on the machine; a limit below them is reported."""
  monkeypatch.setattr(growing, 'BASE', dict(layers=1, width=64, length=16, batch=4))
  monkeypatch.setattr(growing, 'CALLS', 5)
  monkeypatch.setattr(growing, 'DEEP', dict(layers=2, width=16, heads=2))
  monkeypatch.setattr(growing, 'AXES', dict(layers=('depth', (1, 2, 4), 0.1), width=('width', (64, 128, 256), 2)))
  bench.main(['grow', '--rounds=1', '--steps=1', f'--out={tmp_path / "grow.svg"}'])
  out = capsys.readouterr().out
  found = {(name, unit): (float(power), verdict) for name, unit, power, verdict in
           re.findall(r'(\w+)  (ms|MB)  .*  exponent (-?[0-9.]+) \(at most [0-9.]+\)  (.*)', out)}
  assert len(found) == 4 and 0.7 < found['depth', 'MB'][0] < 1.1 and 1.4 < found['width', 'MB'][0] < 2.1, out
  assert 'MORE' in found['depth', 'MB'][1] and found['width', 'MB'][1] == 'as expected', out
  assert 0 < float(re.search(r'([0-9.]+) ms a step in the call', out)[1]) < 1000
  assert (tmp_path / 'grow.svg').read_text().count('<!-- width') == 2


def test_a_known_power_is_found():
  assert abs(growing.exponent((1, 2, 4, 8, 16), [7 + 3 * x ** 2 for x in (1, 2, 4, 8, 16)]) - 2) < 0.1


def test_the_peer_is_in_the_same_table(capsys):
  pytest.importorskip('torch', reason="the peer needs pip install -e '.[parity]'")
  bench.main([*FLAGS, '--peer=torch'])
  assert capsys.readouterr().out.count('ours/this') == 2


def test_each_has_an_accelerator_alone_twice(capsys, monkeypatch):
  monkeypatch.setattr(training.machine, 'accelerated', lambda: True)
  bench.main([*FLAGS, '--rounds=3', '--explain'])
  out = capsys.readouterr().out
  assert re.findall(r'llm_jax  turn (\d): ', out) == ['1', '2'] and 'ours/this 1.00x' in out and ' idle ' in out


def test_a_peer_that_fails_does_not_take_the_others_along(capsys, monkeypatch, tmp_path):
  (tmp_path / 'torch.py').write_text('raise MemoryError("no room")\n')
  monkeypatch.setattr(training, 'import_torch', lambda: None)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  bench.main([*FLAGS, '--peer=torch'])
  out = capsys.readouterr().out
  assert re.search('^torch eager ended with 1: .*MemoryError: no room$', out, re.M) and out.count('ours/this') == 1


def test_a_contestant_that_ends_between_its_turns_says_so(tmp_path):
  flags = sizes(layers=1, batch=2)
  run = training.Process('llm_jax', training.sizes_of(flags), str(tmp_path))
  try:
    assert run.ask('run 1') > 0
    run.process.kill()
    run.process.wait()
    with pytest.raises(ConfigError, match='^llm_jax ended with -9'):
      run.ask('run 1')
  finally:
    run.end()


def test_a_profile_that_holds_nothing_costs_only_its_table(monkeypatch):
  flags = sizes(layers=1, batch=2)
  ours = training.Ours(flags, token_batch(flags))
  monkeypatch.setattr(explain, 'parts_of', lambda *a: {})
  rows, seconds = ours.explain(1)
  assert seconds > 0 and rows[0][0] == 'not explained' and 'no operation of the step' in rows[0][1]


def test_the_peer_computes_our_loss_and_learns_as_we_do():
  torch = pytest.importorskip('torch', reason="the peer needs pip install -e '.[parity]'")
  flags = sizes(layers=2, batch=4)
  token_BT = np.random.default_rng(0).integers(0, 65, (4, 33), dtype=np.int32)
  ours, peer = training.Ours(flags, token_BT), torch_peer.Torch(training.model_of(flags), token_BT, False)
  params = jax.tree.map(np.asarray, ours.state['params'])
  block, put = params['blocks0'], lambda to, w: to.weight.data.copy_(torch.from_numpy(np.array(w)))
  model = torch_peer.gpt(training.model_of(flags))
  put(model.embed, params['embed_VD'])
  put(model.position, params['position_embed_SD'])
  for i, layer in enumerate(model.blocks):
    qkv = [block['attention'][name][i].reshape(64, 64) for name in ('w_q_DNH', 'w_k_DKH', 'w_v_DKH')]
    put(layer.qkv, np.concatenate(qkv, 1).T)
    put(layer.out, block['attention']['w_o_NHD'][i].reshape(64, 64).T)
    put(layer.up, block['mlp']['w_up_DF'][i].T)
    put(layer.down, block['mlp']['w_down_FD'][i].T)
  groups = lambda model: [dict(params=list(model.parameters()), weight_decay=0.1)]
  peer.step = torch_peer.Step(model, groups, 'float32', False)
  for _ in range(3):               # the losses of three steps: the same forward, backward, clip and update
    np.testing.assert_allclose(ours.run(1), peer.run(1), rtol=2e-4)
  assert transformer.count(params) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('flags, text', [(['--layers=0'], 'layers'), (['--loss_chunk=-1'], 'loss_chunk'),
                                         (['--width=65'], 'width'),
                                         (['--peer=tf'], '--peer'), (['--pear=torch'], '--peer')])
def test_bad_flags_are_one_line(flags, text, capsys):
  with pytest.raises(SystemExit) as stopped:
    bench.main(['train', *flags])
  err = capsys.readouterr().err
  assert stopped.value.code == 2 and text in err and len(err.splitlines()) == 1
