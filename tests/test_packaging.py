"""The wheel and the editable install, each in an environment where nothing else of this project is."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


def _pip(*arguments) -> None:
    result = _run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout without what has been built or installed in it."""
    copy = tmp_path_factory.mktemp("checkout") / "soflow-fast"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("soflow_fast", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _environment(folder: Path) -> Path:
    """A new environment that sees the packages of this one, but not its editable installs; returns its python."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin" / "python"
    packages = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    python = _environment(tmp_path_factory.mktemp("installed"))
    _pip("--python", python, "install", "--no-deps", wheel)
    return python


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory):
    python = _environment(tmp_path_factory.mktemp("editable"))
    _pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", checkout)
    return python


_IMPORT = "import soflow_fast, soflow_fast.kernels as k; print(soflow_fast.__file__); print(k.__file__)"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"soflow_fast/{file.relative_to(ROOT / 'soflow_fast')}" for file in (ROOT / "soflow_fast").rglob("*.py")}
    kernels = {f"soflow_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert names == sources | kernels


def test_the_wheel_imports_from_another_directory(installed, tmp_path):
    result = _run(installed, "-c", _IMPORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(installed.parents[1])) for line in result.stdout.split())
    command = _run(installed.parent / "soflow", "train", "nowhere.yaml", cwd=tmp_path)
    assert (command.returncode, "nowhere.yaml does not exist" in command.stderr) == (2, True)


def test_the_wheel_in_the_checkouts_root_is_one_clear_error(installed, checkout):
    result = _run(installed, "-c", "import soflow_fast", cwd=checkout)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: soflow_fast was imported from a source checkout")
    assert "run Python from another directory, or pip install -e the checkout" in last


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_the_editable_install_imports_from_everywhere(editable, checkout, tmp_path, place):
    result = _run(editable, "-c", _IMPORT, cwd=checkout if place == "root" else tmp_path)
    assert result.returncode == 0, result.stderr
    found = [Path(line).resolve() for line in result.stdout.split()]
    assert found == [checkout / "soflow_fast" / "__init__.py", checkout / "kernels" / "__init__.py"]


def test_the_kernels_refuse_to_be_a_package_of_their_own(editable, checkout):
    result = _run(editable, "-c", "import kernels", cwd=checkout)
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: import soflow_fast.kernels")
