"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Inductor writes code for CPUs without vector instructions: to try which there are takes it half a minute a process.
"""

import functools
import gc
import os

import torch
import torch._export.utils

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"

# torch.export asks C++ for the names of all operators in every capture, a quarter of the time of the tests of captures.
torch._export.utils._materialize_cpp_cia_ops = functools.cache(torch._export.utils._materialize_cpp_cia_ops)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_collection_finish():
    """Captured networks are many small objects: to look for cycles among them took a fifth of some tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
