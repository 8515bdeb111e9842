"""The command line: python -m foxdist.bench NAME [...]; --help says what NAME can be."""

import argparse
import sys

from foxdist.bench import acp, attention, context_parallel, kernels, record, scaling, train, tune
from foxdist.options import exit_with, overrides_first


def main(arguments: list[str] | None = None) -> int:
    """Runs one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foxdist.bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module, name, text in (
        (acp, "acp", "tiles that each pruning rule keeps, K/V that ranks need, weight that is really lost"),
        (attention, "attention", "time, memory and errors of attention against other implementations"),
        (context_parallel, "context-parallel", "attention over ranks: bytes, balance, time, and which layout wins"),
        (kernels, "kernels", "time of each kernel of one attention call"),
        (record, "record-gates", "writes the forget gates of a run's newest checkpoint, for attention --gates FILE"),
        (scaling, "scaling", "one table and picture of many results of `train`: strong and weak scaling"),
        (train, "train", "tokens/s, utilisation and memory of training, and the longest sequence that fits"),
        (tune, "tune", "times tile sizes of the kernels on a new GPU and prints their table"),
    ):
        command = commands.add_parser(name, help=text)
        module.add_options(command)
        command.set_defaults(run=module.run)
    words = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(words[:1] + overrides_first(words[1:]))
    try:
        return chosen.run(chosen)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_with(main)
