"""A small code model, from raw text to samples, on any machine:

  python -m llm_jax.main --config=configs/base.py

Data: the source of the Python standard library, already on every machine. Trains its own tokenizer first.
Hardware: 2 CPU cores, 6 minutes from empty caches: first loss after 18 s, then 5 minutes of training (1,056 steps, 2.2
million tokens) to 1.56 bits per byte over all held-out files; with --config.train.minutes=30 to 1.17.

Every key is here once, with its comment. Other config files start from base.get_config() and set only what differs.
`--config.group.key=value` overrides a key on the command line. A published shape replaces the whole model group: in a
file `config.model = preset('llama3_8b')` (names: llm_jax/models/presets.py), on the command line
`--config.model=llama3_8b`; keys set after it win.
"""
from ml_collections import ConfigDict

from llm_jax.config import ConfigError  # noqa: F401  for the configs that start from this one
from llm_jax.models.presets import preset  # noqa: F401


def get_config():
  config = ConfigDict()
  config.model = ConfigDict(dict(
      vocab_size=0,                     # V; 0: what the tokenizer has, rounded up to a multiple of 64
      layers=4,                         # L
      width=128,                        # D
      heads=2,                          # N
      kv_heads=0,                       # K; 0: as many as heads (multi-head); 1: multi-query
      head_dim=0,                       # H; 0: width / heads
      mlp_dim=0,                        # F; 0: 4 x width
      max_length=0,                     # longest position; 0: data.length
      norm='rms',                       # rms | layer
      norm_position='before',           # before | after (the sublayer) | both | post (after the residual: the original)
      norm_eps=1e-6,                    # added to the mean square (variance)
      norm_bias=False,                  # a learned bias beside the scale
      norm_learned=True,                # False: no scale (nor bias)
      norm_unit_offset=False,           # scale is 1 + w (Gemma)
      qk_norm='head',                   # none | head (over H, per head) | full (over all heads, OLMo 2)
      positions='rotary',               # rotary | learned | sinusoidal | alibi | none
      rope_base=10_000.0,               # theta
      rope_base_local=0.0,              # base of the sliding-window layers; 0: rope_base (Gemma 3 uses 10,000)
      rope_fraction=1.0,                # share of H that rotates
      rope_scaling='none',              # none | linear | yarn | llama3; layers with a local base never scale
      rope_factor=1.0,                  # how many times longer the scaled context is
      rope_original_length=0,           # context the unscaled model was trained at (yarn, llama3)
      rope_low_freq=1.0,                # llama3
      rope_high_freq=4.0,               # llama3
      rope_beta_fast=32.0,              # yarn
      rope_beta_slow=1.0,               # yarn
      rope_attention_factor=0.0,        # yarn; 0: 0.1 ln(factor) + 1
      attention='causal',               # causal | prefix | bidirectional; must fit train.objective
      attention_bias=False,             # on q, k, v
      attention_out_bias=False,         # on the output projection
      attention_scale=0.0,              # 0: 1 / sqrt(head_dim)
      attention_softcap=0.0,            # 0: off
      windows=(0,),                     # sliding window by layer, repeated over the depth; 0: all earlier positions
      mlp='relu2',                      # gelu (tanh) | gelu_exact | geglu | swiglu | relu2 | relu
      mlp_bias=False,                   # on both matrices
      experts=0,                        # E: mixture of experts instead of one MLP per layer; 0: off
      experts_per_token=2,              # J: chosen by the router for each token
      expert_dim=0,                     # F of each expert; 0: mlp_dim
      shared_experts=0,                 # experts that every token goes through as well
      expert_capacity=0.0,              # > 0: an expert takes so many times its equal share, training only; 0: dropless
      expert_exchange='fixed',          # over mesh.expert: fixed (all_to_all) | ragged (dropless on TPU and GPU)
      expert_buffer=0.0,                # of an exchange, in equal shares; the rest is dropped; 0: for the worst case
      router='softmax',                 # softmax | sigmoid, of the experts' scores
      router_normalize=True,            # the chosen experts' weights sum to 1
      router_scale=1.0,                 # times those weights (DeepSeek)
      router_bias=False,                # balance by a bias on the choice instead of a loss (arXiv 2408.15664)
      parallel_residual=False,          # attention and MLP read the same input (GPT-J, PaLM)
      tied_embeddings=False,            # the output matrix is the embedding
      embedding_scale=False,            # multiply embeddings by sqrt(width)
      embedding_norm=False,             # a norm straight after the embedding
      logit_softcap=0.0,                # 0: off
      embedding_skips=True,             # each layer mixes the embedding back into its input (modded-nanogpt)
      value_skips=True,                 # each layer mixes the first layer's values into its own (arXiv 2410.17897)
      zero_init=True,                   # output projections start at zero
      init_scale=1.0,                   # times 1/sqrt(fan in) for every matrix
      embedding_init=1.0,               # standard deviation of the embedding
      dropout=0.0,                      # of embeddings and of what each sublayer adds
      encoder_layers=0,                 # > 0: encoder-decoder with cross-attention
      dtype='auto',                     # compute: auto (bfloat16 on TPU and GPU, float32 on CPU) | float32 | bfloat16
      fp8=False,                        # train the layers' products in float8 (NVIDIA Ada, Hopper and newer)
      kernel='auto',                    # attention: auto | xla | cudnn | triton | splash
      remat='auto',                     # auto (the first of the next three whose step fits the device) | none | dots
                                        # (keep matrix products) | full (keep only layer inputs) | offload (full, and
                                        # layer inputs wait in the host's memory)
      unroll=True,                      # unroll the scan over layers: faster steps, slower compile on deep models
  ))

  config.data = ConfigDict(dict(
      source='stdlib',                  # stdlib | text | jsonl | parquet | arrayrecord | tfds | mixture
      path='',                          # file, folder or glob; for tfds a name: 'tiny_shakespeare', 'name/config:1.0.0'
      field='text',                     # the text's key in jsonl, parquet, arrayrecord and tfds records
      mixture=(),                       # of dict(source=, path=, field=, weight=), for source='mixture'
      temperature=1.0,                  # mixture weights ** (1 / temperature)
      length=256,                       # T: tokens per sequence
      packing='concat',                 # concat (one stream, as GPT) | pack (documents kept apart by segment ids)
      valid='hash',                     # hash (a fixed share of documents) | tail (the last share of the text) | given
      valid_fraction=0.05,              # hash and tail
      valid_path='',                    # given: like path; for tfds the name of a split
      cache_dir='',                     # stores and tokenizers; '': $XDG_CACHE_HOME or ~/.cache, /llm_jax
      workers=0,                        # Grain worker processes; 0: threads
      max_bad_records=0,                # corrupt records or bad UTF-8 to skip before failing
  ))

  config.tokenizer = ConfigDict(dict(
      kind='sentencepiece',             # byte | char | sentencepiece | hf
      path='',                          # a .model (sentencepiece) or tokenizer.json (hf) to load; '': train on the data
      vocab_size=2048,                  # sentencepiece, when trained
      algorithm='bpe',                  # sentencepiece: bpe | unigram
      train_mb=8.0,                     # text the tokenizer is trained on, evenly sampled
  ))

  config.train = ConfigDict(dict(
      steps=0,                          # 0: as many as fit in `minutes`
      minutes=5.0,                      # > 0: wall-clock budget of the training loop (steps then cap it)
      batch_size=8,                     # B: sequences per step, over all devices
      accumulate=0,                     # microbatches per step; 0: one, on a CPU of <= 1,024 tokens
      accumulate_dtype='float32',       # float32 | bfloat16: in which microbatches' gradients are summed
      seed=0,                           # of the parameters, the order of the data and dropout
      objective='causal',               # causal | prefix | masked | span
      z_loss=0.0,                       # weight of logsumexp ** 2 (PaLM uses 1e-4)
      balance_loss=0.01,                # experts: weight of the load-balance loss (arXiv 2101.03961)
      router_z_loss=0.001,              # experts: weight of the router's z-loss (arXiv 2202.08906)
      router_bias_rate=0.001,           # experts: how far a step moves router_bias
      label_smoothing=0.0,              # share of the target spread over the vocabulary
      loss_chunk=0,                     # vocabulary entries whose logits exist at once; 0: all
      ema=0.0,                          # decay of the parameters' moving average; 0: none kept
      on_nonfinite='stop',              # stop | skip, at a non-finite loss or gradient (the state stays as it was)
      spike_window=0,                   # a loss more than spike_sigmas above the mean of so many: skipped; 0: off
      spike_sigmas=6.0,                 # standard deviations of those losses
  ))

  config.optimizer = ConfigDict(dict(
      name='muon',                      # adamw | adafactor | lion | muon
      learning_rate=3e-3,               # peak, of everything but muon's matrices
      matrix_learning_rate=0.02,        # muon: peak of the matrices
      tuned_width=0,                    # > 0: learning_rate is for a model so wide, and is less for the matrices of a
                                        # wider one (muP, arXiv 2203.03466); muon's need no rule
      schedule='wsd',                   # constant | linear | cosine | inverse_sqrt | wsd
      warmup_steps=50,                  # linear, at most half of the run
      decay_fraction=0.6,               # wsd: share of the steps that decay
      final_fraction=0.0,               # learning rate at the end, as a share of the peak
      b1=0.9,                           # adamw, lion, muon's rest
      b2=0.95,                          # adamw, lion, muon's rest
      eps=1e-8,                         # adamw, muon
      momentum=0.95,                    # muon
      muon_steps=5,                     # muon: Newton-Schulz iterations, 3 to 6; fewer are faster, less orthogonal
      muon_b2=0.0,                      # muon: of each output's mean square (NorMuon, arXiv 2510.05491); 0: plain Muon
      weight_decay=0.1,                 # on matrices and embeddings; not on scales and biases
      clip_norm=1.0,                    # global norm; 0: off
  ))

  config.mesh = ConfigDict(dict(
      data=1,                           # replicas that split the batch
      fsdp=-1,                          # split the batch, the parameters and the moments; -1: all devices left
      tensor=1,                         # split heads, mlp and vocabulary
      context=1,                        # split positions: ring attention
      expert=1,                         # split the batch, and experts among devices
      stage=1,                          # split the depth: a pipeline of train.accumulate microbatches
      interleave=1,                     # parts of the depth that each stage holds (circular pipeline)
      distributed=False,                # call jax.distributed.initialize() (TPU pods, SLURM, GKE need no arguments)
  ))

  config.checkpoint = ConfigDict(dict(
      every=400,                        # steps; 0: only at the end
      keep=2,                           # newest steps kept
      keep_every=0,                     # steps that are multiples of it are saved and never deleted; 0: none
      resume=True,                      # go on from the newest sound step in workdir
      verify=True,                      # compare its files with their hashes first (the start says how long it took)
  ))

  config.eval = ConfigDict(dict(
      every=200,                        # steps; 0: only at the end
      batches=8,                        # batches per periodic evaluation; the last evaluation uses all held-out text
      batch_size=0,                     # 0: train.batch_size
      prompts=('def ', 'import ', 'class '),  # continued at every evaluation and in the report
      samples=5,                        # further samples from an empty prompt at the end
      max_tokens=128,                   # of each continuation
      temperature=0.8,                  # of the samples; 0: greedy
      top_p=0.95,                       # of the samples
      python=True,                      # report samples that ast.parse accepts, and gzip and xz of the held-out text
  ))

  config.log = ConfigDict(dict(
      every=20,                         # steps per console line
      tensorboard=True,                 # event files in WORKDIR/tensorboard
      progress='auto',                  # auto (rich on a terminal, lines elsewhere) | rich | lines
      profile='',                       # 'first:last' steps to trace with jax.profiler
      compile_cache=True,               # keep compiled programs on disk between runs
      co2_kg_per_kwh=0.4,               # assumed grid intensity for the report
      cpu_watts_per_core=10.0,          # assumed power, where none can be read
  ))

  config.init_from = ''                   # a model whose weights a new run starts from: any path that --model takes
  return config
