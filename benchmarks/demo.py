"""The scores of ``soflow demo`` for several seeds.

python benchmarks/demo.py [--seeds 3] [--json OUT.json]
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from _measure import environment

from soflow_fast.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs, from seed 0 (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores here, after every run")
    arguments = parser.parse_args()
    report = {"environment": environment(), "runs": []}
    for seed in range(arguments.seeds):
        with TemporaryDirectory() as folder:
            scores = run_demo(folder, seed)
        del scores["checkpoint"]
        report["runs"].append(scores)
        print(json.dumps(scores), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
