"""What the benchmark of attention over ranks leaves: tables and a picture."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from foxdist.bench.layouts import Row
from foxdist.bench.measure import NAMES
from foxdist.bench.report import table
from foxdist.layout import LAYOUTS

PLAN_COLUMNS = (
    "heads x dim",
    "tokens",
    "ranks",
    "K/V that a rank sends, MiB (the most)",
    "of a dense ring's",
    "busiest pair, MiB",
    "borrowed at once, MiB",
    "tiles of a rank, most over mean",
    "forecast of forward + backward, ms (exposed)",
    "speed-up",
    "fewer bytes",
    "better balance",
    "faster",
    "auto",
)
COLUMNS = (
    "heads x dim",
    "tokens",
    "ranks",
    "layout",
    "schedule",
    "transport",
    "forward, ms (range)",
    "forward + backward, ms (range)",
    "exposed, ms (of both)",
    "host, ms",
    "speed-up, forward / both",
    "tiles kept",
    "most over mean",
    "K/V that a rank sends, MiB (the most)",
    "that it should send",
    "of a dense ring's",
    "busiest pair, MiB",
    "peak memory, MiB",
)


def markdown(result: dict[str, Any]) -> str:
    """The plan, and what was measured; pairs of numbers are of `zigzag / contiguous`."""
    setup = result["setup"]
    pruning = "nothing pruned" if setup["bound"] is None else f"bound={setup['bound']}"
    title = f"gates {setup['gates']}, {pruning}, {setup['dtype']}, batch 1, torch {setup['torch']}, {setup['date']}"
    title += ", replayed as CUDA graphs" if setup["graphs"] else ""
    parts = [title]
    if result["plan"]:
        layouts = [name for name in LAYOUTS if any(row["layout"] == name for row in result["plan"])]
        host = f"Planned, {setup['ranks_per_host']} ranks on a host; {' / '.join(layouts)}:"
        parts += [host, table(PLAN_COLUMNS, _plan_lines(result)), *_machines(result)]
    if result["left_out"]:
        left_out = ", ".join(f"{x['tokens']:,} on {x['ranks']}" for x in result["left_out"])
        parts.append(f"Left out, as their chunks are not whole blocks: {left_out}.")
    for series, text in (("strong", "one length over the ranks"), ("weak", "one number of tokens for each rank")):
        rows = [row for row in result["rows"] if row["series"] == series]
        if rows:
            parts += [f"Measured on {setup['device']}, {text}:", table(COLUMNS, [_cells(row) for row in rows])]
    if result["verdicts"]:
        parts.append("\n".join(map(_sentence, result["verdicts"])))
    if result["checks"]:
        heads = ("heads x dim", "tokens", "ranks", "layout", "schedule", "transport", *NAMES, "check")
        parts += ["Relative errors against float64:", table(heads, [_check(x) for x in result["checks"]])]
    return "\n\n".join(parts)


def _plan_lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One for each shape and point, of all layouts."""
    keys = dict.fromkeys(_key(row) for row in result["plan"])
    verdicts = {_key(x): x for x in result["forecast_verdicts"]}
    lines = []
    for key in keys:
        rows = [row for row in result["plan"] if _key(row) == key]

        def pair(text: str, rows: list[Row] = rows) -> str:
            return " / ".join(text.format(**row, share=_share(row)) for row in rows)

        shape, series, tokens, ranks = key
        lines.append(
            (
                shape,
                f"{tokens:,}" + (f" ({tokens // ranks:,} a rank)" if series == "weak" else ""),
                str(ranks),
                pair("{kv_sent(MiB):,.1f} ({kv_sent_most(MiB):,.1f})"),
                pair("{share:.1f} %"),
                pair("{busiest_pair(MiB):,.1f}"),
                pair("{borrowed_most(MiB):,.1f}"),
                pair("{balance:.2f}"),
                pair("{forward+backward(ms):,.2f} ({exposed(ms):,.2f})"),
                pair("{speed_up:.2f}"),
                *_verdict(verdicts.get(key)),
            )
        )
    return lines


def _verdict(x: Row | None) -> tuple[str, ...]:
    """Which layout wins, by how much, and what `auto` does about it; unknown where one layout was planned."""
    if x is None:
        return ("-",) * 4
    auto = x["auto"] + (", right" if x["auto_slower_by"] == 1 else f", {x['auto_slower_by']:.2f} x slower")
    return (*(_winner(x[name]) for name in ("fewer_bytes", "better_balance", "faster")), auto)


def _winner(x: Row) -> str:
    if x["layout"] is None:
        return "alike"
    return x["layout"] if x["factor"] is None else f"{x['layout']}, {x['factor']:.2f} x"


def _sentence(x: Row) -> str:
    """What was measured of `auto`."""
    where = f"{x['shape']}, {x['tokens']:,} tokens on {x['ranks']} ranks ({x['series']})"
    right = "right" if x["auto_slower_by"] == 1 else f"{x['auto_slower_by']:.2f} x slower"
    won = "; ".join(
        f"{text}: {_winner(x[name])}"
        for name, text in (("faster", "faster"), ("fewer_bytes", "fewer bytes"), ("better_balance", "better balance"))
    )
    return f"- {where}: {won}; auto: {x['auto']}, {right} ({x['auto_because']})"


def _machines(result: dict[str, Any]) -> list[str]:
    """What the forecast takes for granted."""
    return [
        f"Forecast for {shape}: {x['forward'] / 1e12:.0f} and {x['backward'] / 1e12:.0f} TFLOP/s on kept tiles, "
        f"{x['inside'] / 1e9:.0f} GB/s within a host, {x['across'] / 1e9:.0f} between, {1e6 * x['latency']:.0f} us a "
        "round of messages."
        for shape, x in result["machine"].items()
    ]


def _cells(row: Row) -> tuple[str, ...]:
    def time(name: str) -> str:
        median, least, greatest = (_number(row[f"{name}{which}(ms)"]) for which in ("", "_least", "_greatest"))
        return f"{median} ({least}..{greatest})"

    def faster(name: str) -> str:
        value = row[f"{name}_speed_up"]
        return "-" if value is None else f"{value:.2f}"

    if not timed(row):
        return (*_head(row), row["failed"].replace("|", "/"), *["-"] * (len(COLUMNS) - len(_head(row)) - 1))
    memory, exposed, host = row["peak_memory(MiB)"], row["exposed(ms)"], row["host(ms)"]
    return (
        *_head(row),
        time("forward"),
        time("forward+backward"),
        "-" if exposed is None else f"{exposed:.3g} ({100 * exposed / row['forward+backward(ms)']:.1f} %)",
        "-" if host is None else _number(host),
        " / ".join(map(faster, ("forward", "forward+backward"))),
        f"{row['tiles_kept(%)']:.1f} %",
        f"{row['balance']:.2f}",
        f"{row['kv_sent(MiB)']:,.1f} ({row['kv_sent_most(MiB)']:,.1f})",
        row["failed"] or f"{row['kv_needed(MiB)']:,.1f}",
        f"{_share(row):.1f} %" if row["ranks"] > 1 else "-",
        f"{row['busiest_pair(MiB)']:,.1f}",
        "-" if memory is None else f"{memory:,.0f}",
    )


def _check(x: Row) -> tuple[str, ...]:
    errors = (f"{x['errors'][name]:.1e}" if name in x["errors"] else "-" for name in NAMES)
    return (*_head(x), *errors, (x["failed"] or "passed").replace("|", "/"))


def _head(row: Row) -> tuple[str, ...]:
    way = (row[name] or "-" for name in ("layout", "schedule", "transport"))
    return row["shape"], f"{row['tokens']:,}", str(row["ranks"]), *way


def _key(row: Row) -> tuple[Any, ...]:
    return row["shape"], row["series"], row["tokens"], row["ranks"]


def _share(row: Row) -> float:
    """Percent of what a dense ring sends."""
    return 100 * row["kv_sent(MiB)"] / row["kv_dense(MiB)"] if row["kv_dense(MiB)"] else 0.0


def _number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Over the ranks, a row for each shape: speed-up beside the ideal, K/V of a dense ring's, and balance.

    Forecasts are dashed, what was measured is drawn through: of several schedules the fastest. Both begin at one rank,
    if that was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row | {"plan": True} for row in [*_alone(result), *result["plan"]]]
    rows += [row | {"plan": False, "speed_up": row["forward+backward_speed_up"]} for row in _fastest(result["rows"])]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    size = (13, 1 + 3.4 * len(shapes))
    figure, grid = plt.subplots(len(shapes), 3, figsize=size, layout="constrained", squeeze=False)
    for line, shape in zip(grid, shapes):
        mine = [row for row in rows if row["shape"] == shape]
        ranks = sorted({row["ranks"] for row in mine})
        panels = (
            ("speed-up of forward + backward", lambda row: row["speed_up"]),
            ("K/V sent, % of a dense ring's", lambda row: _share(row) if row["ranks"] > 1 else None),
            ("tiles of a rank, most over mean", lambda row: row["balance"]),
        )
        for axes, (title, value) in zip(line, panels):
            _lines(axes, mine, value)
            axes.set(xscale="log", title=f"{shape}: {title}", xlabel="ranks")
            axes.set_xticks(ranks, [str(p) for p in ranks])
            axes.set_xlim(ranks[0] / 1.1, ranks[-1] * 1.1)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        line[0].plot(ranks, ranks, color="black", linestyle=":", label="ideal")
        line[0].set(yscale="log", ylim=(ranks[0] / 1.5, ranks[-1] * 1.2))
        line[0].set_yticks(ranks, [str(p) for p in ranks])
        line[0].minorticks_off()
        line[1].set_ylim(0)
        line[2].set_ylim(1)
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, frameon=False, fontsize=7, handlelength=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _alone(result: dict[str, Any]) -> list[Row]:
    """Where forecasts begin: the rows of one rank, whose speed-up is 1."""
    return [row | {"speed_up": 1.0} for row in result["rows"] if row["ranks"] == 1 and timed(row)]


def _lines(axes: Any, rows: list[Row], value: Callable[[Row], float | None]) -> None:
    """A line for each length (its colour), layout (its marker and shade) and kind of number."""
    series = sorted({(row["series"], base(row)) for row in rows})
    for (i, (kind, tokens)), layout, planned in product(enumerate(series), LAYOUTS, (True, False)):
        mine = [row for row in rows if (row["series"], base(row)) == (kind, tokens)]
        mine = [row for row in mine if row["layout"] in (layout, None) and row["plan"] == planned]
        points = sorted((row["ranks"], value(row)) for row in mine if value(row) is not None)
        if any(ranks > 1 for ranks, _ in points):
            axes.plot(
                *zip(*points),
                color=f"C{i}",
                alpha=1.0 if layout == "zigzag" else 0.55,
                marker="o" if layout == "zigzag" else "s",
                markersize=4,
                linestyle="--" if planned else "-",
                label=f"{tokens:,}{' a rank' * (kind == 'weak')}, {layout}{', forecast' * planned}",
            )


def timed(row: Row) -> bool:
    """Whether it was measured, right or wrong."""
    return "forward+backward(ms)" in row


def base(row: Row) -> int:
    """The tokens of the row of one rank in the same series."""
    return row["tokens"] // row["ranks"] if row["series"] == "weak" else row["tokens"]


def _fastest(rows: list[Row]) -> list[Row]:
    """Of the schedules of a point and layout."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in filter(timed, rows):
        key = (*_key(row), row["layout"])
        if key not in best or row["forward+backward(ms)"] < best[key]["forward+backward(ms)"]:
            best[key] = row
    return list(best.values())
