"""FlashAttention 4 as soflow_fast.flash calls it, compiled for Hopper where there is no GPU; test_flash.py runs it."""

import os

# Read when the package is imported.
os.environ |= {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}

from unittest import mock

import cutlass
import torch
from flash_attn.cute import interface
from torch._subclasses.fake_tensor import FakeTensorMode

from soflow_fast import flash
from soflow_fast.flash_packages import PACKAGES, missing_for_flash

NAME = "flash_attn_4"


def _form(x: torch.Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype


def what_is_called_compiles():
    """Also where gradients are written into another tensor's places; results are as the operators' fakes say."""
    for tokens, head_dim in ((64, 64), (260, 64), (256, 128)):
        with FakeTensorMode():
            y = torch.empty(8, tokens, 3, 4, head_dim, dtype=torch.bfloat16, device="cuda")
            o, lse = flash._forward(y, NAME)
            assert [_form(o), _form(lse)] == [_form(x) for x in flash._forward_fake(y, NAME)]
            with mock.patch.object(interface, "_validate_tensor", wraps=interface._validate_tensor) as validated:
                flash._backward(y, torch.empty_like(o), o, lse, NAME)
        places = [call.args[0] for call in validated.call_args_list if call.args[1] in ("dq", "dk", "dv")]
        assert len({x.untyped_storage()._cdata for x in places}) == 1
        assert [x.stride() for x in places] == 3 * [y[:, :, 0].stride()]


def wrong_gradients_are_refused():
    """The rows that its backward for Hopper adds dq up in are those it reads where, and only where, we let it run."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        for head_dim in range(8, PACKAGES[NAME].widest + 1, 8):
            tiles = interface._tile_size_bwd_sm90(head_dim, head_dim, causal=False, local=False)
            kernel = interface.FlashAttentionBackwardSm90(cutlass.BFloat16, head_dim, dKV_swapAB=tiles.dKV_swapAB)
            read = -(-head_dim // 32) * 32
            assert (kernel.tile_hdim == read) == (missing_for_flash(NAME, head_dim) is None), head_dim


if __name__ == "__main__":
    what_is_called_compiles()
    wrong_gradients_are_refused()
