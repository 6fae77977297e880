"""The one-pass optimizers: AdamW equal to torch's AdamW, clipping and EMA; and what it shares with RAdam."""

import math
import weakref
from copy import deepcopy

import pytest
import torch
from op_checks import DEVICE
from optim_runs import PAIRS, Net, assert_equal, give, gradients, same_weights
from torch import nn

from soflow_fast import one_pass, optim
from soflow_fast.ema import EMA
from soflow_fast.kernels import optimizer as kernel
from soflow_fast.optim import AdamW, update
from soflow_fast.precision import ComputeCopy


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw_and_ema(impl, grad_clip, weight_decay):
    options = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay}
    net, plain = Net(), Net()
    ema, copy = EMA(net, 0.99), ComputeCopy(net)
    optimizer = AdamW(net.parameters(), impl=impl, **options)
    reference = torch.optim.AdamW(plain.parameters(), foreach=False, **options)
    averages = [p.detach().clone() for p in plain.weights]
    for step in range(5):
        give(net, gradients(step))
        give(plain, gradients(step))
        norm, finite = optimizer.update(ema=ema, copy=copy, grad_clip=grad_clip)
        expected_norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(step)))
        if grad_clip is not None:
            for p in plain.weights:
                p.grad *= min(1.0, grad_clip / (expected_norm + 1e-6))
        reference.step()
        decay = min(0.99, (1 + step) / (10 + step))
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, plain.weights, strict=True)]
        assert finite
        assert norm.item() == pytest.approx(expected_norm, rel=1e-6)
    assert_equal([p.detach() for p in net.weights], [p.detach() for p in plain.weights])
    assert_equal(ema.averages.values(), averages)
    assert ema.updates == 5
    for p, c in zip(net.weights, copy.copies.values(), strict=True):
        assert torch.equal(c, p.detach().bfloat16())


@pytest.mark.parametrize(("name", "steps"), [("adamw", 3), ("radam", 3), ("radam", 7)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_state_goes_to_torch_and_back(impl, name, steps):
    """Of RAdam before and after its steps are rectified."""
    our_class, their_class = PAIRS[name]
    ours, theirs = Net(), Net()
    optimizer, reference = our_class(ours.parameters(), impl=impl), their_class(theirs.parameters())
    for step in range(steps):
        give(ours, gradients(step))
        optimizer.update()
    theirs.load_state_dict(ours.state_dict())
    reference.load_state_dict(deepcopy(optimizer.state_dict()))
    give(theirs, gradients(steps))
    reference.step()
    give(ours, gradients(steps))
    optimizer.update()
    same_weights(ours, theirs)

    again = Net()
    again.load_state_dict(theirs.state_dict())
    resumed = our_class(again.parameters(), impl=impl)
    resumed.load_state_dict(deepcopy(reference.state_dict()))
    give(again, gradients(steps + 1))
    resumed.update()
    give(ours, gradients(steps + 1))
    optimizer.update()
    same_weights(again, ours)


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_loaded_between_steps_is_used(name):
    """The tables point at the state's tensors, so loading must write into them."""
    net = Net()
    optimizer = PAIRS[name][0](net.parameters(), impl="triton")
    give(net, gradients(0))
    optimizer.update()
    saved_state, saved = deepcopy((optimizer.state_dict(), net.state_dict()))
    results = []
    for _ in range(2):
        net.load_state_dict(saved)
        optimizer.load_state_dict(saved_state)
        give(net, gradients(1))
        optimizer.update()
        results.append([p.detach().clone() for p in net.weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, impl, bad):
    net = Net()
    ema, copy = EMA(net, 0.9), ComputeCopy(net)
    optimizer = PAIRS[name][0](net.parameters(), impl=impl)
    give(net, gradients(0))
    optimizer.update(ema=ema, copy=copy)
    before = [t.clone() for t in (*net.parameters(), *ema.averages.values(), *copy.copies.values())]
    state = [t.clone() for s in optimizer.state.values() for t in s.values()]
    give(net, gradients(1))
    net.weights[1].grad[7] = bad
    norm, finite = optimizer.update(ema=ema, copy=copy)
    assert not finite
    assert not norm.isfinite()
    optimizer.step()
    after = [*net.parameters(), *ema.averages.values(), *copy.copies.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(state, (t for s in optimizer.state.values() for t in s.values()), strict=True)
    )
    assert ema.updates == 1


@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
@pytest.mark.parametrize(("name", "impl"), [("adamw", "triton"), ("radam", "triton"), ("radam", "torch")])
def test_a_scheduler_sets_the_learning_rate(name, impl):
    net, plain = Net(), Net()
    our_class, their_class = PAIRS[name]
    pairs = [(net, our_class(net.parameters(), impl=impl)), (plain, their_class(plain.parameters()))]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for _, optimizer in pairs]
    for step in range(3):
        for (module, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            give(module, gradients(step))
            if isinstance(optimizer, optim.OnePass):
                optimizer.update()
            else:
                optimizer.step()
            scheduler.step()
    assert_equal([p.detach() for p in net.weights], [p.detach() for p in plain.weights])


@pytest.mark.parametrize(("name", "impl"), [("adamw", "triton"), ("radam", "triton"), ("radam", "torch")])
def test_parameter_groups(name, impl):
    net, plain = Net(), Net()

    def groups(module):
        return [
            {"params": list(module.weights[:2]), "weight_decay": 0.5},
            {"params": list(module.weights[2:]), "lr": 1e-1},
        ]

    our_class, their_class = PAIRS[name]
    optimizer, reference = our_class(groups(net), impl=impl), their_class(groups(plain))
    give(net, gradients(0))
    give(plain, gradients(0))
    norm, _ = optimizer.update()
    reference.step()
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients(0))), rel=1e-6)
    assert_equal([p.detach() for p in net.weights], [p.detach() for p in plain.weights])


def _adamw(net, **keywords):
    return PAIRS["adamw"][1](net.parameters(), **keywords)


def test_averages_and_copies_may_come_and_change():
    net = Net()
    start = [p.detach().clone() for p in net.weights]
    first, second = (EMA(net, 0.9, warmup=False) for _ in range(2))
    optimizer, copy, after = AdamW(net.parameters(), lr=1e-2, impl="triton"), ComputeCopy(net), []
    for step, given in enumerate([{}, {"ema": first}, {"ema": second, "copy": copy}, {}]):
        give(net, gradients(step))
        optimizer.update(**given)
        after.append([p.detach().clone() for p in net.weights])
    for ema, weights in ((first, after[1]), (second, after[2])):
        assert ema.updates == 1
        assert_equal(ema.averages.values(), [0.9 * p + 0.1 * w for p, w in zip(start, weights, strict=True)])
    for w, c in zip(after[2], copy.copies.values(), strict=True):
        assert (c.float() - w).abs().max() <= 2**-7 * w.abs().max()


def test_a_group_of_frozen_parameters():
    net, plain = Net(), Net()
    for module in (net, plain):
        module.weights[0].requires_grad_(False)
    groups = [[{"params": [module.weights[0]]}, {"params": list(module.weights[1:])}] for module in (net, plain)]
    optimizers = AdamW(groups[0], lr=1e-2, impl="triton"), PAIRS["adamw"][1](groups[1], lr=1e-2)
    for step in range(2):
        for module, optimizer in zip((net, plain), optimizers, strict=True):
            give(module, gradients(step))
            module.weights[0].grad = None
            optimizer.step()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    same_weights(net, plain)


def test_a_group_added_later_is_stepped():
    net, plain = Net(), Net()
    pairs = [(net, AdamW(net.weights[:1], lr=1e-2, impl="triton")), (plain, _adamw(plain))]
    pairs[1][1].param_groups[0]["params"] = list(plain.weights[:1])
    for step in range(2):
        for module, optimizer in pairs:
            give(module, gradients(step))
            if step == 1:
                optimizer.add_param_group({"params": list(module.weights[1:]), "lr": 1e-1})
            optimizer.step()
    same_weights(net, plain)


def test_hyper_parameters_that_are_loaded_are_used():
    net, plain = Net(), Net()
    ours = AdamW(net.parameters(), lr=1e-2, impl="triton")
    give(net, gradients(0))
    ours.update()
    give(plain, gradients(0))
    theirs = _adamw(plain)
    theirs.step()
    theirs.param_groups[0] |= {"weight_decay": 0.5, "betas": (0.5, 0.6)}
    ours.load_state_dict(theirs.state_dict())
    for module, optimizer in ((net, ours), (plain, theirs)):
        give(module, gradients(1))
        optimizer.step()
    same_weights(net, plain)
    assert ours.state_dict()["state"][0]["step"] == 2


def test_a_beta_of_zero():
    net, plain = Net(), Net()
    pairs = [(net, AdamW(net.parameters(), lr=1e-2, betas=(0.0, 0.9), impl="triton"))]
    pairs += [(plain, _adamw(plain, betas=(0.0, 0.9)))]
    for step in range(2):
        for module, optimizer in pairs:
            give(module, gradients(step))
            optimizer.step()
    same_weights(net, plain)


def test_a_state_of_torch_does_not_turn_off_that_steps_are_left_out():
    net, plain = Net(), Net()
    give(plain, gradients(0))
    theirs = _adamw(plain)
    theirs.step()
    ours = AdamW(net.parameters(), lr=1e-2, impl="torch")
    ours.load_state_dict(theirs.state_dict())
    before = [p.detach().clone() for p in net.weights]
    give(net, gradients(1))
    net.weights[0].grad.fill_(float("nan"))
    assert not ours.update()[1]
    assert all(torch.equal(a, b) for a, b in zip(before, net.weights, strict=True))


def test_a_captured_step_keeps_the_addresses_it_was_captured_with(monkeypatch):
    net = Net()
    optimizer = AdamW(net.parameters(), lr=1e-2, impl="triton")
    give(net, gradients(0))
    optimizer.update()
    (group,) = optimizer._passes
    captured = group.next_captured  # in memory of the graph's own, what it runs before would write over it
    with monkeypatch.context() as capture:  # nothing runs during a capture
        capture.setattr(one_pass, "capturing", lambda: True)
        capture.setattr(optim, "capturing", lambda: True)
        capture.setattr(kernel, "launch", lambda *_, **__: None)
        held = gradients(1)
        for p, g in zip(net.weights, held, strict=True):
            p.grad = g
        optimizer.update()
        with pytest.raises(RuntimeError, match=r"prepare\(\) has to be called between two captures"):
            optimizer.update()
    optimizer.prepare()
    give(net, gradients(2))
    optimizer.update()  # in between, without the graph
    assert group.in_use is group.table
    assert group.next_captured is not None
    assert captured.view(-1, 6)[:, 1].tolist() == [g.data_ptr() for g in held]
    assert captured.view(-1, 6)[:, 0].tolist() == [p.data_ptr() for p in net.weights]


def test_the_gradients_of_a_step_are_not_kept():
    net = Net()
    optimizer = AdamW(net.parameters(), lr=1e-2, impl="triton")
    give(net, gradients(0))
    held = [weakref.ref(p.grad) for p in net.weights]
    optimizer.update()
    optimizer.zero_grad(set_to_none=True)
    assert [one() for one in held] == [None] * len(held)


@pytest.mark.parametrize("name", ["AdamW", "RAdam"])
def test_a_parameter_without_gradient_stays_as_torch_leaves_it(name):
    nets = Net(), Net()
    ours, theirs = (
        getattr(optim, name)(net.parameters(), 1e-2, impl=i) for net, i in zip(nets, ("triton", "torch"), strict=True)
    )
    averages = [EMA(net, 0.5) for net in nets]
    for seed in range(3):
        for net, optimizer, ema in zip(nets, (ours, theirs), averages, strict=True):
            give(net, gradients(seed))
            net.weights[1].grad = None
            optimizer.update(ema=ema)
    same_weights(*nets)
    for average, expected in zip(*(ema.averages.values() for ema in averages), strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert len(ours.state_dict()["state"]) == len(theirs.state_dict()["state"]) == len(nets[0].weights) - 1
    give(nets[0], gradients(3))
    with pytest.raises(
        RuntimeError,
        match="the 3 parameters that had a gradient in its first update, and now 4 have one; use",
    ):
        ours.update()


def test_the_state_of_an_optimizer_that_has_not_stepped_begins_again():
    net, other = Net(), Net()
    optimizer, fresh = AdamW(net.parameters(), lr=1e-2, impl="triton"), AdamW(other.parameters(), 1e-2, impl="triton")
    give(net, gradients(0))
    optimizer.update()
    optimizer.load_state_dict(AdamW(other.parameters(), lr=1e-2, impl="triton").state_dict())
    net.load_state_dict(other.state_dict())
    for one, seed in ((net, 1), (other, 1)):
        give(one, gradients(seed))
    optimizer.update()
    fresh.update()
    same_weights(net, other)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_parameter_with_gaps_is_refused(impl):
    """The memory in its gaps, which is another's, would be written."""
    with pytest.raises(ValueError, match=r"shape \(4, 8\) that is a view with gaps, of strides \(16, 1\)"):
        AdamW([nn.Parameter(torch.ones(4, 16, device=DEVICE)[:, :8])], impl=impl)
    AdamW([nn.Parameter(torch.ones(4, 16, device=DEVICE).t())], impl=impl)


def test_gradients_that_start_anywhere():
    """As the views into the buckets of data parallelism do."""
    net, plain = Net(), Net()
    ours, theirs = AdamW(net.parameters(), lr=1e-2, impl="triton"), _adamw(plain)
    give(plain, gradients(0))
    theirs.step()
    bucket = torch.cat([torch.zeros(1, device=DEVICE), *(g.flatten() for g in gradients(0))])
    for p, g in zip(net.weights, bucket[1:].split([p.numel() for p in net.weights]), strict=True):
        p.grad = g.view_as(p)
    ours.step()
    same_weights(net, plain)
    table = ours._passes[0].table.view(-1, 6)
    assert not (table % 16).any()


def test_parameters_that_start_anywhere_are_refused():
    parameter = nn.Parameter(torch.zeros(9, device=DEVICE)[1:])
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match="does not start at 16 bytes; use impl='torch'"):
        AdamW([parameter], impl="triton").update()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_copy_of_others_sees_the_update(impl):
    net = Net()
    other, optimizer = ComputeCopy(net), AdamW(net.parameters(), lr=1e-2, impl=impl)
    give(net, gradients(0))
    optimizer.update()
    other.refresh()
    assert all(torch.equal(p.detach().bfloat16(), c) for p, c in zip(net.weights, other.copies.values(), strict=True))


def test_other_optimizers_take_the_same_update():
    net, plain = Net(), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = EMA(net, 0.5, warmup=False)
    give(net, gradients(0))
    update(optimizer, ema=ema, grad_clip=1.0)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients(0)))
    expected = [p.detach() - 0.1 * g / norm for p, g in zip(plain.weights, gradients(0), strict=True)]
    assert_equal([p.detach() for p in net.weights], expected, rtol=1e-5)
    assert_equal(
        ema.averages.values(),
        [0.5 * p.detach() + 0.5 * e for p, e in zip(plain.weights, expected, strict=True)],
        rtol=1e-5,
    )


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_a_state_with_options_that_are_not_ours_is_refused(option):
    net = Net()
    theirs = torch.optim.AdamW(net.parameters(), **{option: True})
    for impl in ("torch", "triton"):
        with pytest.raises(ValueError, match=f"the state has {option}=True, which AdamW here does not"):
            AdamW(net.parameters(), impl=impl).load_state_dict(theirs.state_dict())


def test_bad_inputs():
    net = Net().double()
    with pytest.raises(ValueError, match=r"takes float32 parameters and got torch.float64; use impl='torch'"):
        AdamW(net.parameters(), impl="triton")
    net = Net()
    optimizer = AdamW(net.parameters(), impl="triton")
    with pytest.raises(RuntimeError, match=r"no parameter of this AdamW has a gradient; call backward\(\) first"):
        optimizer.update()


@pytest.mark.parametrize("make", [optim.AdamW, optim.RAdam])
def test_gradients_scaled_by_torch(make):
    """Its GradScaler hands the scale to fused optimizers of torch's; here it divides by it and leaves steps out."""
    weights = []
    for scaled in (False, True):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make([p], lr=0.1, impl="torch")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for factor in (1.0, float("nan") if scaled else 0.0, 3.0):
            if factor == 0:
                continue
            optimizer.zero_grad()
            scaler.scale(factor * p.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(p.detach().clone())
    torch.testing.assert_close(weights[1], weights[0])
