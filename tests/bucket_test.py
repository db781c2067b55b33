"""Runs in gs:// and s3://, over HTTP, by the real clients (TensorStore and gcsfs, s3fs) on a bucket of 127.0.0.1.

Not tested: the servers of Google and Amazon, credentials, several hosts on a bucket.
"""
import json

import gcs
import pytest
import runs
from etils import epath


@pytest.fixture(params=['gs', 's3'])
def bucket(request, monkeypatch):
  """The address of an empty bucket that this process and its children reach."""
  pytest.importorskip({'gs': 'gcsfs', 's3': 's3fs'}[request.param],
                      reason="a bucket needs its client: pip install -e '.[bucket]'")
  if request.param == 'gs':
    monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')       # asks Google about every bucket
    with gcs.Bucket('pod') as server:
      monkeypatch.setenv('STORAGE_EMULATOR_HOST', server.address)
      monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', server.address)
      yield 'gs://pod'
  else:
    moto = pytest.importorskip('moto.server', reason="an S3 server for tests: pip install -e '.[test]'")
    server = moto.ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in dict(AWS_ENDPOINT_URL=f'http://{host}:{port}', AWS_ACCESS_KEY_ID='a',
                            AWS_SECRET_ACCESS_KEY='b', AWS_DEFAULT_REGION='us-east-1').items():
      monkeypatch.setenv(name, value)
    import s3fs
    s3fs.S3FileSystem(skip_instance_cache=True).makedirs('pod', exist_ok=True)
    yield 's3://pod'
    server.stop()


def start(*args, module='llm_jax.main'):
  return runs.start(list(args), module=module)


def test_a_run_in_a_bucket_is_killed_resumed_elsewhere_verified_and_sampled(bucket, tmp_path):
  runs.write_texts(tmp_path)
  keys = dict(train__steps=9, checkpoint__every=3, model__dropout=0.1)
  workdir = f'{bucket}/runs/a'
  args = [*runs.flags(tmp_path, **keys), f'--workdir={workdir}']
  process = start(*args)
  runs.wait_for(process, r'checkpoint of step 6 ')
  process.kill()
  process.communicate()
  out, error = runs.finish(start(*args, f'--config.data.cache_dir={tmp_path / "another machine"}'))
  assert f'resuming {workdir} at step' in out and 'MB in' in out and 'error' not in error
  runs.finish(runs.start(runs.flags(tmp_path, **keys)))
  folder = epath.Path(workdir)
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  curve = [(row['step'], row['loss/train']) for row in rows if 'loss/train' in row]
  assert curve == [(step, value) for step, _, value in runs.curve(tmp_path / 'run', 'loss/train')]
  for name in ('report.html', 'report.md', 'time.json', 'events.jsonl', 'config.json', 'tokenizer/meta.json'):
    assert (folder / name).exists(), name

  out, _ = runs.finish(start('verify', workdir, module='llm_jax.checkpoint'))
  assert out.count(' verified\n') == 2
  files = (folder / 'checkpoints/9/state/params/ocdbt.process_0/d').iterdir()
  damaged = max(files, key=lambda path: path.stat().length)
  data = bytearray(damaged.read_bytes())
  data[len(data) // 2] ^= 1
  damaged.write_bytes(bytes(data))
  out, error = runs.finish(start(f'--model={workdir}', '--max_tokens=4', module='llm_jax.sample'))
  assert f'9 is damaged: the contents of state/params/ocdbt.process_0/d/{damaged.name} changed' in error
  assert 'going back to step 6' in error and out
  out, error = runs.finish(start(*args))
  assert f'resuming {workdir} at step 6' in out and '9.damaged: set aside' in error
  assert runs.state_bits(workdir) == runs.state_bits(tmp_path / 'run')


def test_what_is_wrong_with_a_bucket_is_said_in_one_line(bucket, tmp_path):
  runs.write_texts(tmp_path)
  args = runs.flags(tmp_path)
  _, error = runs.finish(start(*args, f'--workdir={bucket}elsewhere/run'), 2)
  assert "check the bucket's name and your credentials" in error.splitlines()[-1]
  _, error = runs.finish(start(*args, '--workdir=ftp://pod/run'), 2)
  assert 'expected a local path, gs:// or s3://' in error
