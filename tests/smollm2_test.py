"""A real model: SmolLM2-135M-Instruct (smollm2.py)."""
import os
import subprocess
import sys

import numpy as np
import pytest
from shared import DATA, needs_data

from llm_jax import api
from llm_jax.generate import engine
from llm_jax.generate.options import Options
from llm_jax.interop import load, save


def test_it_knows_the_capital_of_france(smollm2, tmp_path):
  """Greedy; so does the Hugging Face directory made of it. Tokens are those of the published tokenizer, and its special
  ones do not come out of text."""
  model = api.load(smollm2)
  assert model.generate('The capital of France is', max_tokens=2)[0].startswith(' Paris')
  assert '<|im_start|>' in model.chat_template and model.tokenizer.eos_id == 2
  digits = model.tokenizer.encode('The year 2024')[-4:]
  assert [model.tokenizer.decode([i]) for i in digits] == ['2', '0', '2', '4']
  assert not model.tokenizer.adds_bos
  assert 1 not in model.tokenizer.encode('<|im_start|>')
  saved = save.to_hf(load.load(smollm2), tmp_path / 'hf', 'bfloat16')
  assert saved.error < 1.0
  assert api.load(tmp_path / 'hf').generate('The capital of France is', max_tokens=2)[0].startswith(' Paris')


MEMORY = """
import resource, sys
import jax
from llm_jax.interop import load
import gguf.quants
jax.numpy.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = load.load(sys.argv[1]).params
sizes = [x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params))]
embedding = params['embed_VD'].nbytes
assert peak() - before < sum(sizes) + 1.3 * embedding, (peak() - before, sum(sizes), embedding)
"""


def test_loading_holds_the_model_once(smollm2):
  """Peak memory stays below the model, once, and 1.3 times its largest tensor."""
  out = subprocess.run([sys.executable, '-c', MEMORY, str(smollm2)], capture_output=True, text=True, timeout=300)
  assert out.returncode == 0, out.stderr


SPREAD = """
import resource, sys
import jax
from llm_jax import config, sharding
from llm_jax.interop import load
import gguf.quants
mesh = sharding.make_mesh(config.Mesh(fsdp=4, tensor=1, data=2))
jax.device_put(1.0, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = load.load(sys.argv[1], mesh=mesh).params
leaves = jax.tree.leaves(jax.block_until_ready(params))
held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
embedding = params['embed_VD'].nbytes
assert held < 2.1 * sum(x.nbytes for x in leaves)
assert peak() - before < held + 1.3 * embedding, (peak() - before, held, embedding)
"""


def test_spread_over_devices_each_holds_its_shards_alone(smollm2):
  """On CPU devices the shards are the host's memory too: they and 1.3 times the largest tensor are all there is."""
  env = os.environ | dict(XLA_FLAGS='--xla_force_host_platform_device_count=8')
  out = subprocess.run([sys.executable, '-c', SPREAD, str(smollm2)], env=env, capture_output=True, text=True,
                       timeout=300)
  assert out.returncode == 0, out.stderr


@needs_data
@pytest.mark.slow
def test_perplexity_is_that_of_transformers(smollm2):
  """Both read the same GGUF file and the same 16 x 512 tokens, each row alone; within 0.5%."""
  torch = pytest.importorskip('torch', reason="the reference needs pip install '.[parity]'")
  transformers = pytest.importorskip('transformers', reason="the reference needs pip install '.[parity]'")
  pytest.importorskip('accelerate', reason='transformers reads GGUF files with accelerate: pip install accelerate')
  model = api.load(smollm2)
  ids = model.tokenizer.encode((DATA / 'wikitext2/valid.txt').read_text()[:60_000])[:16 * 512].reshape(16, 512)
  reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name,
                                                                dtype=torch.float32).eval()
  sums = [0.0, 0.0]
  for row in ids:
    with torch.no_grad():
      theirs = reference(torch.tensor(row[None].astype(np.int64))).logits[0].numpy()
    for i, logits_TV in enumerate((np.asarray(model.logits(row[None]))[0], theirs)):
      top_T = logits_TV.max(1)
      log_sum_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(1))
      sums[i] += float((log_sum_T[:-1] - logits_TV[np.arange(511), row[1:]]).astype(np.float64).sum())
  ours, theirs = np.exp(np.array(sums) / (16 * 511))
  print(f'perplexity {ours:.4f}, transformers {theirs:.4f}')
  assert abs(ours / theirs - 1) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_S17_alone_batched_cached_and_with_proposals_the_same(smollm2, dtype):
  """Greedy, 16 prompts of 100 tokens. In float32 the tokens are the same but where the two likeliest lie within 1e-4 of
  each other, for at most 1 in 1,000 (there the texts part, and are compared no further); in bfloat16 the share is
  printed."""
  model = api.load(smollm2, dtype=dtype)
  prompts = [model.tokenizer.encode(f'{subject} is').tolist() for subject in (
      'The capital of France', 'Water', 'The sun', 'Python', 'A prime number', 'The moon', 'Bread', 'A poem', 'Gold',
      'The largest ocean', 'Music', 'A friend', 'Winter', 'The heart', 'A computer', 'Mathematics')]

  def run(slots, ahead=0, times=1):
    made = engine.Engine(model.shape, model.params, slots=slots, length=256, vocab_size=model.tokenizer.vocab_size,
                         ahead=ahead)
    for _ in range(times):               # the second time the prompts are in the cache
      requests = [engine.Request(ids, Options(max_tokens=100, logprobs=2)) for ids in prompts]
      for request in requests:
        made.submit(request)
      made.run()
    return requests
  alone = run(slots=1)
  for name, others in dict(batched=run(16), cached=run(16, times=2), proposed=run(4, ahead=3)).items():
    equal = total = parted = close = 0
    for a, b in zip(alone, others):
      n = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), len(a.tokens))
      equal, total, parted = equal + n, total + len(a.tokens), parted + (n < len(a.tokens))
      if n < len(a.tokens):
        top = a.logprobs[n][2]
        close += top[0] - top[1] < 1e-4
    print(f'{dtype}, {name}: {equal / total:.4f} of {total} tokens before a difference, {parted} of 16 texts part')
    assert dtype == 'bfloat16' or (parted == close and close <= total / 1000)
