"""Other launches of the kernels than the committed ones: warps, stages, blocks, what a program has; each timed.

    python benchmarks/launches.py [--only OP] [--json OUT.json] [--minutes 9] [--every-case] [--smoke]

The launch tables of ``kernels/`` were chosen from compiled code. Here each entry is tried otherwise, in the largest
case of every op that it decides about, with bfloat16 operands: half and twice of one number at a time, and on from what
is faster by more than the spread. A launch with which the op is not as exact as its tests demand is not timed. Timed
are the kernels that the entry changes, by themselves, from a cold cache. ``--smoke`` tries the neighbours of each entry
in one row of its smallest case; so does a machine without a GPU, whose times mean nothing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import _interpreter  # noqa: F401
import torch
from _ops import DEVICE, DTYPE, by_size, make_check, make_step, modes, options
from _pieces import begun, gpu_lost, run_pieces
from _timing import Timer, Timing

from soflow_fast.kernels import (
    _adaln_backward,
    _aot,
    _partials,
    _reduction,
    _rows,
    _self_attention_backward,
    activation_difference,
    adaln,
    adaln_difference,
    attention_difference,
    conditioning,
    fused,
    heads,
    mlp,
    noise,
    velocity,
)
from soflow_fast.kernels._cases import Case
from soflow_fast.kernels._launch import Record, recording

Check = Callable[[], list[str]]

# Of a thread; what more of them cost is seen in the time.
_ALL_REGISTERS = 255


@dataclass(frozen=True)
class Entry:
    """One of a launch table: a module's attribute, a number, a tuple of numbers or a ``Launch``.

    Attributes:
        importers: modules that have it too. together: fields of a Launch that are one number.
    """

    module: ModuleType
    attribute: str
    importers: tuple[ModuleType, ...] = ()
    together: tuple[tuple[str, ...], ...] = (("num_warps",), ("queries",), ("keys",))

    @property
    def name(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.attribute}"

    @property
    def committed(self) -> Any:
        return getattr(self.module, self.attribute)

    def neighbours(self, value: Any) -> list[Any]:
        """Half and twice of each of its numbers, one more stage and one less."""
        if isinstance(value, int):
            return [value * 2, max(value // 2, 1)]
        if isinstance(value, tuple):
            return [tuple(part * 2 for part in value), tuple(max(part // 2, 1) for part in value)]
        changes = [{"num_stages": value.num_stages + by} for by in (1, -1)]
        for names in self.together:
            if hasattr(value, names[0]):
                now = getattr(value, names[0])
                changes += [dict.fromkeys(names, now * 2), dict.fromkeys(names, now // 2)]
        possible = [change for change in changes if all(change.values()) and change.get("num_warps", 1) <= 32]
        return [replace(value, **change, max_registers=_ALL_REGISTERS) for change in possible]

    @contextmanager
    def set_to(self, value: Any) -> Iterator[None]:
        """Within it the entry is this value."""
        with ExitStack() as stack:
            for module in (self.module, *self.importers):
                stack.enter_context(mock.patch.object(module, self.attribute, value))
            yield


# A block of queries and one of keys are padded to the same size there.
_SQUARE = (("num_warps",), ("queries", "keys"))

ENTRIES = (
    Entry(_self_attention_backward, "_HALF", together=_SQUARE),
    Entry(_self_attention_backward, "_HALF_WIDE", together=_SQUARE),
    Entry(attention_difference, "_HALF"),
    Entry(attention_difference, "_HALF_SHORT"),
    Entry(attention_difference, "_HALF_WIDE"),
    Entry(_rows, "_MAX_STRIPS"),
    Entry(adaln, "_TOKENS"),
    Entry(_adaln_backward, "_TOKENS"),
    Entry(adaln_difference, "_TOKENS"),
    Entry(mlp, "_LAUNCH"),
    Entry(mlp, "_COLUMNS"),
    Entry(mlp, "_GELU_LAUNCH"),
    Entry(mlp, "_BLOCK"),
    Entry(heads, "_LAUNCH"),
    Entry(heads, "_TOKENS"),
    Entry(heads, "_CHUNKS"),
    Entry(activation_difference, "_LAUNCH"),
    Entry(activation_difference, "_BLOCK"),
    Entry(_partials, "_SUM"),
    Entry(_partials, "_COLUMNS"),
    Entry(_reduction, "_REDUCE"),
    Entry(_reduction, "_BLOCK"),
    Entry(_reduction, "POINTWISE", importers=(velocity,)),
    Entry(_reduction, "POINTWISE_BLOCK", importers=(velocity,)),
    Entry(noise, "_LAUNCH"),
    Entry(noise, "_BLOCK"),
    Entry(conditioning, "_LABELS"),
)


def changed_kernels(entry: Entry, value: Any, case: Case, max_rows: int | None) -> set[str]:
    """The names of the kernels that the entry's value launches otherwise in a case."""

    def launches() -> list[tuple]:
        return [_told(record) for record in _aot.record_case(case, DTYPE, max_rows)]

    before = launches()
    with entry.set_to(value):
        after = launches()
    return {one[0] for one in set(before) ^ set(after)}


def _told(record: Record) -> tuple:
    """What tells one launch from another, but for the limit on registers."""
    sizes = [tuple(a.shape) if torch.is_tensor(a) else a for a in record.args]
    config = replace(record.config, max_registers=_ALL_REGISTERS)
    return record.kernel.__name__, record.grid(), repr(sizes), repr(record.constants), config


def decided(entry: Entry, cases: list[Case], every_case: bool, max_rows: int | None) -> Iterator[Case]:
    """The first case of each op, or every one, in which the entry decides about a launch."""
    seen, value = set(), entry.neighbours(entry.committed)[0]
    for case in cases:
        if (every_case or case.op not in seen) and changed_kernels(entry, value, case, max_rows):
            seen.add(case.op)
            yield case


def timed(
    entry: Entry, value: Any, case: Case, kernels: set[str], check: Check, timer: Timer, max_rows: int | None
) -> Timing:
    """Of these kernels' launches in a case, forward and backward, under the entry's value.

    Raises:
        ValueError: if the op is not exact with it.
    """
    with entry.set_to(value):
        if failures := check():
            raise ValueError("not exact: " + "; ".join(failures))
        step = make_step(case, modes(case)[-1], getattr(fused, case.op), max_rows)
        with recording() as records:
            step()
        chosen = [record for record in records if record.kernel.__name__ in kernels]

        def replay():
            for record in chosen:
                record.run()

        return timer(replay)  # within the value, of which also the grid is made


def search(entry: Entry, case: Case, timer: Timer, max_rows: int | None, climbs: int) -> Iterator[dict]:
    """A row for each value that is tried, the committed one first; ``climbs``: how often to go on from a better one."""
    here, around = entry.committed, entry.neighbours(entry.committed)
    kernels = set().union(*(changed_kernels(entry, value, case, max_rows) for value in around))
    tried, timings, check = [], {}, make_check(case, max_rows)
    around = [here, *around]
    for _ in range(1 + climbs):
        for value in around:
            if _words(value) in tried:
                continue
            tried.append(_words(value))
            row = {"op": case.op, "case": case.name, "entry": entry.name, "value": _words(value)}
            row |= {"committed": value == entry.committed, "kernels": sorted(kernels)}
            try:
                timings[value] = timing = timed(entry, value, case, kernels, check, timer, max_rows)
            except Exception as error:  # what does not compile or fit costs that value alone
                yield row | {"refused": f"{type(error).__name__}: {error}"}
                if gpu_lost():  # of the rest nothing would be learnt
                    return
            else:
                yield row | {"ms": timing.median, "ms_low": timing.low, "ms_high": timing.high}
        fastest = min(timings, key=lambda value: timings[value].median, default=here)
        if fastest == here or here not in timings or timings[fastest].median >= timings[here].low:
            return
        here, around = fastest, entry.neighbours(fastest)


def _words(value: Any) -> str:
    if not is_dataclass(value):
        return str(value)
    return " ".join(f"{name}={part}" for name, part in asdict(value).items() if name not in ("max_registers", "idle"))


def measure(only: str | None, every_case: bool, smoke: bool, minutes: float, path: Path | None, resume: bool) -> dict:
    """Environment, rows and the best of them; the file, if any, is written after every case of an entry."""
    timer, max_rows = Timer(DEVICE), 1 if smoke else None
    report = {"best": [], **begun(path if resume else None, dtype=str(DTYPE), smoke=smoke)}
    cases = by_size(only)[:: -1 if smoke else 1]

    def run(entry: Entry, case: Case) -> None:
        report["rows"] += search(entry, case, timer, max_rows, climbs=0 if smoke else 3)
        report["best"] = best(report["rows"])

    pieces = (
        (f"{entry.name}, {case.op} {case.name}", partial(run, entry, case))
        for entry in ENTRIES
        for case in decided(entry, cases, every_case, max_rows)
    )
    run_pieces(report, pieces, minutes, path)
    return report


def best(rows: list[dict]) -> list[dict]:
    """Of each entry and case the committed time, the fastest value and how many times as fast it is; the most first."""
    of_one: dict[tuple, list[dict]] = {}
    for row in rows:
        of_one.setdefault((row["entry"], row["op"], row["case"]), []).append(row)
    found = []
    for (entry, op, case), tried in of_one.items():
        committed = tried[0]
        if "ms" in committed:
            fastest = min((row for row in tried if "ms" in row), key=lambda row: row["ms"])
            one = {"entry": entry, "op": op, "case": case, "tried": len(tried), "ms": committed["ms"]}
            one |= {"spread": (committed["ms_high"] - committed["ms_low"]) / committed["ms"]}
            one |= {"times": committed["ms"] / fastest["ms"]}
            found.append(one | {"fastest": "as it is" if fastest is committed else fastest["value"]})
    return sorted(found, key=lambda one: one["times"], reverse=True)


def table(report: dict) -> str:
    """The report as text: a line for each entry and case."""
    lines = [f"{'entry':34} {'op':38} {'case':24} {'ms':>8} {'spread':>7} {'times':>6} {'tried':>5}  fastest"]
    lines += [
        f"{one['entry']:34} {one['op']:38} {one['case']:24} {one['ms']:8.4f} {one['spread']:7.1%} {one['times']:6.2f}"
        f" {one['tried']:5}  {one['fastest']}"
        for one in report["best"]
    ]
    refused = sum("refused" in row for row in report["rows"]) + len(report["refused"])
    lines.append(f"{len(report['rows'])} tried, {refused} refused, {len(report['left_out'])} left out for time")
    return "\n".join(lines)


def main() -> int:
    """Tries, writes the JSON, prints the table; 1 if a committed launch or a whole piece was refused."""
    parser = options(__doc__, "entry")
    parser.add_argument("--every-case", action="store_true", help="not only the largest case of each op")
    arguments = parser.parse_args()
    smoke = arguments.smoke or DEVICE == "cpu"
    only, every_case = arguments.only, arguments.every_case
    report = measure(only, every_case, smoke, arguments.minutes, arguments.json, arguments.resume)
    print(table(report))
    return int(bool(report["refused"]) or any(row["committed"] and "refused" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
