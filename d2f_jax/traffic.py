"""What a program does on one device, of its optimised text: bytes of HBM, FLOPs, and what collectives bring in.

HBM bytes are those of operands and results of all instructions that run, as their tiled layouts take them. Buffers in
other memories do not count (a TPU's VMEM is `S(1)`), nor does what a fusion holds inside. A slice reads what it takes,
an update in place writes what it puts. A kernel reads its operands once, which is a lower bound: splash attention
brings keys and values in again for every block of queries. FLOPs are those of convolutions, products of matrices and
splash attention, without padding. A collective that runs in parts, beside other work, counts once.
"""

import collections
import dataclasses
import math
import re

from d2f_jax import hlo
from d2f_jax.hlo import Computation, Instruction, Program

PRODUCTS, ELEMENTWISE, COPIES = "matrix products", "elementwise and reductions", "copies and transposes"
MOVES, COLLECTIVES, CUSTOM = "moves to and from VMEM", "collectives", "custom calls"
BETWEEN_SLICES = "exchange between slices"
CLASSES = (PRODUCTS, ELEMENTWISE, COPIES, MOVES, COLLECTIVES, CUSTOM)

_SLICES = {"slice", "dynamic-slice", "gather"}
_COPIES = _SLICES | {"copy", "transpose", "reshape", "dynamic-update-slice", "concatenate", "pad", "reverse"}
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "recv"}
_NOT_KNOWN = 2**63 - 1  # cycles
_NAMES_ONLY = {"AllocateBuffer", "ConcatBitcast"}  # custom calls that move nothing


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in one run: bytes of HBM by class, FLOPs, and of each kind of collective how many and the bytes.

    `operations` is how often an instruction of so many FLOPs, bytes of HBM and cycles runs. Cycles are estimates of the
    TPU's compiler: 0 of moves beside other work, and None where it gives none. Of `unknown_loops` it is not told how
    often they run.
    """

    hbm: dict[str, int]
    flops: int
    collectives: dict[str, int]
    received: dict[str, int]
    operations: dict[tuple[int, int, int | None], int]
    unknown_loops: int


def work(program: Program, *, unknown_trips: int = 1) -> Work:
    """Of one run; see `hlo.runs`."""
    hbm, received, count, operations = (collections.Counter() for _ in range(4))
    for computation, instruction, times in hlo.runs(program, unknown_trips):
        inside = list(hlo.inside(program, computation, instruction))
        flops, moved = sum(hlo.flops(of, each) for of, each in inside), _hbm(program, computation, instruction)
        operations[flops, moved, _cycles(instruction)] += times
        hbm[_class(computation, instruction, inside)] += times * moved
        for of, each in ((of, each) for of, each in inside if _begins(each)):
            kind = BETWEEN_SLICES if each.opcode == "recv" else each.opcode.removesuffix("-start")
            if kind == "all-reduce" and any(other.opcode == "dynamic-slice" for _, other in inside):
                kind = "reduce-scatter"
            count[kind] += times
            received[kind] += times * _received(kind, each, of, program.devices)
    total = sum(times * flops for (flops, *_), times in operations.items())
    moved = {name: hbm[name] for name in CLASSES}
    return Work(moved, total, dict(count), dict(received), dict(operations), hlo.unknown_loops(program))


def _cycles(instruction: Instruction) -> int | None:
    cycles = int(instruction.attribute("estimated_cycles", r'":"(\d+)') or _NOT_KNOWN)
    if cycles != _NOT_KNOWN:
        return cycles
    return 0 if instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv") else None


def _class(of: Computation, instruction: Instruction, inside: list[tuple[Computation, Instruction]]) -> str:
    opcodes = {each.opcode for _, each in inside}
    if instruction.opcode == "send" or any(_begins(each) for _, each in inside):
        return COLLECTIVES
    if opcodes & {"convolution", "dot"}:
        return PRODUCTS
    if instruction.opcode == "custom-call":
        return CUSTOM
    spaces = {array.space for name in instruction.operands for array in of[name].results}
    if opcodes <= {"copy-start", "slice-start"} or (opcodes == {"copy"} and spaces != {instruction.results[0].space}):
        return MOVES
    return COPIES if opcodes <= _COPIES | hlo.FREE else ELEMENTWISE


def _begins(instruction: Instruction) -> bool:
    """Whether it is a collective, and not a later part of one that runs beside other work."""
    if instruction.opcode.removesuffix("-start") not in _COLLECTIVES:
        return False
    return (instruction.attribute("flag_start", r'":"(-?\d+)') or "-1") == "-1"


def _hbm(program: Program, of: Computation, instruction: Instruction) -> int:
    operands = [of[name].results for name in instruction.operands]
    read = sum(array.hbm for arrays in operands for array in arrays)
    written = sum(array.hbm for array in instruction.results)
    match instruction.opcode:
        case "fusion":
            return _hbm_of_fusion(program, of, instruction)
        case "custom-call" if instruction.attribute("custom_call_target", r'="([^"]+)') in _NAMES_ONLY:
            return 0
        case "copy-start":
            return read + instruction.results[0].hbm
        case opcode if opcode in _SLICES:
            return min(read, instruction.results[0].padded) + written
        case "slice-start":
            taken = instruction.results[1]
            return min(read, taken.padded) + taken.hbm
        case "dynamic-update-slice":
            put = operands[1][0]
            return put.hbm + (put.padded if written else 0)
        case "send":
            return read
        case "recv":
            return instruction.results[0].hbm
        case opcode if opcode.endswith("-start") and opcode != "all-reduce-start":  # whose results begin with operands
            return read + sum(array.hbm for array in instruction.results[len(operands) :])
        case _:
            return read + written


def _hbm_of_fusion(program: Program, of: Computation, fusion: Instruction) -> int:
    called = program.computations[fusion.attribute("calls") or ""]
    root = next(each for each in called.values() if each.root)
    if "AsyncCollectiveDone" in root.text:
        return 0
    # What a collective in parts hands on from one fusion to the next; others write over what they have read.
    in_parts = any(each.opcode.removesuffix("-start") in _COLLECTIVES for _, each in hlo.inside(program, of, fusion))
    aliased = fusion.text.partition("output_to_operand_aliasing=")[2] if in_parts else ""
    handed = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", aliased)
    passed = {int(result or 0) for result, _ in handed}
    given = set() if "AsyncCollectiveStart" in root.text else {int(operand) for _, operand in handed}
    total = 0
    for number, name in enumerate(fusion.operands):
        for array in of[name].results:
            if array.hbm and number not in given:
                total += min(array.hbm, _read(program, called, number))
    for number, (array, part) in enumerate(zip(fusion.results, _makers(called, root), strict=True)):
        if array.hbm and number not in passed:
            total += min(array.hbm, _written(called, part))
    return total


def _makers(called: Computation, result: Instruction) -> list[Instruction]:
    """Of each array of a result, the instruction that makes it."""
    if result.opcode == "tuple":
        return [maker for name in result.operands for maker in _makers(called, called[name])]
    return [result] * len(result.results)


def _read(program: Program, called: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand of this number, at most."""
    parameter = next(p for p in called.values() if p.opcode == "parameter" and p.text.startswith(f"{number})"))
    return _used(program, called, parameter)


def _used(program: Program, of: Computation, value: Instruction) -> int:
    total = value.results[0].padded if value.root else 0
    for user in of.values():
        for place in (k for k, name in enumerate(user.operands) if name == value.name):
            if user.opcode in _SLICES and place == 0:
                total += user.results[0].padded
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue
            elif user.opcode == "bitcast":
                total += _used(program, of, user)
            elif user.opcode == "fusion":
                total += _read(program, program.computations[user.attribute("calls") or ""], place)
            else:
                total += value.results[0].padded
    return total


def _written(called: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = called[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return called[result.operands[1]].results[0].padded
    return sum(array.padded for array in result.results)


def _received(kind: str, collective: Instruction, of: Computation, devices: int) -> int:
    """Bytes: all parts but its own, and for all-reduce those of the sums as well."""
    if collective.opcode == "recv":
        return collective.results[0].size
    given = sum(array.size for name in collective.operands for array in of[name].results)
    size = _group(collective, devices)
    match kind:
        case "collective-permute":
            return given
        case "all-gather":
            return given * (size - 1)
        case "all-reduce":
            return 2 * given * (size - 1) // size
        case _:
            return given * (size - 1) // size


def _group(collective: Instruction, devices: int) -> int:
    """How many devices exchange, from any of XLA's ways to write groups. Raises ValueError for one unknown."""
    groups = collective.text.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    # A mesh that lies otherwise in the network is followed by the order of its devices.
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
    if groups and not groups.startswith("{}"):
        raise ValueError(f"XLA writes groups of devices in a way unknown here: {groups[:100]}")
    return devices
