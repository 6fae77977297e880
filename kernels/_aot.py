"""Offline compilation: every kernel, for every case, for three GPU architectures, without a GPU.

    python -m soflow_fast.kernels._aot [--write TABLE.json] [--only OP]

Each case runs its op on meta tensors while launches are recorded, so what is compiled here is what is launched there:
the same arguments, specialisation and constants. Prints kernel, case, architecture, registers, stack bytes (spills),
shared memory, instructions, the bytes of the widest access to global memory, and bytes moved: every tensor argument of
the launch once, which of the optimizer is the tables of addresses alone. Exits with 1 if a kernel spills, needs more
registers than its launch table allows, moves much and has no wide access, or uses registers of an asynchronous product
that may still run. Must run without Triton's interpreter.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from . import fused, optimizer
from ._async_products import used_too_early
from ._cases import Case, Inputs, as_tuple
from ._launch import TENSOR_MEMORY, Record, recording

ARCHITECTURES = (80, 90, 100)

# The one whose launches are tuned; a brief table has it in full in bfloat16, and only that disassembled, which takes
# half as long as compiling.
_TUNED = 90

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


#: bytes that the widest access of a kernel has at least if it moves much, and what is much
_WIDE, _MUCH = 8, 16 << 20

#: bytes of stack that are let pass where products go into tensor memory: the assembler leaves registers unused there
_FEW = 16


class Binary(NamedTuple):
    """What the compiler reports of one kernel: registers per thread, bytes of stack and of shared memory.

    And what it wrote: instructions, those of a loop or a branch once, the bytes of a thread's widest access, and how
    many instructions use registers of an asynchronous product too early; None where that was not looked at.
    """

    kernel: str
    case: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: int | None
    widest_access: int | None
    bytes_moved: int
    max_registers: int
    too_early: int | None = None

    @property
    def problem(self) -> str | None:
        """Why this binary is refused, or None."""
        if self.too_early:
            return f"uses registers of products that still run, in {self.too_early} instructions"
        if 0 < (self.widest_access or 0) < _WIDE and self.bytes_moved > _MUCH:
            return f"moves {self.bytes_moved} bytes in accesses of {self.widest_access} bytes at most"
        if self.stack > (_FEW if self.arch // 10 in TENSOR_MEMORY else 0):
            return f"spills ({self.stack} bytes of stack)"
        if self.registers > self.max_registers:
            return f"needs {self.registers} registers, more than the {self.max_registers} its launch table allows"
        return None


def record_case(case: Case, dtype: torch.dtype = torch.bfloat16, max_rows: int | None = None) -> list[Record]:
    """The launches that a case makes, forward and backward, recorded on meta tensors."""
    arguments = case.inputs(Inputs("meta", dtype, max_rows=max_rows))
    for name in case.gradients:
        arguments[name].requires_grad_()
    with recording() as records:
        outputs = as_tuple(getattr(fused, case.op)(**arguments, **case.options))
        outputs = [o for o in outputs if o.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return records


def specialize(record: Record, arch: int):
    """``(source, options)`` for the compiler: what Triton's launcher would make of the recorded arguments."""
    backend = make_backend(_target(arch))
    options = record.config.options(arch)
    bind = create_function_from_signature(record.kernel.signature, record.kernel.params, backend)
    bound, specialization, extra = bind(*record.args, **record.constants, **options)
    parsed, signature, constexprs, attrs = record.kernel._pack_args(
        backend, {**record.constants, **options}, bound, specialization, extra
    )
    return ASTSource(record.kernel, signature, constexprs, attrs), parsed


def compile_launch(record: Record, arch: int):
    """Compiles one recorded launch; ``.asm`` of the result holds every stage from "ttir" to "cubin"."""
    source, options = specialize(record, arch)
    return triton.compile(source, target=_target(arch), options=options.__dict__)


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def compile_record(record: Record, case: str, arch: int, disassemble: bool = True) -> Binary:
    """Compiles one recorded launch and reads the compiler's resource report and, if asked to, the instructions."""
    compiled = compile_launch(record, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _said_by("cuobjdump", "-res-usage", file.name)
        code = _said_by("nvdisasm", "--print-code", "--no-dataflow", file.name) if disassemble else None
    instructions, widest_access = (None, None) if code is None else _code(code)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Binary(
        kernel=record.kernel.__name__.strip("_").removesuffix("_kernel"),
        case=case,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        instructions=instructions,
        widest_access=widest_access,
        bytes_moved=record.bytes_moved,
        max_registers=record.config.max_registers,
        too_early=None if code is None else len(used_too_early(code)) if "HGMMA" in code else 0,
    )


def _said_by(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _code(disassembly: str) -> tuple[int, int]:
    """How many instructions there are, and the bytes of the widest access to global memory."""
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", disassembly, re.MULTILINE)
    accesses = [parts for parts in (i.split(".") for i in instructions) if parts[0] in ("LDG", "STG", "LDGSTS")]
    return sum(i != "NOP" for i in instructions), max((_access_bytes(a) for a in accesses), default=0)


def _access_bytes(parts: list[str]) -> int:
    """Of an instruction such as LDG.E.U16: its bits where it says them, else 32."""
    return max((int(bits) for part in parts[1:] if (bits := part.lstrip("US")).isdigit()), default=32) // 8


def recorded() -> Iterator[tuple[str, list[Record]]]:
    """The launches of every case in bf16 and in float32, and those of the optimizer, by name."""
    for case in fused.cases():
        for dtype, suffix in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            yield f"{case.op} {case.name} {suffix}", record_case(case, dtype)
    for form, run in optimizer.passes().items():
        with recording() as records:
            run()
        yield f"optimizer {form}", records


def compile_all(only: str | None = None, brief: bool = False) -> list[Binary]:
    """Every distinct binary of all recorded launches, for every architecture.

    Args:
        only: of ops whose name contains this. brief: one binary of each kernel in float32, and for architectures other
            than sm_90, without its instructions.
    """
    binaries, seen = [], set()
    for name, records in recorded():
        if only and only not in name.split()[0]:
            continue
        for record in records:
            for arch in ARCHITECTURES[_in_float8(record) :]:  # the first has no float8
                keys = {(specialize(record, arch)[0].hash(), record.config, arch)}
                in_full = not brief or (arch == _TUNED and not name.endswith("fp32"))
                if not in_full:
                    keys.add((record.kernel.__name__, arch))
                if not keys & seen:
                    seen |= keys
                    binaries.append(compile_record(record, name, arch, disassemble=in_full))
    return binaries


def _in_float8(record: Record) -> bool:
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in record.args)


def main() -> int:
    """Prints the table; with ``--write`` saves it for the regression test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="TABLE.json", help="save the table here")
    parser.add_argument("--only", metavar="OP", help="compile only ops whose name contains this")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="one case of each kernel in float32 and for other architectures than sm_90, without its instructions",
    )
    arguments = parser.parse_args()
    binaries = compile_all(arguments.only, arguments.brief)
    print(
        f"{'kernel':34} {'case':52} {'arch':>5} {'regs':>5} {'spill':>5} {'shared':>7}"
        f" {'instr':>6} {'widest':>6} {'bytes moved':>14}"
    )
    for b in binaries:
        instructions, widest = ("-" if x is None else x for x in (b.instructions, b.widest_access))
        print(
            f"{b.kernel:34} {b.case:52} {b.arch:>5} {b.registers:>5} {b.stack:>5} {b.shared:>7}"
            f" {instructions:>6} {widest:>6} {b.bytes_moved:>14,}"
        )
    if arguments.write:
        rows = [b._asdict() for b in binaries]
        arguments.write.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    problems = [f"{b.kernel} ({b.case}, sm_{b.arch}) {b.problem}" for b in binaries if b.problem]
    print(f"{len(binaries)} binaries, {len(problems)} refused")
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
