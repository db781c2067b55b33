"""The costs of a compiled program, counted from its optimized HLO (`compiled.as_text()`).

XLA's own cost_analysis counts the body of a loop once; here everything is times its trips. The text of CPUs, TPUs and
GPUs is read: a TPU prints a matrix product as a convolution, and an asynchronous collective as several fusions that all
contain it; a GPU prints products and attention as calls of cuBLAS and cuDNN.
"""
import collections
import dataclasses
import functools
import math
import re

import numpy as np

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
FREE = ('parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'while', 'conditional', 'call', 'after-all',
        'opt-barrier', 'partition-id', 'replica-id', 'async-update', 'async-done')
BOOKKEEPING = ('AllocateBuffer', 'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone',
               'AssumeGatherIndicesInBound')
LIBRARIES = ('__cublas', '__cudnn')
SAME = ('bitcast', 'reshape', 'transpose', 'convert', 'copy')        # each element of the operand, once


@dataclasses.dataclass(frozen=True)
class Collective:
  """`bytes`: what one device sends in a step, by ring algorithms; `axes`: the mesh axes spanned, in mesh order, ('?',)
  for groups that are no product of axes; `count`: executions in a step."""
  kind: str
  axes: tuple[str, ...]
  bytes: float
  count: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device and step. `flops`: of matrix products and cuDNN's attention, and what kernels say of themselves;
  `bytes`: an estimate of HBM traffic; `custom_calls`: executions by target, or by name for a Pallas kernel;
  `unknown_loops`: loops whose trips the text does not tell, counted once."""
  flops: float
  bytes: float
  collectives: tuple[Collective, ...]
  custom_calls: dict[str, float]
  unknown_loops: int


def count(text: str, mesh_shape: dict[str, int]) -> Cost:
  """The costs of a program partitioned over a mesh of this shape (axis names to sizes, in order)."""
  program = Program(text, mesh_shape)
  total = program.total(program.entry, {}, False)
  of = lambda what: {which: float(n) for (name, which), n in total.items() if name == what}
  moved = [Collective(*which, of('sent')[which], n) for which, n in of('collective').items()]
  return Cost(float(total['flops', '']), float(total['bytes', '']),
              tuple(sorted(moved, key=lambda c: (-c.bytes, c.kind, c.axes))), of('call'), len(program.unknown))


def products_in_float8(text: str) -> int:
  """How many of a program's matrix products read operands in float8."""
  computations = parse(text)[0].values()
  return sum(c.ops[op.operands[0]].shape.startswith('f8') for c in computations for op in c.ops.values()
             if op.opcode == 'dot' or op.target.startswith('__cublas'))


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """An instruction: `args` and `attrs` as printed, `config` its metadata and backend_config."""
  name: str
  shape: str
  opcode: str
  args: str
  attrs: str
  config: str

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.args)

  @functools.cached_property
  def leaves(self) -> list[tuple[tuple[int, ...], float, float]]:
    """(dimensions, bytes, bytes in HBM) of each of its arrays; a TPU prints other memories as S(1), VMEM, and so on."""
    out = []
    for kind, dims, layout in re.findall(r'\b([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?', self.shape):
      dims, bits = tuple(int(d) for d in re.findall(r'\d+', dims)), re.match(r'[a-z]+(\d+)', kind)
      if out and kind in ('s8', 'u8') and self.target.startswith(LIBRARIES):
        continue                                   # room for the library to work in
      size = math.prod(dims) * (int(bits[1]) if bits else 8 if kind == 'pred' else 0) / 8
      out.append((dims, size, 0. if re.search(r'S\([1-9]', layout) else size))
    return out

  @property
  def dims(self) -> tuple[int, ...]:
    return self.leaves[0][0]

  def attr(self, name: str, pattern: str = r'%?([\w.-]+)') -> str | None:
    m = re.search(rf'\b{name}={pattern}', self.attrs)
    return m and m[1]

  @functools.cached_property
  def target(self) -> str:
    """What a custom call calls; '' for other operations."""
    return self.attr('custom_call_target', '"([^"]*)"') or '' if self.opcode == 'custom-call' else ''

  def calls(self, *targets: str) -> bool:
    return self.target in targets


@dataclasses.dataclass(eq=False)
class Computation:
  ops: dict[str, Op]
  root: str

  @functools.cached_property
  def params(self) -> list[str]:
    return [op.name for op in sorted((op for op in self.ops.values() if op.opcode == 'parameter'),
                                     key=lambda op: int(op.args))]

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Op, int]]]:
    users = collections.defaultdict(list)
    for op in self.ops.values():
      for k, name in enumerate(op.operands):
        users[name].append((op, k))
    return users

  def same(self, name: str) -> Op:
    """What made a value, before copies and casts."""
    op = self.ops[name]
    return self.same(op.operands[0]) if op.opcode in SAME else op

  def element(self, name: str) -> int | None:
    """i, where the value is element i of the only parameter."""
    op = self.same(name)
    return int(op.attr('index')) if op.opcode == 'get-tuple-element' and op.operands[0] in self.params else None

  def number(self, name: str, env: dict[int, int]) -> int | None:
    op = self.same(name)
    if op.opcode == 'constant':
      return int(op.args) if re.fullmatch(r'-?\d+', op.args) else None
    return env.get(self.element(name))


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of a module by name, and the name of its entry."""
  text, computations, entry = re.sub(r'"body":"[^"]*"', '', text), {}, ''      # megabytes of Pallas code
  thread = r'(?:, execution_thread="\w+")?'                                    # what a TPU's SparseCores run
  for m in re.finditer(rf'^(ENTRY )?%([\w.-]+) .*\{{\n((?:.*\n)*?)\}}{thread}$', text, re.M):
    lines = re.split(r'\n(?=\s+(?:ROOT )?%\S+ = )', '\n' + m[3])[1:]           # an attribute may have line breaks
    ops = [parse_op(line) for line in lines]
    root = next((op.name for op, line in zip(ops, lines) if re.match(r'\s*ROOT ', line)), ops[-1].name)
    computations[m[2]] = Computation({op.name: op for op in ops}, root)
    entry = m[2] if m[1] else entry
  return computations, entry


def parse_op(line: str) -> Op:
  head, rest = line.split(' = ', 1)
  end = closing(rest) if rest.startswith('(') else rest.index(' ')
  shape, (opcode, rest) = rest[:end], rest[end:].lstrip().split('(', 1)
  end = closing('(' + rest) - 2
  attrs, args = rest[end + 1:], rest[:end]
  cut = min((i for i in (attrs.find(', metadata={'), attrs.find(', backend_config=')) if i >= 0), default=len(attrs))
  return Op(head.split('%')[1], shape, opcode, args, attrs[:cut], attrs[cut:])


def closing(text: str) -> int:
  """One past the bracket that closes the first character."""
  depth = 0
  for m in re.finditer(r'[()]', text):
    depth += 1 if m[0] == '(' else -1
    if not depth:
      return m.end()
  raise ValueError(f'unclosed bracket: {text[:80]}')


def ints(text: str | None) -> list[int]:
  return [int(i) for i in re.findall(r'-?\d+', text or '')]


def groups_of(attrs: str, devices: int) -> list[list[int]]:
  """The groups of devices in replica_groups, in each of the ways XLA prints them."""
  if m := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attrs):
    return iota(m[2], m[3]).reshape(ints(m[1])).tolist()
  if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attrs):
    sizes, ids = re.findall(r"'?([^',]+?)'?=(\d+)", m[1]), m[2] or ''
    part = dict(re.findall(r"'?([^',:]+)'?(?::(\(\d+\)\d+))?", m[3]))
    dims = []                                      # 'x':(2)4 is the part of x that is 4 ways, inside its first 2
    for name, size in sizes:
      outer, ways = ints(part[name]) if part.get(name) else (1, int(size) if name in part else 1)
      dims += [outer, ways, int(size) // outer // ways]
    moved = re.match(r'\[([\d,]+)\](?:T\(([\d,]+))?', ids)
    ids = iota(moved[1], moved[2]) if moved else np.array(ints(ids) or range(math.prod(dims)))
    inside = [i for i in range(len(dims)) if i % 3 == 1]
    order = [i for i in range(len(dims)) if i % 3 != 1] + inside
    return ids.reshape(dims).transpose(order).reshape(-1, math.prod(dims[i] for i in inside)).tolist()
  m = re.search(r'replica_groups=\{(\{[\d,{}]*\})\}', attrs)
  return [ints(g) for g in re.findall(r'\{([\d,]+)\}', m[1])] if m else [list(range(devices))]


def iota(dims: str, order: str | None) -> np.ndarray:
  dims = ints(dims)
  return np.arange(math.prod(dims)).reshape(dims).transpose(ints(order) or range(len(dims))).reshape(-1)


def axes_of(groups: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes along which each group is a full product, or ('?',)."""
  found = set()
  for group in groups:
    differ = [len(set(c.tolist())) > 1 for c in np.unravel_index(group, tuple(mesh_shape.values()))]
    axes = tuple(a for a, d in zip(mesh_shape, differ) if d)
    found.add(axes if math.prod(mesh_shape[a] for a in axes) == len(set(group)) else ('?',))
  return found.pop() if len(found) == 1 else ('?',)


class Program:
  def __init__(self, text: str, mesh_shape: dict[str, int]):
    self.computations, self.entry = parse(text)
    self.mesh_shape, self.unknown = mesh_shape, set()

  def total(self, name: str, env: dict[int, int], fused: bool) -> collections.Counter:
    """One execution of a computation, by (what, which). env: the elements of its parameter that are known numbers."""
    total, comp = collections.Counter(), self.computations[name]
    for op in comp.ops.values():
      for key, n in self.cost(comp, op, env, fused).items():
        total[key] += n
    return total

  def cost(self, comp: Computation, op: Op, env: dict[int, int], fused: bool) -> collections.Counter:
    """One execution of an operation, with what it calls."""
    total, kind, inner, times = collections.Counter(), op.opcode.removesuffix('-start'), None, 1
    if not fused:
      total['bytes', ''] += self.traffic(comp, op)
    if kind == 'while':
      times, kept = self.trips(comp, op, env)
      if times is None:
        self.unknown.add(op.name)
      inner = self.total(op.attr('body'), kept, fused)
    elif kind == 'conditional':
      inner = max((self.total(b, {}, fused) for b in branches(op)), key=lambda t: (t['flops', ''], t['bytes', '']))
    elif kind in ('fusion', 'call', 'async'):
      inner = self.total(op.attr('calls') or op.attr('to_apply'), {}, fused or kind == 'fusion')
    elif kind == 'dot':
      total.update(product_flops(comp, op, op.attr('lhs_contracting_dims', r'\{([\d,]*)\}')))
    elif kind == 'convolution':
      total['flops', ''] += convolution_flops(op, *(comp.ops[o].dims for o in op.operands[:2]))
    elif kind == 'custom-call' and not op.calls(*BOOKKEEPING):
      total['call', kernel_name(op) if op.target == 'tpu_custom_call' else op.target] += 1
      total['flops', ''] += sum(ints(''.join(re.findall(r'"cost_estimate":\{"flops":"?(\d+)', op.config))))
      if op.target.startswith('__cudnn$fmha'):
        total['flops', ''] += attention_flops(comp, op)
      elif m := re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', op.config):       # of cuBLAS
        total.update(product_flops(comp, op, m[1]))
    elif kind in KINDS and not self.continues(comp, op) and (sent := self.collective(comp, op, kind, fused)):
      total['sent', sent[0]] += sent[1]
      total['collective', sent[0]] += 1
    for key, n in (inner or {}).items():
      total[key] += n * (1 if times is None else times)
    return total

  def executed(self, name: str | None = None, env: dict[int, int] | None = None, times: float = 1):
    """(computation, operation, executions) of each operation of the entry, its loops, branches and calls, but not
    those inside fusions."""
    comp, env = self.computations[name or self.entry], env or {}
    for op in comp.ops.values():
      yield comp, op, times
      if op.opcode == 'while':
        trips, kept = self.trips(comp, op, env)
        yield from self.executed(op.attr('body'), kept, times * (1 if trips is None else trips))
      elif op.opcode in ('call', 'async-start'):
        yield from self.executed(op.attr('calls') or op.attr('to_apply'), {}, times)
      elif op.opcode == 'conditional':
        for branch in branches(op):
          yield from self.executed(branch, {}, times)

  def continues(self, comp: Computation, op: Op) -> bool:
    """True for a collective that another fusion has started: all the fusions it runs beside repeat it."""
    return ('"async_collective_fusion_config"' in op.config and
            not any(o.calls('AsyncCollectiveStart') for o in comp.ops.values()))

  def collective(self, comp, op, kind, fused):
    """((kind, axes), bytes sent), or None where every group is one device."""
    operands = op.operands[:1] if kind == 'ragged-all-to-all' else op.operands
    size = sum(leaf[1] for o in operands for leaf in comp.ops[o].leaves)
    if kind == 'collective-permute':
      shape = tuple(self.mesh_shape.values())
      pairs = [np.unravel_index(ints(p), shape) for p in re.findall(r'\{(\d+,\d+)\}', op.attrs)]
      axes = tuple(a for i, a in enumerate(self.mesh_shape) if any(c[i][0] != c[i][1] for c in pairs))
      return ((kind, axes), size) if axes else None
    groups = groups_of(op.attrs, math.prod(self.mesh_shape.values()))
    n, users = max(map(len, groups)), comp.users[op.name]
    if fused and kind == 'all-reduce' and users and all(u.opcode == 'dynamic-slice' for u, _ in users):
      kind = 'reduce-scatter'                      # how a TPU prints one
    share = n - 1 if kind == 'all-gather' else (n - 1) / n * (2 if kind == 'all-reduce' else 1)
    return ((kind, axes_of(groups, self.mesh_shape)), share * size) if n > 1 else None

  def trips(self, comp, op, env) -> tuple[int | None, dict[int, int]]:
    """Trips of a loop, if known, and the numbers in its carry that stay the same. A TPU does not print
    known_trip_count: there it is the usual comparison of a counter with a bound."""
    cond, body = self.computations[op.attr('condition')], self.computations[op.attr('body')]
    carry = comp.ops[op.operands[0]]
    carry = carry.operands if carry.opcode == 'tuple' else []
    start = {i: n for i, o in enumerate(carry) if (n := comp.number(o, env)) is not None}
    after = body.ops[body.root].operands
    kept = {i: n for i, n in start.items() if i < len(after) and body.element(after[i]) == i}
    if m := re.search(r'"known_trip_count":\{"n":"?(\d+)', op.config):
      return int(m[1]), kept
    test = cond.ops[cond.root]
    if test.opcode != 'compare' or (i := cond.element(test.operands[0])) not in start or i >= len(after):
      return None, kept
    add, way, bound = body.same(after[i]), test.attr('direction'), cond.number(test.operands[1], kept)
    if add.opcode != 'add' or i not in (at := [body.element(o) for o in add.operands]) or bound is None:
      return None, kept
    step = body.number(add.operands[1 - at.index(i)], kept)
    if not step or way == 'EQ':
      return None, kept
    trips = (bound - start[i]) / step
    return max(0, math.floor(trips) + 1 if way in ('LE', 'GE') else math.ceil(trips)), kept

  def traffic(self, comp, op) -> float:
    """Bytes of HBM that an operation outside fusions reads and writes; an asynchronous one moves them when done."""
    if op.opcode.endswith('-start') or op.opcode in FREE or op.calls(*BOOKKEEPING):
      return 0.
    if op.opcode.endswith('-done'):
      start = comp.ops[op.operands[0]]
      if not start.opcode.endswith('-start'):
        return sum(leaf[2] for leaf in op.leaves)
      op = dataclasses.replace(start, opcode=start.opcode.removesuffix('-start'), shape=op.shape)
    read = sum(sum(leaf[2] for leaf in comp.ops[name].leaves) * self.read(comp, op, k)
               for k, name in enumerate(op.operands))
    if op.opcode != 'fusion':
      return read + sum(leaf[2] for leaf in op.leaves) * self.written(comp, op, op)
    inner = self.computations[op.attr('calls')]
    root = inner.ops[inner.root]
    results = [inner.ops[o] for o in root.operands] if root.opcode == 'tuple' else [root] * len(op.leaves)
    return read + sum(leaf[2] * self.written(inner, r, inner.same(r.name)) for leaf, r in zip(op.leaves, results))

  def read(self, comp, op, k) -> float:
    """The part of operand k that an operation reads."""
    if op.opcode in ('dynamic-slice', 'slice', 'gather') and k == 0:
      return min(1., math.prod(op.dims) / max(1, math.prod(comp.ops[op.operands[0]].dims)))
    if op.opcode in ('dynamic-update-slice', 'scatter') and k == 0 or op.opcode == 'tuple' or self.continues(comp, op):
      return 0.                                    # in place, or handed on
    if op.opcode != 'fusion':
      return 0. if op.calls('AsyncCollectiveDone') else 1.
    inner = self.computations[op.attr('calls')]
    return self.read_of(inner, inner.params[k])

  def read_of(self, inner, name) -> float:
    """The part of a value inside a fusion that its users there read."""
    total = 0.
    for op, k in inner.users[name]:
      same = op.opcode in SAME or op.opcode == 'fusion' and all(
          o.opcode in (*SAME, 'parameter') for o in self.computations[op.attr('calls')].ops.values())
      total += self.read_of(inner, op.name) if same and op.name != inner.root else self.read(inner, op, k)
    return min(total, 1.)

  def written(self, comp, op, made) -> float:
    """The part of a result that is written; `made`: what made it, before casts in the same fusion."""
    if op.opcode == 'parameter' or self.continues(comp, op) or op.calls('AsyncCollectiveStart'):
      return 0.
    k = {'dynamic-update-slice': 1, 'scatter': 2}.get(made.opcode)
    return math.prod(comp.ops[made.operands[k]].dims) / max(1, math.prod(made.dims)) if k else 1.


def branches(op: Op) -> list[str]:
  found = re.findall(r'%([\w.-]+)', op.attr('branch_computations', r'\{([^}]*)\}') or '')
  return found or [op.attr('true_computation'), op.attr('false_computation')]


def product_flops(comp: Computation, op: Op, contracted: str | None) -> dict:
  """Of a matrix product; also under 'flops8' where its operands are in float8."""
  lhs = comp.ops[op.operands[0]]
  flops = 2 * math.prod(op.dims) * math.prod(lhs.dims[i] for i in ints(contracted))
  return {('flops', ''): flops} | ({('flops8', ''): flops} if lhs.shape.startswith('f8') else {})


def attention_flops(comp: Computation, op: Op) -> float:
  """Of cuDNN's attention, by the scores [B, N, T, S] that its configuration names and those its mask leaves: two
  products forward, five backward, which computes the scores again."""
  m = re.search(r'"intermediate_tensor_shape":\s*\{[^{}]*"dimensions":\s*\[([^\]]*)\]', op.config)
  if not m:
    return 0.0
  B, N, T, S = ints(m[1])
  window = re.search(r'"sliding_window_length":\s*"?(\d+)', op.config)
  keys = min(int(window[1]) if window else 0, S) or S
  seen = T * keys - (keys * keys / 2 if re.search(r'"mask_type":\s*"(PADDING_)?CAUSAL"', op.config) else 0)
  products = 5 if op.target.endswith('Backward') else 2
  return 2.0 * products * B * N * seen * comp.ops[op.operands[0]].dims[-1]


def kernel_name(op: Op) -> str:
  m = re.search(r'([^/"]+)/pallas_call', op.config)
  return m[1] if m else re.sub(r'(\.\d+)+$', '', op.name)


def convolution_flops(op: Op, lhs, rhs) -> float:
  """2 for each product of a convolution that does not fall on padding: a TPU writes batch dimensions as spatial ones
  whose off-diagonal products do."""
  into, kernel, out = re.match(r'(\w+)_(\w+)->(\w+)', op.attr('dim_labels', r'([\w>-]+)')).groups()
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', op.attr('window', r'\{([^}]*)\}') or ''))
  pairs = 1
  for i, label in enumerate(sorted(c for c in kernel if c.isdigit())):
    low, stride, into_dilate, kernel_dilate = (
        ints(window[key].split('x')[i].split('_')[0])[0] if key in window else default
        for key, default in (('pad', 0), ('stride', 1), ('lhs_dilate', 1), ('rhs_dilate', 1)))
    pairs *= valid(lhs[into.index(label)], rhs[kernel.index(label)], op.dims[out.index(label)], low, stride,
                   into_dilate, kernel_dilate)
  groups = int(op.attr('batch_group_count') or 1)
  return 2. * pairs * lhs[into.index('b')] / groups * rhs[kernel.index('i')] * op.dims[out.index('f')]


@functools.cache
def valid(size, kernel, out, low, stride, into_dilate, kernel_dilate) -> int:
  """Pairs of an output and a kernel position along one dimension that meet an element of the input."""
  at = np.arange(out) * stride - low
  return sum(np.count_nonzero((x >= 0) & (x <= (size - 1) * into_dilate) & (x % into_dilate == 0))
             for x in (at + k * kernel_dilate for k in range(kernel)))
