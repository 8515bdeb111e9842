"""Training on random tokens, timed: python -m foxdist.bench train. It starts its ranks itself, on this host, or is
started on all of them by a launcher, on many hosts.

Every combination of the options is a row of the table. What runs out of memory says so in its row, and the rest goes
on. With --longest, instead of times, the longest sequence that trains.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foxdist import check
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist.before_start import check_host_memory
from foxdist.bench import processes
from foxdist.bench import train_report as report
from foxdist.bench.cells import GATES, Cell, look, measure
from foxdist.bench.gates import REGIMES
from foxdist.bench.processes import Launched, OutOfMemory, Processes, RankError
from foxdist.options import positive

CONFIGS = Path(__file__).parents[2] / "configs"
ON_OFF = {"on": True, "off": False}
CHECKPOINTING = {"on": (True, False), "off": (False, False), "offload": (True, True)}  # is it, and on the host
UNIT = 16384  # tokens of a rank by which --longest searches
FIRST = 0.9  # of a device's memory: the arithmetic leaves out what is fragmented
AXES = {
    "data.sequence_length": "--lengths",
    "parallel.cp": "--cp",
    "parallel.zero": "--zero",
    "acp.enabled": "--acp",
    "train.activation_checkpointing": "--checkpointing",
    "train.activation_offloading": "--checkpointing",
    "train.compile": "--compile",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One combination of the options but the length."""

    model: str
    cp: int
    zero: int
    acp: str
    checkpointing: str
    compile: str
    gates: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--models", nargs="+", default=["fox_pro_125m"], metavar="NAME|FILE", help="of configs/, or a YAML file")
    add("--lengths", type=positive, nargs="+", metavar="T", help="tokens of a sequence; default: 16384")
    add("--cp", type=positive, nargs="+", default=[1], metavar="P", help="ranks that share a sequence")
    add("--zero", type=int, nargs="+", default=[1], choices=[1, 2, 3])
    add("--acp", nargs="+", default=["on", "off"], choices=ON_OFF)
    add(
        "--checkpointing",
        nargs="+",
        default=["off"],
        choices=CHECKPOINTING,
        help="activation checkpointing; offload: what it keeps waits in the host's memory",
    )
    add("--compile", nargs="+", default=["off"], choices=ON_OFF, help="torch.compile of the blocks")
    add(
        "--gates",
        nargs="+",
        default=["opened"],
        choices=GATES,
        help="initial: a new model's, all local; opened: 30 %% of the tiles of 16,384 tokens are kept; default: opened",
    )
    add("--ranks", type=positive, metavar="N", help="processes, one a GPU; default: the largest --cp")
    add("--warmup", type=positive, metavar="N", help="steps before the timed ones; default: 3, with --longest 1")
    add("--steps", type=positive, metavar="N", help="timed steps; default: 8, with --longest 1")
    processes.add_option(parser)
    add("--profile", type=Path, metavar="FILE", help="of one configuration, also the longest kernels; a Chrome trace")
    add("--longest", action="store_true", help="search the longest sequence that trains, in place of --lengths")
    add("--up-to", type=positive, default=2**21, metavar="T", help="where --longest ends; default: %(default)s")
    add("--output", type=Path, metavar="DIR", help="also write table.md, train.json and train.png there")
    add("overrides", nargs="*", metavar="section.key=value", help="over the configurations")


def run(chosen: argparse.Namespace) -> int:
    """Prints the table, and writes it after every row. 1 if something but memory failed, or a launcher's rank.

    Raises `ValueError` for a mistake in the options or the configuration.
    """
    launched = meshes.world_from_environment() > 1
    ranks = meshes.world_from_environment() if launched else chosen.ranks or max(chosen.cp)
    _check(chosen, ranks, launched)
    points = list(_points(chosen))
    cells = [_cell(point, length, ranks, chosen) for point in points for length in _lengths(point, chosen)]
    for cell in cells:
        _check_gates(cell)
    _check_cells(chosen, cells, ranks, launched)
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour
    call = Launched() if launched else Processes(ranks, chosen.patience)
    try:
        setup = call(look, cells) | _setup(chosen, ranks, cells)
        result: dict[str, Any] = {"setup": setup, "rows": []}
        for row in _rows(points, chosen, ranks, call, setup["memory(GiB)"]):
            result["rows"].append(row)
            # Of a launcher's ranks the one that fails may be the only one that gets so far.
            if chosen.output and (call.first or row["failed"]):
                report.write(chosen.output, result)
        if call.first:
            print(report.markdown(result))
    finally:
        call.stop()
    # A launcher ends ranks that wait for one that failed only if that one says so.
    fine = (None,) if launched else (None, report.OUT_OF_MEMORY)
    return 1 if any(row["failed"] not in fine for row in result["rows"]) else 0


def _points(chosen: argparse.Namespace) -> Iterator[Point]:
    axes = (chosen.models, chosen.cp, chosen.zero, chosen.checkpointing, chosen.compile, chosen.gates, chosen.acp)
    for model, cp, zero, checkpointing, compiled, gates, acp in itertools.product(*axes):
        yield Point(model, cp, zero, acp, checkpointing, compiled, gates)


def _lengths(point: Point, chosen: argparse.Namespace) -> list[int]:
    """Of the rows; with --longest, the first that is tried."""
    return [UNIT * point.cp] if chosen.longest else chosen.lengths or [UNIT]


def _cell(point: Point, length: int, ranks: int, chosen: argparse.Namespace) -> Cell:
    """One micro-batch of one sequence a step, on every group of cp ranks, if no override says otherwise."""
    checkpointing, offloading = CHECKPOINTING[point.checkpointing]
    set_here = {
        "data.sequence_length": length,
        "parallel.cp": point.cp,
        "parallel.zero": point.zero,
        "acp.enabled": ON_OFF[point.acp],
        "train.activation_checkpointing": checkpointing,
        "train.activation_offloading": offloading,
        "train.compile": ON_OFF[point.compile],
    }
    overrides = [f"{name}={str(value).lower()}" for name, value in set_here.items()]
    overrides += ["train.micro_batch=1", *chosen.overrides]
    path = _file(point.model)
    config = configuration.load(path, overrides)
    if not any(text.startswith("train.tokens_per_step=") for text in chosen.overrides):
        tokens = length * config.train.micro_batch * (ranks // point.cp)
        config = configuration.load(path, [*overrides, f"train.tokens_per_step={tokens}"])
    configuration.check_world(config, ranks)
    warmup, steps = (1, 1) if chosen.longest else (3, 8)
    return Cell(point.model, point.gates, config, chosen.warmup or warmup, chosen.steps or steps, chosen.profile)


def _file(model: str) -> Path:
    """Of the option --models."""
    path = Path(model) if model.endswith((".yaml", ".yml")) else CONFIGS / f"{model}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml")))
        raise ValueError(f"--models {model}: no such file; must be a YAML file, or one of {known}; correct the name")
    return path


def _check(chosen: argparse.Namespace, ranks: int, launched: bool) -> None:
    """Mistakes that no configuration sees. Does not touch a GPU: what this process holds there, no rank can have."""
    if launched and chosen.ranks not in (None, ranks):
        raise ValueError(f"--ranks {chosen.ranks}: the launcher started {ranks}; must be that many; leave it out")
    gpus = torch.cuda.device_count()
    if not launched and gpus and ranks > gpus:
        raise ValueError(f"--ranks {ranks}: this host has {gpus} GPUs; must be at most that; lower --ranks or --cp")
    for cp in chosen.cp:
        if ranks % cp:
            raise ValueError(f"--cp {cp}: does not divide {ranks} ranks; must do so; change it or --ranks")
    for text in chosen.overrides:
        name = text.partition("=")[0]
        if name in AXES:
            raise ValueError(f"{text}: is set by an option here; must be left out; use {AXES[name]}")
    if chosen.longest and chosen.lengths:
        raise ValueError(f"--lengths {chosen.lengths[0]}: --longest searches it; must be left out; use --up-to")
    if chosen.longest and chosen.up_to < UNIT * max(chosen.cp):
        least = UNIT * max(chosen.cp)
        raise ValueError(f"--up-to {chosen.up_to}: shorter than the first sequence; must be at least {least}; raise it")


def _check_cells(chosen: argparse.Namespace, cells: list[Cell], ranks: int, launched: bool) -> None:
    """Where there must be no more than one."""
    many = chosen.longest or len(cells) > 1
    if launched and many:
        what = "--longest" if chosen.longest else f"{len(cells)} configurations"
        raise ValueError(
            f"train: {what} on {ranks} ranks of a launcher; must be one configuration, for ranks that fail cannot be "
            "started again here; call it for each"
        )
    if chosen.profile and many:
        raise ValueError(f"--profile {chosen.profile}: of {len(cells)} configurations; must be one; choose one")
    if chosen.profile and not chosen.profile.absolute().parent.is_dir():
        raise ValueError(f"--profile {chosen.profile}: its folder does not exist; must do so; make it first")


def _check_gates(cell: Cell) -> None:
    regime, model = GATES[cell.gates], cell.config.model
    if regime is None:
        return
    try:
        REGIMES[regime](model.heads, model.head_dim)
    except ValueError:
        raise ValueError(
            f"--gates {cell.gates}: {cell.model} has {model.heads} heads; must have 4 or more, of which one stays "
            "global; use --gates initial"
        ) from None


def _setup(chosen: argparse.Namespace, ranks: int, cells: list[Cell]) -> Row:
    return {
        "torch": torch.__version__,
        "ranks": ranks,
        "precision": "/".join(sorted({cell.config.train.precision for cell in cells})),
        "overrides": chosen.overrides,
        "warmup": cells[0].warmup,
        "steps": cells[0].steps,
        "date": time.strftime("%Y-%m-%d"),
    }


def _rows(
    points: list[Point], chosen: argparse.Namespace, ranks: int, call: Processes | Launched, room: float | None
) -> Iterator[Row]:
    """One after the other, each as soon as it is measured. room: as of `longest`."""
    for point in points:

        def measured(length: int, point: Point = point) -> Row:
            return _row(point, length, _cell(point, length, ranks, chosen), ranks, call)

        def expected(length: int, point: Point = point) -> float:
            return sum(check.memory(_cell(point, length, ranks, chosen).config, ranks).values()) / check.GIB

        if chosen.longest:
            yield longest(measured, UNIT * point.cp, chosen.up_to, room, expected)
        else:
            yield from map(measured, _lengths(point, chosen))


def _row(point: Point, length: int, cell: Cell, ranks: int, call: Processes | Launched) -> Row:
    row = vars(point) | {"tokens": length, "failed": None}
    label = ", ".join(f"{name} {value}" for name, value in row.items() if name != "failed")
    print(f"measuring {label}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    here = meshes.local_world_from_environment() if isinstance(call, Launched) else ranks
    try:
        check_host_memory(cell.config, here)
    except configuration.ConfigError as error:
        print(f"  out of memory: {error}", file=sys.stderr, flush=True)
        return row | {"failed": report.OUT_OF_MEMORY}
    try:
        row |= call(measure, cell)
        found = f"  {row['tokens/s/GPU']:,.0f} tokens/s/GPU, {report.peak_memory(row):.1f} GiB"
        print(f"{found}, after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        return row
    except OutOfMemory as error:
        print(f"  out of memory: {error.in_a_line}", file=sys.stderr, flush=True)
        return row | {"failed": report.OUT_OF_MEMORY}
    except RankError as error:  # one that fails must not cost the others' numbers
        print(error, file=sys.stderr, flush=True)
        return row | {"failed": error.briefly}


def longest(
    measured: Callable[[int], Row],
    unit: int,
    limit: int,
    room: float | None = None,
    expected: Callable[[int], float] | None = None,
) -> Row:
    """The row of the longest sequence that trains, a multiple of `unit` and at most `limit`; and what failed beyond it.

    Doubles while it fits, then halves the gap, to an eighth of the length. room: GiB of a rank's device, if known. Then
    it begins with what by arithmetic, `expected` GiB, takes nine tenths of that, less an eighth until it fits. Memory
    grows in a straight line with the length, so one or two that fit say where it ends: there it goes on.
    `does_not_fit`: the shortest that ran out of memory, or None. Another failure ends the search, and is its row.
    """
    best: Row | None = None
    peaks: dict[int, float] = {}  # GiB, by units
    fits, fails, end = 0, 0, limit // unit  # in units; 0: none yet
    first = 1
    if room and expected:
        each = (expected(64 * unit) - expected(32 * unit)) / 32  # far from where the loss takes most
        peaks[0] = expected(32 * unit) - 32 * each
        first = min(max(1, int((FIRST * room - peaks[0]) / each)), end)
    while fits < end and (not fails or fails - fits > max(1, fits // 8)):
        if not fails:
            length = min(2 * fits or first, end)
        elif first > 1 and not fits:
            length = fails - max(1, fails // 8)
        else:
            length = (fits + fails) // 2
        if room and len(peaks) > 1:
            length = min(max(_forecast(peaks, room), fits + max(1, fits // 8)), end)
        row = measured(length * unit)
        if row["failed"] is None:
            best, fits = row, length
            if room:
                peaks[length] = report.peak_memory(row)
        elif row["failed"] == report.OUT_OF_MEMORY:
            best, fails = best or row, length
            room = None  # what is left of the gap is halved
        else:
            return row | {"does_not_fit": None}
    assert best is not None, "the limit is at least one unit"
    return best | {"does_not_fit": fails * unit or None}


def _forecast(peaks: dict[int, float], room: float) -> int:
    """The length, in units, whose peak leaves a twentieth of `room` free: for the context, and what is fragmented."""
    (shorter, less), (longer, more) = list(peaks.items())[-2:]
    each = max((more - less) / (longer - shorter), 1e-6 * room)
    return longer + int((0.95 * room - more) / each)
