"""Gates to measure with: synthetic regimes, and gates recorded from a run.

Synthetic: log f = logsigmoid(bias of the head + N(0, 1)).

| name | heads |
| --- | --- |
| `acp` | an eighth forgets next to nothing, the others have log-spaced decay; 70 % of the tiles of 16,384 tokens may |
|       | be pruned, which is what the ACP paper reports of trained models |
| `mixed` | from global to very local, evenly spaced |
| `local` | all forget within about 1,000 tokens |
| `initial` | a new model's: within about 50 tokens |
| `open` | all keep everything: nothing can be pruned |
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import logsigmoid

from foxdist.layout import BLOCK

PRUNABLE, AT_LENGTH = 0.70, 16384  # what `acp` is calibrated to
LOG_EPS = -10.0
LOCAL, GLOBAL = 0.0, 10.0  # biases: f = 1/2 on average, and f = 1 - 5e-5


class Gates(NamedTuple):
    """Where log_f comes from. Recorded gates have layers, heads and a length of their own; synthetic ones fit all."""

    name: str
    draw: Callable[[int, int, int, int], torch.Tensor]
    """(heads, head dim, length, seed) -> log_f [1, T, H] float32 on the CPU. Seed s is of layer s % layers."""
    layers: int = 1
    heads: int | None = None
    length: int | None = None
    queries_and_keys: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Of a layer, where they were recorded too: q [T, H, D] and k [T, K, D]."""


def find(text: str) -> Gates:
    """The regime of that name, or the gates recorded in that file. Raises `ValueError`."""
    if text in REGIMES:
        return Gates(text, lambda heads, dim, length, seed: _synthetic(REGIMES[text](heads, dim), length, seed))
    return recorded(Path(text))


def recorded(path: Path) -> Gates:
    """Gates of a run: a safetensors file with `log_f` [layers, T, H] or [T, H]. Raises `ValueError`.

    A shorter sequence is the beginning of the recorded one.
    """
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor one of {', '.join(REGIMES)}; must be one of them")
    try:
        with safe_open(path, "pt") as file:
            log_f = file.get_tensor("log_f").float()
            complete = {"q", "k"} <= set(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path}: {error}; must be a safetensors file with log_f [layers, T, H] or [T, H]; "
            "python -m foxdist.bench record-gates RUN_DIR --output FILE writes one"
        ) from None
    if log_f.ndim == 2:
        log_f = log_f[None]
    if log_f.ndim != 3 or not log_f.numel() or not bool((log_f <= 0).all()):
        raise ValueError(
            f"{path}: log_f is {list(log_f.shape)}; must be [layers, T, H] or [T, H] with no value above 0 or NaN"
        )

    @lru_cache(maxsize=1)  # a layer is asked for by each of its heads
    def attended(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        with safe_open(path, "pt") as file:
            return file.get_slice("q")[layer], file.get_slice("k")[layer]

    def draw(heads: int, dim: int, length: int, seed: int) -> torch.Tensor:
        return log_f[seed % len(log_f), None, :length].contiguous()

    layers, length, heads = log_f.shape
    return Gates(path.stem, draw, layers, heads, length, attended if complete else None)


def first_kept(c: torch.Tensor, delta: torch.Tensor | float) -> torch.Tensor:
    """[..., n]: the first block that each query block keeps under the published rule with threshold delta [...].

    c: [..., T] float64, the sum of log f up to each token. Written down once more, apart from foxdist's own, because
    other implementations' masks and the calibration are made from it.
    """
    first, last = c[..., ::BLOCK], c[..., BLOCK - 1 :: BLOCK]
    if c.shape[-1] % BLOCK:
        last = torch.cat([last, c[..., -1:]], -1)
    delta = torch.as_tensor(delta, dtype=c.dtype, device=c.device)
    start = torch.searchsorted(-last.contiguous(), (delta[..., None] - first).contiguous())
    return torch.minimum(start, torch.arange(first.shape[-1], device=c.device))


def threshold(bound: torch.Tensor | float, length: int, log_eps: float) -> torch.Tensor | float:
    """The published delta for logits of at most `bound` and `length` keys."""
    return log_eps - (2 * bound + math.log(length))


def kept_share(start: torch.Tensor) -> float:
    """Of the causal tiles, those that `start` [..., n] keeps."""
    n = start.shape[-1]
    own = torch.arange(n, device=start.device)
    return float((own - start + 1).double().sum(-1).mean()) / (n * (n + 1) / 2)


def _synthetic(bias: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    noise = torch.randn(1, length, len(bias), generator=torch.Generator().manual_seed(20251 + seed))
    return logsigmoid(bias.float() + noise)


@lru_cache
def _calibrated(heads: int, dim: int) -> torch.Tensor:
    """Biases [H] of which all but max(1, H / 8) rise evenly from LOCAL to where PRUNABLE of the tiles may go."""
    globals_ = max(1, heads // 8)
    if 1 - globals_ / heads <= PRUNABLE:
        raise ValueError(f"--gates acp: of {heads} heads one is global; must be 4 or more; use --gates mixed")
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(7))  # neighbours differ, as in a model
    delta = threshold(math.sqrt(dim), AT_LENGTH, LOG_EPS)

    def biases(highest: float) -> torch.Tensor:
        local = torch.linspace(LOCAL, highest, heads - globals_, dtype=torch.float64)
        return torch.cat([local, local.new_full((globals_,), GLOBAL)])[order]

    low, high = LOCAL, 12.0
    for _ in range(20):
        middle = (low + high) / 2
        c = _synthetic(biases(middle), AT_LENGTH, 0)[0].T.double().cumsum(-1)
        prunable = 1 - kept_share(first_kept(c, delta))
        low, high = (middle, high) if prunable > PRUNABLE else (low, middle)
    return biases(high)


REGIMES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "acp": _calibrated,
    "mixed": lambda heads, dim: torch.linspace(9.0, 0.0, heads),
    "local": lambda heads, dim: torch.full((heads,), 3.5),
    "initial": lambda heads, dim: torch.zeros(heads),
    "open": lambda heads, dim: torch.full((heads,), 12.0),
}
CHOICES = f"{', '.join(REGIMES)}, or a file of `record-gates`"
"""What `--gates` may be, for help."""
