"""A run in gs://, over HTTP, by the real clients (TensorStore for arrays, gcsfs for the rest) on a bucket of 127.0.0.1.

Not tested: Google's own servers, credentials, several hosts on a bucket.
"""

import json

import gcs
import pytest
import runs

pytest.importorskip('gcsfs', reason="a bucket needs gcsfs: pip install -e '.[bucket]'")


@pytest.fixture
def bucket():
  with gcs.Bucket('pod') as bucket:
    yield bucket


@pytest.fixture
def start(bucket, tmp_path):
  """start(module, *args): a command that reaches the bucket."""
  env = dict(STORAGE_EMULATOR_HOST=bucket.address, TENSORSTORE_GCS_HTTP_URL=bucket.address,
             GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false')       # asks Google about every bucket

  def start(*args, module='llm_jax.main'):
    return runs.start(list(args), module=module, env=env)
  return start


def test_a_run_in_a_bucket_is_killed_resumed_elsewhere_verified_and_sampled(bucket, start, tmp_path):
  runs.write_texts(tmp_path)
  keys = dict(train__steps=9, checkpoint__every=3, model__dropout=0.1)
  args = [*runs.flags(tmp_path, **keys), '--workdir=gs://pod/runs/a']
  process = start(*args)
  runs.wait_for(process, r'checkpoint of step 6 ')
  process.kill()
  process.communicate()
  out, error = runs.finish(start(*args, f'--config.data.cache_dir={tmp_path / "another machine"}'))
  assert 'resuming gs://pod/runs/a at step' in out and 'MB in' in out and 'error' not in error
  runs.finish(runs.start(runs.flags(tmp_path, **keys)))
  curve = [(r['step'], r['loss/train']) for r in rows(bucket, 'metrics.jsonl') if 'loss/train' in r]
  assert curve == [(step, value) for step, _, value in runs.curve(tmp_path / 'run', 'loss/train')]
  assert {'report.html', 'report.md', 'time.json', 'events.jsonl', 'config.json', 'tokenizer/meta.json'} <= {
      name.removeprefix('runs/a/') for name in bucket.objects}

  out, _ = runs.finish(start('verify', 'gs://pod/runs/a', module='llm_jax.checkpoint'))
  assert out.count(' verified\n') == 2
  name = max((n for n in bucket.objects if '/9/state/params/' in n), key=lambda n: len(bucket.objects[n][0]))
  data = bytearray(bucket.objects[name][0])
  data[len(data) // 2] ^= 1
  bucket.put(name, bytes(data))
  out, error = runs.finish(start('--model=gs://pod/runs/a', '--max_tokens=4', module='llm_jax.sample'))
  assert f'9 is damaged: the contents of {name.partition("/9/")[2]} changed' in error
  assert 'going back to step 6' in error and out


def rows(bucket, name):
  return [json.loads(line) for line in bucket.objects[f'runs/a/{name}'][0].splitlines()]


def test_what_is_wrong_with_a_bucket_is_said_in_one_line(start, tmp_path):
  runs.write_texts(tmp_path)
  args = runs.flags(tmp_path)
  _, error = runs.finish(start(*args, '--workdir=gs://elsewhere/run'), 2)
  assert "check the bucket's name and your credentials" in error.splitlines()[-1]
  _, error = runs.finish(start(*args, '--workdir=ftp://pod/run'), 2)
  assert 'expected a local path' in error
