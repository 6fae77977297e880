"""Networks of which few parameters are trained, such as a pretrained one with adapters."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from foreign_networks import Transformer
from runs import Blobs, StopError, assert_bitwise_equal, files, final, stop_at, tiny_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from soflow_fast import DiT, SoFlow, Trainer, TrainStep, load_run, load_weights
from soflow_fast.config import DataConfig, EMAConfig, ModelConfig, OutputConfig
from soflow_fast.differencing import ForwardDifference
from soflow_fast.dry_run import describe
from soflow_fast.memory import step_bytes
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.optim import AdamW

BASE = "network.base.blocks.0.qkv.own.weight"
TRACKED = (0.05, 0.1)
ADAPTER = "network.base.blocks.0.qkv.up.weight"


class LowRank(nn.Module):
    """A frozen layer and what is trained beside it, in float32."""

    def __init__(self, own):
        super().__init__()
        self.own = own
        self.down = nn.Linear(own.in_features, 2, bias=False)
        self.up = nn.Linear(2, own.out_features, bias=False)

    def forward(self, x):
        return self.own(x) + self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


class Adapted(nn.Module):
    """A transformer that is frozen but for what is beside its projections."""

    num_classes = 10

    def __init__(self, seed=0, dtype=torch.bfloat16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.base = Transformer().requires_grad_(False).to(dtype)
            torch.manual_seed(100)
            for block in self.base.blocks:
                block.qkv, block.proj = LowRank(block.qkv), LowRank(block.proj)

    def forward(self, x, t, s, labels=None):
        dtype = self.base.enter.weight.dtype
        return self.base(x.to(dtype), t.to(dtype), s.to(dtype), labels).to(x.dtype)


def _trainer(folder, net=None, save_frozen=False, posthoc=(), steps=6, **keywords):
    output = OutputConfig(log_every=2, sample_every=0, checkpoint_every=2, save_frozen=save_frozen)
    model = ModelConfig(in_channels=3, input_size=8, num_classes=10)
    config = tiny_config(
        folder, output=output, model=model, total_steps=steps, ema=EMAConfig(posthoc=posthoc, snapshot_every=1)
    )
    initial = keywords.pop("initial_weights", None)
    config = replace(config, initial_weights=None if initial is None else str(initial))
    return Trainer(config, model=FlowMatching(net or Adapted()), dataset=Blobs(shape=(3, 8, 8)), **keywords)


def _frozen(net):
    return {f"network.{name}" for name, p in net.named_parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose checkpoints leave out what is frozen."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    _trainer(folder, posthoc=TRACKED).fit()
    return folder


def test_checkpoints_hold_what_is_trained_and_the_run_goes_on_bitwise(trained, tmp_path, monkeypatch):
    state, net = final(trained), Adapted()
    assert state.frozen.keys() == _frozen(net)
    assert BASE in state.frozen
    assert state.model.keys() == net_state(net).keys() - _frozen(net)
    assert state.ema.keys() == {f"network.{name}" for name, p in net.named_parameters() if p.requires_grad}
    assert {name.split("/")[1] for name in state.posthoc} == state.ema.keys()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            _trainer(tmp_path, posthoc=TRACKED).fit()
    _trainer(tmp_path, posthoc=TRACKED).fit()
    assert_bitwise_equal(final(tmp_path), state)
    assert not torch.equal(state.model[ADAPTER], net_state(net)[ADAPTER])


def net_state(net):
    return {f"network.{name}": value for name, value in net.state_dict().items()}


def test_a_run_goes_on_where_checkpoints_did_or_will_hold_what_is_frozen(trained, tmp_path):
    for number, (before, after) in enumerate(((True, False), (False, True))):
        _trainer(tmp_path / str(number), save_frozen=before, posthoc=TRACKED, steps=2).fit()
        whole = final(tmp_path / str(number), 2)
        assert (BASE in whole.model, BASE in whole.ema, bool(whole.frozen)) == (before, before, not before)
        _trainer(tmp_path / str(number), save_frozen=after, posthoc=TRACKED, accept_changes=True).fit()
        state = final(tmp_path / str(number))
        assert (BASE in state.model, bool(state.frozen)) == (after, not after)
        _, model, _ = load_run(tmp_path / str(number), "cpu", model=FlowMatching(Adapted()))
        assert torch.equal(model.state_dict()[BASE], net_state(Adapted())[BASE])


def test_a_run_over_other_frozen_weights_is_refused(trained, tmp_path):
    _trainer(tmp_path / "run", steps=2).fit()
    there = files(tmp_path / "run")
    for net in (Adapted(1), Adapted(dtype=torch.float32)):
        with pytest.raises(
            ValueError, match=r"^run_dir='.*' holds a run over other frozen weights, .* network\.base\."
        ):
            _trainer(tmp_path / "run", net, steps=2).fit()
    assert files(tmp_path / "run") == there
    with pytest.raises(ValueError, match=r"^the checkpoint .* was trained on other frozen weights, .* and \d+ more;"):
        load_run(tmp_path / "run", "cpu", model=FlowMatching(Adapted(1)))
    _trainer(tmp_path / "run", Adapted(1), steps=2, accept_changes=True).fit()
    _trainer(tmp_path / "run", Adapted(1), steps=4, accept_changes=True).fit()
    changes = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert changes[0]["key"] == "frozen weights"
    _, model, _ = load_run(
        tmp_path / "run", "cpu", model=FlowMatching(Adapted(1))
    )  # whose checkpoint has the hashes of these
    assert torch.equal(model.state_dict()[BASE], net_state(Adapted(1))[BASE])


def test_a_run_is_loaded_with_the_networks_own_frozen_weights(trained):
    averages = final(trained).ema
    _, model, _ = load_run(trained, "cpu", model=FlowMatching(Adapted()))
    network = Adapted()
    load_weights(network, trained)
    _, windowed, _ = load_run(trained, "cpu", model=FlowMatching(Adapted()), ema_std=0.1)
    for found in (model.state_dict(), net_state(network)):
        assert all(torch.equal(found[name], averages[name]) for name in averages)
    assert not torch.equal(windowed.state_dict()[ADAPTER], averages[ADAPTER])
    with pytest.raises(ValueError, match="was trained on other frozen weights"):
        load_weights(Adapted(1), trained)


def test_initial_weights_of_such_a_run_and_of_another_base(trained, tmp_path):
    run = _trainer(tmp_path / "a", initial_weights=trained, steps=2)
    assert torch.equal(run.model.state_dict()[ADAPTER], net_state(Adapted())[ADAPTER])
    run.fit()
    before = final(trained).ema[ADAPTER]
    assert (final(tmp_path / "a", 2).model[ADAPTER] - before).abs().max() < 3e-3  # two steps of 1e-3
    torch.save(Adapted(1).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"^initial_weights='.*other.pt' changes network\.base.*save_frozen=False"):
        _trainer(tmp_path / "b", initial_weights=tmp_path / "other.pt", steps=2).fit()
    _trainer(tmp_path / "b", save_frozen=True, initial_weights=tmp_path / "other.pt", steps=2).fit()
    assert torch.equal(final(tmp_path / "b", 2).model[BASE], net_state(Adapted(1))[BASE])


def test_what_was_left_out_can_be_trained_later(tmp_path):
    """Its average begins with the network's own weight, which no checkpoint had."""
    _trainer(tmp_path, Adapted(dtype=torch.float32), steps=2).fit()
    net = Adapted(dtype=torch.float32)
    net.base.blocks[0].qkv.own.requires_grad_(True)
    _trainer(tmp_path, net, steps=4, accept_changes=True).fit()
    state, first = final(tmp_path, 4), net_state(Adapted(dtype=torch.float32))[BASE]
    assert state.frozen.keys() == _frozen(net)
    drift = (state.ema[BASE] - first).abs().max()
    assert 0 < drift < (state.model[BASE] - first).abs().max() < 3e-3


def test_what_is_frozen_costs_its_bytes_alone():
    net = Adapted()
    model = SoFlow(net)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert step_bytes(model, 8, "bf16") == 22 * trained + 2 * frozen
    assert step_bytes(model, 8, "bf16", averages=2) == 30 * trained + 2 * frozen


def test_a_dry_run_says_how_little_is_trained(tmp_path):
    model = ModelConfig(preset="test_frozen.Adapted", in_channels=3, input_size=8, num_classes=10)
    data = DataConfig(kind="runs.Blobs", init_args={"shape": [3, 8, 8]}, workers=0)
    assert "M, of which 0.000768 M are trained" in describe(tiny_config(tmp_path, model=model, data=data))
    assert "are trained" not in describe(tiny_config(tmp_path))


_seen = []


class _Watched(Adapted):
    def forward(self, x, t, s, labels=None):
        _seen.append((self.base.enter.weight.data_ptr(), self.base.blocks[0].qkv.up.weight.data_ptr()))
        return super().forward(x, t, s, labels)


def test_a_network_is_tried_without_a_copy_of_what_is_frozen(tmp_path):
    net = _Watched()
    net.base.requires_grad_(False)
    for block in net.base.blocks:
        block.qkv.up.requires_grad_(True)
    _seen.clear()
    _trainer(tmp_path, net)
    assert _seen
    assert {frozen for frozen, _ in _seen} == {net.base.enter.weight.data_ptr()}
    assert net.base.blocks[0].qkv.up.weight.data_ptr() not in {trained for _, trained in _seen}


def test_what_is_trained_in_low_precision_is_named(tmp_path):
    net = Adapted()
    net.base.enter.requires_grad_(True)
    with pytest.raises(ValueError, match=r"bfloat16, network\.base\.enter\.weight and 1 more, .* p\.data\.float"):
        _trainer(tmp_path, net)
    with pytest.raises(ValueError, match=r"call \.float\(\) on it"):
        _trainer(tmp_path, Transformer().bfloat16())


class _Uncast(Adapted):
    def forward(self, x, t, s, labels=None):
        return self.base(x, t, s, labels)


def test_a_base_in_low_precision_that_is_called_in_float32_says_what_to_cast(tmp_path):
    with pytest.raises(ValueError, match=r"_Uncast has parameters in torch\.bfloat16 and fails for x .*cast"):
        _trainer(tmp_path, _Uncast())
    _trainer(tmp_path, _Uncast(dtype=torch.float32))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_difference_of_adapters_in_float32_over_a_base_in_bfloat16(autocast):
    net, generator = Adapted(), torch.Generator().manual_seed(0)
    exact = copy.deepcopy(net).double()
    x, dx = torch.randn(2, 4, 3, 8, 8, generator=generator).bfloat16().float()
    t, s, dt = torch.full((4,), 0.75), torch.full((4,), 0.25), torch.full((4,), -1.0)
    labels = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        F, dF = ForwardDifference(net)(x, t, s, labels, dx * 2**-20, dt * 2**-20)
    told = s.double(), labels
    along = (x.double(), t.double()), (dx.double(), dt.double())
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        value, derivative = torch.func.jvp(lambda x, t: exact(x, t, *told), *along)
        _, tangent = ForwardDifference(exact)(*along[0], *told, *along[1], mode="tangent")
    torch.testing.assert_close(tangent, derivative, rtol=1e-12, atol=1e-13)
    assert (F - value).norm() < 0.02 * value.norm()
    assert (dF * 2**20 - derivative).norm() < 0.03 * derivative.norm()


def _dit():
    return DiT(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2)


def _step(net, **keywords):
    return TrainStep(SoFlow(net), optimizer=AdamW(net.parameters(), lr=1e-2), total_steps=2, **keywords)


@pytest.mark.parametrize("part", ["blocks.0.attn.qkv", "blocks.0.adaLN_modulation.1", "t_embedder.mlp.0"])
def test_a_dit_refuses_layers_that_it_would_not_call(part):
    net = _dit()
    _step(net)
    net.set_submodule(part, LowRank(net.get_submodule(part)))
    with pytest.raises(ValueError, match=rf"^{part} of the DiT is a test_frozen\.LowRank, which it would not call"):
        _step(net)


class _Added(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.down, self.up = nn.Parameter(weight[:2].detach().clone()), nn.Parameter(weight[:, :2].detach().clone())

    def forward(self, weight):
        return weight + self.up @ self.down


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dit_trains_what_is_added_to_its_weights(precision):
    net = _dit().requires_grad_(False)
    nn.init.normal_(net.final_layer.linear.weight)
    nn.init.normal_(net.blocks[0].adaLN_modulation[1].weight)
    for layer in (net.blocks[0].attn.qkv, net.blocks[0].mlp.fc1):
        parametrize.register_parametrization(layer, "weight", _Added(layer.weight))
    added = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    step = _step(net, precision=precision)
    step(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    assert len(added) == 4
    assert all((net.get_parameter(name) != before).any() for name, before in added.items())
