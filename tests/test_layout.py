"""The house: imports go down only, files stay short, the kernels stand alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from its own floor and from those below it.
FLOORS = [
    ["kernels"],
    [
        "config", "config_data", "config_io", "config_model", "config_objective", "config_optimizer", "derivation",
        "difference_casts", "difference_nonlinear", "difference_rules", "differencing", "dropping", "flash",
        "flash_packages", "imported", "interop", "paths", "require", "seeding", "size",
    ],
    [
        "attention", "augment", "autoencoder", "build", "capture", "checkpoint", "conditions", "data", "distributed",
        "dit", "ema", "encode", "evaluate", "export", "fidelity", "fingerprint", "flow_weights", "frozen", "given",
        "images", "layers", "memory", "mit", "objectives", "one_pass", "optim", "pair", "positions", "posthoc",
        "precision", "records", "reduction", "run_optimizer", "sample", "unet", "weights",
    ],
    [
        "cli", "commands", "demo", "doctor", "dry_run", "grids", "logs", "run_folder", "sampling_options", "scoring",
        "skipping", "step", "stopping", "trainer", "tune", "validation",
    ],
]  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

SOURCES = {
    file: f"soflow_fast/{file.relative_to(ROOT / 'soflow_fast')}" for file in (ROOT / "soflow_fast").rglob("*.py")
}
KERNELS = list((ROOT / "kernels").glob("*.py"))


def _imports(file: Path) -> set[str]:
    """Absolute names of everything a file imports, in functions too; relative ones start with a dot per level."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _parts(imports: set[str]) -> set[str]:
    """The modules directly under soflow_fast among imported names."""
    return {name.split(".")[1] for name in imports if name.startswith("soflow_fast.")}


@pytest.mark.parametrize("file", SOURCES, ids=SOURCES.values())
def test_imports_go_down_only(file):
    inside = file.relative_to(ROOT / "soflow_fast")
    if inside.name == "__init__.py" and len(inside.parts) == 1:
        return
    own = inside.parts[0].removesuffix(".py")
    assert own in FLOOR, f"{own} has no floor: add it to the one it belongs to"
    above = {name for name in _parts(_imports(file)) if name in FLOOR and FLOOR[name] > FLOOR[own]}
    assert not above


def test_imports_have_no_cycles():
    graph: dict[str, set[str]] = {}
    for file in SOURCES:
        own = file.relative_to(ROOT / "soflow_fast").parts[0].removesuffix(".py")
        if own != "__init__":
            graph.setdefault(own, set()).update(_parts(_imports(file)) & FLOOR.keys() - {own})
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"these modules import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


@pytest.mark.parametrize("file", KERNELS, ids=[file.name for file in KERNELS])
def test_kernels_stand_alone(file):
    outside = {name for name in _imports(file) if not name.startswith(".") or name.startswith("..")}
    tops = {name.split(".")[0] for name in outside}
    assert tops <= {"torch", "triton"} | sys.stdlib_module_names, "kernels/ needs torch, triton and nothing else"


@pytest.mark.parametrize("folder", ["soflow_fast", "kernels", "tests", "benchmarks"])
def test_files_stay_short(folder):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {file.name: n for file, n in lengths.items() if n > 420} == {}
