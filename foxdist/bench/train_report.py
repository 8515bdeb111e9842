"""What the benchmark of training leaves: a Markdown table, JSON, and a picture."""

from pathlib import Path
from typing import Any

from foxdist.bench.report import save, table

Row = dict[str, Any]

OUT_OF_MEMORY = "out of memory"
NONE = "n/a"
POINT = ("model", "tokens", "cp", "zero", "acp", "checkpointing", "compile", "gates")
COLUMNS = (
    *("model", "tokens", "cp", "ZeRO", "ACP", "checkpointing", "compile", "gates"),
    "tokens/s/GPU",
    "ms/step",
    "forward / backward / optimizer, ms",
    "tiles kept",
    "executed utilisation",
    "dense-equivalent MFU",
    "peak memory, GiB",
    "K/V sent, MiB/step",
    "loss, last step",
)


def write(folder: Path, result: dict[str, Any]) -> None:
    """table.md, train.json and train.png."""
    save(folder, "train", markdown(result), result)
    if any(row["failed"] is None for row in result["rows"]):
        draw(result, folder / "train.png")


def markdown(result: dict[str, Any]) -> str:
    """The table, and profiles under it."""
    setup, rows = result["setup"], result["rows"]
    ranks = f"{setup['ranks']} rank{'s' if setup['ranks'] > 1 else ''}"
    title = f"{setup['device']}, {ranks}, torch {setup['torch']}, {setup['precision']}, attention in "
    title += f"{setup['attention']}, median of {setup['steps']} steps, {setup['date']}"
    if setup["overrides"]:
        title += f"; {' '.join(setup['overrides'])}"
    columns = (*COLUMNS, *(["does not fit"] if any("does_not_fit" in row for row in rows) else []))
    parts = [title, table(columns, [_cells(row, len(columns)) for row in rows])]
    return "\n\n".join([*parts, *(row["profile"] for row in rows if "profile" in row)])


def utilisation(row: Row) -> float | None:
    """Percent of the peak that the executed FLOPs were: matrices, and attention's kept tiles."""
    mfu = row.get("perf/mfu(%)")
    return None if mfu is None else mfu * row["perf/executed(%)"] / 100


def peak_memory(row: Row) -> float:
    """GiB of the rank with most: on its GPU, or resident on a CPU, there since its process began."""
    return next(row[name] for name in ("memory/peak_allocated(GiB)", "memory/peak_resident(GiB)") if name in row)


def _cells(row: Row, columns: int) -> tuple[str, ...]:
    head = tuple(f"{row[name]:,}" if name == "tokens" else _plain(name, row[name]) for name in POINT)
    beyond = [_length(row["does_not_fit"])] if "does_not_fit" in row else []
    if row["failed"] is not None:
        return (*head, row["failed"].replace("|", "/"), *["-"] * (columns - len(head) - 1 - len(beyond)), *beyond)
    parts = " / ".join(f"{row[f'time/{name}(ms)']:,.0f}" for name in ("forward", "backward", "optimizer"))
    return (
        *head,
        f"{row['tokens/s/GPU']:,.0f}",
        f"{row['time/step(ms)']:,.0f}",
        parts,
        f"{row['acp/tiles_kept(%)']:.1f} %",
        _percent(utilisation(row)),
        _percent(row.get("perf/mfu(%)")),
        f"{peak_memory(row):.1f}",
        f"{row['comm/kv_sent(MiB)']:,.0f}",
        f"{row['loss']:.5f}",
        *beyond,
    )


def _percent(x: float | None) -> str:
    return NONE if x is None else f"{x:.1f} %"


def _length(x: int | None) -> str:
    return "-" if x is None else f"{x:,}"


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each row: tokens/s/GPU, and beside it the utilisation where the peak of the device is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["failed"] is None]
    varied = [name for name in POINT if len({row[name] for row in rows}) > 1] or ["model", "tokens"]
    labels = [", ".join(_label(name, row[name]) for name in varied) for row in rows]
    known = all("perf/mfu(%)" in row for row in rows)
    figure, grid = plt.subplots(
        1, 1 + known, figsize=(7 + 4 * known, 1.5 + 0.35 * len(rows)), layout="constrained", squeeze=False, sharey=True
    )
    places = range(len(rows))
    bars = grid[0, 0].barh(places, [row["tokens/s/GPU"] for row in rows], color="tab:blue")
    grid[0, 0].bar_label(bars, [f"{row['tokens/s/GPU']:,.0f}" for row in rows], padding=3)
    grid[0, 0].set_yticks(places, labels)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set(xlabel="tokens/s/GPU")
    grid[0, 0].xaxis.set_major_formatter("{x:,.0f}")
    if known:
        grid[0, 1].barh(places, [row["perf/mfu(%)"] for row in rows], color="lightgray", label="dense-equivalent MFU")
        executed = [utilisation(row) for row in rows]
        grid[0, 1].barh(places, executed, height=0.5, color="tab:orange", label="executed")
        grid[0, 1].set(xlabel="% of the device's peak")
        grid[0, 1].legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in grid[0]:
        axes.margins(x=0.15, y=0.02)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(name: str, value: Any) -> str:
    if name == "model":
        return _plain(name, value)
    return f"{value:,} tokens" if name == "tokens" else f"{name} {value}"


def _plain(name: str, value: Any) -> str:
    """Of a file, its name alone."""
    return Path(value).stem if name == "model" else str(value)
