"""A run's model without the run: python -m foxdist.export RUN_DIR OUT. Owns the folder that other programs load.

    OUT/model.safetensors   parameters, by their names in `model.FoX`
    OUT/config.json         `model`: the arguments of `config.Model`; what it was trained on, and for how long
    OUT/tokenizer.json      of the run's data, if its tokens are not bytes and the data are still there

Changes nothing in RUN_DIR, where a job may be training.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from foxdist import __version__, checkpoint, run_folder
from foxdist import config as configuration
from foxdist.config import Config, Model
from foxdist.layer import pruning
from foxdist.model import FoX
from foxdist.options import exit_with

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foxdist.export", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="train.run_dir of a run with a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="float32 is what the optimizer holds; default: %(default)s"
    )
    chosen = parser.parse_args(arguments)
    try:
        about = export(chosen.run_dir, chosen.output, DTYPES[chosen.dtype])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.output}: step {about['step']:,}, {about['parameters']:,} parameters in {chosen.dtype}")
    return 0


def export(run_dir: Path, output: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Writes the newest good checkpoint of a run, whatever ranks and ZeRO stage saved it, and returns what
    `config.json` says.

    Raises `ValueError` if the run has none, or if `output` is there. It is written beside, and renamed when it is
    whole.
    """
    if output.exists():
        raise ValueError(f"{output}: is there already; must be a new folder; delete it or choose another")
    config = configuration.load(run_dir / "config.yaml")
    step, weights = checkpoint.weights(run_folder.checkpoints(run_dir))
    about = _about(config, step, sum(x.numel() for x in weights.values()))
    work = output.with_name(output.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({name: x.to(dtype) for name, x in weights.items()}, work / WEIGHTS, {"format": "pt"})
    (work / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    (work / WEIGHTS).chmod((work / CONFIG).stat().st_mode)  # safetensors makes its files the owner's alone
    tokenizer = config.data.path / TOKENIZER
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, work / TOKENIZER)
    work.rename(output)
    return about


def load(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> FoX:
    """The model of an exported folder, on one process, with nothing pruned.

    Raises `ValueError` if the folder's parameters are not those of its configuration.
    """
    folder = Path(folder)
    about = json.loads((folder / CONFIG).read_text())
    with torch.device(device):
        model = FoX(Model(**about["model"]))
    weights = load_file(folder / WEIGHTS, device=str(device))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {WEIGHTS} does not go with {CONFIG} ({error}); export the run again") from None
    return model.to(dtype)


def rebuild(config: Config, weights: dict[str, torch.Tensor], device: torch.device) -> FoX:
    """The model as it trains, but on one process: parameters in the run's precision, and its pruning."""
    with torch.device(device):
        model = FoX(config.model, acp=pruning(config.acp))
    model.load_state_dict(weights)
    return model.to(torch.bfloat16) if config.train.precision == "bf16" else model


def _about(config: Config, step: int, parameters: int) -> dict[str, Any]:
    return {
        "architecture": "FoX",
        "model": config.model.model_dump(mode="json"),
        "sequence_length": config.data.sequence_length,
        "precision": config.train.precision,
        "step": step,
        "tokens": step * config.train.tokens_per_step,
        "parameters": parameters,
        "foxdist": __version__,
    }


if __name__ == "__main__":
    exit_with(main)
