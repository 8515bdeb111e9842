"""What training will take on GPUs that are not there: python -m foxdist.simulate --config FILE [section.key=value ...].

For each number of GPUs and each `parallel.cp` that they allow: seconds a step, tokens/s, memory, days. A step is

    micro-batches x ( layers x attention  +  matrices  +  what a layer costs over ranks )  +  gradients  +  optimizer

Attention over ranks is `attention.predict`'s forecast, from gates; memory is that of `--check`. The rates of the rest
are fitted to 41 steps of FoX (Pro) 125M, 360M and 760M on one, two and four H200s of one host, compiled and in bf16
(README, Measuring training): five numbers, with which all of them come out within 10 %, 3.5 % in the mean square
(tests/test_simulate.py). What gradients take between hosts has not been measured: it is counted whole, as if
none of it were hidden.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from foxdist import config as configuration
from foxdist.attention.predict import Machine, alone, choose_layout, forecast
from foxdist.bench import gates as gate_kinds
from foxdist.bench import layouts
from foxdist.bench.attention import check_gates
from foxdist.bench.gates import Gates
from foxdist.bench.measure import Shape
from foxdist.bench.report import save, table
from foxdist.check import GIB, memory
from foxdist.config import Config, ConfigError, check_world
from foxdist.model import flops_per_token, parameter_count
from foxdist.options import exit_with, overrides_first, positive

# All of one H200. FLOP/s of the blocks' matrices with all that stands around them, and of the head with its loss.
BLOCKS, HEAD = 614e12, 152e12
RECOMPUTED = 8 / 6  # of the blocks' matrices, with activation checkpointing: forward twice
OPTIMIZER = 59e-12  # seconds for a parameter of a rank's share: clipping, Adam, and what DeepSpeed copies
# Seconds of a layer and micro-batch: small kernels and waits if several ranks share a sequence; ZeRO-3's gathering.
OVER_RANKS, GATHERED = 1.4e-3, 3.1e-3
# Bytes of a parameter that travel once a step: its gradient and the new weight; under ZeRO-3 weights travel for every
# micro-batch, in forward and backward.
A_STEP, A_GATHER = 4 + 2, 2 * 2
LINK, LATENCY = 300.0, 20.0  # GB/s and microseconds between GPUs of one host that read each other's memory
MEMORY = 139.0  # GiB
WORLDS = [8, 16, 32, 64, 128, 256]
DAY = 86400


@dataclass(frozen=True)
class Step:
    """Seconds of one step on the slowest rank, by what takes them."""

    attention: float
    """Of tiles alone."""
    exposed: float
    """Of attention that no tiles hide: pages on their way, and ranks that have fewer tiles than others."""
    matrices: float
    spread: float
    """What layers cost besides, if ranks share sequences or parameters."""
    gradients: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        result = simulate(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.output:
        save(chosen.output, "simulate", markdown(result), result)
        draw(result, chosen.output / "simulate.png")
    print(markdown(result))
    return 0


def simulate(chosen: argparse.Namespace) -> dict[str, Any]:
    """A row for each number of GPUs and `parallel.cp`. Raises `ValueError` if none fits, or what is asked for was not
    measured."""
    config = configuration.load(chosen.config, chosen.overrides)
    if config.train.precision != "bf16" or not config.train.compile:
        raise ValueError(
            f"train.precision={config.train.precision}, train.compile={str(config.train.compile).lower()}: were not "
            "measured; must be bf16 and true; add train.precision=bf16 train.compile=true"
        )
    gates = gate_kinds.find(chosen.gates)
    starts = boundaries(config, gates, chosen)
    rows, left_out = [], []

    def over(cp: int) -> Config:
        return configuration.load(chosen.config, [*chosen.overrides, f"parallel.cp={cp}"])

    for world in chosen.worlds:
        for cp in (n for n in chosen.cp or _powers(world) if world % n == 0):
            try:
                rows.append(row(over(cp), world, starts, chosen))
            except ConfigError as error:
                left_out.append(f"{world} GPUs, cp {cp}: {str(error).partition(';')[0]}")
    if not rows:
        raise ValueError(f"--worlds, --cp: nothing fits; {left_out[0] if left_out else 'choose numbers that divide'}")
    setup = {
        "config": str(chosen.config),
        "overrides": chosen.overrides,
        "gates": gates.name,
        "date": time.strftime("%Y-%m-%d"),
    }
    return {"setup": setup, "length": config.data.sequence_length, "rows": rows, "left_out": left_out}


def boundaries(config: Config, gates: Gates, chosen: argparse.Namespace) -> list[np.ndarray]:
    """[1, H, N] for each layer that the gates tell apart: the first block that each query block keeps.

    Raises `ValueError` for gates that were recorded of another model, or of shorter sequences.
    """
    model = config.model
    asked = argparse.Namespace(no_acp=not config.acp.enabled, bound=config.acp.bound, **vars(chosen))
    shape = Shape(model.heads, model.groups, model.head_dim)
    check_gates(gates, [shape], [config.data.sequence_length])
    return [layouts.find_start(gates, shape, config.data.sequence_length, i, asked) for i in range(gates.layers)]


def row(config: Config, world: int, starts: list[np.ndarray], chosen: argparse.Namespace) -> dict[str, Any]:
    """What is said of one mesh. Raises `ConfigError` if the configuration does not fit it."""
    dp, _ = check_world(config, world)
    took = step(config, world, starts, chosen)
    tokens, kept = config.train.tokens_per_step, _share_kept(starts)
    needed = sum(memory(config, world).values()) / GIB
    return {
        "GPUs": world,
        "dp": dp,
        "cp": config.parallel.cp,
        "tokens/s": tokens / took.seconds,
        "tokens/s/GPU": tokens / took.seconds / world,
        "step(s)": took.seconds,
        "memory(GiB)": needed,
        "fits": needed <= chosen.memory,
        "run(days)": config.total_steps * took.seconds / DAY,
        "tiles_kept(%)": 100 * kept,
        "parts(%)": {name: 100 * seconds / took.seconds for name, seconds in vars(took).items()},
    }


def step(config: Config, world: int, starts: list[np.ndarray], chosen: argparse.Namespace) -> Step:
    """A training step on `world` GPUs. starts: of `boundaries`."""
    _, accumulated = check_world(config, world)
    model, train, cp = config.model, config.train, config.parallel.cp
    machine = _machine(config, chosen)
    tiles, pages = _attention(starts, config, machine)
    layers = model.layers * accumulated
    sequences = train.micro_batch * accumulated
    tokens = sequences * config.data.sequence_length // cp
    head = 6 * model.vocab * model.hidden
    blocks = flops_per_token(model, config.data.sequence_length)[0] - head
    blocks *= RECOMPUTED if train.activation_checkpointing else 1
    parameters, others = parameter_count(model), (world - 1) / world
    link = machine.inside if world <= machine.host else machine.across
    small = layers * OVER_RANKS if cp > 1 else 0.0
    if config.parallel.zero == 3:
        small += max(layers * GATHERED, accumulated * parameters * A_GATHER * others / link)
    return Step(
        attention=tiles * model.layers * sequences,
        exposed=pages * model.layers * sequences,
        matrices=tokens * (blocks / BLOCKS + head / HEAD),
        spread=small,
        gradients=parameters * A_STEP * others / link if world > machine.host else 0.0,
        optimizer=parameters / world * OPTIMIZER,
    )


def _attention(starts: list[np.ndarray], config: Config, machine: Machine) -> tuple[float, float]:
    """Seconds of one layer and sequence, the mean over layers: of tiles, and what none hide."""
    model, cp = config.model, config.parallel.cp
    if cp == 1:
        return statistics.mean(alone(start, model.head_dim, machine)[1] for start in starts), 0.0
    layout, schedule = config.parallel.layout, config.parallel.schedule
    if layout == "auto":
        layout, _ = choose_layout(config.data.sequence_length, cp, model.heads, model.groups, cp <= machine.host)
    found = [forecast(s, model.groups, model.head_dim, 2, cp, layout, machine, schedule) for s in starts]
    both, exposed = (statistics.mean(values) for values in zip(*((f.both, f.exposed) for f in found)))
    return both - exposed, exposed


def _machine(config: Config, chosen: argparse.Namespace) -> Machine:
    asked = argparse.Namespace(**vars(chosen))
    if config.parallel.cp > chosen.ranks_per_host:
        asked.latency = layouts.LATENCY  # of messages
    return layouts.machine(config.model.head_dim, asked)


def _share_kept(starts: list[np.ndarray]) -> float:
    own = np.arange(starts[0].shape[-1])
    return float(np.mean([(own - start + 1).mean() for start in starts]) / (own + 1).mean())


def _powers(world: int) -> list[int]:
    return [2**i for i in range(world.bit_length()) if 2**i <= world]


def markdown(result: dict[str, Any]) -> str:
    """The table; of each number of GPUs the fastest that fits in bold."""
    setup, rows = result["setup"], result["rows"]
    title = f"{setup['config']} {' '.join(setup['overrides'])}".strip()
    title += f", {result['length']:,} tokens a sequence, gates {setup['gates']}; a forecast for H200s, {setup['date']}"
    names = ("GPUs", "dp x cp", "tokens/s", "tokens/s a GPU", "step, s", "days", "memory, GiB", *rows[0]["parts(%)"])
    fitting = [r for r in rows if r["fits"]]
    best = {r["GPUs"]: max(x["tokens/s"] for x in fitting if x["GPUs"] == r["GPUs"]) for r in fitting}
    cells = []
    for r in rows:
        rate = f"{r['tokens/s']:,.0f}"
        cells.append(
            (
                str(r["GPUs"]),
                f"{r['dp']} x {r['cp']}",
                f"**{rate}**" if r["fits"] and r["tokens/s"] == best[r["GPUs"]] else rate,
                f"{r['tokens/s/GPU']:,.0f}",
                f"{r['step(s)']:.3g}",
                f"{r['run(days)']:.3g}",
                f"{r['memory(GiB)']:.1f}" + ("" if r["fits"] else ", too much"),
                *(f"{share:.0f} %" for share in r["parts(%)"].values()),
            )
        )
    kept = f"{rows[0]['tiles_kept(%)']:.1f} % of the tiles are kept."
    notes = [f"- left out: {text}" for text in result["left_out"]]
    return "\n\n".join([title, table(names, cells), kept, *(["\n".join(notes)] if notes else [])])


def draw(result: dict[str, Any], path: Path) -> None:
    """One picture: tokens/s a GPU and memory by the number of GPUs, a line for each cp."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = result["rows"]
    for cp in sorted({r["cp"] for r in rows}):
        mine = [r for r in rows if r["cp"] == cp]
        for axis, name in zip(axes, ("tokens/s/GPU", "memory(GiB)")):
            axis.plot([r["GPUs"] for r in mine], [r[name] for r in mine], ".-", label=f"cp {cp}")
    for axis, title in zip(axes, ("tokens/s a GPU", "memory of a GPU, GiB")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({r["GPUs"] for r in rows}), [str(n) for n in sorted({r["GPUs"] for r in rows})])
        axis.set(title=title, xlabel="GPUs", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m foxdist.simulate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value")
    add("--config", type=Path, required=True, metavar="FILE")
    add("--worlds", type=positive, nargs="+", default=WORLDS, metavar="N", help="GPUs; default: 8 to 256")
    add("--cp", type=positive, nargs="+", metavar="N", help="default: every power of two")
    add("--gates", default="acp", metavar="KIND|FILE", help=gate_kinds.CHOICES)
    add("--memory", type=layouts.rate, default=MEMORY, metavar="GiB", help="of a GPU; default: %(default)s, an H200's")
    add("--ranks-per-host", type=positive, default=8, metavar="P", help="default: %(default)s")
    layouts.add_options(parser)
    parser.set_defaults(link=LINK, latency=LATENCY)
    add("--output", type=Path, metavar="DIR", help="also write table.md, simulate.json and .png there")
    return parser.parse_args(overrides_first(arguments))


if __name__ == "__main__":
    exit_with(main)
