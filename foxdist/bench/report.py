"""What a benchmark leaves: a Markdown table, JSON, and a picture."""

import json
from pathlib import Path
from typing import Any

from foxdist.bench.measure import NAMES

Rows = list[dict[str, Any]]

COLUMNS = (
    "heads x dim",
    "tokens",
    "implementation",
    "tiles kept",
    "forward, ms (range)",
    "forward + backward, ms (range)",
    "TFLOP/s dense",
    "TFLOP/s on kept tiles",
    "of matmul",
    "peak memory, MiB",
)


def save(folder: Path, name: str, text: str, result: dict[str, Any]) -> None:
    """What every benchmark leaves: table.md, and `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def write(folder: Path, result: dict[str, Any]) -> None:
    """table.md, attention.json and attention.png."""
    save(folder, "attention", markdown(result), result)
    if any(row["failed"] is None for row in result["rows"]):
        draw(result, folder / "attention.png")


def markdown(result: dict[str, Any]) -> str:
    """Times, errors, and what could not be measured. Rates are `forward / forward + backward`."""
    setup = result["setup"]
    title = (
        f"{setup['device']}, torch {setup['torch']}, {setup['dtype']}, gates {setup['gates']}, "
        f"bound={setup['bound']}, matmul {result['matmul(TFLOP/s)']:.3g} TFLOP/s, {setup['date']}"
    )
    times = table(COLUMNS, [_cells(row, result["matmul(TFLOP/s)"]) for row in result["rows"]])
    errors = table(
        ("heads x dim", "tokens", "implementation", *NAMES, "check"),
        [
            (*_head(c), *(f"{c['errors'][n]:.1e}" if n in c["errors"] else "-" for n in NAMES), c["failed"] or "passed")
            for c in result["checks"]
        ],
    )
    parts = [title, times, "Relative errors against float64:", errors]
    notes = [f"- {name}: {text}" for name, text in result["notes"].items()]
    notes += [f"- {name}: not available: {reason}" for name, reason in result["not_available"].items()]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def draw(result: dict[str, Any], path: Path) -> None:
    """Dense-equivalent rates over the length, a column for each shape: forward above, both directions below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["failed"] is None]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    size = (1 + 4.5 * len(shapes), 7.5)
    figure, grid = plt.subplots(2, len(shapes), figsize=size, layout="constrained", squeeze=False, sharey="row")
    for column, shape in enumerate(shapes):
        for axes, direction in zip(grid[:, column], ("forward", "forward+backward")):
            for i, name in enumerate(names):
                mine = [row for row in rows if (row["shape"], row["implementation"]) == (shape, name)]
                x, y = ([row[key] for row in mine] for key in ("tokens", f"{direction}_dense(TFLOP/s)"))
                style = {"color": f"C{i}", "linewidth": 2.2 if name.startswith("foxdist") else 1.2}
                axes.plot(x, y, marker="o", markersize=4, label=name, **style)
            axes.axhline(result["matmul(TFLOP/s)"], color="black", linestyle=":", label="matmul")
            axes.set(xscale="log", yscale="log", title=f"{shape}, {direction}", xlabel="tokens")
            ticks = sorted({row["tokens"] for row in rows})
            axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s, counted dense")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _head(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["shape"], f"{row['tokens']:,}", row["implementation"]


def _cells(row: dict[str, Any], ceiling: float) -> tuple[str, ...]:
    head = _head(row)
    if row["failed"] is not None:
        return (*head, *["-"] * (len(COLUMNS) - len(head) - 1), row["failed"])

    def time(name: str) -> str:
        median, least, greatest = (_number(row[f"{name}{which}(ms)"]) for which in ("", "_least", "_greatest"))
        return f"{median} ({least}..{greatest})"

    def rate(kind: str, scale: float = 1.0) -> str:
        both = (row[f"{name}_{kind}(TFLOP/s)"] * scale for name in ("forward", "forward+backward"))
        return " / ".join(map(_number, both))

    memory = row["peak_memory(MiB)"]
    return (
        *head,
        f"{row['tiles_kept(%)']:.1f} %",
        time("forward"),
        time("forward+backward"),
        rate("dense"),
        rate("kept"),
        rate("kept", 100 / ceiling) + " %",
        "-" if memory is None else f"{memory:,.0f}",
    )


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
