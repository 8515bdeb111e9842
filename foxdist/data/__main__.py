"""Command line: python -m foxdist.data prepare INPUT... --output DIR [options]."""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from foxdist.data.prepare import Options, Report, find_files, prepare
from foxdist.options import exit_with, positive


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True)
    try:
        total = sum(p.stat().st_size for p in find_files(options))
        # A BPE is trained on the same files first, and that pass has no bar of its own.
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading text", total=total)
            prepared, report = prepare(options, lambda size: bar.update(task, advance=size))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        return 130
    if report is None:
        print(f"{options.output}: already prepared ({prepared.sequences} sequences); nothing to do")
        return 0
    _print_report(options, prepared.tokenizer, report)
    return 0


def _print_report(options: Options, tokenizer: str, report: Report) -> None:
    length = options.sequence_length
    fill = 1 - report.tokens / (report.sequences * length)
    if options.train_bpe and len(report.histogram) < options.train_bpe:
        print(f"the text gives only {len(report.histogram):,} tokens of the {options.train_bpe:,} asked for")
    print(f"{options.output}: {report.documents:,} documents, {report.tokens:,} tokens ({tokenizer} tokenizer)")
    print(f"{report.sequences:,} sequences of {length:,} tokens, {fill:.2%} of them fill")
    if report.skipped:
        names = ", ".join(str(p) for p in report.skipped[:3])
        print(
            f"skipped {len(report.skipped)} files that are not UTF-8 text: {names}{' ...' * (len(report.skipped) > 3)}"
        )
    if report.short:
        print(f"left out {report.short:,} documents shorter than {options.min_bytes:,} bytes")
    lengths = np.array(report.lengths)
    print("documents by length in tokens:")
    edges = 2 ** np.arange(int(np.log2(lengths.min())), int(np.log2(lengths.max())) + 2)
    _bars([f"{a:>9,} to {b - 1:<9,}" for a, b in pairwise(edges)], np.histogram(lengths, edges)[0])
    used = int((report.histogram > 0).sum())
    print(f"tokens by id ({used:,} of {len(report.histogram):,} ids occur), the ten most frequent:")
    top = np.argsort(-report.histogram, kind="stable")[: min(10, used)]
    _bars([f"{i:>9} {report.text_of(np.array([i]))!r:<10}" for i in top], report.histogram[top])


def _bars(labels: list[str], counts: np.ndarray) -> None:
    for label, count in zip(labels, counts):
        print(f"  {label} {count:>12,} {'#' * round(40 * count / counts.max())}")


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m foxdist.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("prepare", help="text to MDS shards that training reads")
    p.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="text files, folders of them, or .jsonl")
    p.add_argument("--output", required=True, type=Path, metavar="DIR")
    p.add_argument("--sequence-length", type=int, default=16384, metavar="T", help="default: %(default)s")
    p.add_argument("--tokenizer", default="byte", metavar="NAME", help="'byte' (default) or a tokenizer.json")
    p.add_argument("--train-bpe", type=int, metavar="N", help="train a byte-level BPE of N tokens on the inputs")
    p.add_argument("--end", metavar="TOKEN", help="the tokenizer's end-of-text token, if it has an unusual name")
    p.add_argument("--text-key", default="text", metavar="KEY", help="where .jsonl lines hold the text")
    p.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="names of files to take from folders")
    p.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="names of files and folders to leave out")
    p.add_argument(
        "--min-bytes", type=positive, default=0, metavar="N", help="leave out documents shorter than N bytes"
    )
    p.add_argument("--shard-mib", type=positive, default=64, metavar="N", help="size of a shard; default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.train_bpe is not None and chosen.tokenizer != "byte":
        p.error("--train-bpe and --tokenizer exclude each other; give one of them")
    lists = {name: tuple(getattr(chosen, name)) for name in ("inputs", "include", "exclude")}
    return Options(**{**vars(chosen), **lists})


if __name__ == "__main__":
    exit_with(main)
