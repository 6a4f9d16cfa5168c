"""What a person sees while a search runs: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vitq_ray.evaluate import Evaluation, wilson_interval

_ROWS = 14


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def accuracy(evaluation: Evaluation) -> str:
    """Top-1 with its 95 % interval, e.g. `89.51 % (88.89 to 90.10)`."""
    low, high = wilson_interval(evaluation.top1_correct, evaluation.images)
    return f"{percent(evaluation.top1)} ({100 * low:.2f} to {100 * high:.2f})"


def ranked(results: Mapping[str, Evaluation]) -> list[str]:
    """Names, best first: by top-1, then top-5, then as given."""
    return sorted(results, key=lambda n: (-results[n].top1_correct, -results[n].top5_correct))


class LiveTable:
    """Results of candidates as they come in; a context manager."""

    def __init__(self, labels: Mapping[str, str], baseline: Evaluation, console: Console | None = None) -> None:
        self._labels = labels
        self._baseline = baseline
        self._console = console or Console()
        self._results: dict[str, Evaluation] = {}
        self._live = Live(self.table(), console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def add(self, name: str, evaluation: Evaluation, seconds: float) -> None:
        """Show one more result."""
        self._results[name] = evaluation
        if self._console.is_terminal:
            self._live.update(self.table())
            return
        done = f"[{len(self._results)}/{len(self._labels)}]"
        print(f"{done} {self._labels[name]}: {accuracy(evaluation)}, {seconds:.1f} s", flush=True)

    def table(self) -> Table:
        done, total = len(self._results), len(self._labels)
        table = Table(title=f"{done} of {total} distinct settings evaluated", title_justify="left")
        for column in ("", "setting", "images", "top-1 (95 % interval)", "top-5"):
            table.add_column(column, justify="left" if column == "setting" else "right")
        table.add_row("", "float", *_cells(self._baseline), style="dim")
        order = ranked(self._results)
        hidden = max(0, len(order) - _ROWS)
        for place, name in enumerate(order[: _ROWS - 1] if hidden else order, start=1):
            table.add_row(str(place), self._labels[name], *_cells(self._results[name]))
        if hidden:
            table.add_row("", f"… {hidden} more …", "", "", "")
            table.add_row(str(len(order)), self._labels[order[-1]], *_cells(self._results[order[-1]]))
        return table


def _cells(evaluation: Evaluation) -> tuple[str, str, str]:
    return str(evaluation.images), accuracy(evaluation), percent(evaluation.top5)
