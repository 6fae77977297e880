"""Registers of asynchronous products in machine code for sm_90: which are used before their product is waited for.

A product (HGMMA, of ``wgmma``) reads its first operand from registers, where it is not in shared memory, and writes its
result, for as long as ``WARPGROUP.DEPBAR`` has not waited for it. Triton orders that, and ptxas, which gives out the
registers, is known to have broken it before CUDA 13.3 (triton's issue 9433, pull request 11781); Triton 3.6 has 12.8.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(.*?) ;")
_LABEL = re.compile(r"^(\.L_\w+):", re.M)
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_JUMP = re.compile(r"BRA\S*\s.*`\((\.L_\w+)\)")
# A register and how many follow it: of an address or a pair of them two.
_OPERAND = re.compile(r"(?<![A-Z])R(\d+)(\.64)?\b")
# What has no register as its result; the others name it first.
_WITHOUT_RESULT = re.compile(
    r"ST|RED|BRA|EXIT|RET|BAR|BSSY|BSYNC|WARP|DEPBAR|LDGDEPBAR|LDGSTS|[DFHI]SETP|R2UR|R2P|S2UR|SYNCS|NOP|PLOP3|FENCE"
    r"|MEMBAR|ERRBAR|CCTL|YIELD|CALL|VOTEU|ELECT|U[A-Z]"
)

# Groups that are followed: without a wait in a loop they would be ever more.
_MOST = 6


class Product(NamedTuple):
    """Registers of a product, and whether a group of them ends with it."""

    result: frozenset[int]
    operand: frozenset[int]
    ends: bool


class Instruction(NamedTuple):
    text: str
    conditional: bool
    writes: frozenset[int] = frozenset()
    reads: frozenset[int] = frozenset()
    product: Product | None = None


def _registers(first: str, count: int) -> frozenset[int]:
    return frozenset(range(int(first), int(first) + count))


def _width(name: str) -> int:
    """Registers of 32 bits that an instruction's result takes, or a stored value."""
    if ".128" in name or name.endswith(("M88.4", "MT88.4")) or name.startswith("HMMA"):
        return 4
    wide = ".64" in name or ".WIDE" in name or name.endswith(("M88.2", "MT88.2"))
    return 2 if wide or name.startswith(("CS2R", "DADD", "DMUL", "DFMA")) else 1


def _read(text: str, conditional: bool) -> Instruction:
    name, _, rest = text.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    if name.startswith("HGMMA"):
        columns = int(re.search(r"64x(\d+)x", name)[1])
        left = re.fullmatch(r"R(\d+)", operands[1])
        product = Product(
            _registers(operands[0][1:], columns // 2),  # of 128 threads, in float32
            _registers(left[1], 4) if left else frozenset(),
            "gsb0" in rest,
        )
        return Instruction(text, conditional, product=product)
    writes, stored = frozenset(), operands[-1] if name.startswith("ST") else None
    if not _WITHOUT_RESULT.match(name):
        while operands and re.fullmatch(r"U?P\w", operands[0]):  # predicates come before
            operands.pop(0)
        if operands and (result := re.fullmatch(r"R(\d+)(\.\w+)?", operands[0])):
            writes = _registers(result[1], _width(name))
            operands.pop(0)
    reads = frozenset(
        register
        for operand in operands
        for first, pair in _OPERAND.findall(operand)
        for register in _registers(first, _width(name) if operand is stored else 2 if pair else 1)
    )
    return Instruction(text, conditional, writes, reads)


def _parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and at which of them each label is."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.search(line):
            instructions.append(_read(found[1], "@" in line.split("*/", 1)[1].split()[0]))
    return instructions, labels


def used_too_early(code: str) -> list[str]:
    """Of code as nvdisasm prints it, the instructions that write registers of products that run, or read results of
    theirs, on any path. A product that goes on from another's result does not count: they are in order.
    """
    instructions, labels = _parse(code)
    found, seen, paths = {}, set(), [(0, ())]
    while paths:
        at, running = paths.pop()
        while at < len(instructions) and (at, running) not in seen:
            seen.add((at, running))
            instruction = instructions[at]
            if _clashes(instruction, running):
                found[at] = instruction.text
            running = _after(instruction, running)
            at += 1
            if jump := _JUMP.match(instruction.text):
                paths.append((labels[jump[1]], running))
            if instruction.text.startswith(("BRA", "EXIT")) and not instruction.conditional:
                break
    return [text for _, text in sorted(found.items())]


def _clashes(instruction: Instruction, running: tuple[Product, ...]) -> bool:
    own = instruction.product
    return any(
        (own.result & other.operand or own.operand & other.result)
        if own
        else (instruction.writes & (other.operand | other.result) or instruction.reads & other.result)
        for other in running
    )


def _after(instruction: Instruction, running: tuple[Product, ...]) -> tuple[Product, ...]:
    """The groups of products that run after an instruction, each as one, the last perhaps open."""
    if own := instruction.product:
        if running and not running[-1].ends:
            *running, last = running
            own = Product(last.result | own.result, last.operand | own.operand, own.ends)
        return (*running[-_MOST:], own)
    if wait := _WAIT.match(instruction.text):
        closed = tuple(group for group in running if group.ends)
        left = int(wait[1], 16)
        return (closed[-left:] if left else ()) + tuple(group for group in running if not group.ends)
    return running
