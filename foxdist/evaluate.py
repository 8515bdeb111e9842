"""What a trained model makes of a long context: python -m foxdist.evaluate RUN_DIR [--data DIR].

**Loss by position.** The mean loss of tokens by how many tokens of their document stand before them. Where it still
falls, the model uses what is that far back.

**Needle.** `MARK` tokens and a secret of `SECRET` tokens stand somewhere in a text, and at its end the mark stands
again. What the model then expects is compared with the secret: the share of its tokens that are the likeliest, and how
much likelier they are than at their first time, when nothing told of them. Both are drawn from the text's own tokens,
so it works with any tokenizer and asks for no instruction.

On one process, whatever ranks trained, in the run's precision and with its pruning. Changes nothing in checkpoints.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track

from foxdist import checkpoint, run_folder
from foxdist import config as configuration
from foxdist.config import Config
from foxdist.data.folder import Prepared, open_folder
from foxdist.data.loader import Batch, make_batch, one_sequence
from foxdist.export import rebuild
from foxdist.loss import IGNORE, token_losses
from foxdist.model import FoX
from foxdist.options import exit_with, positive

MARK, SECRET = 16, 8  # tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the needle stands, of the text that there is room for

Losses = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""Of a batch of one sequence, for each token [T]: its loss, and whether it was the likeliest."""


class Found(NamedTuple):
    """How much of a secret came back."""

    right: float
    """Share of its tokens that were the likeliest."""
    gain: float
    """Nats a token by which it was likelier than at its first time."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    chosen = _parse(arguments)
    try:
        result = evaluate(chosen)
        output = chosen.output or chosen.run_dir
        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(result, output / "evaluation.png")
    print(summary(result))
    print(f"picture         {output / 'evaluation.png'}")
    return 0


def evaluate(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured. Raises `ValueError` for what is not there or does not go together."""
    config = configuration.load(chosen.run_dir / "config.yaml")
    data = chosen.data or config.data.path
    prepared = open_folder(data)
    longest = prepared.sequence_length
    lengths = chosen.lengths or [length for length in (longest // part for part in (8, 4, 2, 1)) if fits(length)]
    check(config, data, prepared, lengths)
    step, weights = checkpoint.weights(run_folder.checkpoints(chosen.run_dir))
    model = rebuild(config, weights, torch.device(chosen.device))
    places = np.linspace(0, prepared.sequences - 1, min(chosen.sequences, prepared.sequences)).astype(int)
    batches = [one_sequence(data, prepared, int(i)) for i in places]
    console, rng = Console(stderr=True), np.random.default_rng(chosen.seed)
    losses = [losses_of(model, b)[0] for b in track(batches, "loss by position", console=console, transient=True)]
    texts = [b.labels[0][b.labels[0] != IGNORE].numpy() for b in batches]
    points = [(length, depth) for length in lengths for depth in DEPTHS]
    found = [
        needle(partial(losses_of, model), texts, prepared.end, length, depth, chosen.repeats, rng)
        for length, depth in track(points, "needle", console=console, transient=True)
    ]
    return {
        "run": str(chosen.run_dir),
        "step": step,
        "data": str(data),
        "trained_on": data.resolve() == config.data.path.resolve(),
        "sequences": len(batches),
        "date": time.strftime("%Y-%m-%d"),
        "loss": sum(float(x.sum()) for x in losses) / sum(b.targets() for b in batches),
        "by_position": by_position(losses, batches),
        "needle": [
            {"tokens": length, "depth(%)": 100 * depth, "right(%)": 100 * right, "gain(nats)": gain}
            for (length, depth), (right, gain) in zip(points, found)
        ],
    }


def check(config: Config, data: Path, prepared: Prepared, lengths: list[int]) -> None:
    """Raises `ValueError` if the data's tokens are not the model's, or texts have no room for a needle."""
    if prepared.vocab > config.model.vocab:
        raise ValueError(
            f"--data {data}: has {prepared.vocab:,} tokens; must have at most the model's {config.model.vocab:,}; "
            "prepare it with the run's tokenizer"
        )
    for length in lengths:
        if not fits(length) or length > prepared.sequence_length:
            raise ValueError(
                f"--lengths {length}: must be {4 * (MARK + SECRET)} to {prepared.sequence_length}, with room for a "
                f"needle and no longer than the sequences of {data}; choose others"
            )


def fits(length: int) -> bool:
    """Whether half of so many tokens are text."""
    return length >= 4 * (MARK + SECRET)


def losses_of(model: FoX, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`Losses` of a model, on the CPU."""
    device = model.head.weight.device
    tokens, labels, starts = (x.to(device) for x in (batch.tokens, batch.labels, batch.starts))
    with torch.no_grad():
        hidden = model.head.norm(model.hidden(tokens, starts))[0]
        loss, likeliest = token_losses(hidden, model.head.weight, labels[0])
    return loss.cpu(), (likeliest == labels[0]).cpu()


def by_position(losses: list[torch.Tensor], batches: list[Batch]) -> list[dict[str, Any]]:
    """Rows of mean losses, by the tokens of the same document that stand before: 0, 1, 2 to 3, 4 to 7, ..."""
    before = [_tokens_before(batch.starts[0]) for batch in batches]
    real = [batch.labels[0] != IGNORE for batch in batches]
    place = torch.cat([x[keep] for x, keep in zip(before, real)])
    loss = torch.cat([x[keep] for x, keep in zip(losses, real)]).double()
    group = (2 * place + 1).double().log2().floor().long()  # 0, 1, 2, 2, 3, 3, 3, 3, 4, ...
    counts, sums = group.bincount(), group.bincount(weights=loss)
    return [
        {"from": 2**i // 2, "to": max(2**i - 1, 0), "tokens": count, "loss": total / count}
        for i, (count, total) in enumerate(zip(counts.tolist(), sums.tolist()))
        if count
    ]


def _tokens_before(starts: torch.Tensor) -> torch.Tensor:
    """[T]: how many tokens of its document stand before each."""
    place = torch.arange(len(starts))
    return place - torch.where(starts, place, 0).cummax(0).values


def needle(
    losses: Losses, texts: list[np.ndarray], end: int, length: int, depth: float, repeats: int, rng: np.random.Generator
) -> Found:
    """The mean over `repeats` of the texts, cut to `length` tokens, with the needle at `depth` of them.

    Raises `ValueError` if no text is long enough.
    """
    long_enough = [text for text in texts if len(text) >= _around(length)]
    if not long_enough:
        raise ValueError(
            f"--lengths {length}: none of {len(texts)} sequences has so much text; must be shorter; leave it out, or "
            "look at more --sequences"
        )
    found = []
    for _ in range(repeats):
        tokens, first = hide(long_enough[rng.integers(len(long_enough))], end, length, depth, rng)
        sample = {"tokens": tokens, "starts": np.zeros(1, np.int32), "used": length}
        loss, right = losses(make_batch([sample], end))
        before, again = (slice(at, at + SECRET) for at in (first, length - SECRET))
        found.append((float(right[again].float().mean()), float((loss[before] - loss[again]).mean())))
    return Found(*map(float, np.mean(found, 0)))


def hide(text: np.ndarray, end: int, length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """`length` tokens of text with mark and secret inside, and both again at the end; where the first secret begins."""
    around = _around(length)
    drawn = rng.choice(text[text != end], MARK + SECRET)
    at = round(depth * around)
    return np.concatenate([text[:at], drawn, text[at:around], drawn]), at + MARK


def _around(length: int) -> int:
    """Tokens of text around the needle and its end."""
    return length - 2 * (MARK + SECRET)


def summary(result: dict[str, Any]) -> str:
    """What was found, in words and two tables."""
    own = " (which the run trained on)" if result["trained_on"] else ""
    lines = [
        f"run             {result['run']}, step {result['step']:,}",
        f"data            {result['data']}{own}, {result['sequences']} sequences",
        f"loss            {result['loss']:.4f} nats a token",
        "",
        f"{'tokens of the document before':>30} {'tokens':>10} {'loss':>8}",
    ]
    for row in result["by_position"]:
        lines.append(f"{row['from']:>14,} to {row['to']:<12,} {row['tokens']:>10,} {row['loss']:>8.4f}")
    lines += ["", "needle: tokens of the secret that come back, and by how many nats a token it became likelier"]
    lines.append(f"{'tokens':>14} " + " ".join(f"{f'depth {100 * depth:.0f} %':>16}" for depth in DEPTHS))
    for length, rows in by_length(result).items():
        cells = [f"{row['right(%)']:.0f} %, {row['gain(nats)']:+.2f}" for row in rows]
        lines.append(f"{length:>14,} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join([*lines, ""])


def by_length(result: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """What was found of needles in texts of each length, by depth."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in result["needle"]:
        found.setdefault(row["tokens"], []).append(row)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """One picture: loss by position, and the needle's two numbers by length and depth."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    rows = result["by_position"]
    axes[0].plot([(row["from"] + row["to"]) / 2 + 1 for row in rows], [row["loss"] for row in rows], "k.-")
    axes[0].set_xscale("log", base=2)
    axes[0].set(title="loss by position", xlabel="place in the document", ylabel="nats a token")
    axes[0].spines[["top", "right"]].set_visible(False)
    _draw_needle(figure, axes[1], result, "right(%)", "needle: tokens that come back, %", (0, 100))
    largest = max(0.1, *(abs(row["gain(nats)"]) for row in result["needle"]))
    _draw_needle(figure, axes[2], result, "gain(nats)", "needle: likelier by, nats a token", (-largest, largest))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_needle(
    figure: Any, axes: Axes, result: dict[str, Any], name: str, title: str, limits: tuple[float, float]
) -> None:
    found = by_length(result)
    grid = np.array([[row[name] for row in rows] for rows in found.values()]).T
    image = axes.imshow(grid, aspect="auto", vmin=limits[0], vmax=limits[1], cmap="RdYlGn")
    axes.set_xticks(range(len(found)), [f"{length:,}" for length in found])
    axes.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f} %" for depth in DEPTHS])
    axes.set(title=title, xlabel="tokens", ylabel="depth")
    figure.colorbar(image, ax=axes)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m foxdist.evaluate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="train.run_dir of a run with a checkpoint")
    add("--data", type=Path, metavar="DIR", help="prepared text that the run has not seen; default: what it trained on")
    add("--sequences", type=positive, default=16, metavar="N", help="spread over the data; default: %(default)s")
    add("--lengths", type=positive, nargs="+", metavar="T", help="of texts with a needle; default: 1/8 to all of one")
    add(
        "--repeats", type=positive, default=4, metavar="N", help="texts for each length and depth; default: %(default)s"
    )
    add("--seed", type=int, default=0, metavar="N", help="of the needles; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, metavar="DIR", help="of evaluation.json and evaluation.png; default: RUN_DIR")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_with(main)
