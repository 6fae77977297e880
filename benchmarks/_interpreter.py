"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported: import
this module first.

The interpreter rounds to float8 by torch here: by itself it loses a carry, and 127 becomes 64.
"""

import os

import torch


def _round_by_torch(interpreter) -> None:
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = converted


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _round_by_torch(interpreter)
