"""Training data: map-style data sets of (sample, label), and their order."""

from soflow_fast.data.cifar10 import CIFAR10
from soflow_fast.data.digits import digits
from soflow_fast.data.folder import ImageFolder
from soflow_fast.data.latents import LatentMoments
from soflow_fast.data.loader import batches
from soflow_fast.data.moments_folder import MomentsFolder, find_moments_folder
from soflow_fast.data.resident import Resident, load_resident, resident_bytes

__all__ = [
    "CIFAR10",
    "ImageFolder",
    "LatentMoments",
    "MomentsFolder",
    "Resident",
    "batches",
    "digits",
    "find_moments_folder",
    "load_resident",
    "resident_bytes",
]
