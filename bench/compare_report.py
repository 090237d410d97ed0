"""The record of compare.py as a Markdown table, and as a plot of ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from report import heading, number

Record = Mapping[str, Any]
MARKERS = ("o", "s", "D", "^", "v", "P")


def markdown(record: Record) -> str:
    """A row for each system of each piece of work; one without a figure says why."""
    lines = [heading(record["machine"]), ""]
    if record["size"] != "full":
        lines += [f"Size: {record['size']}. These are no figures to compare by.", ""]
    lines += ["| work | system | figure | times ours | |", "|---|---|--:|--:|---|"]
    for row in record["rows"]:
        title = f"**{row['work']}**: {row['what']}"
        for figure in row["figures"]:
            name = f"*floor: {figure['system']}*" if figure["floor"] else figure["system"]
            lines.append(f"| {title} | {name} | {cells(figure, row['unit'])} |")
            title = ""
    packages = "; ".join(f"{s['name']}: {', '.join(s['packages'])}" for s in record["systems"])
    lines += ["", f"Medians of {record['rounds']} round(s). From PyPI: {packages}."]
    return "\n".join(lines) + "\n"


def cells(figure: Mapping[str, Any], unit: str) -> str:
    if "why" in figure:
        return f"- | | {figure['why'].replace('|', '/')}"
    ratio = figure.get("ratio")
    times = "" if ratio is None or figure["system"] == "pagedkv" else f"{number(ratio)}x"
    return f"{number(figure['value'])} {unit} | {times} | {verdict(figure)}"


def verdict(figure: Mapping[str, Any]) -> str:
    """What there is to say of a peer's figure: only that we are behind, or differ."""
    if figure["floor"] or figure["system"] == "pagedkv":
        return ""
    said = ["**we are behind**"] if figure.get("ratio", 1) < 1 else []
    said += ["**other tokens**"] if not figure.get("same_tokens", True) else []
    return ", ".join(said)


def ratios(record: Record) -> Iterator[tuple[int, Mapping[str, Any], float]]:
    """(row, figure, times ours) of all but our own figures."""
    for index, row in enumerate(record["rows"]):
        for figure in row["figures"]:
            if figure.get("ratio") is not None and figure["system"] != "pagedkv":
                yield index, figure, figure["ratio"]


def draw(record: Record, file: Path) -> None:
    """A line of dots for each piece of work: right of 1 the peer takes longer than pagedkv."""
    from matplotlib.figure import Figure

    rows = record["rows"]
    systems = sorted({(f["floor"], f["system"]) for _, f, _ in ratios(record)})
    figure = Figure(figsize=(7.6, 1.3 + 0.27 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number_, (is_floor, system) in enumerate(systems):
        points = [(x, y) for y, f, x in ratios(record) if f["system"] == system]
        axes.scatter(
            [max(x, 1e-3) for x, _ in points],
            [y for _, y in points],
            marker="|" if is_floor else MARKERS[number_ % len(MARKERS)],
            color="0.55" if is_floor else f"C{number_}",
            s=46 if is_floor else 30,
            label=f"floor: {system}" if is_floor else system,
            zorder=3,
        )
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="0.9")
    axes.grid(axis="y", color="0.95")
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("times pagedkv's figure (right of 1: pagedkv is ahead)", fontsize=8)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.42, 1.0), frameon=False)
    figure.savefig(file)
