"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported: import
this module first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
