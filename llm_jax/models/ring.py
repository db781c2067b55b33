"""Ring attention (arXiv 2310.01889): positions are split over the mesh axis `context`, and keys and values travel
around it, one device a step, while each device keeps a running softmax of what its queries have seen.

Under a causal mask device i takes parts i and 2n-1-i of 2n parts of the sequence (arXiv 2311.09431), so that all have
the same work in every step. That order exists only in here: outside, positions lie in their natural order. The backward
pass goes around once more, with the gradients of keys and values travelling along; no scores are kept.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax import sharding
from llm_jax.models.view import View, scores


def attend_ring(q_BTNH, k_BSKH, v_BSKH, view: View, *, window, scale, softcap, slopes_N=None):
  """Softmax attention of a whole pass over a mesh with context > 1 -> o_BTNH; as attention.attend_xla, with T = S in
  their natural order. T must be a multiple of twice the axis (attention.choose checks it)."""
  mesh = jax.sharding.get_abstract_mesh()
  q_spec, k_spec = (sharding.spec(dims, dict(sharding.ACT, S='context'), x.shape, mesh)
                    for dims, x in (('BTNH', q_BTNH), ('BSKH', k_BSKH)))
  if q_spec[2] != k_spec[2]:                               # too few kv heads for the tensor axis: one per query head
    k_BSKH, v_BSKH = (jnp.repeat(x, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    k_spec = q_spec
  rows = P(*q_spec[:2])
  local = Ring(view.kind, mesh.shape['context'], window, scale, softcap)
  slopes = (None, P()) if slopes_N is None else (jnp.asarray(slopes_N), P(q_spec[2]))
  return sharding.per_device(
      local, (q_spec, k_spec, k_spec, rows, rows, slopes[1], P('context')), q_spec)(
          q_BTNH, k_BSKH, v_BSKH, view.segment_BT, view.prefix_BS, slopes[0], sharding.indices('context'))


class Ring:
  """One device's part; what is static of it."""

  def __init__(self, kind, devices, window, scale, softcap):
    self.kind, self.devices = kind, devices
    self.options = dict(window=window, scale=scale, softcap=softcap)

  def __call__(self, q_BTNH, k_BSKH, v_BSKH, segment_BT, prefix_BS, slopes_N, index):
    """o_BTNH of this device's queries. index: [1], its place."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    halves = functools.partial(self.deal, index=index[0])
    q = halves(q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), 3)         # [2, B, K, G, half, H]
    k, v = (halves(x.swapaxes(1, 2), 2) for x in (k_BSKH, v_BSKH))                     # [2, B, K, half, H]
    segment, prefix = (None if x is None else halves(x, 1) for x in (segment_BT, prefix_BS))
    o = _attend(self, q, k, v, dict(segment=segment, prefix=prefix), (segment, slopes_N, index[0]))
    o_BKGTH = self.deal(o, 3, index[0], back=True)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

  def deal(self, x, axis, index, back=False):
    """This device's two neighbouring parts -> its first and its last one, stacked in front; or back again. Of the
    parts 2i and 2i + 1 one goes to each parity of devices."""
    n = self.devices
    owner = lambda part: part if part < n else 2 * n - 1 - part
    to = [[(i, owner(2 * i + odd)) for i in range(n)] for odd in (0, 1)]
    is_odd = index % 2 == 1
    if back:
      even, odd = jnp.where(is_odd, x[1], x[0]), jnp.where(is_odd, x[0], x[1])
      parts = [jax.lax.ppermute(part, 'context', [(b, a) for a, b in perm]) for part, perm in zip((even, odd), to)]
      return jnp.concatenate(parts, axis)
    even, odd = (jax.lax.ppermute(part, 'context', perm) for part, perm in zip(jnp.split(x, 2, axis), to))
    return jnp.stack([jnp.where(is_odd, odd, even), jnp.where(is_odd, even, odd)])

  def pairs(self, home, index, source):
    """The (half of queries, half of keys) to compute with the keys of device `source`; home: they are its own."""
    if self.kind != 'causal':
      return [(0, 0), (0, 1), (1, 0), (1, 1)]
    if home:
      return [(0, 0), (1, 0), (1, 1)]
    later = (source > index).astype(jnp.int32)
    return [(1, 0), (later, later)]

  def score(self, q, k, a, b, fixed, moving, source):
    """Scores of half a of the queries over half b of the keys of device `source`."""
    segment, slopes_N, index = fixed
    half = q.shape[-2]
    first = lambda device, part: half * jnp.where(part == 0, device, 2 * self.devices - 1 - device)
    view = View(self.kind, (first(index, a) + jnp.arange(half))[None], (first(source, b) + jnp.arange(half))[None],
                segment if segment is None else segment[a],
                segment if segment is None else moving['segment'][b],
                moving['prefix'] if moving['prefix'] is None else moving['prefix'][b])
    return scores(q, k, view, slopes_N=slopes_N, **self.options)[0]

  def turn(self, x):
    """What travels, one device on."""
    n = self.devices
    return jax.tree.map(lambda x: jax.lax.ppermute(x, 'context', [(i, (i + 1) % n) for i in range(n)]), x)

  def around(self, visit, state, travelling, index):
    """visit(home, source, state, travelling) -> (state, travelling) at each of the n stations; the first is its own.
    Afterwards what travelled is back home."""
    def body(carry, step):
      state, travelling = carry
      return visit(False, (index - step) % self.devices, state, self.turn(travelling)), None

    carry = visit(True, index, state, travelling)
    (state, travelling), _ = jax.lax.scan(body, carry, jnp.arange(1, self.devices))
    return state, self.turn(travelling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q, k, v, moving, fixed):
  return _forward(ring, q, k, v, moving, fixed)[0]


def _forward(ring, q, k, v, moving, fixed):
  def visit(home, source, state, travelling):
    k, v, moving = travelling
    for a, b in ring.pairs(home, fixed[2], source):
      most, total, o = (x[a] for x in state)
      score = ring.score(q[a], k[b], a, b, fixed, moving, source)
      higher = jnp.maximum(most, score.max(-1, keepdims=True))
      weight, old = jnp.exp(score - higher), jnp.exp(most - higher)
      o = o * old + jnp.einsum('BKGTS,BKSH->BKGTH', weight.astype(v.dtype), v[b], preferred_element_type=jnp.float32)
      new = higher, total * old + weight.sum(-1, keepdims=True), o
      state = tuple(x.at[a].set(y) for x, y in zip(state, new))
    return state, travelling

  one = (*q.shape[:-1], 1)
  state = jnp.full(one, -jnp.inf), jnp.zeros(one), jnp.zeros(q.shape)
  (most, total, o), _ = ring.around(visit, state, (k, v, moving), fixed[2])
  o = (o / total).astype(v.dtype)
  return o, (q, k, v, moving, fixed, o, most + jnp.log(total))


def _backward(ring, saved, do):
  q, k, v, moving, fixed, o, logsumexp = saved
  do = do.astype(v.dtype)
  delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1, keepdims=True)

  def visit(home, source, dq, travelling):
    k, v, moving, dk, dv = travelling
    for a, b in ring.pairs(home, fixed[2], source):
      score, pull = jax.vjp(lambda q, k: ring.score(q, k, a, b, fixed, moving, source), q[a], k[b])  # noqa: B023
      weight = jnp.exp(score - logsumexp[a])
      dweight = jnp.einsum('BKGTH,BKSH->BKGTS', do[a], v[b], preferred_element_type=jnp.float32)
      dq_half, dk_half = pull(weight * (dweight - delta[a]))
      dv_half = jnp.einsum('BKGTS,BKGTH->BKSH', weight.astype(v.dtype), do[a], preferred_element_type=jnp.float32)
      dq, dk, dv = (x.at[i].add(y.astype(jnp.float32)) for x, i, y in
                    ((dq, a, dq_half), (dk, b, dk_half), (dv, b, dv_half)))
    return dq, (k, v, moving, dk, dv)

  zeros = lambda x: jnp.zeros(x.shape)
  dq, (_, _, _, dk, dv) = ring.around(visit, zeros(q), (k, v, moving, zeros(k), zeros(v)), fixed[2])
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
