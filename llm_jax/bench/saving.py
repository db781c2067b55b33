"""bench save: checkpoints, beside Orbax alone."""
import pathlib
import shutil
import statistics
import tempfile
import time

from llm_jax.bench import hardware


def save(flags) -> None:
  """Prints how long a save holds the caller and how long it takes to be complete, ours and Orbax alone, and what
  verifying costs a restore."""
  import jax
  import orbax.checkpoint as ocp

  from llm_jax import checkpoint
  width = 1024
  layers = max(1, round(flags.mb * 1e6 / (3 * 4 * 4 * width * width)))
  params = lambda seed: {'w_up_DF': jax.random.normal(jax.random.key(seed), (layers, width, 4 * width))}
  state = dict(params=params(0), step=jax.numpy.int32(0), opt_state=dict(mu=params(1), nu=params(2)))
  jax.block_until_ready(state)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  held, whole = {'llm_jax': [], 'orbax': []}, {'llm_jax': [], 'orbax': []}
  with tempfile.TemporaryDirectory() as folder:
    run = pathlib.Path(folder) / 'run'
    (run / 'tokenizer').mkdir(parents=True)
    (run / 'tokenizer' / 'meta.json').write_text('{}')
    alone = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    with checkpoint.Checkpointer(run, 1, {}) as ours:
      for i in range(flags.rounds + 1):                  # the first warms up
        start = time.perf_counter()
        held['llm_jax'].append(ours.save(i + 1, state))
        ours.wait()
        whole['llm_jax'].append(time.perf_counter() - start)
        start = time.perf_counter()
        items = dict(params=state['params'], train={k: v for k, v in state.items() if k != 'params'})
        alone.save(pathlib.Path(folder) / f'{i}', args=ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}))
        held['orbax'].append(time.perf_counter() - start)
        alone.wait_until_finished()
        whole['orbax'].append(time.perf_counter() - start)
        shutil.rmtree(pathlib.Path(folder) / f'{i}')
    alone.close()
    print(f'save {size:.0f} MB, {flags.rounds} rounds, medians; {hardware()}')
    for what, seconds in (('holds the caller', held), ('is complete after', whole)):
      ours_s, theirs_s = seconds['llm_jax'][1:], seconds['orbax'][1:]
      ratio = statistics.median(a / b for a, b in zip(ours_s, theirs_s))
      print(f'{what:>24}  {statistics.median(ours_s):.3f} s  orbax alone {statistics.median(theirs_s):.3f} s  '
            f'ours/orbax {ratio:.2f}x')
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    read = {True: [], False: []}
    for _ in range(flags.rounds):
      for verify in read:
        start = time.perf_counter()
        jax.block_until_ready(checkpoint.restore(run, None, abstract, verify=verify))
        read[verify].append(time.perf_counter() - start)
    print(f'{"restore, verified":>24}  {statistics.median(read[True]):.3f} s  not verified '
          f'{statistics.median(read[False]):.3f} s')
