"""Networks that predict the velocity and ones that predict the data, on the handwritten digits, by patch size.

    python benchmarks/prediction_quality.py [--only NAME ...] [--steps 1000] [--seeds 3] [--json OUT.json]

Everything else is that of ``soflow demo``, but where an image of 8×8 is one patch, of 64 numbers: there the network is
narrower than that, 48. Options as of ``objectives_quality.py``.
"""

from dataclasses import replace

from objectives_quality import main

from soflow_fast.demo import demo_config
from soflow_fast.layers import PREDICTIONS

#: Patch size and width.
_SIZES = ((2, 96), (8, 48))

#: What a configuration has in place of the demo's.
METHODS = {
    f"{prediction}, patches of {patch}×{patch}": {
        "model": replace(demo_config("unused").model, patch_size=patch, hidden_size=width, prediction=prediction)
    }
    for patch, width in _SIZES
    for prediction in PREDICTIONS
}


if __name__ == "__main__":
    main(methods=METHODS, about=__doc__)
