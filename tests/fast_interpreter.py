"""Triton's interpreter without the work that it repeats for every operation: the same bits in a third of the time.

But for sums that a function of our own adds up, whose order is that of a GPU here.
"""

import functools

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import ReduceOps

_patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_generic_reduce, _broadcast = ReduceOps.generic_reduce, TritonSemantic.broadcast_impl_value
_init_block_type, _init_tensor = tl.block_type.__init__, tl.tensor.__init__

# ------------------------------------------------------------------------------------------------- calls of functions

#: the modules of the language whose functions are the interpreter's at the time
_patched: set = set()


class _Inner:
    def restore(self):
        """Left to the scope of the launch."""


class _Outer:
    def __init__(self, scope):
        self._scope = scope

    def restore(self):
        self._scope.restore()
        _patched.clear()


@functools.cache
def _languages(fn):
    return frozenset(module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core)


def _patch_lang_once(fn):
    """A launch patches each module once, and not in every call of one jitted function by another."""
    languages = _languages(fn)
    if languages and languages <= _patched:
        return _Inner()
    scope = _Inner if _patched else _Outer
    new = _patch_lang(fn)
    _patched.update(languages)
    return scope(new) if scope is _Outer else scope()


# -------------------------------------------------------------------------------------------------------------- types


@functools.cache
def _of_name(name, dtype):
    return _get_np_dtype(dtype)


def _known_np_dtype(dtype):
    dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return _get_np_dtype(dtype) if isinstance(dtype, tl.pointer_type) else _of_name(dtype.name, dtype)


#: what block types, and tensors of a type, have in common, by element type and shape
_block_types: dict[tuple, dict] = {}
_tensors: dict[tuple, dict] = {}


def _known_block_type(self, element_ty, shape):
    if type(element_ty) is not tl.dtype:
        return _init_block_type(self, element_ty, shape)
    key = element_ty.name, tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
    if key not in _block_types:
        _init_block_type(self, element_ty, shape)
        _block_types[key] = dict(self.__dict__)
    self.__dict__.update(_block_types[key])


def _known_tensor(self, handle, type):
    key = type.name
    if isinstance(type.scalar, tl.pointer_type):
        return _init_tensor(self, handle, type)
    if key not in _tensors:
        _init_tensor(self, handle, type)
        _tensors[key] = dict(self.__dict__)
    self.__dict__.update(_tensors[key])
    self.handle, self.type = handle, type


def _broadcast_if_needed(self, lhs, rhs):
    same = lhs.type.shape is rhs.type.shape if lhs.type.is_block() and rhs.type.is_block() else False
    return (lhs, rhs) if same else _broadcast(self, lhs, rhs)


# --------------------------------------------------------------------------------------------------------- reductions


def _reduce_by_halves(self, input):
    """As a GPU's threads do, and all of a half at once, where Triton's interpreter takes one element after another."""
    if self.axis is None:
        return _generic_reduce(self, input)
    dtypes = [x.dtype for x in input]
    parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
    while len(parts[0]) > 1:
        middle = len(parts[0]) // 2
        halves = (
            self.to_tensor(part[half], dtype)
            for half in (slice(None, middle), slice(middle, None))
            for part, dtype in zip(parts, dtypes, strict=True)
        )
        result = self.combine_fn.fn(*halves)
        parts = [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]
    parts = [part[0] for part in parts]
    if self.keep_dims:
        parts = [np.expand_dims(part, self.axis) for part in parts]
    return [self.to_tensor(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]


def install() -> None:
    """For this process."""
    interpreter._patch_lang, interpreter._get_np_dtype = _patch_lang_once, _known_np_dtype
    ReduceOps.generic_reduce, TritonSemantic.broadcast_impl_value = _reduce_by_halves, _broadcast_if_needed
    tl.block_type.__init__, tl.tensor.__init__ = _known_block_type, _known_tensor
