"""The table: scores of clips gathered to figures with their controls, held against the bars, shown and
written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.table import Table

from stableavatar.evaluation.observation import VARIANTS, Bar, Metric, Observation, Variant
from stableavatar.evaluation.registry import GROUPS, Group

_HEADINGS: dict[Variant, str] = {
    "made": "result",
    "true": "true frames",
    "decoded": "decoded truth",
    "redrawn": "moved anew",
    "still": "still picture",
    "wrong": "wrong speech",
}


@dataclass
class Scores:
    """Every clip's value of every metric, by group and variant."""

    values: dict[tuple[str, str, Variant], list[float]] = field(default_factory=dict)

    def add(self, group: str, variant: Variant, clip: Observation) -> None:
        """Measures a clip by every metric of a group of the registry."""
        for metric in GROUPS[group].metrics:
            self.values.setdefault((group, metric.name, variant), []).append(metric.measure(clip))

    def merge(self, other: Scores) -> None:
        """Takes over the values of other clips."""
        for key, values in other.values.items():
            self.values.setdefault(key, []).extend(values)

    def figure(self, group: str, metric: Metric, variant: Variant) -> float | None:
        """The figure of a metric, None where no clip of the variant was measured."""
        values = self.values.get((group, metric.name, variant))
        return None if values is None else metric.gather(values)

    def missed(self) -> list[str]:
        """A line for every bar that a measured figure misses."""
        lines = []
        for name, group in GROUPS.items():
            for metric in group.metrics:
                for variant, bar in metric.bars.items():
                    value = self.figure(name, metric, variant)
                    if value is not None and not bar.passes(value):
                        label = "" if variant == group.main else f" ({_HEADINGS[variant]})"
                        lines.append(f"{metric.title}{label}: {value:.3g}, the bar is {bar}")
        return lines

    def unmeasured(self) -> list[str]:
        """A line for every bar that there is no figure for, which nobody can say is passed."""
        return [
            f"{metric.title}: not measured ({_HEADINGS[variant]}), the bar is {bar}"
            for name, group in GROUPS.items()
            for metric in group.metrics
            for variant, bar in metric.bars.items()
            if self.figure(name, metric, variant) is None
        ]

    def rows(self) -> Iterator[list[str]]:
        """The table's rows: figure, result, controls, bar and whether it is passed."""
        for name, group in GROUPS.items():
            for metric in group.metrics:
                shown = {variant: self.figure(name, metric, variant) for variant in VARIANTS}
                if all(value is None for value in shown.values()):
                    continue
                cells = [_number(shown[group.main])]
                cells += [_number(shown[v]) if v != group.main else "" for v in VARIANTS if v != "made"]
                unit = f" [{metric.unit}]" if metric.unit else ""
                yield [
                    metric.title + unit,
                    *cells,
                    _bars(metric.bars, group),
                    self._verdict(name, metric),
                ]

    def _verdict(self, group: str, metric: Metric) -> str:
        """Nothing where a bar's control was not measured and none is missed."""
        bars = metric.bars
        figures = {variant: self.figure(group, metric, variant) for variant in bars}
        if any(value is not None and not bars[variant].passes(value) for variant, value in figures.items()):
            return "MISS"
        return "" if not bars or None in figures.values() else "pass"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _bars(bars: Mapping[Variant, Bar], group: Group) -> str:
    return ", ".join(
        str(bar) if variant == group.main else f"{_HEADINGS[variant]} {bar}" for variant, bar in bars.items()
    )


COLUMNS = ("figure", "result", *(_HEADINGS[v] for v in VARIANTS if v != "made"), "bar", "")


def rich_table(scores: Scores, title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 0 < index <= len(VARIANTS) else "left")
    for row in scores.rows():
        shown = {"pass": "[green]pass[/]", "MISS": "[bold red]MISS[/]"}
        table.add_row(row[0].replace("[", "\\["), *(shown.get(cell, cell) for cell in row[1:]))
    return table


def markdown_table(scores: Scores) -> str:
    """The table for a document."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(VARIANTS) + "---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in scores.rows()]
    return "\n".join(lines)
