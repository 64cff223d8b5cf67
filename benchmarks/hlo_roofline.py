"""Roofline estimate of a compiled GPU program from its HLO text: launches, traffic, operations, seconds.

    seconds of an operation = max(memory bytes / memory rate, cache bytes / cache rate, FLOP / product rate) + launch

A program's estimate is the sum over all operations that it launches, loops unrolled; overlap of operations is not
assumed. Traffic is counted by these rules:

- An operation reads each operand once and writes its result once. What it fuses does not reach memory.
- A gather reads one row for each index, a slice what it cuts out, whatever the size of the array that they read from;
  nothing is assumed to be still in the cache. An update in place moves its rows and not the array.
- A scatter reads its updates, and reads and writes the rows that they go to. One without `unique_indices=true` adds by
  atomics and is counted.
- A matmul takes 2 * m * n * k operations at the rate of its operands' type; float32 operands count as TF32 unless the
  text asks for the highest precision.
- The kernels of `h2a2_jax.sparse.conv_implicit` are opaque to the text and have a model of their own, `implicit_cost`.

Text alone does not tell how well a kernel runs: the rates of `H200` are shares of the data sheet that good kernels
reach, those of gathering kernels lower ones. The result is an estimate and no measurement.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
    "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
"""Size of the elements of an array by type."""


@dataclass(frozen=True)
class Device:
    """Rates that programs reach on a device.

    Attributes:
        memory: bytes a second from and to memory.
        cache: bytes a second from the cache that all cores share.
        launch: seconds from one operation to the next in a CUDA graph.
        products: FLOP a second of a library's matmul, by type of its operands ("bf16", "tf32", "f32").
        gathered: FLOP a second of a matmul that gathers its rows, by the same types.
        transfer: bytes a second from the host.
    """

    memory: float
    cache: float
    launch: float
    products: Mapping[str, float]
    gathered: Mapping[str, float]
    transfer: float


H200 = Device(
    memory=4.3e12,
    cache=5.5e12,
    launch=2e-6,
    products={"bf16": 790e12, "tf32": 395e12, "f32": 54e12},
    gathered={"bf16": 400e12, "tf32": 200e12, "f32": 30e12},
    transfer=50e9,
)
"""NVIDIA H200: 90 % of 4.8 TB/s; 80 % of 989, 494 and 67 TFLOP/s, and 40 to 45 % for kernels that gather. The cache's
rate is that measured of an H100's by others (5.5 to 7 TB/s); PCIe 5.0 x16 carries 80 % of 63 GB/s."""


@dataclass(frozen=True)
class Shape:
    """Type and shape of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.size * BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: name of its value.
        shapes: arrays of its value; one but for tuples.
        opcode: operation.
        operands: names of its operands.
        text: the line, without a kernel's code.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        """Size of its value in bytes."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        single = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", self.text)
        several = re.findall(r"branch_computations=\{([^}]*)\}", self.text)
        return single + [name.strip().lstrip("%") for names in several for name in names.split(",")]


@dataclass(frozen=True)
class Module:
    """Computations of a program by name.

    Attributes:
        computations: instructions of each computation, by name of their values.
        entry: name of the first computation.
        roots: name of the result of each computation.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    roots: dict[str, str]


_COMPUTATION = re.compile(r"^\s*(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")


def parse(text: str) -> Module:
    """Parse the text of a compiled program.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = {}
            if header[1]:
                entry = current
        elif line.strip().startswith("}"):
            current = ""
        elif current and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            computations[current][name] = Instruction(
                name, _shapes(shape), opcode, tuple(re.findall(r"%([\w.\-]+)", _arguments(rest))), _without_code(line)
            )
            if root:
                roots[current] = name
    if not entry:
        raise ValueError("the text has no line that begins with ENTRY; give as_text() of a compiled program.")
    return Module(computations, entry, roots)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = _SHAPE.findall(text)
    return tuple(Shape(t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in found if t in BYTES)


def _arguments(rest: str) -> str:
    """Text up to the parenthesis that ends the operands."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:i]
    return rest


def _without_code(line: str) -> str:
    return re.sub(r'ir = ".*', "", line)


# ---------------------------------------------------------------- costs


@dataclass
class Cost:
    """Cost of a program or of a part of it.

    Attributes:
        seconds: roofline estimate.
        launches: number of operations that are started.
        traffic: bytes from and to memory.
        flop: operations of matmuls.
        atomics: number of launched scatters that add by atomics.
        by_kind: seconds, launches, bytes and FLOP of each kind of operation.
        slowest: seconds, launches and text of the operations that take longest.
    """

    seconds: float = 0.0
    launches: int = 0
    traffic: float = 0.0
    flop: float = 0.0
    atomics: int = 0
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)

    def add(self, kind: str, times: int, launch: "Launch", device: Device, text: str) -> None:
        """Add an operation that is launched several times."""
        seconds = launch.seconds(device)
        parts = {"seconds": seconds, "launches": 1, "traffic": launch.traffic, "flop": launch.flop}
        for name, value in parts.items():
            setattr(self, name, getattr(self, name) + times * value)
            self.by_kind.setdefault(kind, Counter())[name] += times * value  # type: ignore[assignment]
        self.atomics += times * launch.atomic
        self.slowest.append((times * seconds, times, text))


@dataclass(frozen=True)
class Launch:
    """One operation of a device.

    Attributes:
        traffic: bytes from and to memory.
        flop: operations of matmuls.
        dtype: type of their operands, "bf16", "tf32" or "f32".
        cached: bytes that are read from the cache alone.
        gathers: if True, the kernel gathers the rows that it multiplies.
        atomic: if True, it adds by atomics.
    """

    traffic: float
    flop: float = 0.0
    dtype: str = "bf16"
    cached: float = 0.0
    gathers: bool = False
    atomic: bool = False

    def seconds(self, device: Device) -> float:
        """Roofline estimate, the start included."""
        rate = (device.gathered if self.gathers else device.products)[self.dtype]
        cache = (self.traffic + self.cached) / device.cache
        return max(self.traffic / device.memory, cache, self.flop / rate) + device.launch


@dataclass(frozen=True)
class Maps:
    """What the text does not tell of the kernels of `conv_implicit`.

    Attributes:
        pairs: number of pairs of each map of neighbours, by (offsets, rows written, rows read).
        wide: type of float32 products, "tf32" or "f32".
    """

    pairs: Mapping[tuple[int, int, int], float] = field(default_factory=dict)
    wide: str = "tf32"

    def count(self, volume: int, written: int, read: int) -> float:
        """Number of pairs of a map.

        Raises:
            ValueError: there is no such map.
        """
        if (volume, written, read) not in self.pairs:
            raise ValueError(
                f"a kernel reads a map of {volume} offsets from {read} to {written} rows, which is none of the "
                "plan's; give its number of pairs."
            )
        return self.pairs[volume, written, read]


_FREE = frozenset(
    ["parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"]
)


def estimate(module: Module, maps: Maps | None = None, device: Device = H200) -> Cost:
    """Estimate a program.

    Args:
        module: the program.
        maps: maps that the kernels of `conv_implicit` read.
        device: rates.

    Raises:
        ValueError: a kernel reads a map that is not among `maps`.
    """
    cost = Cost()
    _visit(module, module.entry, 1, maps or Maps(), device, cost)
    cost.slowest.sort(reverse=True)
    del cost.slowest[20:]
    return cost


def _visit(module: Module, name: str, times: int, maps: Maps, device: Device, cost: Cost) -> None:
    body = module.computations[name]
    for op in body.values():
        if op.opcode in _FREE:
            continue
        if op.opcode == "while":
            trips = re.search(r"known_trip_count\D*(\d+)", op.text)
            inner = re.search(r"body=%?([\w.\-]+)", op.text)
            assert inner is not None
            _visit(module, inner[1], times * (int(trips[1]) if trips else 1), maps, device, cost)
        elif op.opcode in ("call", "conditional"):
            costs = [Cost() for _ in op.called()]
            for each, branch in zip(costs, op.called(), strict=True):
                _visit(module, branch, times, maps, device, each)
            _merge(cost, max(costs, key=lambda each: each.seconds))
        else:
            launch, kind = _launch(module, body, op, maps)
            cost.add(kind, times, launch, device, f"{kind} {op.text.strip()[:120]}")


def _merge(cost: Cost, more: Cost) -> None:
    for name in ("seconds", "launches", "traffic", "flop", "atomics"):
        setattr(cost, name, getattr(cost, name) + getattr(more, name))
    for kind, parts in more.by_kind.items():
        cost.by_kind.setdefault(kind, Counter()).update(parts)
    cost.slowest += more.slowest


def _launch(module: Module, body: dict[str, Instruction], op: Instruction, maps: Maps) -> tuple[Launch, str]:
    """Cost and kind of one operation."""
    operands = [body[name] for name in op.operands]
    if op.opcode == "custom-call":
        if "gpu.triton" in op.text and "implicit_" in op.text:
            return implicit_cost(op, operands, maps), "implicit"
        traffic = float(op.bytes + sum(operand.bytes for operand in operands))
        if "gemm" in op.text or "matmul" in op.text:
            flop = 2 * math.sqrt(math.prod(max(1, max(s.size for s in o.shapes)) for o in [*operands[:2], op]))
            return Launch(traffic, flop, _type(operands[0].shapes[0].dtype, op.text)), "matmul"
        return Launch(traffic), "custom-call"
    inner = module.computations[op.called()[0]] if op.opcode == "fusion" else {op.name: op}
    codes = {each.opcode for each in inner.values()}
    flop, dtype = _dots(module, inner if op.opcode == "fusion" else body, inner)
    atomic = any(each.opcode == "scatter" and "unique_indices=true" not in each.text for each in inner.values())
    if op.opcode == "fusion":
        root = module.roots[op.called()[0]]
        traffic = _written(inner, root) + sum(_read(inner, i, each) for i, each in enumerate(operands))
    else:
        traffic = _written(body, op.name) + sum(_read_by(op, each.name, each, body) for each in operands)
    order = ("dot", "scatter", "gather", "dynamic-update-slice", "reduce", "sort", "copy")
    kind = next((code for code in order if code in codes), "elementwise")
    return Launch(traffic, flop, dtype, atomic=atomic), {"dot": "matmul", "copy": "copy"}.get(kind, kind)


def _read(inner: dict[str, Instruction], index: int, operand: Instruction) -> float:
    """Bytes that a fusion reads of one of its operands."""
    number = re.compile(rf"parameter\({index}\)")
    name = next((each.name for each in inner.values() if each.opcode == "parameter" and number.search(each.text)), None)
    if name is None:
        return operand.bytes
    return min(operand.bytes, _read_of(inner, name))


def _read_of(inner: dict[str, Instruction], name: str) -> float:
    """Bytes that the users of a value read of it."""
    users = [each for each in inner.values() if name in each.operands]
    views = [each for each in users if each.opcode in ("bitcast", "reshape")]
    read = sum(_read_by(each, name, inner[name], inner) for each in users if each not in views)
    return read + sum(_read_of(inner, each.name) for each in views)


def _read_by(user: Instruction, name: str, value: Instruction, body: dict[str, Instruction]) -> float:
    """Bytes that one operation reads of a value."""
    first = user.operands[0] == name
    if user.opcode in ("gather", "dynamic-slice", "slice") and first:
        return min(value.bytes, user.bytes)
    if user.opcode == "dynamic-update-slice" and first:
        return 0
    if user.opcode == "scatter" and first:
        return min(value.bytes, body[user.operands[2]].bytes)
    return value.bytes


def _written(body: dict[str, Instruction], name: str) -> float:
    """Bytes that are written for a value: an update in place writes its rows."""
    op = body[name]
    if op.opcode == "tuple":
        return sum(_written(body, operand) for operand in op.operands)
    if op.opcode == "bitcast" and op.operands[0] in body:
        return _written(body, op.operands[0])
    if op.opcode == "dynamic-update-slice":
        return body[op.operands[1]].bytes
    if op.opcode == "scatter":
        return min(op.bytes, body[op.operands[2]].bytes)
    return op.bytes


def _dots(module: Module, body: dict[str, Instruction], ops: dict[str, Instruction]) -> tuple[float, str]:
    """FLOP of the matmuls among operations and what they call, and the widest type of their operands."""
    total, widest = 0.0, "bf16"
    for op in ops.values():
        more, dtype = 0.0, "bf16"
        if op.opcode == "dot":
            left = body[op.operands[0]].shapes[0]
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)
            depth = math.prod(left.dims[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
            more, dtype = 2.0 * op.shapes[0].size * depth, _type(left.dtype, op.text)
        elif op.opcode == "fusion":
            inner = module.computations[op.called()[0]]
            more, dtype = _dots(module, inner, inner)
        if more:
            total, widest = total + more, max(widest, dtype, key=("bf16", "tf32", "f32").index)
    return total, widest


def _type(dtype: str, text: str) -> str:
    """Type of the products of operands."""
    if dtype in ("bf16", "f16", "s8"):
        return "bf16"
    return "f32" if "highest" in text else "tf32"


# ---------------------------------------------------------------- implicit matmuls


def implicit_cost(op: Instruction, operands: list[Instruction], maps: "Maps", tile: int = 128) -> Launch:
    """Cost of a kernel of `conv_implicit`, by the shapes of its arguments and the pairs of its map.

    Rows. Each pair's row is read from memory once for each block of output channels, with no reuse of the cache between
    offsets, which a real scan would have; the table is read once for each block and the result written once. The
    kernels come from memory once and from the cache for every tile. Products are those of a full kernel on every row:
    missing neighbours are multiplied as zeros.

    Kernels. Each pair's two rows are read from memory once for each block of the other's channels; the gradients of all
    parts are written.
    """
    shapes = [operand.shapes[0] for operand in operands]
    if "implicit_rows" in op.text:
        table, x, stack = shapes[-3:]
        tiles, volume, n = shapes[0].size, *table.dims
        c_in, c_out = stack.dims[1:]
        across = -(-c_out // tile)
        found = maps.count(volume, n, x.dims[0])
        traffic: float = across * (found * c_in * BYTES[x.dtype] + table.bytes) + op.bytes + stack.bytes
        cached: float = tiles * volume * c_in * c_out * BYTES[x.dtype]
        flop = 2.0 * tiles * tile * volume * c_in * c_out
    else:
        table, x, g = shapes[-3:]
        volume, n = table.dims
        c_in, c_out = x.dims[1], g.dims[1]
        found = maps.count(volume, n, x.dims[0])
        rows = found * (c_in * -(-c_out // tile) + c_out * -(-c_in // tile)) * BYTES[x.dtype]
        traffic, cached = rows + table.bytes + op.bytes, 0.0
        flop = 2.0 * volume * n * c_in * c_out
    dtype = "bf16" if BYTES[x.dtype] == 2 else maps.wide
    return Launch(traffic, flop, dtype, cached, gathers=True)
