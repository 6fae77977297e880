"""Package map: the folder ``kernels`` is installed as ``soflow_fast.kernels``; all else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["soflow_fast", "soflow_fast.objectives", "soflow_fast.data", "soflow_fast.kernels"],
    package_dir={"soflow_fast.kernels": "kernels"},
)
