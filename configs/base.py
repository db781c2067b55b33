"""A small code model, from raw text to samples, on any machine:

  python -m llm_jax.main --config=configs/base.py

Data: the source of the Python standard library, already on every machine. Trains its own tokenizer first.
Hardware: 2 CPU cores, under 6 minutes in all; --config.train.minutes=30 learns more.

How configs compose: a config file returns an ml_collections.ConfigDict of the groups below; another starts from
base.get_config() and sets only the lines that differ. `--config.group.key=value` overrides any key on the command line.
A published shape replaces the whole model group: in a file `config.model = preset('llama3_8b')` (from
llm_jax.models.presets), on the command line `--config.model=llama3_8b`; keys set after it win.
What each key means, and its default, is written once, beside it in llm_jax/config.py.
"""
import dataclasses

from ml_collections import ConfigDict

from llm_jax.config import Config


def get_config():
  config = ConfigDict(dataclasses.asdict(Config()))
  return config
