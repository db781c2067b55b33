"""The sampling command: what goes to stdout and stderr, its errors, pipes and terminals."""
import io
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
import tiny

from llm_jax import checkpoint, hardware, sample
from llm_jax import config as config_lib
from llm_jax.data import tokenizer as tokenizer_lib

CONFIG = config_lib.Config(model=config_lib.Model(layers=1, width=32, heads=4),
                           data=config_lib.Data(source='text', path='corpus', length=48),
                           tokenizer=config_lib.Tokenizer(kind='char'), log=config_lib.Log(compile_cache=False))
ALPHABET = '\n\x1b\x9b\rabcdefghé€字'


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
  monkeypatch.setattr(hardware, 'keep_programs', lambda folder: None)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """--model=... of a run that writes random characters, escape and carriage return among them."""
  workdir = tmp_path_factory.mktemp('run')
  tokenizer = tokenizer_lib.Char(ALPHABET)
  tokenizer.save(workdir / 'tokenizer')
  shape = config_lib.derive(CONFIG.model, tokenizer.vocab_size, CONFIG.data.length)
  with checkpoint.Checkpointer(workdir, 1, config_lib.to_dict(CONFIG)) as checkpoints:
    checkpoints.save(2, dict(step=np.int32(2), params=tiny.params(shape)))
  return f'--model={workdir}'


def texts(capsys, *args):
  sample.main(list(args))
  return capsys.readouterr()


def failure(capsys, *args):
  """The one line on stderr of a command that ends with status 2."""
  with pytest.raises(SystemExit) as e:
    sample.main(list(args))
  out, err = capsys.readouterr()
  assert e.value.code == 2 and out == '' and err.count('\n') == 1 and 'Traceback' not in err
  return err


def test_prompt_and_text_on_stdout_the_rest_on_stderr(run, capsys):
  out, err = texts(capsys, run, '--prompt=abc', '--max_tokens=9')
  assert out.startswith('abc') and len(out) == 3 + 9 + 1 and out.endswith('\n')
  assert err.startswith('9 tokens in ') and 'tok/s' in err
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9').out == out
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--stream').out == out
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--seed=1').out != out


def test_several_prompts_and_samples_are_kept_apart(run, capsys):
  out = texts(capsys, run, '--prompt=abc', '--prompt=a', '--n=2', '--max_tokens=5', '--temperature=2').out
  parts = out.split('=' * 20 + '\n')
  assert [p[:n] for p, n in zip(parts, (3, 3, 1, 1))] == ['abc', 'abc', 'a', 'a'] and len(set(parts)) == 4


def test_options_reach_the_sampler(run, capsys):
  greedy = texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--temperature=0').out
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--temperature=3', '--top_k=1').out == greedy
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--temperature=3', '--top_p=1e-6').out == greedy
  assert texts(capsys, run, '--prompt=abc', '--max_tokens=9', '--temperature=3', '--min_p=1').out == greedy
  args = (run, '--prompt=abc', '--max_tokens=9', '--temperature=0')
  assert texts(capsys, *args, '--repetition_penalty=9').out != greedy
  assert texts(capsys, *args, '--stop=' + greedy[5:7]).out == greedy[:greedy.index(greedy[5:7], 3)] + '\n'


def test_a_mesh_gives_the_same_text(run, capsys):
  args = (run, '--prompt=abc', '--prompt=cab', '--max_tokens=9', '--temperature=0')
  assert texts(capsys, *args, '--fsdp=2', '--tensor=2').out == texts(capsys, *args).out


def test_prompt_from_stdin(run, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('é€'.encode())))
  assert texts(capsys, run, '--prompt=-', '--max_tokens=4').out.startswith('é€')
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\xff')))
  assert '--prompt: expected UTF-8' in failure(capsys, run, '--prompt=-')


def test_errors_are_one_line_with_status_2(run, capsys, tmp_path):
  assert "unknown flag --promt=x; nearest: '--prompt'" in failure(capsys, run, '--promt=x')
  assert "invalid int value: 'many'" in failure(capsys, run, '--max_tokens=many')
  assert '--model' in failure(capsys)
  assert '--fsdp=3 --tensor=4: expected' in failure(capsys, run, '--prompt=a', '--fsdp=3', '--tensor=4')
  assert f'{tmp_path}: not a run directory' in failure(capsys, f'--model={tmp_path}', '--prompt=a')
  assert 'top_p: expected above 0 and at most 1, got 2.0' in failure(capsys, run, '--prompt=a', '--top_p=2')
  assert 'prompt 0: is empty' in failure(capsys, run)
  assert "character 'ß'" in failure(capsys, run, '--prompt=ß')
  assert 'prompt 0: has 48 tokens, expected at most 47' in failure(capsys, run, '--prompt=' + 'a' * 48)
  assert 'no checkpoint of step 7' in failure(capsys, run, '--prompt=a', '--step=7')
  assert '--stream: expected one prompt' in failure(capsys, run, '--prompt=a', '--n=2', '--stream')


def start(*args, **pipes):
  env = dict(os.environ, XLA_FLAGS='--xla_backend_optimization_level=0')     # compiling is what it spends
  return subprocess.Popen([sys.executable, '-m', 'llm_jax.sample', *args], env=env, **pipes)


def test_a_terminal_is_shown_no_control_characters(run):
  ours, theirs = pty.openpty()
  process = start(run, '--prompt=\x1babc', '--max_tokens=40', '--temperature=9', '--top_p=1', stdout=theirs,
                  stderr=subprocess.PIPE)
  os.close(theirs)
  shown = b''
  while True:
    try:
      shown += os.read(ours, 1000)
    except OSError:                                        # its other end is closed
      break
  assert process.wait() == 0, process.stderr.read()
  text = shown.decode().replace('\r\n', '\n')              # the terminal's own line ends
  assert text.startswith('\\x1babc') and '\\x9b' in text and '\\r' in text
  assert not any(c in text for c in '\x1b\x9b\r')


def test_what_is_no_terminal_gets_the_text_as_it_is(run, capsys):
  out = texts(capsys, run, '--prompt=abc', '--max_tokens=40', '--temperature=9', '--top_p=1').out
  assert '\x1b' in out and '\r' in out and len(out) == 44


def test_a_pipe_may_close_early(run):
  process = start(run, '--prompt=abc', stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  _, err = process.communicate()
  assert process.returncode == 0 and err == b''
