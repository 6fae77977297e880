"""``soflow sample --conditions FILE.npy``: samples of the conditions in a file, without the data of the run."""

import re

import numpy as np
import pytest
import torch
from conditioned import WIDTH, ByEmbedding, ByTokens, data_of
from runs import refused, tiny_config

from soflow_fast import DiT, Trainer, conditions
from soflow_fast.cli import main
from soflow_fast.conditions import ConditionsFile, ItemConditions
from soflow_fast.config import ModelConfig
from soflow_fast.images import to_uint8
from soflow_fast.sample import Sampler
from soflow_fast.trainer import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose data set was given as an object, which the command cannot make again."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, total_steps=2, model=ModelConfig("conditioned.ByEmbedding", 8, 1))
    Trainer(config, dataset=data_of(ByEmbedding())).fit()
    return folder


def _written(path, rows):
    np.save(path, rows)
    return path


def _drawn(n=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, WIDTH))


def test_rows_in_turn_are_the_conditions_of_the_samples(run, tmp_path, capsys):
    rows = _drawn()
    file = _written(tmp_path / "rows.npy", rows)  # float64
    command = ["sample", str(run), "--device", "cpu", "--count", "7", "--conditions", str(file), "--format", "npz"]
    assert main([*command, "--out", str(tmp_path / "drawn")]) == 0
    _, model, _ = load_run(run, "cpu")
    told = torch.from_numpy(rows).float()[torch.arange(7) % 3]
    sampler = Sampler(model, (1, 8, 8), batch=7, precision="fp32")
    wanted, others = (to_uint8(torch.cat(list(sampler.draw(c, 7)))) for c in (told, told.roll(1, 0)))
    with np.load(tmp_path / "drawn.npz") as found:
        assert np.array_equal(found["arr_0"][..., 0], wanted[:, 0])
        assert not np.array_equal(found["arr_0"][..., 0], others[:, 0])
        assert found["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_files_are_called_by_the_conditions(run, tmp_path, capsys):
    """By their values, not by where they lie."""
    command = ["sample", run, "--device", "cpu", "--count", "4", "--conditions"]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    first = _written(tmp_path / "a" / "My rows.npy", _drawn())
    other = _written(tmp_path / "b" / "My rows.npy", _drawn(seed=1))
    same = _written(tmp_path / "c" / "My rows.npy", _drawn())
    for file in (first, other):
        assert main([*map(str, command), str(file)]) == 0
    assert "exists already" in refused(capsys, *command, same)
    names = [path.name for path in (run / "samples").glob("*conditions*")]
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"step-00000002-1-step-4-samples-conditions-myrows-[0-9a-f]{6}\.png", n) for n in names)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            np.zeros((3, 5), np.float32),
            r"\(3, 5\) of float32, and the .* null_condition is of shape \(16,\) and",
        ),
        (np.zeros(WIDTH), r"an array \(16,\) of float64, .* give \(N, 16\), at least one row"),
        (np.zeros((0, WIDTH)), r"an array \(0, 16\)"),
        (np.array(3.0), r"an array \(\) of float64"),
        (np.zeros((3, WIDTH), complex), r"\(3, 16\) of complex128, .* and torch\.float32; give"),
        (np.full((3, WIDTH), "x"), "cannot be read .*numpy.save wrote of an array of numbers"),
        (np.array([[0.0] * WIDTH, [np.nan] * WIDTH]), "in row 1 values that are not finite in torch.float32"),
        (np.full((1, WIDTH), 1e300), "in row 0 values that are not finite in torch.float32"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, rows, said):
    file = _written(tmp_path / "x.npy", rows)
    with pytest.raises(ValueError, match=f"^the conditions {re.escape(str(file))} .*{said}"):
        ConditionsFile(file, ByEmbedding())


def test_files_that_are_no_arrays_are_refused(run, tmp_path, capsys):
    whole = _written(tmp_path / "x.npy", _drawn(100))
    whole.write_bytes(whole.read_bytes()[:-1])
    np.savez(tmp_path / "x.npz", _drawn())
    for name, said in (("x.npy", "cannot be read"), ("x.npz", "cannot be read"), ("y.npy", "do not exist")):
        assert said in refused(capsys, "sample", run, "--conditions", tmp_path / name)


@pytest.mark.parametrize(
    ("dtype", "values"), [("<f4", [0.5, 2]), (">f8", [0.5, 2]), ("i8", [3, 2]), ("<f2", [0.5, 2]), ("?", [1, 0])]
)
@pytest.mark.parametrize("null", [torch.float32, torch.bfloat16])
def test_numbers_become_those_of_the_network(tmp_path, dtype, values, null):
    net = ByEmbedding()
    net.null_condition = torch.zeros(2, dtype=null)
    given = ConditionsFile(_written(tmp_path / "x.npy", np.array([[9, 1], values]).astype(dtype)), net)
    found = ItemConditions(given, torch.tensor([1, 0, 1]))[:1]
    assert found.dtype == null
    assert found.tolist() == [values]


def test_whole_numbers_stay_whole(tmp_path):
    net = ByTokens()
    for dtype in ("u1", ">i4", "u8"):
        tokens = ConditionsFile(_written(tmp_path / "x.npy", np.array([[3, 1], [7, 2]], dtype)), net)
        assert torch.equal(tokens.conditions([1, 0]), torch.tensor([[7, 2], [3, 1]]))
    with pytest.raises(ValueError, match=r"of float64, and .* torch\.int64"):
        ConditionsFile(_written(tmp_path / "x.npy", np.zeros((2, 2))), net)
    with pytest.raises(ValueError, match=r"in row 1 values that are too large in torch\.int64"):
        ConditionsFile(_written(tmp_path / "x.npy", np.array([[0, 0], [0, 2**63]], np.uint64)), net)


def test_files_of_several_parts_are_looked_at_as_a_whole(tmp_path, monkeypatch):
    rows = _drawn(10)
    whole = str(ConditionsFile(_written(tmp_path / "x.npy", rows), ByEmbedding()))
    monkeypatch.setattr(conditions, "_LOOKED_AT_BYTES", 3 * rows[0].nbytes)
    assert str(ConditionsFile(tmp_path / "x.npy", ByEmbedding())) == whole
    rows[7, 2] = np.inf
    with pytest.raises(ValueError, match="in row 7 values that are not finite"):
        ConditionsFile(_written(tmp_path / "x.npy", rows), ByEmbedding())


def test_one_of_labels_and_conditions(run, tmp_path, capsys):
    file = _written(tmp_path / "x.npy", _drawn())
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(run), "--labels", "1", "--conditions", str(file)])
    assert stopped.value.code == 2
    assert "argument --conditions: not allowed with argument --labels" in capsys.readouterr().err


def test_networks_that_are_told_no_conditions(tmp_path, capsys):
    file, config = _written(tmp_path / "x.npy", _drawn()), tiny_config(tmp_path / "run", total_steps=1)
    Trainer(config).fit()
    capsys.readouterr()
    said = refused(capsys, "sample", tmp_path / "run", "--conditions", file)
    assert said == (
        f"soflow: the conditions {file} are for a network that is told conditions (null_condition), and DiT is told "
        "classes; give --labels\n"
    )
    with pytest.raises(ValueError, match="and DiT is told nothing of a sample; leave them out"):
        ConditionsFile(file, DiT(8, 4, 1, 16, 1, 2, num_classes=0))
