"""The forget gates of a trained model on one sequence of its data, for `attention --gates FILE`, and q and k with them
for `acp --gates FILE`."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from foxdist import checkpoint, run_folder
from foxdist import config as configuration
from foxdist.data.folder import open_folder
from foxdist.data.loader import Batch, one_sequence
from foxdist.export import rebuild
from foxdist.model import FoX


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="train.run_dir of a run with a checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a safetensors file")
    parser.add_argument("--queries-and-keys", action="store_true", help="also q and k, as attention gets them")
    parser.add_argument("--sequence", type=int, default=0, metavar="N", help="of the run's data; default: the first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])


def run(chosen: argparse.Namespace) -> int:
    """Writes log_f [layers, T, H] float32, and if asked q [layers, T, H, D] and k [layers, T, K, D]. One process,
    whatever ranks trained. Raises `ValueError`."""
    if not chosen.output.absolute().parent.is_dir():
        raise ValueError(f"--output {chosen.output}: its folder does not exist; must do so; make it first")
    config = configuration.load(chosen.run_dir / "config.yaml")
    batch = one_sequence(config.data.path, open_folder(config.data.path), chosen.sequence)
    step, weights = checkpoint.weights(run_folder.checkpoints(chosen.run_dir))
    model = rebuild(config, weights, torch.device(chosen.device))
    names = ("q", "k", "log_f") if chosen.queries_and_keys else ("log_f",)
    seen = attended(model, batch, torch.device(chosen.device), names)
    about = {"run": chosen.run_dir.name, "step": str(step), "sequence": str(chosen.sequence)}
    save_file(seen, chosen.output, about | {"date": time.strftime("%Y-%m-%d")})
    counts = [layer.meter.take() for layer in model.attention_layers()]
    kept = sum(int(torch.as_tensor(c.kept_by_head).sum()) for c in counts)
    causal = sum(c.causal_by_head * config.model.heads for c in counts)
    print(f"{chosen.output}: gates of step {step}, [layers, tokens, heads] = {list(seen['log_f'].shape)}")
    print(f"the run's pruning keeps {100 * kept / causal:.1f} % of the tiles of this sequence")
    return 0


class _Watch(TorchDispatchMode):
    """Keeps what attention gets of each layer, in their order: of q, k and log_f those that are named."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.seen: list[dict[str, torch.Tensor]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.foxdist.attention.default:
            given = dict(zip(("q", "k", "v", "log_f"), args))
            self.seen.append({name: given[name][0].cpu() for name in self.names})
        return operator(*args, **(kwargs or {}))


def attended(model: FoX, batch: Batch, device: torch.device, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of q [layers, T, H, D] and k [layers, T, K, D] in the model's dtype and log_f [layers, T, H] float32 those that
    are named, on the CPU, as attention sees them: log_f is RESET at the first token of each document."""
    tokens, labels, starts = (x.to(device) for x in (batch.tokens, batch.labels, batch.starts))
    with torch.no_grad(), _Watch(names) as watch:
        model(tokens, labels, starts)
    return {name: torch.stack([layer[name] for layer in watch.seen]) for name in names}
