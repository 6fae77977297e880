"""The training step in its fast forms gives the numbers of the plain one."""

import copy
import gc
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import data_parallel
import opaque_draws
import pytest
import torch
from _baselines import SixCalls
from fast_step_runs import STEPS, distances, make_model, make_step, train, training_batch

from soflow_fast import DiT, SoFlow, UNet
from soflow_fast.augment import AUGMENT_DIM, Augment
from soflow_fast.ema import EMA, PowerEMA
from soflow_fast.kernels.reference import normal, philox
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.optim import AdamW, RAdam
from soflow_fast.precision import ComputeCopy, tensor_cores
from soflow_fast.step import TrainStep


@pytest.fixture(scope="module")
def plain64():
    return train(torch.float64, objective=SixCalls)


@pytest.fixture(scope="module")
def plain32():
    return train(torch.float32, objective=SixCalls)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 4},
        {"compile": "aot_eager"},
        {"network": {"recompute": "elementwise"}},
        {"network": {"recompute": "block"}},
    ],
    ids=str,
)
def test_merged_equals_plain_in_float64(plain64, options):
    losses, model = train(torch.float64, **options)
    assert losses == pytest.approx(plain64[0], rel=1e-9)
    assert max(distances(model, plain64[1]).values()) < 1e-9


def test_merged_equals_plain_in_float32(plain32):
    losses, model = train(torch.float32)
    assert losses == pytest.approx(plain32[0], rel=1e-5)
    assert max(distances(model, plain32[1]).values()) < 1e-5


@pytest.fixture(scope="module")
def plain_of_one_block():
    """For what is compiled, which takes time by the block."""
    return train(torch.float32, objective=SixCalls, network={"depth": 1})


@opaque_draws.traced()
def test_inductor_draws_the_same_numbers():
    """The words are the same, and what is made of them rounds its own way."""
    rows, step = torch.arange(3), torch.tensor(2**31 + 7)
    draw = torch.compile(lambda step: [f(rows, 6, seed=5, step=step, stream=1) for f in (philox, normal)])
    words, values = draw(step)
    assert torch.equal(words, philox(rows, 6, seed=5, step=step, stream=1))
    torch.testing.assert_close(values, normal(rows, 6, seed=5, step=step, stream=1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inductor_equals_plain_in_float32(plain_of_one_block):
    """The graph that trains for real, in which a GPU draws by operators."""
    losses, model = train(torch.float32, compile=True, network={"depth": 1})
    assert losses == pytest.approx(plain_of_one_block[0], rel=1e-5)
    assert max(distances(model, plain_of_one_block[1]).values()) < 1e-5


@pytest.mark.parametrize("objective", [MeanFlow, AlphaFlow, SCM, FlowMatching])
def test_other_objectives_compile(objective):
    plain, _ = train(torch.float64, steps=3, objective=objective)
    compiled, _ = train(torch.float64, steps=3, objective=objective, compile="aot_eager")
    assert compiled == pytest.approx(plain, rel=1e-12)


@opaque_draws.traced()
def test_one_graph_and_one_compilation_in_a_run():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    train(torch.float32, steps=4, compile="aot_eager", accumulation=2)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_bfloat16_follows_float32(plain32):
    """The steps in bfloat16 stay within its rounding of the float32 ones."""
    losses, model = train(torch.float32, precision="bf16")
    assert losses == pytest.approx(plain32[0], rel=3e-3)
    assert max(distances(model, plain32[1]).values()) < 0.03
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_compute_copies_are_the_rounded_masters_after_every_step():
    model = make_model(torch.float32)
    step, _ = make_step(model, precision="bf16")
    for k in range(2):
        step(*training_batch(k, torch.float32))
        for name, p in model.named_parameters():
            assert torch.equal(step.copy.copies[name], p.detach().bfloat16())


def test_a_master_written_by_hand_is_seen_by_the_next_step():
    model, other = make_model(torch.float32), make_model(torch.float32)
    with torch.no_grad():
        other.network.final_layer.linear.weight.mul_(2)
    expected = make_step(other, precision="bf16")[0](*training_batch(0, torch.float32)).loss
    step, _ = make_step(model, precision="bf16")
    with torch.no_grad():
        model.network.final_layer.linear.weight.mul_(2)
    assert step(*training_batch(0, torch.float32)).loss == expected


def test_gradients_of_copies_reach_the_masters_in_float32():
    """Two micro-gradients that bfloat16 could not add: 1 and 2^-9."""
    master = torch.nn.Linear(1, 1, bias=False)
    copy = ComputeCopy(master)
    for value in (1.0, 2.0**-9):
        weight = copy.parameters()["weight"]
        assert weight.dtype == torch.bfloat16
        (weight * value).sum().backward()
    assert master.weight.grad.dtype == torch.float32
    assert master.weight.grad.item() == 1 + 2.0**-9


def test_steps_of_many_seeds_share_their_code():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(9):
        model = make_model(torch.float32)
        make_step(model, seed=seed, compile="aot_eager")[0](*training_batch(0, torch.float32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_that_nobody_uses_is_freed_at_once():
    model = make_model(torch.float32)
    gc.disable()
    try:
        step = make_step(model, precision="bf16")[0]
        step(*training_batch(0, torch.float32))
        copies = weakref.ref(next(iter(step.copy.copies.values())))
        model.zero_grad()
        del step
        assert copies() is None
    finally:
        gc.enable()


class _Foreign(torch.nn.Module):
    """What it does depends on t, so that no difference forward can be derived; notes how it is computed."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.computed = set()

    def forward(self, x, t, s, labels):
        if t.max() > 2:
            return x
        out = self.layer(x * t.view(-1, 1, 1, 1) + s.view(-1, 1, 1, 1))
        self.computed.add((out.dtype, torch.backends.cuda.matmul.allow_tf32))
        return out


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (SoFlow, {"guidance_scale": 1.0}),
        (MeanFlow, {"derivative": "finite_difference", "guidance_scale": 1.0}),
    ],
)
def test_a_difference_of_two_outputs_is_of_float32(objective, options):
    torch.manual_seed(0)
    model = objective(_Foreign(), impl="torch", **options)
    make_step(model, precision="bf16")[0](*training_batch(0, torch.float32))
    assert model.network.computed == {(torch.float32, False)}


def test_a_difference_of_two_outputs_is_refused_on_copies():
    model = make_model(torch.float32, partial(MeanFlow, derivative="finite_difference"))
    with pytest.raises(ValueError, match="precision='bf16' loses the difference of two outputs that this MeanFlow"):
        make_step(model, precision="bf16")
    assert make_step(model)[0].precision == "fp32"


def test_a_compiled_dit_is_refused_on_copies():
    model = make_model(torch.float32)
    model.network = torch.compile(model.network)
    with pytest.raises(ValueError, match=r"the network is compiled already, .* give the network itself"):
        make_step(model, precision="bf16")
    assert make_step(model, precision="fp32")[0].copy is None


def test_products_of_bfloat16_are_summed_in_float32():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with tensor_cores("bf16"):
        assert not matmul.allow_bf16_reduced_precision_reduction
    assert matmul.allow_bf16_reduced_precision_reduction == before


def test_torch_may_be_told_of_tensor_cores_by_its_newer_names():
    """In a process of its own: once used, they exclude the older ones."""
    code = (
        "import torch; from fast_step_runs import *\n"
        "names = torch.backends.cuda.matmul, torch.backends.cudnn.conv\n"
        "for name in names: name.fp32_precision = 'ieee'\n"
        "make_step(make_model(torch.float32), precision='tf32')[0](*training_batch(0, torch.float32))\n"
        "assert [name.fp32_precision for name in names] == ['ieee', 'ieee']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_follow_one(tmp_path, plain_of_one_block):
    """In every form of ``data_parallel.py``; and a run begins in both with the network of the first."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(here / "data_parallel.py"), str(tmp_path)], capture_output=True, text=True, cwd=here
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    start = saved.pop("start")
    torch.testing.assert_close(start.pop("beside"), data_parallel.beside(), rtol=0.02, atol=1e-3)
    assert start["refused"] == (
        "process 1 has another Linear than the first, weight (3, 3) torch.float32 in place of weight (2, 3) "
        "torch.float32; build the same network in every process"
    )
    for name, average in start["averages"][0].items():
        assert torch.equal(average, start["averages"][1][name]), name
    assert saved.keys() == {"eager", "compiled", "eager, two micro-batches", "compiled, bf16"}
    for form, found in saved.items():
        of_losses, of_parameters = (3e-3, 0.03) if "bf16" in form else (1e-6, 1e-6)
        losses, plain = plain_of_one_block
        model = make_model(torch.float32, depth=1)
        model.load_state_dict(found["parameters"])
        assert found["losses"] == pytest.approx(losses, rel=of_losses), form
        assert max(distances(model, plain).values()) < of_parameters, form


def test_a_cuda_graph_needs_a_gpu_and_one_process():
    if torch.cuda.is_available():
        pytest.skip("a GPU is present: the graph itself is tested below")
    with pytest.raises(ValueError, match="cuda_graph=True needs the model on a CUDA GPU and one process"):
        make_step(make_model(torch.float32), cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graph_equals_eager():
    results = []
    for options in ({"cuda_graph": False, "compile": False}, {"cuda_graph": True, "compile": False}):
        model = make_model(torch.float32).cuda()
        average = PowerEMA(model, 0.1)
        step, _ = make_step(model, precision="bf16", averages=[average], **options)
        losses = []
        for k in range(8):
            x, labels = training_batch(k, torch.float32)
            losses.append(step(x.cuda(), labels.cuda()).loss.item())
        results.append((losses, model, average))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert max(distances(results[1][1], results[0][1]).values()) < 1e-6
    for eager, captured in zip(*(average.averages.values() for *_, average in results), strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_graph_would_keep_a_learning_rate_that_is_a_number():
    model = make_model(torch.float32).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    with pytest.raises(ValueError, match=r"build the optimizer with lr=torch\.tensor"):
        TrainStep(model, optimizer=optimizer, total_steps=STEPS, cuda_graph=True)
    assert not TrainStep(model, optimizer=optimizer, total_steps=STEPS).cuda_graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_torchs_capturable_optimizer_in_a_graph_follows_the_learning_rate_and_a_loaded_state():
    model = make_model(torch.float32).cuda()
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, capturable=True)
    step = TrainStep(model, optimizer=optimizer, total_steps=STEPS, compile=False)
    assert step.cuda_graph
    batches = [[part.cuda() for part in training_batch(k, torch.float32)] for k in range(8)]
    for k in range(5):
        step(*batches[k])
    state = copy.deepcopy(step.state_dict())
    lr.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    step(*batches[5])
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    step.load_state_dict(state)
    for k in range(5, 8):
        step(*batches[k])
    counts = {float(one["step"]) for one in optimizer.state.values()}
    assert counts == {8.0}  # of the state that was loaded, and not of the tensors of the first graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Inductor, fused kernels and the CUDA graph need a GPU")
@pytest.mark.parametrize(
    ("objective", "optimizer_class"),
    [(SoFlow, AdamW), (SoFlow, RAdam), *((kind, AdamW) for kind in (MeanFlow, ImprovedMeanFlow, AlphaFlow, SCM))],
)
def test_the_default_step_on_a_gpu_follows_the_eager_one_and_the_learning_rate(objective, optimizer_class):
    results = []
    for options in ({"cuda_graph": False, "compile": False}, {}):
        torch.manual_seed(0)
        net = DiT(8, 2, 1, 64, 2, 2, num_classes=10, condition_dim=objective.condition_dim)
        for p in net.parameters():
            if p.requires_grad and (p == 0).all():
                torch.nn.init.normal_(p, std=0.05)
        model = objective(net.cuda())
        ema = EMA(model, 0.99)
        optimizer = optimizer_class((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        step, losses = TrainStep(model, optimizer=optimizer, ema=ema, total_steps=STEPS, **options), []
        for k in range(8):
            if k == 5:
                optimizer.param_groups[0]["lr"] = 0.0
                before = [p.detach().clone() for p in model.parameters()]
            x, labels = training_batch(k, torch.float32)
            losses.append(step(x.cuda(), labels.cuda()).loss.item())
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        results.append((losses, model, ema.averages))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-2)
    assert max(distances(results[1][1], results[0][1]).values()) < 5e-2


def _unet_losses(dropout, seeds, **options):
    """Of a UNet that is told of its augmentation, the network's own draws seeded for each step as the Trainer does."""
    torch.manual_seed(0)
    net = UNet(8, 1, 10, model_channels=32, channel_mult=(1, 2), num_blocks=1, dropout=dropout, augment_dim=AUGMENT_DIM)
    for p in net.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    model = SoFlow(net.cuda(), velocity_share=0.5)
    step = TrainStep(
        model, optimizer=RAdam(model.parameters(), lr=1e-3), total_steps=STEPS, augment=Augment(0.3, 10), **options
    )
    losses = []
    for k, seed in enumerate(seeds):
        x, labels = training_batch(k, torch.float32)
        torch.manual_seed(seed)
        losses.append(step(x.cuda(), labels.cuda()).loss.item())
    return losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Inductor, fused kernels and the CUDA graph need a GPU")
def test_the_default_step_of_a_unet_on_a_gpu():
    """It follows the eager one; in the graph, too, the masks of its dropout are those of the seed."""
    eager = _unet_losses(0.0, range(8), cuda_graph=False, compile=False)
    assert _unet_losses(0.0, range(8)) == pytest.approx(eager, rel=3e-2)
    first, again, other = (_unet_losses(0.3, [*range(7), last]) for last in (7, 7, 8))
    assert again == pytest.approx(first, rel=1e-4)  # a library's convolutions may add in another order
    assert other[:7] == pytest.approx(first[:7], rel=1e-4)
    assert other[7] != pytest.approx(first[7], rel=1e-3)
