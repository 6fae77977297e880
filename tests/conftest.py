"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Inductor writes code for CPUs without vector instructions: to try which there are takes it half a minute a process.
"""

import functools
import gc
import os

import torch
import torch._export.utils
from torch.export import exported_program

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_float(values, source, target, rounding):
        """With torch's rounding to float8: the interpreter's loses a carry, so that 127 becomes 64."""
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return _convert(values, source, target, rounding)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = _convert_float

os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"

# torch.export asks C++ for the names of all operators in every capture, and tells each of them how it is decomposed on
# every kind of device: half of the time of the tests of captures.
torch._export.utils._materialize_cpp_cia_ops = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
for keys in (exported_program._AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE, exported_program._BACKEND_KEYS_TO_OVERRIDE):
    keys[:] = [key for key in keys if key.name.endswith(("CPU", "CUDA", "Meta"))]


def pytest_collection_finish():
    """Captured networks are many small objects: to look for cycles among them took a fifth of some tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
