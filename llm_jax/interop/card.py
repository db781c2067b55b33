"""The model card (README.md) of an exported model: what it is, what it was trained on, what is known of its limits."""
from llm_jax import config as config_lib
from llm_jax.interop import families
from llm_jax.models import transformer


def text(model, architecture: str, dtype: str) -> str:
  """Markdown with the YAML header that model hubs read. model: a Loaded."""
  shape, config = model.shape, model.config
  trained = not model.family or bool(config.init_from)
  data = config.data
  sources = ', '.join(f'{s.source} {s.path} (weight {s.weight:g})'.replace('  ', ' ') for s in data.mixture) or (
      f'{data.source} {data.path}'.strip())
  parts = [
      '---', 'library_name: transformers', 'tags:', '- llm_jax', '---', '', '# Model card', '',
      f'{architecture} with {transformer.count(model.params):,} parameters, stored in {dtype}; written by llm_jax.', '']
  if trained:
    t, o = config.train, config.optimizer
    until = f'{t.minutes:g} minutes' if t.minutes else f'{t.steps:,} steps'
    parts += [
        '## Training data', '', f'* {sources}', f'* sequences of {data.length} tokens, packing `{data.packing}`; '
        f'held out: `{data.valid}`', f'* tokenizer: {model.tokenizer.kind}, {model.tokenizer.vocab_size:,} entries', '',
        '## Training', '', f'* {until}, batch of {t.batch_size}, {o.name}, learning rate {o.learning_rate:g}, '
        f'{o.schedule}, seed {t.seed}',
        *([f'* from the weights of {config.init_from}'] if config.init_from else []), f'* {model.origin}', '']
  else:
    parts += ['## Training data', '', 'Converted, not trained here: see the original, and its licence '
              f'({model.origin}).', '']
  parts += [
      '## Evaluation', '', *evaluation(model, trained), '',
      '## Limits', '',
      '* It continues text; it states falsehoods fluently, and repeats what its data held, biases too.',
      f'* It reads at most {shape.max_length:,} tokens.',
      '* Nothing here was tested for a use; test it for yours.', '', '## Config', '', '```']
  plain, shape = config_lib.Model(), families.computed(shape)
  parts += [f'{name} = {value!r}' for name, value in vars(shape).items() if value != getattr(plain, name)]
  return '\n'.join([*parts, '```', ''])


NAMES = {'loss/valid': 'loss per token, nats', 'eval/bits_per_byte': 'bits per byte',
         'eval/accuracy': 'next token right'}


def evaluation(model, trained: bool) -> list[str]:
  """Lines on the run's last evaluation up to this step."""
  if not model.figures:
    return ['No evaluation was recorded.' if trained else 'See the original.']
  rows = [f'| {NAMES.get(name, name)} | {value:.4f} |' for name, value in model.figures.items()
          if name != 'step' and isinstance(value, float)]
  return [f'On text held out from its training data, after step {model.figures["step"]:,}:', '',
          '| | |', '|---|---|', *rows, '',
          'Nothing else was measured: neither truthfulness, nor bias, nor how it follows instructions.']
