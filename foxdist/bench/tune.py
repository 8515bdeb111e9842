"""Tile sizes for a GPU that has none yet: times candidates and prints entries for attention/kernels/configs.py.

Each candidate runs in a process of its own with a time limit, because a tile that does not fit may take its compiler,
or the GPU's context, down with it. One that computes something wrong is out.
"""

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import MISSING, asdict, fields, replace
from typing import Any, NamedTuple

import torch

from foxdist.bench import gates as gate_kinds
from foxdist.bench.implementations import registry
from foxdist.bench.measure import CHECKED, DTYPES, Case, Checker, Shape, bind, limits, make_inputs, milliseconds
from foxdist.options import positive

WARPS, STAGES, REGISTERS = (4, 8), (1, 2, 3), (128, 168)
SHOWN = 4  # of the runners-up


class Timing(NamedTuple):
    """What came of a candidate: milliseconds, or None and the reason."""

    ms: float | None
    reason: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--dims", type=positive, nargs="+", default=[64, 128], metavar="D", help="head dims; default: 64 128")
    add("--heads", type=positive, default=8, metavar="H")
    add("--length", type=positive, default=16384, metavar="T")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--limit", type=positive, default=120, metavar="S", help="seconds for a candidate; default: %(default)s")
    add("--try", dest="candidate", help=argparse.SUPPRESS)  # the child's side


def run(chosen: argparse.Namespace) -> int:
    """Prints `dim: Tiles(...)` for each head dim. Raises `ValueError` where there is no GPU."""
    if chosen.candidate:
        print(json.dumps(time_here(json.loads(chosen.candidate))))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("tune: torch finds no GPU; must run on the one to tune for; run it there")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {chosen.dtype}, {chosen.length:,} tokens; ms")
    for dim in chosen.dims:
        print(search(dim, chosen), flush=True)
    return 0


def search(dim: int, chosen: argparse.Namespace) -> str:
    """The best tiles found for one head dim, as text for the table: kernel by kernel, the others as they were.

    forward is ranked by the time of forward, the two backward kernels by that of both directions.
    """
    configs = importlib.import_module("foxdist.attention.kernels.configs")
    capability = torch.cuda.get_device_capability()
    tiles = configs.choose("triton", capability, dim, DTYPES[chosen.dtype])
    lines = [f"{dim}: Tiles("]
    for kernel in tiles._fields:
        before = getattr(tiles, kernel)
        found: dict[Any, Timing] = {}
        _time([before, *candidates(before, dim, DTYPES[chosen.dtype])], found, tiles, kernel, dim, chosen)
        _time(refinements(ranked(found)[0]), found, tiles, kernel, dim, chosen)
        winner, *others = ranked(found)
        runners_up = ", ".join(f"{text(tile)} {found[tile].ms:.3g}" for tile in others[:SHOWN])
        lines += [f"    # {found[winner].ms:.3g}; {runners_up}", f"    {kernel}={text(winner)},"]
        tiles = tiles._replace(**{kernel: winner})
    return "\n".join([*lines, "),"])


def candidates(like: Any, dim: int, dtype: torch.dtype) -> list[Any]:
    """Tiles of all sizes worth a try, with nothing capped."""
    sizes = (32, 64) if dim > 128 else (32, 64, 128) if dtype == torch.float32 else (64, 128)
    plain = {f.name: f.default for f in fields(like) if f.default is not MISSING}
    return [
        replace(like, rows=rows, columns=columns, warps=warps, stages=stages, **plain)
        for rows, columns, warps, stages in itertools.product(sizes, sizes, WARPS, STAGES)
    ]


def refinements(tile: Any) -> list[Any]:
    """The same tile with its options turned: registers capped so that more programs fit, vectors by descriptors."""
    return [
        replace(tile, maxnreg=registers, vectors=vectors)
        for registers, vectors in itertools.product((None, *REGISTERS), (False, True))
    ]


def ranked(found: dict[Any, Timing]) -> list[Any]:
    """The tiles that ran, fastest first. Raises `ValueError` if none did."""
    ran = [(timing.ms, i, tile) for i, (tile, timing) in enumerate(found.items()) if timing.ms is not None]
    if not ran:
        reason = next(iter(found.values())).reason
        raise ValueError(f"tune: no tile ran, not even the one in use ({reason}); one must; see what attention says")
    return [tile for _, _, tile in sorted(ran)]


def _time(
    wanted: list[Any], found: dict[Any, Timing], tiles: Any, kernel: str, dim: int, chosen: argparse.Namespace
) -> None:
    """Adds to `found` what is not in it yet."""
    for tile in wanted:
        if tile not in found:
            found[tile] = attempt(tiles._replace(**{kernel: tile}), kernel, dim, chosen)
            print(f"{dim} {kernel} {text(tile)}: {found[tile].ms or found[tile].reason}", file=sys.stderr)


def attempt(tiles: Any, kernel: str, dim: int, chosen: argparse.Namespace) -> Timing:
    """Times one choice of tiles in a process of its own."""
    candidate = {
        "tiles": {name: asdict(tile) for name, tile in tiles._asdict().items()},
        "both": kernel != "forward",
        "shape": [chosen.heads, chosen.heads, dim],
        "length": chosen.length,
        "dtype": chosen.dtype,
    }
    command = [sys.executable, "-m", "foxdist.bench", "tune", "--try", json.dumps(candidate)]
    return in_a_process(command, chosen.limit)


def in_a_process(command: list[str], limit: float) -> Timing:
    """The number that a command prints last, unless it fails or takes longer than `limit` seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Timing(None, f"over {limit} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Timing(None, f"status {done.returncode}: {said[-1][:150] if said else ''}")
    return Timing(float(done.stdout.split()[-1]))


def time_here(candidate: dict[str, Any]) -> float:
    """Median milliseconds in this process. Raises `ValueError` if the result is wrong."""
    configs = importlib.import_module("foxdist.attention.kernels.configs")
    use(configs.Tiles(**{name: configs.Tile(**tile) for name, tile in candidate["tiles"].items()}))
    shape, dtype = Shape(*candidate["shape"]), DTYPES[candidate["dtype"]]
    case = Case(shape, candidate["length"], dtype, torch.device("cuda"))
    implementation = registry("paper")["foxdist-triton"]
    errors = Checker(case._replace(length=CHECKED[0]), gate_kinds.find("mixed")).errors(implementation)
    wrong = {name: error for name, error in errors.items() if not error <= limits(dtype)[name]}
    if wrong:
        raise ValueError(f"wrong results: {wrong}")
    ready = bind(implementation, make_inputs(case, gate_kinds.find("acp"), 0))
    times = sorted(milliseconds(ready.both if candidate["both"] else ready.forward, case.device))
    return times[len(times) // 2]


def use(tiles: Any) -> None:
    """From here on every kernel of this process takes these: each module holds `choose` by its own name."""
    for name in ("configs", "triton_forward", "triton_backward"):
        module = importlib.import_module(f"foxdist.attention.kernels.{name}")
        module.choose = lambda *arguments: tiles  # type: ignore[attr-defined]


def text(tile: Any) -> str:
    """A tile as configs.py writes it: what has no default by place, the rest by name where it differs."""
    parts = []
    for f in fields(tile):
        value = getattr(tile, f.name)
        if f.default is MISSING:
            parts.append(repr(value))
        elif value != f.default:
            parts.append(f"{f.name}={value!r}")
    return f"Tile({', '.join(parts)})"
