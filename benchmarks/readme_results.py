"""Writes the results section of README.md, and RESULTS.md, from the JSON files under benchmarks/results.

    python benchmarks/readme_results.py [--check]

README.md has the reports that a reader asks for first, RESULTS.md all of them. ``--check`` writes nothing and exits
with 1 if the texts are not what the files give.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
ALL = Path(__file__).parent / "RESULTS.md"
BEGIN, END = "<!-- results: written by benchmarks/readme_results.py -->\n", "<!-- end of results -->\n"


def where(report: dict) -> str:
    """Hardware, versions and commit of a report, in one sentence."""
    machine = report["environment"]
    versions = machine["versions"]
    hardware = (
        machine["gpu"]["name"]
        if machine["gpu"]
        else f"{machine['cpu']['model']}, {machine['cpu']['threads']} thread(s)"
    )
    commit = machine["commit"]
    state = f"commit {commit['hash'][:8]}" + (" with changes" if commit["dirty"] else "") if commit else "no commit"
    return f"{hardware}; torch {versions['torch']}, triton {versions['triton']}; {state}."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------- kinds of report


def precision(report: dict) -> str:
    text = []
    for weights, table in report["relative_error"].items():
        ratios = list(next(iter(table.values())))
        rows = [[name, *(f"{errors[r]:.2g}" for r in ratios)] for name, errors in table.items()]
        network = {"random": "DiT-B/4 with random weights", "digits": "the digits' network, trained"}[weights]
        text.append(markdown([f"{network}; r =", *ratios], rows))
    return "\n\n".join(text)


def digits_quality(report: dict) -> str:
    rows = []
    for name, row in report["summary"].items():
        values = (row[key] for key in ("standard_error", "above_fp32", "above_fp32_standard_error"))
        formats = ("{:.2f}", "{:+.2f}", "{:.2f}")
        shown = ["" if value is None else form.format(value) for form, value in zip(formats, values, strict=True)]
        rows.append([name, f"{row['mean']:.2f}", *shown, str(row["seeds"])])
    setting = f"{report['steps']} steps of {report['batch']}; {report['samples']} one-step samples.\n\n"
    heads = ["", "Fréchet distance", "± standard error", "above fp32 on the same seeds", "± standard error", "seeds"]
    return setting + markdown(heads, rows)


def demo(report: dict) -> str:
    rows = []
    for run in report["runs"]:
        for steps in ("one_step", "two_steps"):
            scores = run[steps]
            distances = [f"{scores[name]:.2f}" for name in ("frechet_all", "frechet_held_out")]
            rest = [f"{scores['recognised']:.1%}", f"{scores['memorisation']:.2f}"]
            rows.append([f"seed {run['seed']}, {steps.replace('_', ' ')}", *distances, *rest])
    return markdown(["", "Fréchet distance, all", "held out", "recognised", "memorisation"], rows)


def cifar_recipe(report: dict) -> str:
    rows = []
    for run in report["runs"]:
        for steps in ("one_step", "two_steps"):
            values = [f"{run[steps][name]:.2f}" for name in ("frechet_all", "frechet_held_out", "memorisation")]
            rows.append([f"{run['variant']}, seed {run['seed']}, {steps.replace('_', ' ')}", *values])
    setting = f"{report['steps']} steps of 256; {report['samples']} samples without classes; a UNet of "
    setting += f"{report['runs'][0]['parameters'] / 1e6:.1f} M parameters.\n\n"
    return setting + markdown(["", "Fréchet distance, all", "held out", "memorisation"], rows)


def objectives_quality(report: dict) -> str:
    least, rows = min(row["flops_per_sample"] for row in report["summary"].values()), []
    for told, row in report["summary"].items():
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.2f}"
        one, two = row["one_step"], row["two_steps"]
        distances = [f"{one['frechet_all']:.2f}", error, f"{two['frechet_all']:.2f}", f"{one['recognised']:.1%}"]
        rows.append([told, *distances, f"{row['flops_per_sample'] / least:.2f}", str(row["seeds"])])
    setting = f"{report['steps']} steps of 256; {report['samples']} samples of one and of two steps. Cost: FLOPs of a "
    setting += "training step, guidance included, by those of the cheapest."
    if "sCM" in report["summary"]:
        setting += " sCM has no guidance; the others have a scale of 2 where none is named."
    heads = ["", "Fréchet distance, one step", "± standard error", "two steps", "recognised", "cost", "seeds"]
    return f"{setting}\n\n{markdown(heads, rows)}"


def kernel_errors(report: dict) -> str:
    ours, outside = report["rows"], sum(not row["within_rule"] for row in report["rows"])
    rows = []
    for op in dict.fromkeys(map(_rounded_op, ours)):
        for inputs in dict.fromkeys(row["inputs"] for row in ours if _rounded_op(row) == op):
            of_op = [row for row in ours if (_rounded_op(row), row["inputs"]) == (op, inputs)]
            plain = [row["plain"] for row in of_op if row["plain"] is not None]
            worst = max(row["fused"] for row in of_op)
            rows.append([op, inputs, f"{worst:.1e}", f"{max(plain):.1e}" if plain else ""])
    told = f"{len(ours)} results, {outside} outside twice the error of the reference at the same precision.\n\n"
    return told + markdown(["op", "inputs", "fused", "plain torch"], rows)


def _rounded_op(row: dict) -> str:
    """The op of a row, apart where its results are rounded to float8."""
    rounded = row["op"] == "gelu_rows" or row["case"].endswith(" float8")
    return f"`{row['op']}`{' to float8' if rounded else ''}"


def throughput(report: dict) -> str:
    timed = {name: row for name, row in report["rows"].items() if "ms_per_step" in row}
    absolute = report["environment"]["gpu"] is not None  # times of a CPU that others use too are not told
    rows = []
    for name, row in sorted(timed.items(), key=lambda item: item[1]["ms_per_step"]):
        ratio = row["ratio_to_public"]
        line = [f"{ratio:.2f}" if ratio else "", f"{row['flops_per_sample'] / 1e9:.3g}"]
        line.append(f"{row['peak_memory_bytes'] / 2**30:.3g}")
        times = [f"{row['ms_per_step']:.4g}", f"{row['images_per_s']:.4g}"] if absolute else []
        rows.append([f"`{name}`", *times, *line])
    left = [f"`{name}`" for name, row in report["rows"].items() if "skipped" in row]
    text = report["title"] + ".\n\n"
    times = ["ms per step", "images/s"] if absolute else []
    text += markdown(["", *times, "times as fast as public", "GFLOP per image", "GiB"], rows)
    return text + (f"\n\nNot run, for the reasons in the JSON: {', '.join(left)}." if left else "")


def listed(rows: list[dict], name: Callable[[dict], str], columns: dict[str, tuple[str, str]]) -> str:
    """A table of those rows that have every value: ``columns`` has key to heading and format."""
    timed = [row for row in rows if all(row.get(key) is not None for key in columns)]
    lines = [[name(row), *(form.format(row[key]) for key, (_, form) in columns.items())] for row in timed]
    return markdown(["", *(heading for heading, _ in columns.values())], lines)


def kernels(report: dict) -> str:
    times = {}
    for row in report["rows"]:
        times.setdefault((row["op"], row["case"], row["mode"]), {})[row["provider"]] = row
    rows = []
    for (op, case, mode), row in times.items():
        if {"ours", "compiled", "eager"} <= set(row):
            ms = [f"{row[name]['ms']:.4f}" for name in ("eager", "compiled", "ours")]
            rows.append([f"`{op}`, {case}, {mode}", *ms, f"{row['ours']['percent_of_copy']:.0f} %"])
    told = f"Copy bandwidth {report['copy_gb_per_s']:.0f} GB/s.\n\n"
    return told + markdown(["", "eager ms", "compiled ms", "ours ms", "of the copy bandwidth"], rows)


def launches(report: dict) -> str:
    columns = {"ms": ("committed ms", "{:.4f}"), "times": ("fastest, times as fast", "{:.2f}"), "fastest": ("by", "{}")}
    return listed(report["best"], lambda row: f"`{row['entry']}`, `{row['op']}`, {row['case']}", columns)


def step_forms(report: dict) -> str:
    columns = {"ratio_to_plain": ("times as fast as plain", "{:.2f}")}
    if report["environment"]["gpu"]:
        columns["ms_per_step"] = ("ms per step", "{:.4g}")
    rows = [{**row, "of": name} for name, size in report["configurations"].items() for row in size["forms"]]
    return listed(rows, lambda row: f"{row['of']}, {row['form']}", columns)


def analytic(report: dict) -> str:
    columns = {"one_step": ("one step", "{:.2%}"), "one_step_bar": ("aim", "{:.0%}"), "any": ("worst (t, s)", "{:.2%}")}
    return listed(report["results"], lambda row: f"{row['case']}, guidance {row['guidance_scale']:g}", columns)


def correctness(report: dict) -> str:
    bad = [*report["failure"], *report["error"]]
    text = f"{report['tests']} tests, {len(bad)} failed, {len(report['skipped'])} skipped."
    return text + "".join(f"\n- {name}" for name in bad)


def rates(report: dict) -> str:
    columns = {"ms": ("ms", "{:.3f}"), "tflops": ("TFLOP/s", "{:.0f}"), "ms_per_step": ("ms per step", "{:.2f}")}
    text = f"Copy bandwidth {report['copy_gb_per_s']:.0f} GB/s."
    for model in report["models"]:
        floor = f"{model['model']}, batch {model['batch']}: floor {model['floor_ms']:.1f} ms"
        text += f"\n\n{floor}, {model['tflops']:.0f} TFLOP/s"
        text += f", without {', '.join(model['without'])}.\n\n" if model.get("without") else ".\n\n"
        text += listed(model["rows"], lambda row: row["part"], columns)
    return text


def profile_step(report: dict) -> str:
    columns = {"ms": ("ms", "{:.2f}"), "floor_ms": ("floor", "{:.2f}"), "gap_ms": ("gap", "{:.2f}")}
    rows = [{**kind, "kind": name} for name, kind in report["kinds"].items()]
    text = f"`{report['row']}`, {report['model']}, batch {report['batch']}: {report['ms_per_step']:.1f} ms per step, "
    floor = "unknown" if report.get("no_floor") else f"{report['floor_ms']:.1f}"
    text += f"floor {floor}. Largest gaps: {', '.join(report['largest_gaps'])}.\n\n"
    return text + listed(rows, lambda row: row["kind"], columns)


def photographs(report: dict) -> str:
    rows, reached = [], report["seconds_to_reference"] or {}
    for name, row in report["rows"].items():
        if row.get("points"):
            when = reached.get(name)
            last = row["points"][-1]
            rows.append([f"`{name}`", f"{last['distance']:.4g}", str(last["steps"]), f"{when:.1f}" if when else ""])
    return markdown(["", "distance at the end", "steps", "seconds to public's distance"], rows)


def sampling(report: dict) -> str:
    columns = {"ms": ("ms", "{:.2f}"), "images_per_s": ("images/s", "{:.4g}"), "ratio_to_eager": ("of eager", "{:.2f}")}
    return listed(
        report["rows"],
        lambda row: f"{row['model']}, {row['precision']}, {row['steps']} steps of {row['batch']}, {row['form']}",
        columns,
    )


def loader(report: dict) -> str:
    columns = {"batches_per_s": ("batches/s", "{:.4g}"), "images_per_s": ("images/s", "{:.4g}")}
    return listed(report["rows"], lambda row: row["data"], columns)


class Section(NamedTuple):
    """How the files that match a pattern are told; ``first``: in README.md too."""

    pattern: str
    title: str
    script: str
    write: Callable[[dict], str]
    first: bool = False


SECTIONS = (
    Section("demo*.json", "The digits demo", "demo.py", demo, True),
    Section("objectives*.json", "The objectives, on the digits", "objectives_quality.py", objectives_quality, True),
    Section(
        "prediction_quality*.json",
        "What the last layer predicts, on the digits",
        "prediction_quality.py",
        objectives_quality,
        True,
    ),
    Section(
        "heads_quality*.json",
        "Improved MeanFlow's second head, on the digits",
        "heads_quality.py",
        objectives_quality,
    ),
    Section("cifar_recipe*.json", "The CIFAR-10 recipe, on the digits", "cifar_recipe.py", cifar_recipe),
    Section("precision*.json", "Error of the consistency quotient", "precision.py", precision, True),
    Section("digits_quality*.json", "Quality by precision, on the digits", "digits_quality.py", digits_quality),
    Section("throughput*.json", "Training throughput", "throughput.py", throughput, True),
    Section("step_forms*.json", "Forms of the step", "step_forms.py", step_forms),
    Section("analytic*.json", "Distance to the exact flow map", "analytic.py", analytic),
    Section("ladder*.json", "From the published form to the fast one", "throughput.py --rows ladder", throughput),
    Section("ablations*.json", "The fast step with one thing changed", "throughput.py --rows ablations", throughput),
    Section("correctness*.json", "Tests of the kernels on a GPU", "campaign.py run --only correctness", correctness),
    Section("*errors*.json", "Errors of the fused ops, relative to float64", "errors.py", kernel_errors),
    Section("kernels*.json", "Kernels", "kernels.py", kernels),
    Section("launches*.json", "Other launches of the kernels", "launches.py", launches),
    Section("rates*.json", "The floor of a step", "rates.py", rates),
    Section("profile*.json", "Where the time of a step goes", "profile_step.py", profile_step),
    Section("photographs*.json", "Quality against seconds", "photographs.py", photographs),
    Section("sampling*.json", "Sampling", "sampling.py", sampling),
    Section("loader*.json", "Reading the data", "loader.py", loader),
)


def sections(folder: Path, base: Path, *, first: bool = False) -> str:
    """The reports in the folder and below it as Markdown, with their pictures, linked from ``base``."""
    text = []
    for section in SECTIONS:
        for path in sorted(folder.rglob(section.pattern)) if section.first or not first else []:
            report = json.loads(path.read_text())
            made = f"`python benchmarks/{section.script}`. {where(report)}"
            text.append(f"### {section.title}\n\n{made}\n\n{section.write(report)}\n")
            if (picture := path.with_suffix(".png")).exists():
                text.append(f"![{section.title}]({os.path.relpath(picture, base)})\n")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if they differ")
    options = parser.parse_args(arguments)
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    texts = {
        README: before + BEGIN + "\n" + sections(RESULTS, ROOT, first=True) + "\n" + END + after,
        ALL: f"# Results\n\n{BEGIN}\n{sections(RESULTS, ALL.parent)}\n{END}",
    }
    different = [path.name for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if options.check and different:
        told = " and ".join(different)
        print(f"not what benchmarks/results gives: {told}; run python benchmarks/readme_results.py", file=sys.stderr)
        return 1
    if not options.check:
        for path, text in texts.items():
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
