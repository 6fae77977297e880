"""Improved MeanFlow over the DiT and over the MiT, there with and without the velocity's head, on the digits.

    python benchmarks/heads_quality.py [--only NAME ...] [--steps 1000] [--seeds 3] [--json OUT.json]

Everything else is that of ``soflow demo``. Widths are such that a step of each costs about as many FLOPs: the tokens in
front of a MiT's 16 patches are 20. Options as of ``objectives_quality.py``.
"""

from dataclasses import replace

import objectives_quality

from soflow_fast.demo import demo_config

_IMPROVED = objectives_quality.METHODS["improved MeanFlow"]


def _mit(width: int, velocity_head: bool) -> dict:
    sizes = {"preset": "MiT-B/2", "hidden_size": width, "depth": 3, "head_depth": 1}
    section = replace(_IMPROVED["improved_meanflow"], velocity_head=velocity_head)
    return {**_IMPROVED, "improved_meanflow": section, "model": replace(demo_config("unused").model, **sizes)}


#: What a configuration has in place of the demo's.
METHODS = {
    "DiT, one head": _IMPROVED,
    "MiT, one head": _mit(64, velocity_head=False),
    "MiT, two heads": _mit(56, velocity_head=True),
}


if __name__ == "__main__":
    objectives_quality.main(methods=METHODS, about=__doc__)
