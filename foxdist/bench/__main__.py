"""Command line: python -m foxdist.bench attention [options]."""

import argparse
import json
import sys
from pathlib import Path

import torch

from foxdist.bench.attention import GATES, check, measure, table
from foxdist.options import positive


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foxdist.bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("attention", help="forward and backward of attention over sequence lengths")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--lengths", type=positive, nargs="+", default=[4096, 8192, 16384, 32768, 65536], metavar="T")
    p.add_argument("--heads", type=positive, default=4, metavar="H")
    p.add_argument("--dim", type=positive, default=64, metavar="D")
    p.add_argument(
        "--gates", default="local", choices=sorted(GATES), help="how fast heads forget; default: %(default)s"
    )
    p.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="medians over N fresh inputs; default: %(default)s"
    )
    p.add_argument("--json", type=_writable, metavar="FILE", help="also write the numbers there")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU; use --device cpu")
    device = torch.device(chosen.device)
    fault = check(device, chosen.heads, chosen.dim, chosen.gates)
    if fault:
        print(f"error: attention is wrong here ({fault}); no time is reported", file=sys.stderr)
        return 1
    rows = []
    for length in chosen.lengths:
        rows.append(measure(device, chosen.heads, chosen.dim, length, chosen.gates, chosen.repeats))
        print(f"measured {length:,} tokens", file=sys.stderr)
    print(table(rows))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))
    return 0


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {path.parent} is no folder; must be one; make it first")
    return path


if __name__ == "__main__":
    sys.exit(main())
