"""A run's generator as one file, for whoever has torch and not this package: a program, or the weights alone.

Shapes: B rows, any number; samples are (B, C, H, W).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from soflow_fast.checkpoint import on_host, replaced, writing
from soflow_fast.conditions import null_condition
from soflow_fast.dit import DiT
from soflow_fast.precision import follows_parameters
from soflow_fast.sample import SAMPLE_PRECISIONS, Decoder, evaluating, sample

#: What is written, by the suffix of its file.
PROGRAM, WEIGHTS = ".pt2", ".safetensors"

#: The file in a program's archive, and the entry of the weights' metadata, that says what they are.
ABOUT = "soflow.json"

# Each is a part of the program, and what torch.export takes grows faster than their number.
_MOST_CALLS = 8

# Rows that a program is captured with, and others that it is tried with; of 0 and 1 torch.export makes constants.
_CAPTURED_ROWS, _TRIED_ROWS = 3, 2

# Fewer rows than this are said to be the most: a network may have another branch for many, as diffusers' decoder has.
_UNLIMITED = 1 << 16

_MAKE_ROOM = "make room or give another path"


class _Generator(nn.Module):
    """Noise to samples, decoded where they are latents."""

    def __init__(self, model: nn.Module, steps: int, decode: Decoder | None, autocast: bool):
        super().__init__()
        self.model, self.steps, self.decode, self.autocast = model, steps, decode, autocast

    def forward(self, noise: Tensor, labels: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.autocast):
            samples = sample(self.model, noise, labels, self.steps, seed=seed)
        return samples.float() if self.decode is None else self.decode(samples.float())


@torch.no_grad()
def write_program(
    model: nn.Module,
    shape: tuple[int, ...],
    path: Path,
    about: dict,
    *,
    steps: int = 1,
    decode: Decoder | None = None,
    precision: str = "fp32",
) -> str:
    """Writes the sampling of a model as a program of torch's operators alone, for any number of rows B.

    ``torch.export.load(path).module()(noise, labels)`` are the samples of (B, C, H, W) float32 standard normal noise,
    in float32, or images where they are decoded. labels are (B,) int64 or conditions, left out for a network without
    either. Where noise is added again between several steps, it has one argument more, ``seed=torch.tensor(7)``.

    Args:
        model: an objective. It is left with torch's operators in place of the fused ones, with the weights of the
            precision, and without gradients. shape: (C, H, W). path: the file; it is there once it is whole and has
            drawn what the model draws. about: written into its archive as JSON.
        steps: as in :func:`~soflow_fast.sample.sample`. decode: from latents to images, see
            :func:`soflow_fast.autoencoder.vae_decoder`; a module, which stays in float32.
        precision: as in :class:`~soflow_fast.sample.Sampler`.

    Returns:
        How it is called, in Python.

    Raises:
        ValueError: for a network that cannot be captured, or whose capture draws other samples than it does, and for
            more than eight network calls.
    """
    calls = steps * getattr(model, "ode_steps", 1)
    if calls > _MOST_CALLS:
        raise ValueError(
            f"a program of {calls} network calls takes torch.export too long; choose steps (and of flow_matching "
            f"ode_steps) with at most {_MOST_CALLS}"
        )
    if precision not in SAMPLE_PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known; choose one of {', '.join(SAMPLE_PRECISIONS)}")
    network = use_torch(model).network
    low, in_bfloat16 = precision == "bf16", follows_parameters(network)
    if low and in_bfloat16:
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
    generator = _Generator(model, steps, decode, autocast=low and not in_bfloat16).requires_grad_(False)
    arguments, seed = _arguments(model, shape, steps, _CAPTURED_ROWS)
    rows = {0: Dim.DYNAMIC}
    moving = dict(zip(("noise", "labels"), [rows] * len(arguments), strict=False)) | dict.fromkeys(seed)
    with evaluating(generator), replaced(path) as temporary:
        try:
            program = torch.export.export(generator, arguments, seed, dynamic_shapes=moving)
            program = program.run_decompositions({})  # writes out autocast, which torch 2.11 cannot read from a file
        except Exception as error:
            raise ValueError(
                f"torch.export cannot capture {type(network).__name__} for any number of rows "
                f"({str(error).strip().splitlines()[0]}); its forward may not depend on the values of tensors, nor "
                "take their size by len(x): x.shape[0] is what may change"
            ) from error
        with writing("the program", path.parent, _MAKE_ROOM):
            torch.export.save(program, temporary, extra_files={ABOUT: json.dumps(about)})
        written = torch.export.load(temporary).module()
        tried, seed = _arguments(model, shape, steps, _TRIED_ROWS)
        found, wanted = written(*tried, **seed), generator(*tried, **seed)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"what torch.export captured of {type(network).__name__} draws other samples than it does: its forward "
                "depends on what a capture keeps as it was, such as random numbers; make it a function of its inputs"
            )
    limits = [int(found.upper) for found in program.range_constraints.values() if found.upper < _UNLIMITED]
    return _usage(path, arguments, seed, network) + (f"  # at most {min(limits)} rows a call" if limits else "")


def use_torch(model: nn.Module) -> nn.Module:
    """The objective, from now on with torch's operators in place of the fused ones."""
    for module in (model, model.network):
        if hasattr(module, "impl"):
            module.impl = "torch"
    if isinstance(model.network, DiT):
        model.network.attention = "sdpa"
    return model


def write_weights(model: nn.Module, path: Path, about: dict) -> None:
    """Writes a model's weights under the keys of its checkpoints, with what they are as JSON in the metadata; the file
    is there once it is whole.
    """
    with replaced(path) as temporary, writing("the file of weights", path.parent, _MAKE_ROOM):
        save_file(on_host(model.state_dict()), temporary, metadata={ABOUT: json.dumps(about)})


def _arguments(
    model: nn.Module, shape: tuple[int, ...], steps: int, rows: int
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Noise, labels where the network takes some, and the seed where noise is added."""
    network, device = model.network, next(model.parameters()).device
    noise = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows)).to(device)
    null, labels = null_condition(network), ()
    if null is not None:
        labels = (null.detach().expand(rows, *null.shape).clone(),)
    elif network.num_classes:
        labels = (torch.arange(rows, device=device) % network.num_classes,)
    renoises = steps > 1 and model.renoises
    return (noise, *labels), {"seed": torch.zeros((), dtype=torch.int64, device=device)} if renoises else {}


def _usage(path: Path, arguments: tuple[Tensor, ...], seed: dict[str, Tensor], network: nn.Module) -> str:
    device = f", device={str(arguments[0].device)!r}" if arguments[0].is_cuda else ""
    sizes = [", ".join(map(str, (8, *tensor.shape[1:]))) for tensor in arguments]
    given = [f"torch.randn({sizes[0]}{device})"]
    if null_condition(network) is not None:
        given.append(f"torch.zeros({sizes[1]}, dtype={arguments[1].dtype}{device})")
    elif len(arguments) > 1:
        given.append(f"torch.arange(8{device}) % {network.num_classes}")
    given += [f"seed=torch.tensor(0{device})"] if seed else []
    return f"generator = torch.export.load({str(path)!r}).module()\nsamples = generator({', '.join(given)})"
