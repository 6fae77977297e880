"""Which gradients several processes reduce together; that the numbers are right is shown by ``test_fast_step.py``."""

import pytest
import torch

from soflow_fast import DiT, SoFlow, step
from soflow_fast.reduction import INDUCTOR_OPTIONS, _by_module


@pytest.fixture(scope="module")
def parameters():
    with torch.device("meta"):
        net = DiT.from_preset("DiT-B/4", impl="torch")
    return {name: p for name, p in SoFlow(net, impl="torch").named_parameters() if p.requires_grad}


@pytest.mark.parametrize("least_bytes", [1, 4 << 20, 1 << 40])
def test_every_parameter_is_of_one_group_and_the_modulation_first(parameters, least_bytes):
    groups = _by_module(parameters, least_bytes)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(parameters)
    late = ["adaLN_modulation" in name for name in names]
    assert late == sorted(late, reverse=True)
    blocks = [{".".join(name.split(".")[1:3]) for name in group} for group in groups]
    assert all(len(block) == 1 for block in blocks)


def test_a_block_is_reduced_in_parts_that_are_large_enough(parameters):
    def of_the_block(least_bytes):
        found = [group for group in _by_module(parameters, least_bytes) if group[0].startswith("network.blocks.3.")]
        return [sorted({name.split(".")[3] for name in group}) for group in found]

    assert of_the_block(4 << 20) == [["adaLN_modulation"], ["attn"], ["mlp"]]
    assert of_the_block(1 << 40) == [["adaLN_modulation"], ["attn", "mlp"]]


def test_parameters_of_two_dtypes_are_not_reduced_together():
    parameters = {"a.weight": torch.zeros(2), "a.bias": torch.zeros(2, dtype=torch.float64), "a.scale": torch.zeros(2)}
    assert _by_module(parameters, 1 << 40) == [["a.weight"], ["a.bias"], ["a.scale"]]


def test_of_a_compiled_dit_alone(monkeypatch):
    """Of another network the order of gradients is not known; uncompiled, nothing would overlap."""
    told = []
    monkeypatch.setattr(step, "compiled", lambda function, how, options: told.append(options) or function)
    monkeypatch.setattr(step, "CompiledReduction", lambda model: "in the backward")
    monkeypatch.setattr(step, "DistributedDataParallel", lambda loss, **_: loss)

    class OfMyOwn(DiT):
        pass

    for network, options, expected in (
        (DiT, {"compile": True}, INDUCTOR_OPTIONS),
        (DiT, {"compile": False}, None),
        (DiT, {"compile": True, "accumulation": 2}, None),
        (OfMyOwn, {"compile": True}, None),
    ):
        model = SoFlow(network(8, 4, 1, 16, 1, 2, num_classes=10, impl="torch"), impl="torch")
        adamw = torch.optim.AdamW(model.parameters())
        made = step.TrainStep(model, optimizer=adamw, total_steps=1, rank=0, world_size=2, **options)
        assert told.pop() == expected
        assert made.reduction == (expected and "in the backward")
