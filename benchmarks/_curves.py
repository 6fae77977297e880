"""The results of ``photographs.py``: a JSON file that grows row by row, a table and a chart of its curves."""

import json
import os
from pathlib import Path

REFERENCE = "soflow/public"


class Results:
    """The report, and its file if there is one.

    Args:
        header: what the run is, without rows; ``same`` is what rows of one table share. path: of the JSON, or None.
        resume: go on with the rows in the file.

    Raises:
        ValueError: where the rows to go on with are of another run.
    """

    def __init__(self, header: dict, path: Path | None, resume: bool):
        self.path, self.report = path, {**header, "rows": {}}
        if resume and path.exists():
            try:
                before = json.loads(path.read_text())
                same, self.report["rows"] = before["same"], before["rows"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no result of this benchmark; delete it or give another --json") from error
            different = [name for name, value in header["same"].items() if same.get(name) != value]
            if different:
                told = ", ".join(f"{name} {same.get(name)} there, {header['same'][name]} here" for name in different)
                raise ValueError(f"{path} cannot be resumed, it is of another run ({told}); give another --json")

    def add(self, rows: dict[str, dict]) -> None:
        """Adds rows and writes the file, whole or not at all."""
        self.report["rows"] |= rows
        self.report["seconds_to_reference"] = seconds_to_reference(self.report["rows"])
        if self.path:
            unfinished = self.path.with_name(self.path.name + ".unfinished")
            unfinished.write_text(json.dumps(self.report, indent=1) + "\n")
            os.replace(unfinished, self.path)


def finished(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows that were trained to the end."""
    return {name: row for name, row in rows.items() if "skipped" not in row}


def seconds_to_reference(rows: dict[str, dict]) -> dict[str, float | None] | None:
    """When each row was first evaluated at no more than the distance ``REFERENCE`` ends with; None where it never was,
    and for all where that row is not there."""
    rows = finished(rows)
    if REFERENCE not in rows:
        return None
    aim = rows[REFERENCE]["points"][-1]["distance"]
    return {
        name: next((point["seconds"] for point in row["points"] if point["distance"] <= aim), None)
        for name, row in rows.items()
    }


def table(report: dict) -> str:
    """The report as text: one line per row, reasons below."""
    reached = report["seconds_to_reference"] or {}
    width = max(map(len, report["rows"]), default=0)
    lines = [f"{'':{width}} {'ms/step':>9} {'steps':>8} {'images':>10} {'distance':>9} {'as good':>9} {'apart':>8}"]
    for name, row in finished(report["rows"]).items():
        last, when = row["points"][-1], reached.get(name)
        apart = row["preparation_seconds"] + row["evaluation_seconds"]
        lines.append(
            f"{name:{width}} {row['ms_per_step']:9.1f} {last['steps']:8} {last['images']:10} {last['distance']:9.4g} "
            f"{'-' if when is None else f'{when:.1f} s':>9} {apart:6.0f} s"
        )
    lines += [f"{name}: {row['skipped']}" for name, row in report["rows"].items() if "skipped" in row]
    lines.append(
        f"distance after {report['same']['seconds']:g} s of training (crops to other crops: "
        f"{report['distance_of_crops']:.3g}); as good: when it reached the last one of {REFERENCE}; apart: compiling "
        "and evaluating"
    )
    return "\n".join(lines)


def chart(report: dict, path: Path) -> None:
    """Distance against seconds of training, one line per row."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    rows, same = finished(report["rows"]), report["same"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, row in rows.items():
        seconds, distances = ([point[key] for point in row["points"]] for key in ("seconds", "distance"))
        axes.plot(seconds, distances, marker="o", markersize=3, label=f"{name} ({row['ms_per_step']:.0f} ms/step)")
    if REFERENCE in rows:
        aim = rows[REFERENCE]["points"][-1]["distance"]
        axes.axhline(aim, color="gray", linestyle="--", label=f"{REFERENCE} at the end")
    axes.axhline(report["distance_of_crops"], color="gray", linestyle=":", label="crops to other crops")
    axes.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="Fréchet distance of one-step samples")
    smoke = ": a smoke run, its figures mean nothing" if report["smoke"] else ""
    axes.set_title(f"{same['model']} on photographs, batch {same['batch']}, {same['hardware']}{smoke}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
