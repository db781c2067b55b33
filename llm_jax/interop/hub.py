"""Models by name from a hub (huggingface.co, or what HF_ENDPOINT names), and back to it, through huggingface_hub."""
import contextlib
import pathlib
import tempfile
from collections.abc import Callable

from llm_jax.config import ConfigError

# What is read of a model; nothing that could be unpickled, and no second copy of the weights.
FILES = ('*.json', '*.jinja', '*.safetensors', '*tokenizer.model', '*.tiktoken', 'merges.txt')


def download(name: str) -> pathlib.Path:
  """The local copy of 'org/name', 'org/name@revision' or 'org/name/FILE.gguf', fetched once into the hub's cache
  (HF_HOME). Raises ConfigError where the hub cannot be reached or has no such model."""
  import huggingface_hub
  name, _, revision = name.partition('@')
  organisation, _, rest = name.partition('/')
  repository, _, file = rest.partition('/')
  if not organisation or not repository or file and not file.endswith('.gguf'):
    raise ConfigError(f'hf:{name}: expected hf:org/name, hf:org/name@revision or hf:org/name/FILE.gguf')
  options = dict(repo_id=f'{organisation}/{repository}', revision=revision or None)
  with _one_line(f'hf:{name}'):
    if file:
      return pathlib.Path(huggingface_hub.hf_hub_download(filename=file, **options))
    return pathlib.Path(huggingface_hub.snapshot_download(
        allow_patterns=FILES, ignore_patterns=['original/*', 'consolidated*'], **options))


def upload(name: str, write: Callable[[pathlib.Path, str], object]):
  """Lets `write(folder, file)` make a model in a temporary directory, checked as always, uploads the directory as
  'org/name' (private, where it is new) and returns what write did. file: what a single file is called there, the last
  part of 'org/name/FILE.gguf' or else name.gguf."""
  import huggingface_hub
  organisation, _, rest = name.partition('/')
  repository, _, file = rest.partition('/')
  if not organisation or not repository or '/' in file:
    raise ConfigError(f'hf:{name}: expected hf:org/name, or hf:org/name/FILE.gguf')
  with tempfile.TemporaryDirectory() as folder, _one_line(f'hf:{name}'):
    target = pathlib.Path(folder) / 'model'
    saved = write(target, file or f'{repository}.gguf')
    api = huggingface_hub.HfApi()
    api.create_repo(f'{organisation}/{repository}', private=True, exist_ok=True)
    api.upload_folder(repo_id=f'{organisation}/{repository}', folder_path=target,
                      commit_message='Model written by llm_jax')
  return saved._replace(path=f'hf:{name}')


@contextlib.contextmanager
def _one_line(name):
  from huggingface_hub import errors
  try:
    yield
  except ConfigError:
    raise
  except errors.RepositoryNotFoundError as e:
    raise ConfigError(f'{name}: the hub has no such model, or it is private: then run `hf auth login`') from e
  except errors.EntryNotFoundError as e:
    raise ConfigError(f'{name}: {" ".join(str(e).split())[:200]}') from e
  except Exception as e:          # the network's, in many classes
    text = f'{type(e).__name__}: {" ".join(str(e).split())[:160]}'
    raise ConfigError(f'{name}: the hub does not answer as expected ({text}); '
                      'check the network, HF_ENDPOINT and `hf auth whoami`, or give a local path') from e
