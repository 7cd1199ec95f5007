"""Plots of benchmark results (extra `bench`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.slora import Load


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(title: str, y: str):  # type: ignore[no-untyped-def]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _written(figure: Any, path: Path) -> Path:
    """Save the figure as PNG and close it. Returns the path."""
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path


def bars(path: Path, title: str, y: str, values: Mapping[str, float]) -> Path:
    """A bar chart as PNG. Returns its path."""
    figure, axes = _axes(title, y)
    drawn = axes.bar(list(values), list(values.values()), color="#3b6ea5")
    axes.bar_label(drawn, fmt="{:,.0f}")
    axes.tick_params(axis="x", labelrotation=15)
    return _written(figure, path)


def loads(path: Path, title: str, runs: Sequence[Load]) -> Path:
    """Throughput and p99 of the time to first token of an S-LoRA comparison, by medians, as PNG. Returns its path."""
    pyplot = _pyplot()
    counts = sorted({run.adapters for run in runs})
    cases = list(dict.fromkeys(run.case for run in runs))
    share = {run.case: run.share for run in runs}
    names = [
        f"alpha {alpha:g}\n{rate:.3g} requests/s"
        + (f"\n{share[alpha, rate]:.0%} of capacity" if share[alpha, rate] else "")
        for alpha, rate in cases
    ]
    figure, halves = pyplot.subplots(2, 1, figsize=(max(8.0, 1.5 * len(cases)), 7), layout="constrained", sharex=True)
    figure.suptitle(title)
    width = 0.8 / len(counts)
    panels = {"requests/s finished": "requests_per_second", "time to first token, p99, s": "ttft_p99"}
    for axes, (label, of) in zip(halves, panels.items(), strict=True):
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        for n, count in enumerate(counts):
            repeats = [[r.summary for r in runs if (r.case, r.adapters) == (case, count)] for case in cases]
            values = [statistics.median(getattr(summary, of) for summary in each) for each in repeats]
            heights = [value if math.isfinite(value) else 0.0 for value in values]
            at = [i + n * width for i in range(len(cases))]
            drawn = axes.bar(at, heights, width, label=f"{count} adapters")
            labels = [f"{value:.2f}" if math.isfinite(value) else "" for value in values]
            for i, each in enumerate(repeats):  # a server that rejects requests looks faster
                if failed := sum(summary.failed for summary in each):
                    labels[i] += f"\n{failed} failed"
            axes.bar_label(drawn, labels, fontsize=8)
        axes.set_ylim(bottom=0)
    halves[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    halves[1].set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], names)
    return _written(figure, path)


def quality(path: Path, title: str, y: str, points: Sequence[tuple[int, int, float, float, int]], chosen: int) -> Path:
    """Quality by number of parameters as PNG. Returns its path.

    Args:
        points: (rank, parameters, value, spread of the seeds, steps). Points with the most steps are filled.
        chosen: rank with a larger marker.
    """
    figure, axes = _axes(title, y)
    longest = max(steps for *_, steps in points)
    for rank, parameters, value, spread, steps in points:
        axes.errorbar(
            parameters,
            value,
            yerr=spread / 2,
            fmt="o",
            color="#3b6ea5",
            capsize=3,
            markersize=11 if rank == chosen else 6,
            markerfacecolor="#3b6ea5" if steps == longest else "white",
        )
        axes.annotate(
            f"rank {rank}\n{steps} steps", (parameters, value), xytext=(8, 4), textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.margins(0.15)
    return _written(figure, path)
