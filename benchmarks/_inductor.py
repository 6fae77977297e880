"""What Inductor makes of a training step for an H100 or H200, without one.

The loss is traced on fake CPU tensors. Its forward and backward graphs are then moved to a GPU that does not exist, and
Inductor writes their code without compiling or running it. So a copy that a layout forces, a reduction that is not
fused or a tensor read twice shows in a count, and in the code.
"""

import contextlib
import copy
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch._inductor.scheduler
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import make_fallback
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton import runtime
from triton.backends.compiler import GPUTarget

from soflow_fast.kernels._launch import recording

_GPU = torch.device("cuda", 0)
_PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    total_memory=141 << 30,
)


@dataclass
class Compiled:
    """Code and counts of the graphs of a step, to be filled: forward first.

    Attributes:
        code: of each graph, in Python. launches: of Inductor's and this package's kernels, and calls of library
            functions, such as a matrix product or attention. bytes_moved: what all of these read and write.
    """

    code: list[str]
    launches: int = 0
    bytes_moved: int = 0


# Flash attention as it is on a GPU: the operator of the CPU has other outputs.


@torch.library.custom_op("offline::attention", mutates_args=(), tags=[torch.Tag.needs_exact_strides])
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("on fake tensors only")


@_attention.register_fake
def _(q, k, v):
    B, H, N, h = q.shape
    return q.new_empty(B, N, H, h).transpose(1, 2), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("offline::attention_bwd", mutates_args=(), tags=[torch.Tag.needs_exact_strides])
def _attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("on fake tensors only")


@_attention_bwd.register_fake
def _(do, q, k, v, o, logsumexp):
    B, H, N, h = q.shape
    dq, dk, dv = (q.new_empty(B, N, H, h).transpose(1, 2) for _ in range(3))
    return dq, dk, dv


for _operator in (_attention, _attention_bwd):
    make_fallback(_operator._opoverload, warn=False)

_aten = torch.ops.aten
#: operators of a CPU: what stands for them on a GPU, and how many of the arguments it takes
_ON_GPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (_attention._opoverload, 3),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (_attention_bwd._opoverload, 6),
}


class _Driver:
    """Of Triton, for a GPU that is asked what it is and nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def _imagined_gpu() -> Iterator[None]:
    """Inside the block what Inductor asks about the GPU is answered as by an H200."""
    torch._C._ensureCUDADeviceGuardSet()

    def answers(value) -> Callable:
        return lambda *_, **__: value

    patches = {
        torch.cuda: {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": _PROPERTIES,
            "get_device_capability": (9, 0),
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
            "get_rng_state": torch.empty(0),
            "set_rng_state": None,
            "synchronize": None,
        },
        CudaInterface: {
            "is_available": True,
            "current_device": 0,
            "get_device_properties": _PROPERTIES,
            "get_compute_capability": 90,
        },
        CudaInterface.Worker: {"current_device": 0, "get_device_properties": _PROPERTIES},
        torch._inductor.scheduler: {"has_triton": True},
        torch._subclasses.fake_tensor: {"init_gpu_context": None},
    }
    with contextlib.ExitStack() as stack:
        for owner, values in patches.items():
            for name, value in values.items():
                function = answers(value)
                stack.enter_context(
                    mock.patch.object(owner, name, staticmethod(function) if isinstance(owner, type) else function)
                )
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(runtime.driver, "_active", _Driver()))
        yield


def _moved(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph on the GPU."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if node.target in _ON_GPU:
            node.target, n = _ON_GPU[node.target]
            node.args, node.kwargs = node.args[:n], {}
        node.args, node.kwargs = (
            torch.fx.node.map_aggregate(x, lambda y: _GPU if isinstance(y, torch.device) else y)
            for x in (node.args, node.kwargs)
        )
    graph.recompile()
    return graph


def _write(graph: torch.fx.GraphModule, inputs: list, into: Compiled, **options) -> None:
    """Adds the code and the counts of one graph."""

    def write(lowered: GraphLowering):
        code, _ = lowered.codegen()
        into.code.append(code.value)
        into.bytes_moved += lowered.count_bytes()[0]
        return types.SimpleNamespace(call=lambda inputs: None)  # instead of the compiled code

    mode = TracingContext.get().fake_mode
    with _imagined_gpu(), mock.patch.object(GraphLowering, "compile_to_module", write):
        with mode:
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_GPU) if isinstance(x, Tensor) else x
                for x in inputs
            ]
        graph = _moved(graph)
        with recording() as fused:
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        with torch._inductor.config.patch(fx_graph_cache=False):
            compile_fx_inner(graph, inputs, **options)
    body = into.code[-1].partition("def call(")[2]
    into.launches += len(fused) + len(
        re.findall(r"\btriton_\w+\.run\(|\bextern_kernels\.|= torch\.ops\.(?!soflow\.(?!linear_gelu))", body)
    )


def backend(into: Compiled) -> Callable:
    """A backend of torch.compile that adds to ``into`` and runs the graphs as they are; for fake CPU tensors."""

    def compiler(**options) -> Callable:
        def compile(graph: torch.fx.GraphModule, inputs: list) -> Callable:
            _write(graph, inputs, into, **options)
            return make_boxed_func(graph.forward)

        return compile

    def partition(joint, inputs, **keywords):
        with V.set_fake_mode(detect_fake_mode(inputs)):
            _recursive_joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **keywords)

    return aot_autograd(
        fw_compiler=compiler(is_inference=False),
        bw_compiler=compiler(is_backward=True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
