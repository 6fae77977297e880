"""What fits into a GPU's memory, and what follows from it."""

import pytest
import torch
from runs import Blobs
from torch import nn

from soflow_fast import DiT, SoFlow
from soflow_fast.data import digits
from soflow_fast.memory import choose_recompute, keep_on_device, step_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
GIB = 2**30


def _model(preset):
    with torch.device("meta"):
        return SoFlow(DiT.from_preset(preset))


def _gpu(monkeypatch, total, free=None):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((free or total) * GIB), int(total * GIB)))


def test_xl_at_batch_256():
    """676.7 M weights of 22 bytes; 28 blocks of 256·256 tokens of 1152 channels of 37 bytes."""
    model = _model("DiT-XL/2")
    state = 22 * 676.7e6
    element = 256 * 256 * 1152
    assert step_bytes(model, 256, "bf16") == pytest.approx(state + 28 * 37 * element, rel=1e-3)
    assert step_bytes(model, 256, "tf32") == pytest.approx(state + 2 * 28 * 37 * element, rel=1e-3)
    assert step_bytes(model, 256, "bf16", "elementwise") == pytest.approx(state + 28 * 29 * element, rel=1e-3)
    assert step_bytes(model, 256, "bf16", "block") == pytest.approx(state + (28 * 9 + 37) * element, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "gib", "expected"),
    [
        ("DiT-B/4", 40, "elementwise"),
        ("DiT-XL/2", 140, "elementwise"),
        ("DiT-XL/2", 90, "elementwise"),
        ("DiT-XL/2", 48, "block"),
        ("DiT-XL/2", 16, "block"),  # the most there is
    ],
)
def test_recomputation_as_much_as_the_memory_asks_for(monkeypatch, preset, gib, expected):
    _gpu(monkeypatch, gib)
    assert choose_recompute(_model(preset), 256, "bf16", GPU) == expected
    assert choose_recompute(_model(preset), 256, "bf16", CPU) == "none"


class _Layer(nn.Linear):
    num_classes = 0

    def forward(self, x, t, s, labels):
        return super().forward(x)


def test_of_another_network_only_the_weights_are_known():
    network = _Layer(9, 9)
    model = SoFlow(network, guidance_scale=1.0, label_drop=0.0)
    assert step_bytes(model, 256, "bf16") == 22 * 90
    assert step_bytes(model, 256, "bf16", averages=2) == 30 * 90


class _Large(Blobs):
    """Ten GiB of data that can be read in pieces."""

    def __len__(self):
        return 10 * GIB // (self.samples[0].nbytes + 8)

    def read_range(self, start, stop):
        raise AssertionError


@pytest.mark.parametrize(("free", "held"), [(25, True), (23, False)])
def test_auto_holds_data_in_half_of_what_a_step_leaves(monkeypatch, free, held):
    _gpu(monkeypatch, 80, free)
    assert keep_on_device("auto", _Large(), GPU, needed=4 * GIB) is held
    assert keep_on_device(False, _Large(), GPU, needed=0) is False
    assert keep_on_device(True, _Large(), GPU, needed=70 * GIB) is True


def test_auto_holds_what_is_small_on_a_cpu_and_nothing_that_cannot_be_read_in_pieces(monkeypatch):
    _gpu(monkeypatch, 80)
    assert keep_on_device("auto", digits(), GPU, needed=0) is True
    assert keep_on_device("auto", Blobs(), GPU, needed=0) is False
    assert keep_on_device("auto", digits(), CPU, needed=0) is True
    assert keep_on_device("auto", _Large(), CPU, needed=0) is False
    assert keep_on_device(True, digits(), CPU, needed=0) is True


def test_refusals(monkeypatch):
    _gpu(monkeypatch, 80, free=9)
    with pytest.raises(ValueError, match=r"Blobs has no read_range\(start, stop\); give it one or set"):
        keep_on_device(True, Blobs(), GPU, needed=0)
    with pytest.raises(ValueError, match=r"needs 10\.0 GiB on cuda:0 and 9\.0 are free"):
        keep_on_device(True, _Large(), GPU, needed=0)
