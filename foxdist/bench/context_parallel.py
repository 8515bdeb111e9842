"""Attention over ranks: which layout wins, and what it takes: python -m foxdist.bench context-parallel.

Without `--ranks` everything is planned from gates and forecast, with no GPU and no second process. With it the same is
also measured: on the ranks of a launcher, or on as many processes as the largest number of ranks asks for.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foxdist import mesh as meshes
from foxdist.attention.acp import BOUNDS
from foxdist.attention.backends import BACKENDS, choose_backend
from foxdist.attention.plan import SCHEDULES
from foxdist.attention.transport import TRANSPORTS
from foxdist.bench import gates as gate_kinds
from foxdist.bench import layouts, processes, spread, spread_report
from foxdist.bench.attention import check_gates, read_shapes
from foxdist.bench.layouts import Point, Row
from foxdist.bench.measure import DTYPES, SECONDS, Shape
from foxdist.bench.processes import Launched, Processes, RankError
from foxdist.bench.report import save
from foxdist.layout import BLOCK, LAYOUTS, chunk_count
from foxdist.options import positive

PLANNED = [2, 4, 8, 64]
LENGTHS = [65536, 1048576]
REPEATS = {"cuda": 5, "cpu": 3}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--shapes", default="16x64", metavar="HxD,...", help="query heads x head dim; default: %(default)s")
    add("--kv-heads", type=positive, metavar="K", help="key and value heads; default: as many as query heads")
    add("--lengths", type=positive, nargs="+", metavar="T", help="default: 65536 1048576, or none with --weak")
    add("--weak", type=positive, nargs="+", default=[], metavar="T", help="also so many tokens for each rank")
    add("--gates", default="acp", metavar="KIND|FILE", help=gate_kinds.CHOICES)
    add("--bound", choices=BOUNDS, default=BOUNDS[0], help="the pruning rule; default: %(default)s")
    add("--no-acp", action="store_true", help="prune nothing")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--plan-ranks", type=positive, nargs="+", metavar="P", help="to plan for; default: --ranks, or 2 4 8 64")
    add("--ranks-per-host", type=positive, default=8, metavar="P", help="of the forecast; default: %(default)s")
    layouts.add_options(parser)
    add("--ranks", type=positive, nargs="+", default=[], metavar="P", help="also measure on so many; 1 for speed-ups")
    add("--schedules", nargs="+", choices=SCHEDULES, default=["gather", "ring"], help="to measure")
    add("--transports", nargs="+", choices=TRANSPORTS, default=["auto"], help="to measure; default: auto")
    add("--repeats", type=positive, metavar="N", help="sets of fresh inputs; default: 5 on a GPU, 3 on a CPU")
    add(
        "--seconds",
        type=layouts.rate,
        default=SECONDS,
        metavar="S",
        help="of timed calls for each set of inputs on a GPU, at least three; default: %(default)s",
    )
    add("--graphs", action="store_true", help="replay calls as CUDA graphs, which takes the host no time; peer only")
    processes.add_option(parser)
    add("--backend", choices=BACKENDS, default="auto", help="of attention; default: %(default)s")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, metavar="DIR", help="also write table.md, context_parallel.json and .png there")


def run(chosen: argparse.Namespace) -> int:
    """Prints the tables; under a launcher its first rank does. 1 if a way to spread attention is wrong, or sends other
    bytes than brute force finds.

    Raises `ValueError` for a mistake in the options.
    """
    gates, shapes = gate_kinds.find(chosen.gates), read_shapes(chosen.shapes, chosen.kv_heads)
    chosen.repeats = chosen.repeats or REPEATS[chosen.device]
    measured = points_of(chosen, chosen.ranks)
    planned = [p for p in points_of(chosen, chosen.plan_ranks or chosen.ranks or PLANNED) if p.ranks > 1]
    check_gates(gates, shapes, [point.tokens for point in [*planned, *measured]])
    check_points(planned, measured)
    check_ranks(chosen, shapes)
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour
    result: dict[str, Any] = {
        "setup": setup_of(gates.name, chosen),
        "machine": {str(shape): vars(layouts.machine(shape.dim, chosen)) for shape in shapes},
        "left_out": [point._asdict() for point in planned if not point.fits],
        "plan": [row for shape in shapes for row in plan(shape, planned, chosen)],
        "checks": [],
        "rows": [],
        "verdicts": [],
    }
    planned_on = {point.ranks: point.ranks <= chosen.ranks_per_host for point in planned}
    result["forecast_verdicts"] = layouts.verdicts(result["plan"], shapes, planned_on)
    if measured and not measure_into(result, measured, shapes, chosen):
        return 0  # another rank of the launcher goes on
    if chosen.output:
        save(chosen.output, "context_parallel", spread_report.markdown(result), result)
        spread_report.draw(result, chosen.output / "context_parallel.png")
    print(spread_report.markdown(result))
    return report_failures(result)


def measure_into(result: dict[str, Any], points: list[Point], shapes: list[Shape], chosen: argparse.Namespace) -> bool:
    """Adds to `result` what is measured, and writes it after every row: hours may end early. Whether this process
    speaks for all ranks."""
    launched = meshes.world_from_environment() > 1
    call = Launched() if launched else Processes(max(chosen.ranks), chosen.patience)
    try:
        machine = call(spread.look, chosen)
        result["setup"]["device"] = machine["device"]
        for kind, row in measured(points, shapes, chosen, call):
            if not call.first:
                continue
            result[kind].append(row)
            result["rows"] = speed_ups(result["rows"])
            fine = [x for x in result["rows"] if x["ranks"] > 1 and spread_report.timed(x)]
            result["verdicts"] = layouts.verdicts(fine, shapes, machine["one_host"])
            if chosen.output:
                save(chosen.output, "context_parallel", spread_report.markdown(result), result)
        return call.first
    finally:
        call.stop()


def measured(
    points: list[Point], shapes: list[Shape], chosen: argparse.Namespace, call: Processes | Launched
) -> Iterator[tuple[str, Row]]:
    """Checks and rows, each with the name of its list, as soon as it is there. A row that fails is one that says so."""
    for way in spread.ways(shapes, sorted({point.ranks for point in points}), chosen):
        check = way.row() | {"tokens": spread.check_length(way.ranks), "errors": {}}
        check = _called(check, spread.Job(way, None, chosen), call)
        yield "checks", check
        for point in points if check["failed"] is None else []:
            if point.ranks == way.ranks:
                row = _called(way.row() | point._asdict(), spread.Job(way, point, chosen), call)
                if call.first:
                    _say(row)
                yield "rows", row


def _called(about: Row, job: spread.Job, call: Processes | Launched) -> Row:
    try:
        return about | {"failed": None} | call(spread.measure_here, job)
    except RankError as error:
        if isinstance(call, Launched):  # whose other ranks wait for this one
            raise
        print(error, file=sys.stderr, flush=True)
        return about | {"failed": error.briefly}


def _say(row: Row) -> None:
    """A row as soon as it is there, for a run that takes long."""
    way = [row[name] for name in ("layout", "schedule", "transport") if row[name]]
    where = ", ".join((f"{row['ranks']} ranks", *way, row["shape"], f"{row['tokens']:,} tokens"))
    if spread_report.timed(row):
        print(
            f"{where}: {row['forward(ms)']:.3g} and {row['forward+backward(ms)']:.3g} ms", file=sys.stderr, flush=True
        )
    else:
        print(f"{where}: {row['failed']}", file=sys.stderr, flush=True)


def points_of(chosen: argparse.Namespace, ranks: list[int]) -> list[Point]:
    """What the options ask for on these numbers of ranks."""
    lengths = chosen.lengths or ([] if chosen.weak else LENGTHS)
    ranks = sorted(set(ranks))
    return [Point("strong", tokens, size) for tokens in lengths for size in ranks] + [
        Point("weak", tokens * size, size) for tokens in chosen.weak for size in ranks
    ]


def check_points(planned: list[Point], measured: list[Point]) -> None:
    """Raises `ValueError` if one that is to be measured does not fit its ranks, or none that is to be planned does."""
    wrong = [point for point in measured if not point.fits]
    if not wrong and planned and not any(point.fits for point in planned):
        wrong = planned
    if wrong:
        _, tokens, ranks = wrong[0]
        unit = BLOCK * chunk_count(ranks, "zigzag")
        raise ValueError(
            f"--lengths, --weak: {tokens} tokens on {ranks} ranks; must be a multiple of {unit}, whole {BLOCK}-token "
            f"blocks for each of {unit // BLOCK} chunks; use {-(-tokens // unit) * unit}, or fewer ranks"
        )


def check_ranks(chosen: argparse.Namespace, shapes: list[Shape]) -> None:
    """Raises `ValueError` for ranks that cannot be had here, and for a device or backend that cannot."""
    world = meshes.world_from_environment()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; must be there; use --device cpu")
    if world > 1 and max(chosen.ranks, default=0) != world:
        raise ValueError(
            f"--ranks {' '.join(map(str, chosen.ranks))}: the launcher started {world}; the largest must be that; "
            f"add {world}, or start another number"
        )
    if not chosen.ranks:
        return
    gpus = torch.cuda.device_count() if chosen.device == "cuda" else None
    if gpus is not None and world == 1 and max(chosen.ranks) > gpus:
        raise ValueError(
            f"--ranks {max(chosen.ranks)}: torch finds {gpus} GPU{'s' if gpus > 1 else ''}; must be one for every "
            "rank; use fewer, or a launcher on several hosts"
        )
    if chosen.graphs and (chosen.device != "cuda" or chosen.transports != ["peer"]):
        raise ValueError(
            f"--graphs: --device {chosen.device}, --transports {' '.join(chosen.transports)}; must be cuda and peer, "
            "with which the host waits for nothing; add --transports peer, or leave --graphs out"
        )
    for shape in shapes:
        choose_backend(chosen.backend, torch.device(chosen.device), DTYPES[chosen.dtype], shape.dim)


def plan(shape: Shape, points: list[Point], chosen: argparse.Namespace) -> list[Row]:
    """The rows of the points whose chunks are whole blocks."""
    print(f"planning {shape}", file=sys.stderr)
    return layouts.plan(gate_kinds.find(chosen.gates), shape, [point for point in points if point.fits], chosen)


def setup_of(gates: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "gates": gates,
        "bound": None if chosen.no_acp else chosen.bound,
        "dtype": chosen.dtype,
        "device": None,
        "ranks_per_host": chosen.ranks_per_host,
        "repeats": chosen.repeats,
        "backend": chosen.backend,
        "graphs": chosen.graphs,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def speed_ups(rows: list[Row]) -> list[Row]:
    """The rows with what all ranks compute in a second, in that of one rank in the same run; of weak scaling, too.

    At equal length this is one rank's time over theirs. None where one rank was not measured. In the order of the
    tables.
    """
    rows = sorted(rows, key=lambda row: (row["shape"], row["series"], spread_report.base(row), row["ranks"]))
    for row in rows:
        one = next((other for other in rows if _is_base(other, row)), None)
        for name in ("forward", "forward+backward"):
            key, speed_up = f"{name}(ms)", None
            if one and spread_report.timed(row):
                speed_up = row["tiles"] / row[key] / (one["tiles"] / one[key])
            row[f"{name}_speed_up"] = speed_up
    return rows


def _is_base(one: Row, row: Row) -> bool:
    same = one["shape"] == row["shape"] and one["series"] == row["series"] and one["ranks"] == 1
    return same and one["tokens"] == spread_report.base(row) and spread_report.timed(one)


def report_failures(result: dict[str, Any]) -> int:
    """Names what is wrong; the exit status."""
    failed = [x for x in result["checks"] + result["rows"] if x["failed"]]
    for x in failed:
        way = f"{x['shape']} on {x['ranks']} ranks, {x['layout']}, {x['schedule']}, {x['transport']}"
        way += f", {x['tokens']:,} tokens"
        print(f"error: {way}: {x['failed']}", file=sys.stderr)
    return 1 if failed else 0
