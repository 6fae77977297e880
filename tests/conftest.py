"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Inductor writes code for CPUs without vector instructions: to try which there are takes it half a minute a process.
"""

import functools
import gc
import os

import _interpreter  # noqa: F401, first
import torch
import torch._export.utils
from torch.export import exported_program

os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"

import fast_interpreter
import opaque_draws

if not torch.cuda.is_available():  # a GPU's kernels are compiled, and draw by operators of their own
    fast_interpreter.install()
    opaque_draws.install()

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
