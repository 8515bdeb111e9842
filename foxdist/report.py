"""Pictures and a summary of a run, from what it wrote: python -m foxdist.report RUN_DIR [RUN_DIR ...].

Of several runs, their losses in one picture, and how far each is from the first.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from foxdist.layout import BLOCK
from foxdist.sinks import read_jsonl

Rows = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foxdist.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, metavar="PNG", help="of several runs; default: comparison.png")
    chosen = parser.parse_args(arguments)
    try:
        runs = {folder: read(folder) for folder in chosen.run_dir}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(runs) > 1:
        picture = chosen.output or Path("comparison.png")
        for folder, rows in runs.items():
            print(f"{folder}:\n{summary(rows)}\n")
        names = [folder.name for folder in runs]
        alike = len(set(names)) < len(names)
        compare({str(folder) if alike else folder.name: rows for folder, rows in runs.items()}, picture)
        print(f"picture         {picture}")
        return 0
    ((folder, rows),) = runs.items()
    print(summary(rows))
    picture = folder / "report.png"
    draw(rows, picture)
    print(f"picture         {picture}")
    print(f"everything else {folder}: config.yaml, metrics.jsonl, checkpoints/")
    return 0


def read(folder: Path) -> Rows:
    """The logged steps of a run. Raises `ValueError` if there are none."""
    rows = read_jsonl(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"RUN_DIR {folder}: no logged step in metrics.jsonl; must be the train.run_dir of a run")
    return rows


def over_run(rows: Rows, name: str) -> float:
    """The mean of a metric over all steps of the run; a row speaks for the steps since the row before."""
    steps = np.diff([0, *(row["step"] for row in rows)])
    return float(np.average([row[name] for row in rows], weights=steps))


def summary(rows: Rows) -> str:
    """The run in a few lines."""
    first, last = rows[0], rows[-1]
    sent, dense, causal = (over_run(rows, f"comm/kv_{name}(MiB)") for name in ("sent", "dense", "causal"))
    lines = [
        f"loss            {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}",
        f"tiles computed  {over_run(rows, 'acp/tiles_kept(%)'):.1f} % of the causal ones over the run, "
        f"{last['acp/tiles_kept(%)']:.1f} % at the end",
    ]
    if dense:
        lines += [
            f"K/V sent        {100 * sent / dense:.1f} % of a dense ring's bytes over the run "
            f"({100 * sent / causal:.1f} % of what causality alone needs), "
            f"{100 * last['comm/kv_sent(MiB)'] / last['comm/kv_dense(MiB)']:.1f} % at the end",
            f"                {sent:.2f} of {dense:.2f} MiB a step",
        ]
    certified = [row for row in rows if "acp/pruned_weight" in row]
    if certified:
        worst = max(row["acp/pruned_weight"] for row in certified)
        lines.append(
            f"weight lost     {worst:.1e} at most, of {certified[-1]['acp/pruned_weight_allowed']:.1e} allowed, by "
            f"{len(certified)} certificates"
        )
    steps = np.array([row["step"] for row in rows])
    rate = np.median([row["tokens/s"] for row in rows])
    lines.append(f"speed           {rate:,.0f} tokens/s, median over {len(steps)} logged steps")
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """One picture: loss, kept tiles, K/V traffic, and the window of every head at the end."""
    figure, ((loss, tiles), (traffic, heads)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    steps = [row["step"] for row in rows]
    loss.plot(steps, [row["loss"] for row in rows], color="black", linewidth=1.2)
    loss.set(title="loss", ylabel="nats a token", xlabel="step")
    _draw_tiles(tiles, steps, rows)
    _draw_traffic(traffic, steps, rows)
    _draw_heads(heads, rows[-1])
    for axes in (loss, tiles, traffic):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(runs: dict[str, Rows], path: Path) -> None:
    """The losses of several runs, and the distance of each from the first where both logged a step."""
    figure, (loss, distance) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = [{row["step"]: row["loss"] for row in rows} for rows in runs.values()]
    for i, (name, curve) in enumerate(zip(runs, curves)):
        loss.plot(*zip(*curve.items()), color=f"C{i}", linewidth=1.2, label=name)
        both = [step for step in curve if step in curves[0]]
        if i and both:
            apart = [max(abs(curve[step] - curves[0][step]), 1e-8) for step in both]
            distance.plot(both, apart, color=f"C{i}", linewidth=1.2, label=name)
    loss.set(title="loss", ylabel="nats a token", xlabel="step")
    distance.set(title=f"distance from {next(iter(runs))}", ylabel="nats a token", xlabel="step", yscale="log")
    for axes in (loss, distance):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_tiles(axes: Axes, steps: list[int], rows: Rows) -> None:
    by_layer = np.array([np.mean(row["acp/tiles_kept_by_head(%)"], axis=1) for row in rows])
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, by_layer.shape[1]))
    for layer, color in enumerate(colors):
        axes.plot(steps, by_layer[:, layer], color=color, linewidth=0.9)
    axes.plot(steps, [row["acp/tiles_kept(%)"] for row in rows], color="black", linewidth=2, label="mean")
    axes.set(title="tiles computed, of the causal ones", ylabel="%", xlabel="step", ylim=(0, 102))
    axes.legend(title="layers: first dark, last light", frameon=False, loc="upper left")


def _draw_traffic(axes: Axes, steps: list[int], rows: Rows) -> None:
    if not rows[-1]["comm/kv_dense(MiB)"]:
        axes.text(0.5, 0.5, "one rank a sequence: nothing to send", ha="center", transform=axes.transAxes)
        return
    for name, label, style in (("dense", "dense ring", ":"), ("causal", "causal need", "--"), ("sent", "sent", "-")):
        axes.plot(steps, [row[f"comm/kv_{name}(MiB)"] for row in rows], style, color="black", label=label)
    axes.fill_between(steps, [row["comm/kv_sent(MiB)"] for row in rows], color="tab:orange", alpha=0.5)
    axes.set(title="K/V between ranks, forward", ylabel="MiB a step", xlabel="step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_heads(axes: Axes, row: dict[str, Any]) -> None:
    windows = np.array(row["acp/window_by_head(tokens)"])
    scale = LogNorm(vmin=BLOCK, vmax=max(1024, windows.max()))
    image = axes.imshow(windows, aspect="auto", cmap="magma", norm=scale)
    axes.set(
        title=f"window of each head at step {row['step']}, in whole blocks of {BLOCK}", xlabel="head", ylabel="layer"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(image, ax=axes, label="tokens")
    ticks = [t for t in BLOCK * 2.0 ** np.arange(20) if t <= scale.vmax]
    bar.set_ticks(ticks, labels=[f"{t:,.0f}" for t in ticks])
    bar.minorticks_off()


if __name__ == "__main__":
    sys.exit(main())
