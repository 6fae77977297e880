"""What a campaign measures, in order."""

from dataclasses import dataclass

#: Tests that run natively on a GPU: kernels against float64; then whole networks and the captured step.
NATIVE_TESTS = {
    "correctness": [
        "adaln",
        "adaln_difference",
        "activation_difference",
        "attention_difference",
        "conditioning",
        "consistency",
        "float8",
        "heads",
        "mlp",
        "noise",
        "self_attention",
        "velocity",
    ],
    "correctness_step": ["optim", "impl", "attention", "flash", "fast_step", "capture"],
}

# The order in which rows are run: a call may be over before a table is.
_FIRST = ("soflow/fast", "soflow/public", "meanflow/strong", "soflow/merged-compile")

# Batch 256 for the rows that fit: the published form keeps float32 activations, with which XL/2 and L/2 do not. Their
# whole tables, and the ratios to it, are at a batch that fits.
_FIRST_OF_DEEP = (
    "soflow/fast",
    "meanflow/strong",
    "soflow/merged-compile",
    "soflow/public-bf16-fp32pair-compile",
    "soflow/fast-own-attention",
    "meanflow/compiled",
)


@dataclass(frozen=True)
class Stage:
    """One measurement.

    Attributes:
        name: of the stage, its JSON and its log. script: of this folder, or ``pytest``. arguments, smoke: of the script
            on a GPU and in a smoke run. seconds: expected on an H200, compiling included. rows: ids or sets of
            ``throughput.py`` that make it complete; such a script takes ``--limit`` and goes on where it stopped.
        pieces: whether the script takes ``--minutes`` and goes on where it stopped. least: seconds without which it is
            not begun, for one that goes on, half of them where it was compiled ahead; the others need all of theirs.
            gib: of GPU memory that it needs.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ("--smoke",)
    seconds: int = 60
    rows: tuple[str, ...] = ()
    least: int = 120
    gib: int = 0
    pieces: bool = False


def _throughput(name: str, model: str, rows: tuple[str, ...], seconds: int, batch: int = 256, gib: int = 0) -> Stage:
    smoke = ("--model", "small", "--batch", "4", "--seconds", "0.2")
    arguments = ("--model", model, "--batch", str(batch), "--seconds", "5")
    least = 330 if model in ("DiT-XL/2", "DiT-L/2") else 220  # one row
    return Stage(name, "throughput.py", arguments, smoke, seconds, rows, least, gib)


STAGES = (
    Stage("correctness", "pytest", seconds=240),
    _throughput("throughput_xl2_256", "DiT-XL/2", _FIRST_OF_DEEP, 800, gib=100),
    _throughput("throughput_b4", "DiT-B/4", (*_FIRST, "flow-matching", "table"), 650),
    Stage("rates", "rates.py", ("--models", "DiT-XL/2", "DiT-B/4", "DiT-L/2", "DiT-B/2"), seconds=90),
    Stage("profile_xl2", "profile_step.py", ("--rates", "{folder}/rates.json"), ("--smoke",), 120, gib=100),
    Stage("correctness_step", "pytest", seconds=180),
    Stage("kernels", "kernels.py", (), ("--smoke", "--only", "silu_difference"), 450, pieces=True),
    Stage("errors", "errors.py", (), ("--only", "silu_difference"), 200),
    Stage("precision", "precision.py", ("--weights", "random", "digits"), seconds=180),
    Stage("profile_b4", "profile_step.py", ("--model", "DiT-B/4", "--rates", "{folder}/rates.json"), seconds=90),
    _throughput("ladder_b4", "DiT-B/4", ("ladder",), 240),
    _throughput("ablations_b4", "DiT-B/4", ("ablations",), 300),
    _throughput("throughput_xl2_96", "DiT-XL/2", (*_FIRST, "table"), 1800, batch=96),
    _throughput("throughput_b2", "DiT-B/2", (*_FIRST, "table"), 700),
    _throughput("throughput_l2_128", "DiT-L/2", (*_FIRST, "table"), 1600, batch=128),
    Stage("photographs", "photographs.py", ("--seconds", "300"), seconds=580, rows=("soflow/fast", "soflow/public"),
          least=520),
    Stage("sampling", "sampling.py", ("--steps", "1"), seconds=450, pieces=True),
    Stage("sampling_steps", "sampling.py",
          ("--steps", "2", "4", "--precisions", "bf16", "--batches", "1", "256"), seconds=450, pieces=True),
    Stage("loader", "loader.py"),
    Stage("launches", "launches.py", (), ("--smoke", "--only", "silu_difference"), 520, pieces=True),
    _throughput("ladder_xl2_96", "DiT-XL/2", ("ladder",), 500, batch=96),
)  # fmt: skip
