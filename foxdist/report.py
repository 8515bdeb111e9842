"""Pictures and a summary of a run, from what it wrote: python -m foxdist.report RUN_DIR [RUN_DIR ...].

Of several runs, the same in one picture, and how far each one's losses are from the first's.
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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from foxdist.layout import BLOCK
from foxdist.options import exit_with
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
        named = {str(folder) if alike else folder.name: rows for folder, rows in runs.items()}
        print("\n".join(differences(named)))
        compare(named, picture)
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


def dense_ring(rows: Rows) -> np.ndarray:
    """[rows] MiB that a dense ring sends in a step. NaN, which leaves gaps in pictures, where a rank has a sequence to
    itself: a run may change its ranks when it starts again."""
    return np.array([row["comm/kv_dense(MiB)"] or np.nan for row in rows])


def share_sent(rows: Rows) -> np.ndarray:
    """[rows] K and V sent, in percent of a dense ring's bytes."""
    return 100 * np.array([row["comm/kv_sent(MiB)"] for row in rows]) / dense_ring(rows)


def apart(rows: Rows, others: Rows) -> tuple[list[int], np.ndarray]:
    """The steps that both runs logged, and there the losses of `rows` less those of `others`, in nats a token."""
    loss, other = ({row["step"]: row["loss"] for row in part} for part in (rows, others))
    steps = [step for step in loss if step in other]
    return steps, np.array([loss[step] - other[step] for step in steps])


def differences(runs: dict[str, Rows]) -> list[str]:
    """A line for each run but the first: how far its losses are from the first's."""
    (first, reference), *rest = runs.items()
    lines = []
    for name, rows in rest:
        steps, by = apart(rows, reference)
        text = "no step logged by both"
        if steps:
            text = (
                f"{np.abs(by).mean():.2g} nats a token apart in the mean over {len(steps)} logged steps, with its sign "
                f"{by.mean():+.2g}; {by[-1]:+.2g} at step {steps[-1]}"
            )
        lines.append(f"loss            {name} from {first}: {text}")
    return lines


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
        at_the_end = share_sent([last])[0]
        lines += [
            f"K/V sent        {100 * sent / dense:.1f} % of a dense ring's bytes over the run "
            f"({100 * sent / causal:.1f} % of what causality alone needs), "
            + ("none at the end: one rank a sequence" if np.isnan(at_the_end) else f"{at_the_end:.1f} % at the end"),
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
    """One picture: loss, kept tiles, K/V traffic, every head's window at the end, its tiles and K/V over the run."""
    traffic = _traffic_of_heads(rows)
    below = ["heads", "heads" if traffic is None else "pages"]
    figure, axes = plt.subplot_mosaic(
        [["loss", "tiles"], ["traffic", "windows"], below], figsize=(11, 12), layout="constrained"
    )
    steps = [row["step"] for row in rows]
    axes["loss"].plot(steps, [row["loss"] for row in rows], color="black", linewidth=1.2)
    axes["loss"].set(title="loss", ylabel="nats a token", xlabel="step")
    _draw_tiles(axes["tiles"], steps, rows)
    _draw_traffic(axes["traffic"], steps, rows)
    _draw_windows(axes["windows"], rows[-1])
    tiles = _tiles_of_heads(rows)
    _draw_heads(axes["heads"], rows, tiles, tiles.min())
    axes["heads"].set_title("tiles computed, of the causal ones, by layer and head")
    if traffic is not None:
        _draw_heads(axes["pages"], rows, traffic, traffic[traffic > 0].min(initial=100.0))
        axes["pages"].set_title("K/V needed of other ranks, of a dense ring's, by layer and head")
    for name in ("loss", "tiles", "traffic"):
        _open_frame(axes[name])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(runs: dict[str, Rows], path: Path) -> None:
    """One picture: losses, their differences from the first run's, kept tiles, K/V traffic, speed, every head's tiles.

    Legends give the shares' averages over the whole run. Runs that pruned nothing have no picture of their heads.
    """
    pruned = {name: rows for name, rows in runs.items() if any(row["acp/tiles_kept(%)"] < 100 for row in rows)}
    figure, axes = _panels(list(pruned))
    first, reference = next(iter(runs.items()))
    for i, (name, rows) in enumerate(runs.items()):
        _draw_curves(axes, name, rows, f"C{i}")
        if i:
            both, by = apart(rows, reference)
            axes["difference"].plot(both, by, color=f"C{i}", linewidth=1.2, label=name)
            axes["distance"].plot(both, np.abs(by).clip(1e-8), color=f"C{i}", linewidth=1.2, label=name)
    axes["difference"].axhline(0, color="black", linewidth=0.8)
    axes["distance"].set_yscale("log")
    least = min((_tiles_of_heads(rows).min() for rows in pruned.values()), default=100.0)
    for name, rows in pruned.items():
        _draw_heads(axes[f"heads of {name}"], rows, _tiles_of_heads(rows), least)
        axes[f"heads of {name}"].set_title(f"tiles computed by layer and head, {name}")
    for panel, (title, unit) in {
        "loss": ("loss", "nats a token"),
        "difference": (f"difference of loss from {first}", "nats a token"),
        "distance": ("size of the difference", "nats a token"),
        "tiles": ("tiles computed, of the causal ones", "%"),
        "traffic": ("K/V sent, of a dense ring's bytes", "%"),
        "speed": ("speed", "tokens/s"),
    }.items():
        axes[panel].set(title=title, ylabel=unit, xlabel="step")
        if unit != "nats a token":
            axes[panel].set_ylim(bottom=0)
        if axes[panel].lines:
            axes[panel].legend(frameon=False)
        else:
            _say_nothing_sent(axes[panel])
        _open_frame(axes[panel])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(with_heads: list[str]) -> tuple[Figure, dict[str, Axes]]:
    """Two rows of three panels, and below them one for each run of `with_heads`, up to three in a row."""
    rows = [["loss", "difference", "distance"], ["tiles", "traffic", "speed"]]
    in_a_row = min(3, len(with_heads))
    for i in range(0, len(with_heads), max(1, in_a_row)):
        below = [f"heads of {name}" for name in with_heads[i : i + in_a_row]]
        rows.append(below + ["."] * (in_a_row - len(below)))
    sixths = [[panel for panel in row for _ in range(6 // len(row))] for row in rows]
    return plt.subplot_mosaic(sixths, figsize=(16, 4.2 * len(rows)), layout="constrained")


def _draw_curves(axes: dict[str, Axes], name: str, rows: Rows, color: str) -> None:
    """What a run adds to the panels of all runs but the differences."""
    kept = f"{name}: {over_run(rows, 'acp/tiles_kept(%)'):.1f} %"
    curves = {
        "loss": (name, [row["loss"] for row in rows]),
        "speed": (name, [row["tokens/s"] for row in rows]),
        "tiles": (kept, [row["acp/tiles_kept(%)"] for row in rows]),
    }
    sent, dense = (over_run(rows, f"comm/kv_{which}(MiB)") for which in ("sent", "dense"))
    if dense:
        curves["traffic"] = f"{name}: {100 * sent / dense:.1f} %", share_sent(rows).tolist()
    for panel, (label, values) in curves.items():
        axes[panel].plot([row["step"] for row in rows], values, color=color, linewidth=1.2, label=label)


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _say_nothing_sent(axes: Axes) -> None:
    axes.text(0.5, 0.5, "one rank a sequence: nothing to send", ha="center", transform=axes.transAxes)
    axes.set_axis_off()


def _draw_layers(axes: Axes, steps: list[int], by_layer: np.ndarray) -> None:
    """A thin line for each layer of by_layer [rows, layers]."""
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, by_layer.shape[1]))
    for layer, color in enumerate(colors):
        axes.plot(steps, by_layer[:, layer], color=color, linewidth=0.9)


def _draw_tiles(axes: Axes, steps: list[int], rows: Rows) -> None:
    _draw_layers(axes, steps, np.array([np.mean(row["acp/tiles_kept_by_head(%)"], axis=1) for row in rows]))
    axes.plot(steps, [row["acp/tiles_kept(%)"] for row in rows], color="black", linewidth=2, label="mean")
    axes.set(title="tiles computed, of the causal ones", ylabel="%", xlabel="step", ylim=(0, 102))
    axes.legend(title="layers: first dark, last light", frameon=False, loc="upper left")


def _draw_traffic(axes: Axes, steps: list[int], rows: Rows) -> None:
    dense = dense_ring(rows)
    known = dense[~np.isnan(dense)]
    if not known.size:
        _say_nothing_sent(axes)
        return
    name = "comm/kv_sent_by_layer(MiB)"
    if all(name in row for row in rows):  # a run of an older version did not log it
        sent = np.array([row[name] for row in rows])
        _draw_layers(axes, steps, 100 * sent.shape[1] * sent / dense[:, None])
    axes.plot(steps, share_sent(rows), color="black", linewidth=2, label="sent")
    causal = np.array([row["comm/kv_causal(MiB)"] for row in rows])
    axes.plot(steps, 100 * causal / dense, "--", color="black", label="causal need")
    axes.set(title=f"K/V between ranks, of a dense ring's {known[-1]:,.1f} MiB a step", ylabel="%", xlabel="step")
    axes.set_ylim(0, 102)
    axes.legend(title="layers: first dark, last light", frameon=False, loc="upper left")


def _tiles_of_heads(rows: Rows) -> np.ndarray:
    """[rows, layers, heads]: tiles that each head kept, in percent of the causal ones."""
    return np.array([row["acp/tiles_kept_by_head(%)"] for row in rows])


def _traffic_of_heads(rows: Rows) -> np.ndarray | None:
    """[rows, layers, K/V heads]: what ranks need of each other, in percent of a dense ring's; None if they never do."""
    name = "comm/kv_needed_by_head(MiB)"
    dense = dense_ring(rows)
    if np.isnan(dense).all() or not all(name in row for row in rows):  # an older version did not log it
        return None
    needed = np.array([row[name] for row in rows])
    return 100 * needed[0].size * needed / dense[:, None, None]


def _draw_heads(axes: Axes, rows: Rows, kept: np.ndarray, least: float) -> None:
    """`kept` [rows, layers, heads], percent, over the run: a line of the image for each head, layers from the top down.

    The scale is logarithmic and runs from `least`, in percent, to 100; what is below has its darkest color.
    """
    layers, heads = kept.shape[1:]
    least = max(0.01, min(50.0, least))
    image = axes.pcolormesh(
        np.array([0, *(row["step"] for row in rows)]),  # a row speaks for the steps since the row before
        np.arange(layers * heads + 1) / heads,
        kept.reshape(len(rows), -1).T.clip(least),
        cmap="magma",
        norm=LogNorm(vmin=least, vmax=100),
        rasterized=True,
    )
    axes.hlines(np.arange(1, layers), 0, rows[-1]["step"], color="white", linewidth=0.4)
    axes.set(xlabel="step", ylabel="layer, its heads below each other", ylim=(layers, 0))
    axes.set_yticks(np.arange(layers) + 0.5, labels=[str(layer) for layer in range(layers)], fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, label="%")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t >= least]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.minorticks_off()


def _draw_windows(axes: Axes, row: dict[str, Any]) -> None:
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
    exit_with(main)
