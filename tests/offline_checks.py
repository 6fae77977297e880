"""What is checked of compiled kernels, without a GPU; ``test_aot.py`` runs them in processes without the interpreter.

    python tests/offline_checks.py CHECK ...

prints which of them failed, and how, as JSON.
"""

import json
import re
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch._inductor.exc import OperatorIssue
from torch.testing._internal.distributed.fake_pg import FakeStore

from soflow_fast.kernels import _aot, fused
from soflow_fast.kernels._async_products import used_too_early
from soflow_fast.kernels._cases import Inputs, as_tuple
from soflow_fast.kernels._launch import Launch, Record, recording
from soflow_fast.reduction import INDUCTOR_OPTIONS

ARCH = 90

# A product whose first operand is in registers: its result, and that.
_REGISTER_PRODUCT = re.compile(r"HGMMA\S+ R(\d+), R(\d+), gdesc")


def _hashes(records: list[Record]) -> list[tuple]:
    """What tells one binary from another: source, signature, specialisation, constants; and the launch options."""
    return [(_aot.specialize(r, ARCH)[0].hash(), r.config) for r in records]


def _elements(records: list[Record]) -> int:
    return sum(a.numel() for r in records for a in r.args if isinstance(a, torch.Tensor))


def one_binary_for_every_batch():
    """Batch sizes that are 1, odd, and a multiple of 16 launch the same binaries."""
    for case in fused.cases():
        runs = [_aot.record_case(case, max_rows=rows) for rows in (None, 48, 7, 1)]
        if not any(runs):  # products alone
            continue
        assert len({_elements(run) for run in runs}) == len(runs), f"{case.op} {case.name} ignores Inputs.rows"
        first, *others = map(_hashes, runs)
        assert all(other == first for other in others), f"{case.op} {case.name}: a batch size has its own binary"


def one_binary_for_every_number_of_tokens():
    """Token counts from 1 to 4096 launch the same binaries."""

    def hashes(tokens: int) -> list[tuple]:
        x, branch = (torch.empty(2, tokens, 384, device="meta", requires_grad=True) for _ in range(2))
        m = torch.empty(2, 384, device="meta")
        with recording() as records:
            outputs = fused.gated_residual_layernorm(x, branch, m, m, m, bias=m[0])
            torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
            fused.gated_residual_layernorm_difference(x, x, x, x, m, m, m, m, m, bias=m[0])
            fused.gelu_difference(x, x)
            q, k, v = fused.project_heads(x, torch.empty(3 * 384, 384, device="meta"), x.new_empty(3 * 384), heads=6)
            (q + k + v).sum().backward()
        return _hashes(records)

    assert len(hashes(256)) == 6
    assert all(hashes(tokens) == hashes(256) for tokens in (1, 7, 16, 64, 4096))

    def attention_hashes(tokens: int) -> list[tuple]:
        q, k, v = torch.empty(2, tokens, 3, 6, 64, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
        with recording() as records:
            fused.attention_difference(q, k, v, q, k, v, torch.empty_like(q))
        return _hashes(records)

    def own_attention_hashes(tokens: int) -> list[tuple]:
        x = torch.empty(2, tokens, 1152, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with recording() as records:
            o, *_ = fused.self_attention(x, x.new_empty(3456, 1152), x.new_empty(3456), heads=16)
            o.sum().backward()
        return _hashes(records)

    assert all(own_attention_hashes(tokens) == own_attention_hashes(256) for tokens in (128, 1024, 4096))
    assert all(own_attention_hashes(tokens) == own_attention_hashes(260) for tokens in (65, 80, 4097))
    assert all(own_attention_hashes(tokens) == own_attention_hashes(49) for tokens in (1, 7, 16))  # one block

    # with and without a part of a block left over
    assert all(attention_hashes(tokens) == attention_hashes(256) for tokens in (64, 1024, 4096))
    assert all(attention_hashes(tokens) == attention_hashes(260) for tokens in (1, 7, 16, 65, 4097))


def kernels_compile_whichever_gradients_arrive():
    """The backward of each op, of its first case, with the gradient of one output alone, and of all but that.

    What the interpreter runs the compiler may refuse: it goes on after a return in an ``if`` that it decides.
    """
    first_cases = {case.op: case for case in reversed(fused.cases()) if case.gradients}
    compiled = 0
    for case in first_cases.values():
        arguments = case.inputs(Inputs("meta", torch.bfloat16))
        for name in case.gradients:
            arguments[name].requires_grad_()
        outputs = [o for o in as_tuple(getattr(fused, case.op)(**arguments, **case.options)) if o.requires_grad]
        for one in outputs:
            for some in ([one], [o for o in outputs if o is not one]):
                if not some:
                    continue
                with recording() as records:
                    torch.autograd.backward(some, [torch.empty_like(o) for o in some], retain_graph=True)
                for record in records:
                    _aot.compile_launch(record, ARCH)
                    compiled += 1
    assert compiled > 20, compiled


def program_ids_are_widened_before_they_are_multiplied():
    """No address holds a 32-bit product of what a program id went into: it stays right beyond 2^31 elements."""
    seen = set()
    for _, records in _aot.recorded():
        for record in records:
            if record.kernel not in seen:
                seen.add(record.kernel)
                narrow = _narrow_products(record)
                assert not narrow, f"{record.kernel.__name__}: {narrow[0]}"
    assert _narrow_products(_record(_narrow_kernel, Launch()))


def _narrow_products(record: Record) -> list[str]:
    """The addresses that a 32-bit product of something from a program id goes into, in Triton's intermediate code."""
    from_program_id, products, found = set(), set(), []
    for line in _aot.compile_launch(record, ARCH).asm["ttir"].splitlines():
        assignment = re.match(r"\s*(%\w+)(?::\d+)? = (\S+) (.*)", line)
        if not assignment:
            continue
        name, operation, operands = assignment.groups()
        result_type = re.split(r" : | -> | to ", re.sub(r" loc\(.*", "", operands))[-1]
        used = set(re.findall(r"%\w+", operands))
        for carried, start in re.findall(r"(%\w+) = (%\w+)", operands):  # the variables of a loop
            for values in (from_program_id, products):
                if start in values:
                    values.add(carried)
        if operation == "tt.get_program_id" or (used & from_program_id and "i32" in result_type):
            from_program_id.add(name)
            if operation == "arith.muli":
                products.add(name)
        if used & products:
            products.add(name)
            if operation == "tt.addptr":
                found.append(line.strip())
    return found


@triton.jit
def _narrow_kernel(x_ptr, n: tl.int64):
    offsets = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(x_ptr + offsets, 0.0, mask=offsets < n)


@triton.jit
def _greedy_kernel(x_ptr, n: tl.int64):
    offsets = tl.arange(0, 16384)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x - tl.sum(x))


def _record(kernel, config: Launch) -> Record:
    return Record(kernel, (torch.empty(16384, device="meta"), 16384), {}, config)


def a_spill_is_refused():
    """512 values a thread do not fit in 255 registers."""
    binary = _aot.compile_record(_record(_greedy_kernel, Launch(num_warps=1)), "planted", ARCH)
    assert binary.stack > 0
    assert "spills" in binary.problem


def too_many_registers_are_refused():
    """The limit of the launch table counts, not only the hardware's."""
    binary = _aot.compile_record(_record(_greedy_kernel, Launch(num_warps=8, max_registers=32)), "planted", ARCH)
    assert binary.stack == 0
    assert "more than the 32 its launch table allows" in binary.problem


def a_register_used_too_early_is_refused():
    """Written while a product reads it or writes its result to it, or read before that is waited for."""
    (case,) = (c for c in fused.cases() if (c.op, c.name) == ("self_attention", "XL/2"))
    for record in _aot.record_case(case):
        compiled = _aot.compile_launch(record, ARCH)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            lines = _aot._said_by("nvdisasm", "--print-code", file.name).splitlines()
        assert used_too_early("\n".join(lines)) == []
        at, product = next((i, found) for i, line in enumerate(lines) if (found := _REGISTER_PRODUCT.search(line)))
        for register in product.groups():
            planted = f"        /*0000*/                   MOV R{register}, RZ ;"
            found = used_too_early("\n".join([*lines[: at + 1], planted, *lines[at + 1 :]]))
            assert f"MOV R{register}, RZ" in found
        unwaited = used_too_early("\n".join(line for line in lines if "WARPGROUP.DEPBAR" not in line))
        assert len(unwaited) > 100
    assert "still run" in _aot.Binary("k", "c", ARCH, 1, 0, 0, 1, 16, 0, 255, too_early=1).problem


@triton.jit(do_not_specialize=["n"])
def _masked_kernel(x_ptr, n: tl.int64):
    offsets = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    tl.store(x_ptr + offsets, 0.0, mask=offsets < n)


def narrow_accesses_are_refused():
    """A mask of a size of which the compiler knows nothing makes each of them one value wide."""
    config = Launch(num_warps=1)
    for elements, refused in ((1 << 23, True), (1 << 10, False)):
        record = Record(_masked_kernel, (torch.empty(elements, device="meta"), elements), {}, config)
        binary = _aot.compile_record(record, "planted", ARCH)
        assert binary.widest_access == 4
        assert (binary.problem is not None) == refused
    assert _aot.compile_record(_record(_narrow_kernel, config), "planted", ARCH).widest_access == 16


def bytes_are_those_of_the_tensors():
    """``bytes_moved`` counts every tensor argument once."""
    (case,) = (c for c in fused.cases() if (c.op, c.name) == ("gelu_difference", "B/4"))
    (record,) = _aot.record_case(case)
    u = case.inputs(Inputs("meta"))["u"]
    assert _aot.compile_record(record, "bytes", ARCH).bytes_moved == 3 * 2 * u.numel()


def products_into_tensor_memory_are_not_pipelined():
    """Of all that Triton compiles wrongly there, loops of pipelined products are what our kernels would have."""
    for case in fused.cases():
        if case.op in ("attention_difference", "self_attention"):
            for record in _aot.record_case(case):
                assert record.config.tensor_cores
                assert [record.config.options(arch)["num_stages"] for arch in (100, 103, 110)] == [1, 1, 1]
                assert [record.config.options(arch)["num_stages"] for arch in (80, 90, 120)] == 3 * [
                    record.config.num_stages
                ]
                in_float32 = [r.config for r in _aot.record_case(case, torch.float32)] if "128" not in case.name else []
                assert all(config.options(100)["num_stages"] == config.num_stages for config in in_float32)


def the_update_moves_no_more_bytes_than_committed():
    """Of each parameter: gradient twice; parameter, two moments and average read and written; copy written."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import counters

    now = counters.optimizer_bytes_per_parameter()
    assert now == 2 * 4 + 4 * 2 * 4 + 2
    assert counters.worse("DiT-B/4", {"optimizer_bytes_per_parameter": now}) == []


def a_block_launches_and_moves_no_more_than_committed():
    """In the code that Inductor writes of a step."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import counters

    assert counters.worse("DiT-B/4", counters.compiled_block("DiT-B/4")) == []


def flash_attention_leaves_one_gradient():
    """Instead of three that are packed and summed, 8 bytes more; and its operators are known to Inductor."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import counters

    with mock.patch.object(OperatorIssue, "operator_str", side_effect=AssertionError("an operator was described")):
        moved = counters.compiled_block("DiT-B/4", attention="flash_attn_4")["bytes_moved_per_element_block"]
    committed = json.loads(counters.COUNTERS.read_text())["DiT-B/4"]
    assert moved <= committed["bytes_moved_per_element_block"] - 7.9


def float8_guidance_rounds_where_rows_are_made():
    """A block has three products in float8. Nothing but its weights is rounded by a pass of its own, and Inductor knows
    the operators."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import counters

    with mock.patch.object(OperatorIssue, "operator_str", side_effect=AssertionError("an operator was described")):
        compiled, _ = counters.compiled_step("DiT-B/4", depth=1, float8_guidance=True)
    code = compiled.code[0]
    assert len(re.findall(r"soflow\.float8_product\.default\(", code)) == 3
    assert code.count(".to(tl.float8e4nv)") == 3


def the_step_of_two_processes_is_written():
    """By Inductor, which describes no operator: it does so with all that the arguments were computed from, manyfold
    with each block. And the gradients of a part of a block are reduced before those of the next are computed.
    """
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import counters

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with (
        mock.patch.object(OperatorIssue, "operator_str", side_effect=AssertionError("an operator was described")),
        torch._inductor.config.patch(INDUCTOR_OPTIONS),
    ):
        compiled, _ = counters.compiled_step("DiT-B/4", depth=2)
    calls = re.findall(r"\.(all_reduce|wait_tensor|gelu_bwd|attention_bwd)\w*\.default\(", compiled.code[-1])
    order = "".join({"all_reduce": "r", "wait_tensor": "w"}.get(call, call[0]) for call in calls)
    # the last layer; of each block MLP and attention; embeddings, and the modulation, which is one product
    assert re.fullmatch("r(gw+raw+r){2}(w+r)*w+", order), order


def main(names: list[str]) -> None:
    failed = {}
    for name in names:
        try:
            globals()[name]()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
