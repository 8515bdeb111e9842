"""One table and one picture of many runs of `bench train`: python -m foxdist.bench scaling DIR.

A point is so many GPUs on one length: a folder somewhere under DIR that holds `train.json`, and the logs of its ranks
(slurm/scaling.sbatch). Read along one length points are strong scaling, along one number of tokens a GPU weak scaling.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foxdist.bench.report import save, table
from foxdist.bench.train_report import NONE, peak_memory, utilisation

Row = dict[str, Any]
SERIES = ("model", "acp", "checkpointing", "compile", "gates", "zero", "setup")
"""What points that are compared have in common. The table has the first two, and of the others what varies."""
COLUMNS = (
    "model",
    "ACP",
    "tokens",
    "GPUs",
    "tokens a GPU",
    "tokens/s",
    "tokens/s/GPU",
    "ms/step",
    "strong: speed-up (ideal)",
    "weak: tokens/s/GPU, of its base",
    "tiles kept",
    "executed utilisation",
    "peak memory, GiB",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the points lie; gets the table and the picture")


def run(chosen: argparse.Namespace) -> int:
    """Prints the table, and writes table.md, scaling.json and scaling.png. Raises `ValueError` if there is no point."""
    setups, rows, lost = read(chosen.folder)
    result = {"setups": setups, "rows": compare(rows), "lost": lost}
    save(chosen.folder, "scaling", markdown(result), result)
    if any(row["failed"] is None for row in rows):
        draw(result, chosen.folder / "scaling.png")
    print(markdown(result))
    return 0


def read(folder: Path) -> tuple[list[Row], list[Row], list[str]]:
    """Setups that differ among points; the points' rows, with `gpus` and the number of their `setup`, from 1; and the
    folders of points that left no result."""
    setups, rows = [], []
    for path in sorted(folder.rglob("train.json")):
        point = json.loads(path.read_text())
        setup = {name: value for name, value in point["setup"].items() if name not in ("ranks", "date", "memory(GiB)")}
        setups += [setup] if setup not in setups else []
        about = {"gpus": point["setup"]["ranks"], "setup": 1 + setups.index(setup)}
        rows += [row | about for row in point["rows"]]
    logs = sorted(path.parent for path in folder.rglob("rank_00000.log"))
    lost = [str(path) for path in logs if not (path / "train.json").exists()]
    if not rows and not lost:
        raise ValueError(f"{folder}: holds no point; must be what slurm/scaling.sbatch wrote; run it first")
    return (
        setups,
        sorted(rows, key=lambda row: (*(str(row[name]) for name in SERIES), row["tokens"], row["gpus"])),
        lost,
    )


def compare(rows: list[Row]) -> list[Row]:
    """The rows with `strong` and `weak`: over the point of fewest GPUs on the same line, None where there is no other.

    strong: tokens a second, at equal length; `ideal` is the ratio of GPUs. weak: tokens a second and GPU, at equal
    tokens a GPU. Attention grows with the square of the length, so weak falls on perfect hardware, too; `executed
    utilisation` does not.
    """
    found = []
    for row in rows:
        strong, weak = (_base(row, rows, line) for line in (_length, _share))
        ideal = row["gpus"] / strong["gpus"] if strong else None
        found.append(
            row
            | {
                "ideal": ideal,
                "strong": ideal and strong and ideal * row["tokens/s/GPU"] / strong["tokens/s/GPU"],
                "weak": weak and row["tokens/s/GPU"] / weak["tokens/s/GPU"],
            }
        )
    return found


def _length(row: Row) -> float:
    return row["tokens"]


def _share(row: Row) -> float:
    return row["tokens"] / row["gpus"]


def _base(row: Row, rows: list[Row], line: Callable[[Row], float]) -> Row | None:
    """Of the rows on one line with `row`, that of fewest GPUs; None if there are not two, or `row` failed."""
    same = [x for x in rows if x["failed"] is None and _series(x) == _series(row) and line(x) == line(row)]
    return min(same, key=lambda x: x["gpus"]) if row["failed"] is None and len(same) > 1 else None


def _series(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in SERIES)


def markdown(result: dict[str, Any]) -> str:
    """What was measured on what, the table, and what is missing."""
    lines = [", ".join(f"{name} {value}" for name, value in setup.items() if value) for setup in result["setups"]]
    if len(lines) > 1:
        lines = [f"setup {number}: {line}" for number, line in enumerate(lines, 1)]
    lost = [f"no result, see the logs there: {folder}" for folder in result["lost"]]
    varied = _varied(result["rows"])
    columns = (*COLUMNS[:2], *varied, *COLUMNS[2:])
    return "\n\n".join([*lines, table(columns, [_cells(row, varied) for row in result["rows"]]), *lost])


def _varied(rows: list[Row]) -> tuple[str, ...]:
    """What else tells the series of these rows apart."""
    return tuple(name for name in SERIES[2:] if len({str(row[name]) for row in rows}) > 1)


def _cells(row: Row, varied: tuple[str, ...]) -> tuple[str, ...]:
    share = row["tokens"] // row["gpus"]
    series = (Path(row["model"]).stem, row["acp"], *(str(row[name]) for name in varied))
    head = (*series, f"{row['tokens']:,}", f"{row['gpus']}", f"{share:,}")
    if row["failed"] is not None:
        return (*head, row["failed"].replace("|", "/"), *["-"] * (len(COLUMNS) + len(varied) - len(head) - 1))
    busy = utilisation(row)
    return (
        *head,
        f"{row['gpus'] * row['tokens/s/GPU']:,.0f}",
        f"{row['tokens/s/GPU']:,.0f}",
        f"{row['time/step(ms)']:,.0f}",
        NONE if row["strong"] is None else f"{row['strong']:.2f} ({row['ideal']:g})",
        NONE if row["weak"] is None else f"{100 * row['weak']:.0f} %",
        f"{row['acp/tiles_kept(%)']:.1f} %",
        NONE if busy is None else f"{busy:.1f} %",
        f"{peak_memory(row):.1f}",
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Over the number of GPUs: tokens a second at each length, and tokens a second and GPU at each tokens a GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["failed"] is None]
    varied = _varied(rows)
    figure, (strong, weak) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, line, rate, unit in (
        (strong, _length, lambda row: row["gpus"] * row["tokens/s/GPU"], "tokens"),
        (weak, _share, lambda row: row["tokens/s/GPU"], "tokens a GPU"),
    ):
        for i, value in enumerate(sorted({line(row) for row in rows})):
            for series in sorted({_series(row) for row in rows}):
                mine = [row for row in rows if line(row) == value and _series(row) == series]
                others = [f"{name} {x}" for name, x in zip(SERIES, series) if name in varied]
                name = ", ".join([f"{value:,.0f} {unit}", Path(series[0]).stem, f"ACP {series[1]}", *others])
                style = "-" if series[1] == "on" else "--"
                if mine:
                    x, y = zip(*sorted((row["gpus"], rate(row)) for row in mine))
                    axes.plot(x, y, style, color=f"C{i % 10}", marker="o", markersize=4, label=name)
        ticks = sorted({row["gpus"] for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="GPUs")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    strong.set(title="strong scaling", ylabel="tokens/s")
    weak.set(title="weak scaling", ylabel="tokens/s/GPU")
    figure.savefig(path, dpi=110)
    plt.close(figure)
