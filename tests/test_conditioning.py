"""Fused conditioning: sinusoids of the times, their difference, and the sum of the embeddings with its SiLU."""

import pytest
import torch
from op_checks import (
    DEVICE,
    check_accuracy,
    check_compiles,
    check_repeatable,
    run,
)

from soflow_fast.kernels import conditioning, fused
from soflow_fast.kernels._launch import recording

SINUSOIDS, DIFFERENCE, CONDITION = "time_sinusoids", "time_sinusoids_difference", "condition"
GRADIENTS = {SINUSOIDS: (), DIFFERENCE: (), CONDITION: ("t_embedding", "s_embedding", "table")}
OPS = tuple(GRADIENTS)
# B, L and XL, a width that is only a multiple of 8, and an odd one
WIDTHS = (768, 1024, 1152, 136, 13)


def _times(rows=9, step=1e-3):
    generator = torch.Generator().manual_seed(0)
    t, s, dt = torch.rand(3, rows, generator=generator)
    return {"t": t.to(DEVICE), "s": (t * s).to(DEVICE), "dt": (-step * dt).to(DEVICE)}


def _embeddings(width, dtype=torch.float32, rows=7, classes=5):
    generator = torch.Generator().manual_seed(0)
    t_embedding, s_embedding = (torch.randn(2, rows, width, generator=generator)).to(DEVICE, dtype)
    table = torch.randn(classes, width, generator=generator).to(DEVICE)
    labels = torch.randint(classes - 1, (rows,), generator=generator).to(DEVICE)  # the last class is not in the batch
    return {"t_embedding": t_embedding, "s_embedding": s_embedding, "table": table, "labels": labels}


def _arguments(name):
    if name == CONDITION:
        return _embeddings(24)
    times = _times()
    return times if name == DIFFERENCE else {"t": times["t"], "s": times["s"]}


# -------------------------------------------------------------------------------------------------- sinusoids


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 34, 2])
def test_sinusoids_match_the_reference(width, dtype):
    t, s, _ = _times().values()
    check_accuracy(SINUSOIDS, {"t": t, "s": s}, {"width": width, "dtype": dtype})


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 34, 2])
def test_sinusoid_difference_matches_the_reference(width, dtype, tangent):
    check_accuracy(DIFFERENCE, _times(), {"width": width, "dtype": dtype, "tangent": tangent})


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1000.0])
def test_sinusoids_by_their_definition(scale):
    """Within a few roundings of the phase, also for times far outside [0, 1]."""
    t, s = (scale * x for x in list(_times().values())[:2])
    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64, device=DEVICE)
    for features, tau in zip(fused.time_sinusoids(t, s), (t, t - s), strict=True):
        phase = tau.double()[:, None] * omega
        assert (features - torch.cat([phase.cos(), phase.sin()], dim=1)).abs().max() < 2e-7 + 6e-7 * scale


@pytest.mark.parametrize("step", [0.5, 1e-2, 1e-6, 1e-12])
def test_sinusoid_difference_is_relative(step):
    """The error is relative to the difference, element by element, at every step."""
    t, s, dt = _times(step=step).values()
    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64, device=DEVICE)
    half = (omega * dt.double()[:, None] / 2).sin()
    for ours, tau in zip(fused.time_sinusoids_difference(t, s, dt), (t, t - s), strict=True):
        middle = (tau.double() + dt.double() / 2)[:, None] * omega
        truth = torch.cat([-2 * middle.sin() * half, 2 * middle.cos() * half], dim=1)
        # t−s and t+dt/2 are rounded to float32 first
        assert (ours - truth).abs().max() < 1e-6 * truth.abs().max()
        assert ((ours - truth)[:, 128:].abs() / truth[:, 128:].abs()).max() < 3e-6


# -------------------------------------------------------------------------------------------------- condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_condition_matches_the_reference(width, dtype):
    check_accuracy(CONDITION, _embeddings(width, dtype), {}, GRADIENTS[CONDITION])


def test_table_gradient_sums_over_a_batch_longer_than_one_search(monkeypatch):
    """Every row of the batch adds to its class, in whichever block of labels it stands."""
    monkeypatch.setattr(conditioning, "_LABELS", 8)
    check_accuracy(CONDITION, _embeddings(8, rows=20, classes=3), {}, GRADIENTS[CONDITION])


@pytest.mark.parametrize(("rows", "classes", "programs"), [(3, 1, 2), (5, 2, 2), (9, 1, 4), (4, 2, 1)])
def test_programs_share_a_class_where_classes_are_few(rows, classes, programs, monkeypatch):
    """Of the last one there are fewer rows, or none."""
    monkeypatch.setattr(conditioning, "_ROWS", 2)
    monkeypatch.setattr(conditioning, "_MOST_PROGRAMS", 4)
    arguments = _embeddings(8, rows=rows, classes=classes + 1)
    arguments["table"] = arguments["table"][:classes]
    with recording() as records:
        check_accuracy(CONDITION, arguments, {}, GRADIENTS[CONDITION])
    _, _, of_table, *sums = records
    assert of_table.grid() == (classes, programs)
    assert len(sums) == (programs > 1)


def test_a_class_without_rows_gets_a_zero_gradient():
    *_, dtable = run(fused.condition, _embeddings(24), {}, GRADIENTS[CONDITION])
    assert not dtable[-1].any()
    assert dtable[:-1].any()


def test_extreme_values_stay_finite():
    arguments = _embeddings(24) | {"table": torch.linspace(-300, 300, 5, device=DEVICE)[:, None].repeat(1, 24)}
    check_accuracy(CONDITION, arguments, {}, GRADIENTS[CONDITION])


def test_an_unknown_label_is_not_a_number():
    arguments = _embeddings(24) | {"labels": torch.tensor([0, 5, -1, 4, 0, 1, 2], device=DEVICE)}
    c, active = fused.condition(**arguments)
    for result in (c, active):
        assert result.isnan().all(1).tolist() == [False, True, True, False, False, False, False]
        assert not result[[0, 3, 4, 5, 6]].isnan().any()


def test_c_carries_no_gradient():
    arguments = {k: v.requires_grad_(v.is_floating_point()) for k, v in _embeddings(24).items()}
    c, active = fused.condition(**arguments)
    assert active.requires_grad
    assert not c.requires_grad


@pytest.mark.parametrize("gradient", [torch.tensor(0.7).expand(7, 24), torch.arange(336.0).view(24, 14).T[::2] / 300])
def test_strided_gradients(gradient):
    check_accuracy(CONDITION, _embeddings(24), {}, GRADIENTS[CONDITION], output_gradients=(gradient,))


# ----------------------------------------------------------------------------------------------------- all ops


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name):
    arguments = _arguments(name)
    check_compiles(name, arguments, {}, GRADIENTS[name])
    check_repeatable(name, arguments, {}, GRADIENTS[name])


def test_raw_ops():
    t, s, dt = _times().values()
    torch.library.opcheck(conditioning._time_sinusoids_op, (t, s, 34, torch.bfloat16))
    torch.library.opcheck(conditioning._time_sinusoids_difference_op, (t, s, dt, 34, torch.bfloat16, True))
    embeddings = tuple(_embeddings(24).values())
    torch.library.opcheck(conditioning._condition_fwd_op, embeddings)
    torch.library.opcheck(conditioning._condition_bwd_op, (torch.ones(7, 24, device=DEVICE), *embeddings))


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs(name):
    arguments = _arguments(name)
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in arguments.items()}
    ours = run(getattr(fused, name), arguments, {}, GRADIENTS[name])
    for a, b in zip(ours, run(getattr(fused, name), strided, {}, GRADIENTS[name]), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_flows_to_the_times():
    times = {k: v.requires_grad_() for k, v in _times().items()}
    assert not fused.time_sinusoids(times["t"], times["s"]).requires_grad
    assert not fused.time_sinusoids_difference(**times).requires_grad


def test_the_sinusoids_of_time_zero():
    zero = torch.zeros(3, device=DEVICE)
    features = fused.time_sinusoids(zero, zero)
    assert torch.equal(features[..., :128], torch.ones(2, 3, 128, device=DEVICE))
    assert not features[..., 128:].any()


def test_bad_inputs():
    t, s, dt = _times().values()
    with pytest.raises(ValueError, match="width=33 is not a positive even number"):
        fused.time_sinusoids(t, s, width=33)
    with pytest.raises(ValueError, match=r"dt has shape \(3,\) where \(9,\) is needed"):
        fused.time_sinusoids_difference(t, s, dt[:3])
    with pytest.raises(ValueError, match=r"t has dtype torch\.float64"):
        fused.time_sinusoids(t.double(), s)
    a = _embeddings(24)
    with pytest.raises(ValueError, match=r"table has shape \(5, 23\) where \(5, 24\) is needed"):
        fused.condition(**{**a, "table": a["table"][:, 1:]})
    with pytest.raises(ValueError, match=r"labels has dtype torch\.int32 where torch\.int64 is needed"):
        fused.condition(**{**a, "labels": a["labels"].int()})
    with pytest.raises(ValueError, match=r"s_embedding has dtype torch\.float16 where torch\.float32 is needed"):
        fused.condition(**{**a, "s_embedding": a["s_embedding"].half()})
