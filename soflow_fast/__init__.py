"""soflow-fast: train one-step image generators with Solution Flow Models (arXiv 2512.15657)."""

try:
    import soflow_fast.kernels as kernels
except ModuleNotFoundError as error:
    if error.name != "soflow_fast.kernels":
        raise
    raise ImportError(
        "soflow_fast was imported from a source checkout, where its kernels are not beside it: "
        "run Python from another directory, or pip install -e the checkout"
    ) from None

from soflow_fast.config import TrainConfig
from soflow_fast.dit import DiT
from soflow_fast.ema import EMA
from soflow_fast.mit import MiT
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.objectives.soflow import SoFlow
from soflow_fast.step import TrainStep
from soflow_fast.trainer import Trainer, load_run
from soflow_fast.unet import UNet
from soflow_fast.weights import load_weights

__all__ = [
    "EMA",
    "SCM",
    "AlphaFlow",
    "DiT",
    "FlowMatching",
    "ImprovedMeanFlow",
    "MeanFlow",
    "MiT",
    "SoFlow",
    "TrainConfig",
    "TrainStep",
    "Trainer",
    "UNet",
    "kernels",
    "load_run",
    "load_weights",
]
