"""The Transformer once more, in float64 NumPy: one row, one document, one head at a time, by the published formulas.
It shares no code with llm_jax and knows no batches, segments, caches, scans or meshes, so agreement means something."""
import math

import numpy as np


def forward(cfg, params, tokens, prefix=0, source=None):
  """Logits [T, V] of one document of ids; its first `prefix` tokens are seen by all; source: ids of the encoder."""
  p = _float64(params)
  memory = None
  if source is not None:
    memory = _embed(cfg, p, source)
    for i in range(cfg.encoder_layers):
      memory = _block(cfg, _layer(p['encoder_blocks0'], i), memory, np.ones((len(source),) * 2, bool), 0)
    if cfg.norm_position != 'post':
      memory = _norm(cfg, p.get('norm_encoder'), memory)

  x = embed = _embed(cfg, p, tokens)
  T, first = len(tokens), {}
  period = len(cfg.windows) if len(set(cfg.windows)) > 1 else 1
  for i in range(cfg.layers):
    whole = i < cfg.layers // period * period
    block = _layer(p[f'{"blocks" if whole else "tail"}{i % period}'], i // period if whole else 0)
    window = cfg.windows[i % period]
    mask = np.array([[_sees(cfg.attention, window, prefix, q, k) for k in range(T)] for q in range(T)])
    if cfg.embedding_skips:
      x = block['skip_x_D'] * x + block['skip_embed_D'] * embed
    x = _block(cfg, block, x, mask, window, memory, first if cfg.value_skips else None)
  if cfg.norm_position != 'post':
    x = _norm(cfg, p.get('norm_final'), x)
  logits = x @ (p['embed_VD'].T if cfg.tied_embeddings else p['unembed_DV'])
  return cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits


def _float64(tree):
  return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _layer(tree, i):
  return {k: _layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def _sees(kind, window, prefix, q, k):
  if kind == 'bidirectional':
    return not window or abs(q - k) < window
  return (k <= q or (kind == 'prefix' and k < prefix)) and (not window or q - k < window)


def _embed(cfg, p, tokens):
  x = p['embed_VD'][tokens]
  if cfg.embedding_scale:
    x = x * math.sqrt(cfg.width)
  if cfg.positions == 'learned':
    x = x + p['position_embed_SD'][:len(tokens)]
  if cfg.positions == 'sinusoidal':
    half = cfg.width // 2
    for t in range(len(tokens)):
      for i in range(half):
        angle = t / 10_000 ** (2 * i / cfg.width)
        x[t, i] += math.sin(angle)
        x[t, half + i] += math.cos(angle)
  return _norm(cfg, p.get('norm_embed'), x) if cfg.embedding_norm else x


def _norm(cfg, p, x):
  flat = x.reshape(len(x), -1)
  if cfg.norm == 'layer':
    flat = flat - flat.mean(-1, keepdims=True)
  y = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + cfg.norm_eps)
  for name, w in sorted((p or {}).items(), reverse=True):      # scale_*, then bias_*
    y = y * (w.ravel() + cfg.norm_unit_offset) if name.startswith('scale') else y + w.ravel()
  return y.reshape(x.shape)


def _block(cfg, p, x, mask, window, memory=None, first=None):
  def sublayer(x, name, f, inputs=None):
    h = x if inputs is None else inputs
    y = f(_norm(cfg, p.get(f'norm_{name}'), h) if cfg.norm_position in ('before', 'both') else h)
    if cfg.norm_position in ('after', 'both'):
      y = _norm(cfg, p.get(f'norm_{name}_out'), y)
    return _norm(cfg, p.get(f'norm_{name}_out'), x + y) if cfg.norm_position == 'post' else x + y

  start = x
  x = sublayer(x, 'attention', lambda h: _attention(cfg, p['attention'], h, h, mask, window, True, first))
  if memory is not None:
    everything = np.ones((len(x), len(memory)), bool)
    x = sublayer(x, 'cross', lambda h: _attention(cfg, p['cross_attention'], h, memory, everything, 0, False))
  return sublayer(x, 'mlp', lambda h: _mlp(cfg, p['mlp'], h), start if cfg.parallel_residual else None)


def _attention(cfg, p, x, kv, mask, window, positions, first=None):
  q, k, v = (np.einsum('td,dnh->tnh', a, w) for a, w in ((x, p['w_q_DNH']), (kv, p['w_k_DKH']), (kv, p['w_v_DKH'])))
  if cfg.attention_bias:
    q, k, v = q + p['b_q_NH'], k + p['b_k_KH'], v + p['b_v_KH']
  if cfg.qk_norm == 'full':
    q, k = _norm(cfg, p.get('norm_q'), q), _norm(cfg, p.get('norm_k'), k)
  if cfg.qk_norm == 'head':
    q = np.stack([_norm(cfg, p.get('norm_q'), q[:, n]) for n in range(q.shape[1])], 1)
    k = np.stack([_norm(cfg, p.get('norm_k'), k[:, n]) for n in range(k.shape[1])], 1)
  if positions and cfg.positions == 'rotary':
    local = window and cfg.rope_base_local
    freq, factor = rope(cfg, cfg.rope_base_local if local else cfg.rope_base, not local)
    q, k = _rotate(q, freq, factor), _rotate(k, freq, factor)
  if first is not None:
    first.setdefault('v', v)
    v = (1 - p['value_mix_K'][:, None]) * v + p['value_mix_K'][:, None] * first['v']
  out = np.zeros_like(x) if not cfg.attention_out_bias else np.tile(p['b_o_D'], (len(x), 1))
  for n in range(cfg.heads):
    g = n // (cfg.heads // cfg.kv_heads)
    score = q[:, n] @ k[:, g].T * (cfg.attention_scale or 1 / math.sqrt(cfg.head_dim))
    if cfg.attention_softcap:
      score = cfg.attention_softcap * np.tanh(score / cfg.attention_softcap)
    if positions and cfg.positions == 'alibi':               # here with heads a power of two
      score = score - 2 ** (-8 * (n + 1) / cfg.heads) * np.abs(np.subtract.outer(np.arange(len(x)), np.arange(len(kv))))
    weight = np.where(mask, np.exp(score - score.max()), 0)
    out += weight / weight.sum(-1, keepdims=True) @ v[:, g] @ p['w_o_NHD'][n]
  return out


def _rotate(x, freq, factor):
  """Each pair (i, i + pairs) is a complex number that turns by position x frequency."""
  pairs, out = len(freq), x.copy()
  for t in range(len(x)):
    z = (x[t, :, :pairs] + 1j * x[t, :, pairs:2 * pairs]) * np.exp(1j * t * np.asarray(freq)) * factor
    out[t, :, :pairs], out[t, :, pairs:2 * pairs] = z.real, z.imag
  return out


def rope(cfg, base, scaled=True):
  """(frequencies, factor on the rotated channels), pair by pair as the papers and reference codes have them."""
  dim = int(cfg.head_dim * cfg.rope_fraction)
  freq = [base ** (-2 * i / dim) for i in range(dim // 2)]
  old, factor = cfg.rope_original_length, cfg.rope_factor
  if not scaled or cfg.rope_scaling == 'none':
    return freq, 1.0
  if cfg.rope_scaling == 'linear':
    return [f / factor for f in freq], 1.0
  if cfg.rope_scaling == 'llama3':
    def llama3(f):
      wavelength = 2 * math.pi / f
      if wavelength < old / cfg.rope_high_freq:
        return f
      if wavelength > old / cfg.rope_low_freq:
        return f / factor
      smooth = (old / wavelength - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)
      return (1 - smooth) * f / factor + smooth * f
    return [llama3(f) for f in freq], 1.0

  def dimension(turns):                                      # the pair that makes this many turns over `old` positions
    return dim * math.log(old / (2 * math.pi * turns)) / (2 * math.log(base))
  low = max(math.floor(dimension(cfg.rope_beta_fast)), 0)
  high = min(math.ceil(dimension(cfg.rope_beta_slow)), dim - 1)
  out = []
  for i, f in enumerate(freq):
    interpolate = min(max((i - low) / (high - low), 0), 1)
    out.append(f / factor * interpolate + f * (1 - interpolate))
  return out, cfg.rope_attention_factor or 0.1 * math.log(factor) + 1


def _mlp(cfg, p, x):
  return _experts(cfg, p, x) if cfg.experts else _dense(cfg, p, x)


def _experts(cfg, p, x):
  """Token by token, expert by expert; no expert is ever full."""
  out = np.zeros_like(x)
  for t, token in enumerate(x):
    logits = token @ p['w_router_DE']
    score = np.exp(logits - logits.max())
    score = score / score.sum() if cfg.router == 'softmax' else 1 / (1 + np.exp(-logits))
    chosen = np.argsort(-(score + p.get('router_bias_E', 0)), kind='stable')[:cfg.experts_per_token]
    total = score[chosen].sum() if cfg.router_normalize else 1
    for e in chosen:
      expert = {name[:-3] + ('DF' if 'down' not in name else 'FD'): w[e] for name, w in p.items() if name[-3] == 'E'}
      out[t] += cfg.router_scale * score[e] / total * _dense(cfg, expert, token[None])[0]
  return out + (_dense(cfg, p['shared'], x) if cfg.shared_experts else 0)


def _dense(cfg, p, x):
  up = x @ p['w_up_DF'] + (p['b_up_F'] if cfg.mlp_bias else 0)
  tanh_gelu = lambda a: 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
  gate = x @ p['w_gate_DF'] if 'w_gate_DF' in p else None
  h = {'gelu': lambda: tanh_gelu(up), 'geglu': lambda: tanh_gelu(gate) * up,
       'swiglu': lambda: gate / (1 + np.exp(-gate)) * up, 'relu': lambda: np.maximum(up, 0),
       'relu2': lambda: np.maximum(up, 0)**2,
       'gelu_exact': lambda: up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))}[cfg.mlp]()
  return h @ p['w_down_FD'] + (p['b_down_D'] if cfg.mlp_bias else 0)
