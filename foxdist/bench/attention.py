"""Attention against other implementations, on the same inputs: python -m foxdist.bench attention.

Each implementation first shows its errors against the definition; one that fails gets no time.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foxdist.attention.acp import BOUNDS
from foxdist.bench import gates as gate_kinds
from foxdist.bench import peers, report
from foxdist.bench.gates import Gates
from foxdist.bench.implementations import Implementation, defaults, registry
from foxdist.bench.measure import CHECKED, DTYPES, Case, Checker, Shape, limits, matmul_ceiling, measure
from foxdist.layout import BLOCK
from foxdist.options import positive

SHAPES = {"cuda": "16x64,8x128", "cpu": "4x64"}
LENGTHS = {"cuda": [4096, 16384, 65536], "cpu": [4096, 8192, 16384, 32768, 65536]}
REPEATS = {"cuda": 5, "cpu": 3}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line; defaults that hang on the device are filled in by `run`."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    add("--shapes", metavar="HxD,...", help="query heads x head dim; default: 16x64,8x128 on a GPU, 4x64 on a CPU")
    add("--heads", type=positive, metavar="H", help="with --head-dim: one shape, in place of --shapes")
    add("--head-dim", type=positive, metavar="D")
    add("--kv-heads", type=positive, metavar="K", help="key and value heads; default: as many as query heads")
    add("--lengths", type=positive, nargs="+", metavar="T")
    about = f"{gate_kinds.CHOICES}; default: acp on a GPU, local on a CPU"
    add("--gates", metavar="KIND|FILE", help=about)
    add("--implementations", nargs="+", metavar="NAME", help="default: what is made for the device, and all peers")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="fox=PATH: the official kernel's source; fla=PATH: flash-linear-attention's; or a Python file that "
        "defines attend(q, k, v, log_f, acp)",
    )
    add("--repeats", type=positive, metavar="N", help="sets of fresh inputs; default: 5 on a GPU, 3 on a CPU")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--bound", choices=BOUNDS, default=BOUNDS[0], help="foxdist's pruning rule; default: %(default)s")
    add("--output", type=Path, metavar="DIR", help="also write table.md, attention.json and attention.png there")


def run(chosen: argparse.Namespace) -> int:
    """Prints the table. 1 if a foxdist backend is wrong or breaks, 2 if something named cannot run.

    Raises `ValueError` for a mistake in the options.
    """
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; must be there; use --device cpu")
    device = torch.device(chosen.device)
    gates = gate_kinds.find(chosen.gates or ("acp" if device.type == "cuda" else "local"))
    dtype = chosen.dtype or ("bf16" if device.type == "cuda" else "fp32")
    shapes, lengths = _shapes(chosen), chosen.lengths or LENGTHS[device.type]
    check_gates(gates, shapes, lengths)
    implementations, named = _implementations(chosen, device)
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour
    result: dict[str, Any] = {
        "setup": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "dtype": dtype,
            "gates": gates.name,
            "bound": chosen.bound,
            "repeats": chosen.repeats or REPEATS[device.type],
            "date": time.strftime("%Y-%m-%d"),
        },
        "matmul(TFLOP/s)": matmul_ceiling(device, DTYPES[dtype]),
        "notes": {each.name: each.note for each in implementations if each.note},
        "not_available": {},
        "checks": [],
        "rows": [],
    }
    ragged = any(length % BLOCK for length in lengths)
    for shape in shapes:
        cases = [Case(shape, length, DTYPES[dtype], device) for length in lengths]
        passed = _checked(implementations, cases[0], ragged, result)
        missing = [name for name in named if name in result["not_available"]]
        if missing:
            reason = result["not_available"][missing[0]]
            print(f"error: --implementations {missing[0]}: not available here: {reason}; leave it out", file=sys.stderr)
            return 2
        for case in cases:
            result["rows"] += [_row(each, case, gates, result["setup"]["repeats"], chosen.bound) for each in passed]
    if chosen.output:
        report.write(chosen.output, result)
    print(report.markdown(result))
    ours = {each.name for each in implementations if each.ours}
    broken = [x for x in result["checks"] + result["rows"] if x["failed"] and x["implementation"] in ours]
    for x in broken:
        print(f"error: {x['implementation']} {x['shape']} {x['tokens']:,} tokens: {x['failed']}", file=sys.stderr)
    return 1 if broken else 0


def _shapes(chosen: argparse.Namespace) -> list[Shape]:
    if (chosen.heads is None) != (chosen.head_dim is None) or (chosen.heads and chosen.shapes):
        raise ValueError("--heads, --head-dim: one shape; must be given together, and without --shapes; use --shapes")
    text = f"{chosen.heads}x{chosen.head_dim}" if chosen.heads else chosen.shapes or SHAPES[chosen.device]
    return read_shapes(text, chosen.kv_heads)


def read_shapes(text: str, kv_heads: int | None) -> list[Shape]:
    """Of the option --shapes. Raises `ValueError`."""
    found = []
    for part in text.split(","):
        try:
            heads, dim = map(positive, part.split("x"))
        except (ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"--shapes {part}: not a shape; must be HEADSxDIM; for example 16x64,8x128") from None
        found.append(make_shape(heads, kv_heads, dim))
    return found


def make_shape(heads: int, kv_heads: int | None, dim: int) -> Shape:
    """Of the options; as many K/V heads as query heads if it is not said. Raises `ValueError`."""
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads}: does not divide {heads} query heads; must do so; change one")
    return Shape(heads, kv_heads, dim)


def check_gates(gates: Gates, shapes: list[Shape], lengths: list[int]) -> None:
    """Raises `ValueError` for gates that were not recorded for these."""
    for shape in shapes:
        if gates.heads not in (None, shape.heads):
            raise ValueError(
                f"--gates {gates.name}: of {gates.heads} heads; must be as many as measured, {shape.heads}; use "
                f"--shapes {gates.heads}x{shape.dim}"
            )
        gates.draw(shape.heads, shape.dim, 1, 0)  # a regime may refuse a number of heads
    if gates.length is not None and max(lengths) > gates.length:
        raise ValueError(
            f"--lengths {max(lengths)}: longer than the {gates.length} tokens of --gates {gates.name}; must be at most "
            "that; shorten it, or record a longer sequence"
        )


def _implementations(chosen: argparse.Namespace, device: torch.device) -> tuple[list[Implementation], list[str]]:
    """What to measure, and the names that the user asked for."""
    known = registry(chosen.bound)
    loaded = {peer.name: peer for peer in map(peers.load, chosen.peer)}
    for name in loaded.keys() & known.keys():
        raise ValueError(f"--peer {name}: is the name of a built-in implementation; must be another; rename it")
    known |= loaded
    for name in chosen.implementations or []:
        if name not in known:
            raise ValueError(
                f"--implementations {name}: unknown; must be among {', '.join(known)}; correct the name, or give its "
                "source with --peer NAME=PATH"
            )
    names = chosen.implementations or [*defaults(device), *loaded]
    return [known[name] for name in names], [*(chosen.implementations or []), *loaded]


def _checked(
    implementations: list[Implementation], case: Case, ragged: bool, result: dict[str, Any]
) -> list[Implementation]:
    """Those that are right at this shape. Others need to be so at uneven lengths only if one is measured."""
    mixed = gate_kinds.find("mixed")
    wrong: set[str] = set()
    for length in CHECKED:
        checker = Checker(case._replace(length=length), mixed)
        for each in implementations:
            skip = each.name in wrong or each.name in result["not_available"]
            if skip or (length % BLOCK and not (each.ours or ragged)):
                continue
            errors, failed = _errors(each, checker, case.dtype, result)
            if each.name in result["not_available"]:
                continue
            if failed:
                wrong.add(each.name)
            where = {"shape": str(case.shape), "tokens": length, "implementation": each.name}
            result["checks"].append(where | {"errors": errors, "failed": failed})
    return [each for each in implementations if each.name not in wrong | result["not_available"].keys()]


def _errors(
    each: Implementation, checker: Checker, dtype: torch.dtype, result: dict[str, Any]
) -> tuple[dict[str, float], str | None]:
    """The errors, and what is wrong. What the machine lacks is noted as not available."""
    try:
        errors = checker.errors(each)
    except Exception as error:  # whatever another project raises is a line of the table
        if each.ours and isinstance(error, ValueError) and str(error).startswith("backend="):
            result["not_available"][each.name] = _one_line(error)
        return {}, _one_line(error)
    allowed = limits(dtype)
    for name, value in errors.items():
        if not value <= allowed[name]:
            return errors, f"{name} is wrong: {value:.1e}, more than {allowed[name]:.1e}"
    return errors, None


def _row(each: Implementation, case: Case, gates: Gates, repeats: int, bound: str) -> dict[str, Any]:
    print(f"measuring {each.name}, {case.shape}, {case.length:,} tokens", file=sys.stderr)
    row = {"shape": str(case.shape), "tokens": case.length, "implementation": each.name, "failed": None}
    try:
        return row | measure(each, case, gates, repeats, bound)
    except Exception as error:  # one that runs out of memory must not cost the others' numbers
        return row | {"failed": _one_line(error)}
    finally:
        if case.device.type == "cuda":
            torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")[:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
