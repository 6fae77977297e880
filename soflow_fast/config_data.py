"""The section of a configuration that says what is trained on."""

from dataclasses import dataclass, field
from typing import Any, Literal

from soflow_fast.config_io import Section, as_path
from soflow_fast.config_model import GIVEN
from soflow_fast.imported import check_arguments, is_import_path
from soflow_fast.require import brief, require, require_count

DATA_KINDS = ("digits", "latents", "folder", "cifar10", GIVEN)


@dataclass
class DataConfig(Section, section="data."):
    """The training data.

    Attributes:
        kind: ``digits`` (scikit-learn's handwritten digits), ``latents`` (latent moments: an HDF5 file, or a folder of
            one file per image as EDM2's and REPA's tools write it), ``folder`` (images by class), ``cifar10``
            (CIFAR-10's training set), ``given`` (an object given to the Trainer), or the import path of a class or
            function, such as ``my_package.Photos``, that makes the data set from init_args, and from path where that
            is set. path: of the file or folder; of the folder that holds ``cifar-10-batches-py``, or that it is
            downloaded into.
        latent_scale: what unscaled latents are multiplied by. latent_mean, latent_std: of each channel of unscaled
            latents, (C,), by which those of ``latents`` are normalised before that (the scale is then 1, or what is
            left to apply), and samples the other way before they are decoded; empty for 0 and 1.
        vae: the autoencoder that decodes latents, see :func:`~soflow_fast.autoencoder.load_vae`; without it samples
            stay latents. latent_precision: of the moments as they are read: ``fp32`` as they are; ``bf16`` rounds them
            by at most 2^-8 of their size and halves the memory they take, so that twice as many can lie on a GPU.
        on_device: whether the data lie in the device's memory as a whole, for latents, digits, CIFAR-10 and data sets
            that can be read in pieces; the batches are the same. ``auto`` is yes if they take at most half of the free
            memory that a step is estimated to leave, on a CPU at most 256 MiB.
        flip: whether images of a ``folder`` are mirrored at random, each with probability 1/2.
        augment: the probability of each change of an image that the network is told of, see
            :class:`~soflow_fast.augment.Augment`; 0 for none, also without mirroring.
        workers: loader processes, 0 for none, at most one for each CPU. prefetch: batches each of them reads ahead.
        validation: path of the data of the same kind and form that ``output.validate_every`` is of; ``held_out`` for
            the digits that are not trained on and for CIFAR-10's test images; or ``given`` (an object given to the
            Trainer). validation_samples: how many of them, the first of a fixed order.
    """

    kind: str = "latents"
    path: str | None = None
    latent_scale: float = 0.18215
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    vae: str | None = None
    latent_precision: Literal["bf16", "fp32"] = "fp32"
    on_device: bool | Literal["auto"] = "auto"
    flip: bool = False
    augment: float = 0.0
    workers: int = 4
    prefetch: int = 4
    validation: str | None = None
    validation_samples: int = 2048
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.path, self.validation = as_path(self.path), as_path(self.validation)
        super().__post_init__()
        require(0 <= self.augment <= 1, f"data.augment={self.augment} must be in [0, 1]")
        require(
            self.kind in DATA_KINDS or is_import_path(self.kind),
            f"data.kind={self.kind!r} is not known; choose one of {', '.join(DATA_KINDS)}, or package.module.Class",
        )
        check_arguments("data.init_args", self.kind, self.init_args)
        require(
            self.path is None or "path" not in self.init_args,
            f"data.path={self.path!r} and data.init_args both give path; leave one out",
        )
        require(
            not self.flip or self.kind == "folder",
            f"data.flip=True does nothing with data.kind={self.kind!r}; leave it out (latents: soflow encode --flip)",
        )
        require(self.latent_scale > 0, f"data.latent_scale={self.latent_scale} must be greater than 0")
        require(
            all(x > 0 for x in self.latent_std),
            f"data.latent_std={brief(list(self.latent_std))} must be greater than 0",
        )
        require(
            not (self.latent_mean or self.latent_std) or self.kind not in ("digits", "folder", "cifar10"),
            f"data.latent_mean and data.latent_std do nothing with data.kind={self.kind!r}; leave them out",
        )
        require_count("data.workers", self.workers, least=0)
        require_count("data.prefetch", self.prefetch)
        require_count("data.validation_samples", self.validation_samples)
