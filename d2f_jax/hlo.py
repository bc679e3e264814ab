"""The text of an optimised program (`compiled.as_text()`): its arrays, its instructions, and how often they run."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "async-update", "domain"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_BRANCHES = re.compile(r"\b(?:branch|true|false)_computations?=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """`size` is in bytes, `padded` what its layout's tiles take, `space` its memory, of which 0 is HBM."""

    dims: tuple[int, ...]
    size: int
    padded: int
    space: int

    @property
    def hbm(self) -> int:
        """Bytes of HBM; those of single numbers, such as a loop's counter, are not worth counting."""
        return 0 if self.space or not self.dims else self.padded


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # behind the opening parenthesis
    root: bool

    def attribute(self, name: str, value: str = r"=%?([\w.\-]+)") -> str | None:
        found = re.search(rf"\b{name}{value}", self.text)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Program:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r'\n(?="|}})', " ", text).splitlines():  # what is told of a kernel has lines of its own
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            current[name] = Instruction(name, opcode, arrays(shape), operands, rest, bool(root))
    devices = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(devices[1]) if devices else 1)


def arrays(shape: str) -> tuple[Array, ...]:
    """Of a type's text, such as `f32[8,320]{1,0:T(8,128)S(1)}` or a tuple of them."""
    return tuple(_array(*found) for found in _ARRAY.findall(shape))


def runs(program: Program, unknown_trips: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that works, the computation it stands in, and how often it runs.

    Loops whose length the text does not tell run `unknown_trips` times; of a conditional every branch counts.
    """
    return _runs(program, program.entry, 1, unknown_trips)


def trips(program: Program, within: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: as XLA says, or from its counter's first value, its limit and its step."""
    if known := loop.attribute("known_trip_count", r'"?:\{"?n"?:"?(\d+)'):
        return int(known)
    condition = program.computations[loop.attribute("condition") or ""]
    test = _root(condition)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, limit = (condition[name] for name in test.operands)
    step = _step(program, counter, within, loop)
    first, last = (_constant(condition, value, within, loop) for value in (counter, limit))
    return None if first is None or last is None or not step else max(-(-(last - first) // step), 0)


def unknown_loops(program: Program) -> int:
    """How many loops there are whose length the text does not tell."""
    every = ((of, each) for of in program.computations.values() for each in of.values())
    return sum(each.opcode == "while" and trips(program, of, each) is None for of, each in every)


def inside(program: Program, of: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction, or all that a fusion is made of."""
    if instruction.opcode == "fusion":
        called = program.computations[instruction.attribute("calls") or ""]
        for each in called.values():
            yield from inside(program, called, each)
    else:
        yield of, instruction


def flops(of: Computation, instruction: Instruction) -> int:
    """Two for each multiplication with what is not padding; of kernels, those of splash attention alone."""
    if instruction.opcode == "dot":
        left = of[instruction.operands[0]].results[0].dims
        contracted = (instruction.attribute("lhs_contracting_dims", r"=\{([\d,]*)\}") or "").split(",")
        return 2 * math.prod(instruction.results[0].dims) * math.prod(left[int(i)] for i in contracted if i)
    if instruction.opcode == "custom-call":
        return _flops_of_splash(of, instruction)
    if instruction.opcode != "convolution":
        return 0
    left, right = (of[name].results[0].dims for name in instruction.operands)
    out = instruction.results[0].dims
    labels = re.split("_|->", instruction.attribute("dim_labels", r"=([\w?>\-]+)") or "")
    window = instruction.attribute("window", r"=\{([^}]*)\}") or ""
    values = dict(part.split("=") for part in window.split())
    total = 2 * out[labels[2].index("b")] * out[labels[2].index("f")] * right[labels[1].index("i")]
    for k in range(len(left) - 2):

        def at(name: str, default: str, k: int = k) -> str:
            return values[name].split("x")[k] if name in values else default

        before = int(at("pad", "0_0").split("_")[0])
        dilation = int(at("lhs_dilate", "1")), int(at("rhs_dilate", "1"))
        sides = left[labels[0].index(str(k))], right[labels[1].index(str(k))], out[labels[2].index(str(k))]
        total *= _pairs(*sides, int(at("stride", "1")), before, *dilation)
    return total


def _flops_of_splash(of: Computation, kernel: Instruction) -> int:
    """By how many products of its kernels' operands [batch, heads, length, width], each of which costs as much as q k.

    Forward they are q k and p v. The gradient by keys and values has q k, do v, p do and ds q, and ds k as well where
    the same kernel makes that by queries, of which each block of keys leaves a part; alone that has q k, do v and ds k.
    """
    kind = re.match(r"splash_mha_(fwd|dkv|dq)_", kernel.name)
    if kind is None:
        return 0
    q, k, *_ = (dims for name in kernel.operands if len(dims := of[name].results[0].dims) == 4)
    parts_of_dq = any(len(array.dims) == 5 for array in kernel.results)
    return 2 * math.prod(q) * k[2] * ({"fwd": 2, "dkv": 4, "dq": 3}[kind[1]] + parts_of_dq)


def _array(kind: str, bits: str, sides: str, layout: str) -> Array:
    dims = tuple(map(int, filter(None, sides.split(","))))
    order, _, memory = layout.partition(":")
    padded = [dims[int(i)] for i in filter(None, order.split(","))] or list(reversed(dims))
    # The first tile pads the minor dimensions; a second one, (2,1) of half precision, orders what is inside.
    if tile := re.search(r"T\(([\d,]+)\)", memory):
        for k, side in enumerate(map(int, reversed(tile[1].split(",")))):
            if k < len(padded):
                padded[k] = -(-padded[k] // side) * side
    space = re.search(r"S\((\d+)\)", memory)
    width = max(int(bits or 8), 8) // 8
    return Array(dims, width * math.prod(dims), width * math.prod(padded), int(space[1]) if space else 0)


def _constant(of: Computation, value: Instruction, within: Computation, loop: Instruction) -> int | None:
    """The integer that an instruction of a loop's condition is; what the loop carries has its first value."""
    value = _copied(of, value)
    if value.opcode == "constant" and (number := re.match(r"-?\d+", value.text)):
        return int(number[0])
    start = within[loop.operands[0]]
    if value.opcode == "get-tuple-element" and of is not within and start.opcode == "tuple":
        carried = start.operands[int(value.attribute("index") or 0)]
        return _constant(within, within[carried], within, loop)
    return None


def _step(program: Program, counter: Instruction, within: Computation, loop: Instruction) -> int | None:
    """What a round adds to the counter: 1 in loops of JAX, more where XLA has made one round of several."""
    of = program.computations[loop.attribute("body") or ""]
    result = _root(of)
    if counter.opcode != "get-tuple-element" or result.opcode != "tuple":
        return None
    index = counter.attribute("index") or "0"
    value = _copied(of, of[result.operands[int(index)]])
    if value.opcode == "fusion":
        of = program.computations[value.attribute("calls") or ""]
        value = _copied(of, _root(of))
    if value.opcode != "add":
        return None
    sides = [_copied(of, of[name]) for name in value.operands]
    steps = [_constant(of, side, within, loop) for side in sides if side.attribute("index") != index]
    return next((step for step in steps if step is not None), None)


def _copied(of: Computation, value: Instruction) -> Instruction:
    """What it is a copy of."""
    while value.opcode in ("copy", "bitcast", "convert"):
        value = of[value.operands[0]]
    return value


def _root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.root)


def _runs(program: Program, name: str, times: int, unknown: int) -> Iterator[tuple[Computation, Instruction, int]]:
    computation = program.computations[name]
    for instruction in computation.values():
        match instruction.opcode:
            case "while":
                count = trips(program, computation, instruction)
                body = instruction.attribute("body") or ""
                yield from _runs(program, body, times * (unknown if count is None else count), unknown)
            case "call" | "async-start":
                called = instruction.attribute("(?:to_apply|calls)") or ""
                yield from _runs(program, called, times, unknown)
            case "conditional":
                for branch in re.findall(r"%([\w.\-]+)", " ".join(_BRANCHES.findall(instruction.text))):
                    yield from _runs(program, branch, times, unknown)
            case opcode if opcode not in FREE and not opcode.endswith("-done"):
                yield computation, instruction, times


@functools.cache
def _pairs(left: int, right: int, out: int, stride: int, before: int, left_step: int, right_step: int) -> int:
    """Pairs of an output's and a kernel's place, along one axis, that meet an input which is there."""
    total, shared = 0, math.gcd(stride, left_step)
    period = left_step // shared
    for k in range(right):
        offset = k * right_step - before  # of the input that the first output meets, as dilated
        if offset % shared == 0:
            first = -offset // shared * pow(stride // shared, -1, period) % period
            low = max(0, -(-(-offset - first * stride) // (period * stride)))
            high = (min(out - 1, ((left - 1) * left_step - offset) // stride) - first) // period
            total += max(0, high - low + 1)
    return total
