"""A DiT that is told an embedding in place of a class."""

from dataclasses import replace

import pytest
import torch
from conditioned import CLASSES, WIDTH, ByClass, ByEmbedding, data_of, seeded
from runs import tiny_config

from soflow_fast import DiT, SoFlow, Trainer, trainer
from soflow_fast.weights import load_weights


def _told_dit(impl="torch"):
    net = seeded(DiT, 8, 4, 1, 16, 2, 2, embedding_dim=WIDTH, impl=impl)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return net


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_dit_told_embeddings(impl):
    """It is the DiT whose label table has them embedded; its gradients and its difference too."""
    net, conditions = _told_dit(impl), ByClass().label.weight.detach()
    by_class = DiT(8, 4, 1, 16, 2, 2, num_classes=CLASSES)
    state = {name: value for name, value in net.state_dict().items() if name not in ("null_condition",)}
    state = {name: value for name, value in state.items() if not name.startswith("y_embedder")}
    table = torch.cat([net.y_embedder(conditions[:CLASSES])[0], net.y_embedder(net.null_condition[None])[0]]).detach()
    by_class.load_state_dict({**state, "y_embedder.embedding_table.weight": table})
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 6, 1, 8, 8, generator=generator)
    t, dt = torch.linspace(0.5, 0.9, 6), torch.full((6,), -1e-3)
    labels = torch.tensor([3, 1, 4, 1, 5, 9])
    found = net.forward_difference(x, t, t / 2, conditions[labels], 1e-3 * dx, dt)
    wanted = by_class.forward_difference(x, t, t / 2, labels, 1e-3 * dx, dt)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(x, t, t, None), by_class(x, t, t, None), rtol=1e-4, atol=1e-6)
    found[0].square().sum().backward()
    wanted[0].square().sum().backward()
    gradient = by_class.y_embedder.embedding_table.weight.grad
    bias = net.y_embedder.mlp[2].bias.grad  # the sum over rows, as is that of the table
    torch.testing.assert_close(bias, gradient.sum(0), rtol=1e-3, atol=1e-5)
    assert net.y_embedder.mlp[0].weight.grad.abs().sum() > 0


def test_a_dit_told_embeddings_starts_from_one_told_classes(tmp_path):
    by_class = DiT(8, 4, 1, 16, 2, 2, num_classes=CLASSES)
    torch.save(by_class.state_dict(), tmp_path / "x.pt")
    net = _told_dit()
    origin = load_weights(SoFlow(net), tmp_path / "x.pt", ["y_embedder"])
    assert "kept as initialised: y_embedder" in origin
    assert torch.equal(net.x_embedder.proj.weight, by_class.x_embedder.proj.weight)


def test_a_dit_told_embeddings_trains_in_low_precision_from_a_configuration(tmp_path):
    config = tiny_config(tmp_path, total_steps=4)
    config = replace(config, model=replace(config.model, embedding_dim=WIDTH, num_classes=0))
    config = replace(config, compute=replace(config.compute, precision="bf16"))
    run = Trainer(config, dataset=data_of(ByEmbedding()))
    assert run.step.copy is not None
    before = run.model.network.y_embedder.mlp[2].bias.detach().clone()
    run.fit()
    assert not torch.equal(run.model.network.y_embedder.mlp[2].bias, before)
    assert "embedding_dim: 16" in (tmp_path / "config.yaml").read_text()
    _, model, step = trainer.load_run(tmp_path, "cpu")
    assert (model.network.num_classes, step) == (0, 4)
