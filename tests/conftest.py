"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Inductor writes code for CPUs without vector instructions: to try which there are takes it half a minute a process.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
