"""The training step against the loss it is made of, differentiated by hand in the test."""

import copy

import pytest
import torch
from runs import tiny_config

from soflow_fast import SoFlow, build, optim
from soflow_fast.ema import EMA, PowerEMA
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.step import TrainStep

LR = 0.1


def _model(seed=0, dtype=torch.float64):
    model = build.build_model(tiny_config("unused", seed=seed)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.network.final_layer.linear.weight, std=0.1, generator=generator)
    return model


def _batch(n=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(0, 10, (n,), generator=generator)


def _step(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return TrainStep(model, optimizer=optimizer, **{"total_steps": 10, "seed": 3, **options})


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_three_steps_of_gradient_descent_at_the_right_progress_and_draws():
    x, labels = _batch()
    model, expected = _model(), _model()
    step = _step(model)
    for k in range(3):
        stats = step(x, labels)
        loss = expected.loss(x, labels, k / 10, seed=3, step=k).loss
        parameters = [p for p in expected.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= LR * gradient
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(stats.loss, loss.detach())
        torch.testing.assert_close(stats.grad_norm, norm)
        assert stats.finite
        assert {name: len(part.t) for name, part in stats.parts.items()} == {"velocity": 12, "consistency": 4}
    torch.testing.assert_close(_weights(model), _weights(expected))
    assert int(step.step) == 3


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_change_nothing(accumulation):
    x, labels = _batch()
    whole, parts = _model(), _model()
    for model, n in ((whole, 1), (parts, accumulation)):
        step = _step(model, accumulation=n)
        for _ in range(2):
            stats = step(x, labels)
    assert len(stats.parts["velocity"].mse) == 12
    torch.testing.assert_close(_weights(parts), _weights(whole))


def test_two_halves_of_a_batch_are_the_rows_of_two_processes():
    # the gradients of two processes average to the whole batch's; here each half is a step of its own
    x, labels = _batch()
    moved = []
    for rank, rows in ((0, slice(0, 8)), (1, slice(8, 16)), (None, slice(None))):
        model = _model()
        before = _weights(model)
        out = model.loss(x[rows], labels[rows], 0.0, seed=3, step=0, first_row=8 * (rank or 0))
        out.loss.backward()
        moved.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert torch.equal(_weights(model), before)
    torch.testing.assert_close((moved[0] + moved[1]) / 2, moved[2])


def test_clipping_limits_the_norm():
    x, labels = _batch()
    model = _model()
    before = _weights(model)
    norm = _step(model, grad_clip=1e-3)(x, labels).grad_norm
    assert norm > 1e-3
    assert (_weights(model) - before).norm() == pytest.approx(LR * 1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
        lambda parameters: optim.AdamW(parameters, lr=LR, impl="torch"),
        lambda parameters: optim.RAdam(parameters, lr=LR, impl="torch"),
    ],
    ids=["torch", "ours", "RAdam"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(make):
    x, labels = _batch(dtype=torch.float32)
    model = _model(dtype=torch.float32)
    ema, average = EMA(model), PowerEMA(model, 0.1)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    step = TrainStep(model, optimizer=optimizer, ema=ema, averages=[average], total_steps=10)
    step(x, labels)
    assert all(torch.equal(average.averages[name], p) for name, p in model.named_parameters() if p.requires_grad)
    before = _weights(model), *({n: v.clone() for n, v in one.state_dict().items()} for one in (ema, average))
    stats = step(x / 0, labels)
    assert not stats.finite
    assert torch.equal(_weights(model), before[0])
    for one, values in ((ema, before[1]), (average, before[2])):
        assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())
    assert (int(step.step), int(ema.updates), int(average.updates)) == (2, 1, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert step(x, labels).finite
    assert not torch.equal(_weights(model), before[0])
    moved, _ = _weights(model), step(x / 0, labels)
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.ones_like(p)
    optimizer.step()  # by hand, after one that was left out
    assert not torch.equal(_weights(model), moved)


def test_a_run_goes_on_from_its_states():
    x, labels = _batch(dtype=torch.float32)

    def new():
        model = _model(dtype=torch.float32)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, impl="torch")
        ema, average = EMA(model), PowerEMA(model, 0.1)
        return model, TrainStep(model, optimizer=optimizer, ema=ema, averages=[average], total_steps=10)

    (whole, whole_step), (first, first_step), (second, second_step) = new(), new(), new()
    for _ in range(4):
        whole_step(x, labels)
    for _ in range(2):
        first_step(x, labels)
    state = copy.deepcopy((first.state_dict(), first_step.state_dict()))
    first_step(x, labels)
    second.load_state_dict(state[0])
    second_step.load_state_dict(state[1])
    for _ in range(2):
        second_step(x, labels)
    assert int(second_step.step) == 4
    assert torch.equal(_weights(second), _weights(whole))
    for one, other in ((second_step.ema, whole_step.ema), (second_step.averages[0], whole_step.averages[0])):
        assert all(torch.equal(value, other.averages[name]) for name, value in one.averages.items())
    with pytest.raises(ValueError, match="the state has 2 averages and this step 0; give it the same ema"):
        _step(_model(dtype=torch.float32)).load_state_dict(state[1])


def test_a_state_of_other_parameters_is_refused():
    steps = []
    for trained in ("weight", "bias"):
        model = _model(dtype=torch.float32)
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(f"final_layer.linear.{trained}"))
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps.append(TrainStep(model, optimizer=optim.AdamW(parameters, impl="torch"), total_steps=10))
    state = steps[0].state_dict()
    with pytest.raises(
        ValueError, match=r"a step that trains network\.\S+\.weight where this one trains \S+\.bias; set"
    ):
        steps[1].load_state_dict(state)
    steps[0].load_state_dict({name: value for name, value in state.items() if name != "parameters"})  # as before


def test_a_graph_with_other_hyper_parameters_than_those_loaded_is_captured_anew():
    model = _model(dtype=torch.float32)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], impl="triton")
    step = TrainStep(model, optimizer=optimizer, total_steps=10)
    state, graph = copy.deepcopy(step.state_dict()), object()
    for changes, kept in (({"lr": 0.5}, True), ({"weight_decay": 0.5}, False)):
        state["optimizer"]["param_groups"][0] |= changes
        step._graph = graph
        step.load_state_dict(state)
        assert (step._graph is graph) == kept


@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.RAdam])
def test_our_optimizers_are_prepared_and_do_the_whole_update(monkeypatch, optimizer_class):
    """A captured step has no other way to what the host decides, and only so is it one pass."""
    model, calls = _model(dtype=torch.float32), []

    def spied(name):
        original = getattr(optimizer_class, name)

        def call(self, **keywords):
            calls.append((name, keywords))
            return original(self, **keywords)

        monkeypatch.setattr(optimizer_class, name, call)

    spied("prepare")
    spied("update")
    ema, optimizer = EMA(model), optimizer_class([p for p in model.parameters() if p.requires_grad], impl="torch")
    TrainStep(model, optimizer=optimizer, ema=ema, total_steps=10, grad_clip=0.5)(*_batch(dtype=torch.float32))
    assert calls[:2] == [("prepare", {}), ("update", {"ema": ema, "copy": None, "grad_clip": 0.5})]


def test_only_consistency_rows_are_lost_to_rounding(caplog):
    net = _model(dtype=torch.float32).network
    for objective, warned in ((SoFlow(net, quotient="two_forwards"), True), (FlowMatching(net), False)):
        caplog.clear()
        _step(objective, precision="bf16")
        assert ("lost to rounding in bf16" in caplog.text) == warned


def test_settings_that_cannot_be():
    x, labels = _batch(12)
    with pytest.raises(ValueError, match=r"batches of 6 rows do not all hold .* a multiple of 4"):
        _step(_model(), accumulation=2)(x, labels)
    with pytest.raises(ValueError, match="accumulation=5 does not divide the batch of 12 rows"):
        _step(_model(), accumulation=5)(x, labels)
    for setting, sentence in (
        ({"grad_clip": -1.0}, "grad_clip=-1.0 is not a norm to clip at"),
        ({"accumulation": 0}, "accumulation=0 is not possible; it must be at least 1"),
        ({"total_steps": 0}, "total_steps=0 is not possible"),
        ({"rank": 3, "world_size": 1}, "rank=3 is none of world_size=1 processes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            _step(_model(), **setting)
    with pytest.raises(ValueError, match="there are 11 labels for 12 samples"):
        _step(_model())(x, labels[:11])
    with pytest.raises(ValueError, match="x0 has no samples"):
        _step(_model())(x[:0])
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad"):
        _step(_model().requires_grad_(False))
    with pytest.raises(ValueError, match="precision='fp8' is not known"):
        _step(_model(), precision="fp8")
    with pytest.raises(ValueError, match="cuda_graph=True needs the model on a CUDA GPU"):
        _step(_model(), cuda_graph=True)


def test_what_would_not_be_trained_or_averaged_is_refused():
    model = _model()
    model.projection = torch.nn.Linear(2, 2)
    of_network = torch.optim.SGD(model.network.parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"the optimizer is a SGD without the parameter projection\.weight; give it"):
        TrainStep(model, optimizer=of_network, total_steps=4)
    with pytest.raises(ValueError, match="an average is of another network than the one that is trained"):
        _step(model, ema=EMA(_model()))
    x, labels = _batch()
    _step(model, ema=EMA(model.network))(x, labels)  # of what is sampled alone


def test_a_cuda_graph_is_chosen_where_the_optimizer_allows_it():
    parameters, gpu = [torch.nn.Parameter(torch.zeros(2))], torch.device("cuda")
    ours, sgd = optim.AdamW(parameters, lr=LR, impl="torch"), torch.optim.SGD(parameters, lr=LR)
    assert optim.choose_cuda_graph(None, ours, gpu, 1)
    assert not optim.choose_cuda_graph(None, ours, gpu, 2)
    assert not optim.choose_cuda_graph(None, sgd, gpu, 1)
    with pytest.raises(ValueError, match="needs an optimizer built with capturable=True"):
        optim.choose_cuda_graph(True, sgd, gpu, 1)
    capturable = torch.optim.AdamW(parameters, lr=LR, capturable=True)
    assert not optim.choose_cuda_graph(None, capturable, gpu, 1)
    with pytest.raises(ValueError, match="would keep a learning rate that is a number"):
        optim.choose_cuda_graph(True, capturable, gpu, 1)
