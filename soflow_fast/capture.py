"""Functions of tensors as compiled code and as CUDA graphs."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# Arguments of torch.compile, by what is asked for; anything else is a backend. Inductor's own CUDA graphs stay off,
# because what is compiled here becomes part of a larger one.
_OPTIONS = {True: {"mode": "default"}, "max-autotune": {"mode": "max-autotune-no-cudagraphs"}}


def compiled(function: Callable, how: bool | str | Callable, inductor: Mapping[str, Any] | None = None) -> Callable:
    """The function, compiled as one graph for fixed shapes; what cannot be compiled raises, an error of the function's
    own as that.

    Args:
        how: False, True, ``max-autotune`` (which also tries implementations of the matrix products), or a backend of
            torch.compile.
        inductor: options of torch's own compiler, where it is that; those that its version does not have are left out.
    """
    if not how:
        return function
    options = _OPTIONS.get(how, {"backend": how})
    if inductor and "mode" in options:  # torch takes one of the two
        from torch._inductor import config, list_mode_options  # slow to import

        known = {name: value for name, value in inductor.items() if hasattr(config, name)}
        options = {"options": {**list_mode_options(options["mode"]), **known}}
    run = torch.compile(function, fullgraph=True, dynamic=False, **options)

    @wraps(function)
    def call(*arguments):
        # One graph also under data parallelism, which would cut it at its buckets; many settings in a process.
        with torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=64):
            try:
                return run(*arguments)
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError):
                function(*arguments)  # an error of its own says more than that it cannot be compiled
                raise

    return call


def on_side_stream(stream: torch.cuda.Stream, function: Callable, *inputs: Tensor | None) -> Any:
    """Runs the function on a stream, as a capture will, so that nothing is left bound to the current one."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
    return result


class Captured:
    """A function captured as one CUDA graph, with the inputs it reads and the outputs it writes.

    Args:
        what: the name of the function in messages. stream: not the default one, of the GPU of the inputs; the one of
            :func:`on_side_stream`, as memory that was allocated on another is not used again.
        function: of tensors or None; run before on that stream, so that its kernels are compiled and loaded.
        inputs: of the shapes it will always have.

    Raises:
        RuntimeError: if the capture fails, with its cause; another capture may follow.
    """

    def __init__(self, what: str, stream: torch.cuda.Stream, function: Callable, *inputs: Tensor | None):
        self.what = what
        self.inputs = [None if x is None else x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(stream.device):
            before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
            try:
                with _capturing(self.graph, stream, pool):
                    self.outputs = function(*self.inputs)
            except Exception as error:
                torch.cuda.set_stream(before)  # which a capture that cannot be ended leaves
                _forget(self.graph, stream, pool)
                cause = error.__context__ or error  # the end of a broken capture fails as well
                why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
                raise RuntimeError(
                    f"{what} cannot be captured as a CUDA graph ({why}); set cuda_graph=False to run without"
                ) from error

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The outputs for these inputs; the next call overwrites them."""
        for own, given in zip(self.inputs, inputs, strict=True):
            shapes = [None if x is None else tuple(x.shape) for x in (own, given)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{self.what} is captured for inputs of shape {shapes[0]} and got {shapes[1]}; "
                    "keep the batch's shape (drop the last partial batch) or set cuda_graph=False"
                )
            if own is not None:
                own.copy_(given)
        self.graph.replay()
        return self.outputs


#: Graphs whose capture could not be ended: torch's allocator of pinned memory goes on asking them.
_BROKEN: list[torch.cuda.CUDAGraph] = []


def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None):
    # Threads that load data may allocate pinned memory meanwhile.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _forget(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """Ends for torch's allocator and generator a capture that CUDA could not end: to them it would go on for ever."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it has been ended, or never began; then the graph itself releases what it has
        return
    torch._C._cuda_releasePool(device, pool)
    _BROKEN.append(graph)
    with _capturing(torch.cuda.CUDAGraph(), stream):  # the end of a next one is what the generator notices
        torch.zeros((), dtype=torch.int64, device=stream.device)
