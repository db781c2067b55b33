"""Imports point one way, and the few Flax names in use are the agreed ones. Everything is read from the source."""
import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'llm_jax'
NNX = {'Module', 'Param', 'Rngs', 'vmap', 'split', 'merge', 'eval_shape', 'state', 'to_pure_dict'}

# A part may import its own level and those before it: config <- sharding <- ... <- commands.
LEVELS = [['config'], ['sharding', 'manifest', 'paths', 'hlo', 'hardware'], ['models', 'data', 'checkpoint'],
          ['interop'], ['generate'], ['train'], ['serve', 'tune', 'evals', 'planner'], ['api'],
          ['main', 'sample', 'convert', 'chat', 'evaluate', 'plan', 'bench']]
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}
COMMANDS = {*LEVELS[-1], 'serve.__main__', 'bench.__main__'} - {'bench'}
# The imports that point up: `--config.model=NAME` looks up a preset, or a model by its path, inside the function that
# reads the flag.
ALLOWED = {('config', 'models.presets'), ('config', 'interop.load')}


def modules():
  """{dotted name inside llm_jax: its syntax tree}; the package itself is ''."""
  names = {p: '.'.join(p.relative_to(PACKAGE).with_suffix('').parts).removesuffix('__init__').rstrip('.')
           for p in PACKAGE.rglob('*.py')}
  return {name: ast.parse(p.read_text(), str(p)) for p, name in names.items()}


MODULES = modules()


def imports(tree, top_level=False):
  """Modules of llm_jax that a file imports; top_level: only what importing the file itself imports."""
  nodes = tree.body if top_level else ast.walk(tree)
  for node in nodes:
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'relative import, line {node.lineno}'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    for name in names:
      if name.partition('.')[0] != 'llm_jax':
        continue
      name = name.removeprefix('llm_jax').removeprefix('.')
      while name and name not in MODULES:                       # a name inside a module: the module
        name = name.rpartition('.')[0]
      yield name


def part(name):
  return name.partition('.')[0]


def test_every_part_has_its_place():
  unknown = {part(name) for name in MODULES} - set(RANK) - {''}
  assert not unknown, f'{unknown} are in no level: say in LEVELS who may import them'


@pytest.mark.parametrize('name', sorted(set(MODULES) - {''}))
def test_imports_point_one_way(name):
  for other in imports(MODULES[name]):
    if other and (name, other) not in ALLOWED:
      rank = len(LEVELS) - 1 if name in COMMANDS else RANK[part(name)]
      assert RANK[part(other)] <= rank, f'{name} imports {other}'
      assert other not in COMMANDS or other == name, f'{name} imports the command {other}'


def test_the_package_itself_imports_only_when_called():
  assert not list(imports(MODULES[''], top_level=True))


def test_models_know_nothing_of_training():
  for name, tree in MODULES.items():
    if part(name) == 'models':
      assert {part(other) for other in imports(tree)} <= {'models', 'sharding', 'config'}
      used = {alias.name.partition('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
              for alias in node.names}
      used |= {node.module.partition('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
      assert not used & {'optax', 'orbax', 'grain', 'tensorflow_datasets'}, name


def test_no_module_imports_itself_in_a_circle():
  graph = {name: {other for other in imports(tree, top_level=True) if other != name} for name, tree in MODULES.items()}
  list(graphlib.TopologicalSorter(graph).static_order())        # raises CycleError with the circle


def test_only_the_agreed_names_of_nnx():
  for name, tree in MODULES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'nnx':
        assert node.attr in NNX, f'{name}, line {node.lineno}: nnx.{node.attr}'
      if isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] == 'flax':
        assert [alias.name for alias in node.names] == ['nnx'] and node.module == 'flax', f'{name}, line {node.lineno}'
      if isinstance(node, ast.Import):
        assert not any(alias.name.startswith('flax') for alias in node.names), f'{name}, line {node.lineno}'
