"""The network's section of the configuration."""

from dataclasses import dataclass, field
from typing import Any, Literal

from soflow_fast.config_io import Section
from soflow_fast.imported import check_arguments, is_import_path
from soflow_fast.require import require, require_count
from soflow_fast.size import Size, as_size, height_and_width

#: Stands for a network, an objective or a data set that was given to the Trainer as an object.
GIVEN = "given"

#: The preset that is a UNet; the others are DiTs and MiTs.
UNET_PRESET = "UNet"

# What not every network has.
_OF_TRANSFORMER = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
_OF_DIT = ("embedding_dim", "attention", "recompute", "float8_guidance")
_OF_MIT = ("head_depth",)
_OF_UNET = ("model_channels", "channel_mult", "num_blocks", "attention_resolutions", "dropout")

# What was written out in configurations before it was the preset's own.
_MLP_RATIO_OF_OTHERS = 4.0

# Of a width, a depth and the like: what is larger is a slip, and building it would take all memory, or for ever.
_LARGEST = 2**14


@dataclass
class ModelConfig(Section, section="model."):
    """The network: :class:`~soflow_fast.DiT`, :class:`~soflow_fast.MiT`, :class:`~soflow_fast.UNet` or one of yours; a
    size given here replaces the preset's.

    Attributes:
        preset: such as ``DiT-B/4`` or ``MiT-B/2``; ``UNet``; or the import path of a class or function, such as
            ``my_package.Net``, that makes the network from init_args. in_channels, num_classes: of the data.
        input_size: of the data, one number or [height, width].
        patch_size, hidden_size, depth, num_heads, mlp_ratio: of a DiT or MiT. head_depth: of a MiT.
        embedding_dim, attention: of a DiT; embedding_dim needs num_classes=0. recompute: see there, or ``auto``:
            ``elementwise``, or ``block`` where that is estimated not to fit the GPU's memory; ``none`` on a CPU.
            float8_guidance: see there.
        model_channels, channel_mult, num_blocks, attention_resolutions, dropout: of a UNet.
        prediction: of the last layer, ``velocity`` or ``data``, see :class:`~soflow_fast.layers.DataPrediction`.
        impl: of the fused ops, see :func:`soflow_fast.kernels.resolve_impl`; for attention see
            :func:`soflow_fast.attention.resolve_attention`.
    """

    preset: str = "DiT-B/4"
    input_size: Size = 32
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    head_depth: int | None = None
    embedding_dim: int | None = None
    model_channels: int | None = None
    channel_mult: tuple[int, ...] | None = None
    num_blocks: int | None = None
    attention_resolutions: tuple[int, ...] | None = None
    dropout: float | None = None
    prediction: Literal["velocity", "data"] = "velocity"
    impl: str = "auto"
    attention: str = "auto"
    recompute: str = "auto"
    float8_guidance: bool = False
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        self.input_size = as_size(*height_and_width(self.input_size, "model.input_size="))
        require_count("model.in_channels", self.in_channels)
        sizes = ("patch_size", "hidden_size", "depth", "num_heads", "head_depth", "embedding_dim", "model_channels")
        for name in (*sizes, "num_blocks"):
            if getattr(self, name) is not None:
                require_count(f"model.{name}", getattr(self, name), most=_LARGEST)
        for factor in self.channel_mult or ():
            require_count("model.channel_mult", factor)
        require_count("model.num_classes", self.num_classes, least=0)
        if self.mlp_ratio == _MLP_RATIO_OF_OTHERS and not self.is_mit:
            self.mlp_ratio = None
        of_others = ()
        if self.is_dit:
            of_others = (*_OF_MIT, *_OF_UNET)
        elif self.is_mit:
            of_others = (*_OF_DIT, *_OF_UNET)
        elif self.preset == UNET_PRESET:
            of_others = (*_OF_TRANSFORMER, *_OF_DIT, *_OF_MIT)
        elif self.is_imported:
            of_others = (*_OF_TRANSFORMER, *_OF_DIT, *_OF_MIT, *_OF_UNET, "prediction")
        remedy = "give it in model.init_args" if self.is_imported else "leave it out"
        for name in of_others:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r} does nothing with model.preset={self.preset!r}; {remedy}"
                )
        check_arguments("model.init_args", self.preset, self.init_args)
        require(
            self.embedding_dim is None or self.num_classes == 0,
            f"model.embedding_dim={self.embedding_dim} stands in place of classes, and model.num_classes is "
            f"{self.num_classes}; set model.num_classes=0",
        )
        require(
            self.mlp_ratio is None or self.mlp_ratio > 0, f"model.mlp_ratio={self.mlp_ratio} must be greater than 0"
        )

    @property
    def is_dit(self) -> bool:
        """Whether the preset is a DiT's, and neither another's nor a network of the user's."""
        return self.preset.startswith("DiT") and not self.is_imported

    @property
    def is_mit(self) -> bool:
        """Whether the preset is a MiT's."""
        return self.preset.startswith("MiT") and not self.is_imported

    @property
    def is_imported(self) -> bool:
        """Whether the preset is an import path."""
        return is_import_path(self.preset)
