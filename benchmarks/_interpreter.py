"""Without a GPU the fused kernels run in Triton's interpreter, which must be chosen before Triton is imported: import
this module first.

Here the interpreter rounds as a GPU does, and multiplies bfloat16. By itself it cuts float32 off where bfloat16 ends,
multiplies the bits of bfloat16 as if they were integers, and loses a carry in float8, so that 127 becomes 64.
"""

import os

import numpy as np
import torch

_ROUNDED = {"bf16": (torch.bfloat16, torch.uint16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8)}


def _mend(interpreter) -> None:
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(values, source, target, rounding):
        if source.name != "fp32" or target.name not in _ROUNDED:
            return convert(values, source, target, rounding)
        dtype, bits = _ROUNDED[target.name]
        return torch.from_numpy(np.array(values)).to(dtype).view(bits).numpy()

    def widened(operand):
        if operand.dtype.scalar.name != "bf16":
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def with_bfloat16(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = with_bfloat16


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _mend(interpreter)
