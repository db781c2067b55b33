"""Several real processes on this machine, as the hosts of a pod: they train, save, are killed, and go on, with the loss
curve of a single process. Stopping and saving by agreement is in faults_test.py."""
import signal

import numpy as np
import pytest
import runs

from llm_jax import checkpoint, paths

EXPERTS = dict(model__experts=4, model__expert_dim=32, model__mlp='swiglu', train__accumulate=2)
CASES = {      # processes, devices of each, mesh, model
    'fsdp and tensor on 2': (2, 2, dict(mesh__fsdp=2, mesh__tensor=2), {}),
    'experts over 4': (4, 1, dict(mesh__expert=4, mesh__fsdp=1), EXPERTS),
    'stages over 2': (2, 1, dict(mesh__stage=2, mesh__fsdp=1), dict(train__accumulate=2)),
    'context over 4': (4, 1, dict(mesh__context=4, mesh__fsdp=1), {}),
    # Independent updates of many matrices: programs whose collectives could wait for each other.
    'muon on 2': (2, 1, dict(mesh__fsdp=2), dict(optimizer__name='muon', optimizer__matrix_learning_rate=0.01)),
}
SLOW = ('stages over 2', 'context over 4', 'muon on 2')


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_killed_hosts_resume_with_the_curve_of_one(name, tmp_path):
  hosts, devices, mesh, model = CASES[name]
  runs.write_texts(tmp_path)
  keys = dict(train__steps=24, checkpoint__every=8, optimizer__learning_rate=1e-3, optimizer__eps=1e-4,
              train__accumulate=1) | model
  one = runs.start(runs.flags(tmp_path, workdir='one', **keys, mesh__fsdp=1))
  runs.finish(one)

  flags = runs.flags(tmp_path, workdir='several', **keys, **mesh)
  processes = runs.start_hosts(flags, hosts, devices=devices)
  runs.wait_for(processes[0], r'step +18/')              # well after the checkpoint of step 8 or 16
  for process in processes:
    process.send_signal(signal.SIGKILL)
    process.wait()
  found = checkpoint.find_to_resume(tmp_path / 'several')
  assert found.step in (8, 16)
  processes = runs.start_hosts(flags, hosts, devices=devices)
  out, _ = runs.finish(processes[0])
  for process in processes[1:]:
    runs.finish(process)
  assert f'resuming {tmp_path / "several"} at step {found.step}' in out and f'{hosts} process(es)' in out

  def curve(folder):
    return [(row['step'], row['tokens'], row['loss/train'], row['grads/norm'])
            for row in paths.read_jsonl(tmp_path / folder / 'metrics.jsonl') if 'loss/train' in row]
  want, got = curve('one'), curve('several')
  assert [row[:2] for row in got] == [row[:2] for row in want] and len(want) == 24
  assert want[-1][2] < 0.9 * want[0][2]
  np.testing.assert_allclose([row[2:] for row in got], [row[2:] for row in want], rtol=1e-5)
