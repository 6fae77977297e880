"""The results of the throughput benchmark: a JSON file that grows row by row, a table and a chart of it."""

import json
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

from _measure import write_report
from _pieces import GIVEN_UP, given_up, interruptions, running
from _public_source import ID as PUBLIC_SOURCE

REFERENCE = "soflow/public"

#: What the values of a row are, for whoever reads the JSON.
COLUMNS = {
    "ms_per_step": "median over all timed steps; ms_quartiles: 25 % and 75 %; ms_p99: 99 % (the slowest of fewer "
    "than 100 steps); steps: how many",
    "images_per_s": "batch / ms_per_step; ms_per_image: its inverse",
    "ratio_to_public": f"how many times as fast as {REFERENCE}; null where that was not timed",
    "flops_per_sample": "of matrix products and attention in one step, counted on the eager form without flash "
    "attention, with what the row recomputes; tflops: 10^12 of them per second",
    "mfu": "tflops over probe_tflops, the rate of one large matrix product (bfloat16 on a GPU, float32 on a CPU) timed "
    "before each turn of this row: measured, not a datasheet's; it also shows whether the machine changed",
    "peak_memory_bytes": "most that the row held at once; state_bytes: weights, gradients, AdamW, averages, copies",
    "compile_seconds": "the first five steps beyond what they take later: compiling, kernels, capture",
    "kernels_launched": "GPU kernels of one step, in a graph or not, by torch's profiler after the timing",
    "joules_per_image": "of the whole GPU, by NVML over the timed steps; power_w, sm_clock_mhz: medians while the row "
    "ran; temperature_c: highest; throttled_by: what held the clocks down at any time",
    "loss_error": "relative, against the plain objective in float64; gradient_error: likewise, of all gradients as one "
    "vector",
    "group": "rows of one group were in memory together and timed in turns; others share the probe only",
}

_SAME = ("model", "batch", "device", "attention", "compile", "hardware", "versions", "commit")


class Results:
    """The report of a run, kept in a file if there is one.

    Args:
        header: what the run is, without rows. path: of the JSON, or None. resume: go on with the rows in the file.
        order: of the ids in the report.

    Raises:
        ValueError: where the rows in the file are not of this run.
    """

    def __init__(self, header: dict, path: Path | None, resume: bool, order: list[str]):
        self._order = {name: i for i, name in enumerate(order)}
        self.path, self.report = path, {**header, "columns": COLUMNS, "rows": {}}
        if resume and path.exists():
            try:
                before = json.loads(path.read_text())
                same, rows = before["same"], before["rows"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no result of this benchmark; delete it or give another --json") from error
            different = [name for name in _SAME if same.get(name) != header["same"][name]]
            if different:
                told = ", ".join(f"{name} {same.get(name)} there, {header['same'][name]} here" for name in different)
                raise ValueError(f"{path} cannot be resumed, it is of another run ({told}); give another --json")
            self.report |= {"rows": rows, "interrupted": interruptions(before)}
            for name in given_up(before):
                rows.setdefault(name, {"skipped": GIVEN_UP, "failed": True})

    @property
    def rows(self) -> dict[str, dict]:
        return self.report["rows"]

    def add(self, rows: dict[str, dict]) -> None:
        """Adds rows and writes the file, whole or not at all."""
        rows = {**self.rows, **rows}
        self.report["rows"] = {name: rows[name] for name in sorted(rows, key=self._order.__getitem__)}
        public, source = (self.rows.get(name, {}).get("ms_per_step") for name in (REFERENCE, PUBLIC_SOURCE))
        for row in self.rows.values():
            if "ms_per_step" in row:
                row["ratio_to_public"] = public and public / row["ms_per_step"]
        self.report["ratio_of_public_to_public_source"] = source / public if source and public else None
        self._write(self.report)

    def running(self, name: str) -> AbstractContextManager[None]:
        """Within it a row is prepared or run: what ends or hangs the process there is known to the next."""
        return running(self.report, name, self._write)

    def _write(self, report: dict) -> None:
        if self.path:
            write_report(self.path, report)


def table(report: dict) -> str:
    """The report as text: one line per row, reasons below."""
    timed = {name: row for name, row in report["rows"].items() if "ms_per_step" in row}
    heads = ("ms/step", "quartiles", "p99", "steps", "images/s", "ratio", "GFLOP/im", "TFLOP/s", "MFU", "GiB")
    heads += ("compile s", "kernels", "J/image", "error")
    lines = []
    for name, row in timed.items():
        low, high = row["ms_quartiles"]
        lines.append(
            (
                name,
                f"{row['ms_per_step']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{row['ms_p99']:.2f}",
                f"{row['steps']}",
                f"{row['images_per_s']:.4g}",
                _or_dash(row["ratio_to_public"], "{:.2f}x"),
                f"{row['flops_per_sample'] / 1e9:.4g}",
                f"{row['tflops']:.3g}",
                f"{row['mfu']:.0%}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['compile_seconds']:.0f}",
                _or_dash(row["kernels_launched"], "{}"),
                _or_dash(row["joules_per_image"], "{:.3g}"),
                f"{row['gradient_error']:.1e}",
            )
        )
    cells = [("", *heads), *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads) + 1)]
    text = [report["title"]]
    for name, *values in cells:
        text.append("  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])]))
    for name, row in timed.items():
        if "largest_batch" in row:
            text.append(
                f"{name}: {row['ms_per_image']:.4g} ms per image, {row['ms_per_image_at_largest_batch']:.4g} at its "
                f"largest batch, {row['largest_batch']}"
            )
    if report["ratio_of_public_to_public_source"]:
        text.append(f"{REFERENCE} is {report['ratio_of_public_to_public_source']:.2f}x as fast as {PUBLIC_SOURCE}")
    text += [f"{name}: not timed, {row['skipped']}" for name, row in report["rows"].items() if "skipped" in row]
    return "\n".join(text)


def _or_dash(value, form: str) -> str:
    return "-" if value is None else form.format(value)


_COLORS = {"soflow": "#2a6fb0", "meanflow": "#d98c2b", "flow-matching": "#7a7a7a", "ladder": "#5aa469"}


def chart(report: dict, path: Path) -> None:
    """Bars of images per second with their quartiles, and below them what was not timed."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in report["rows"].items() if "ms_per_step" in row}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.36 * max(len(rows), 1)), layout="constrained")
    largest = max((row["images_per_s"] for row in rows.values()), default=1.0)
    for i, (name, row) in enumerate(rows.items()):
        value = row["images_per_s"]
        slow, fast = sorted(1000 * report["same"]["batch"] / ms for ms in row["ms_quartiles"])
        family = name.split("/")[0]
        axes.barh(i, value, color=_COLORS[family], height=0.7)
        axes.errorbar(value, i, xerr=[[max(value - slow, 0)], [max(fast - value, 0)]], color="black", capsize=3, lw=1)
        ratio = "" if row["ratio_to_public"] is None else f"  ({row['ratio_to_public']:.2f}x)"
        axes.text(max(fast, value) + 0.012 * largest, i, f"{value:.4g}{ratio}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * largest)  # room for the numbers
    axes.set_xlabel(f"images per second (times {REFERENCE}); bars: medians, lines: quartiles")
    figure.suptitle(report["title"], fontsize=10.5, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    skipped = [name for name, row in report["rows"].items() if "skipped" in row]
    if skipped:
        text = "Not timed (reasons in the JSON): " + ", ".join(skipped)
        text = textwrap.fill(text, 140, break_on_hyphens=False)
        figure.supxlabel(text, fontsize=7.5, color="#555555", ha="left", x=0.01)
    figure.savefig(path, dpi=150)
    plt.close(figure)
