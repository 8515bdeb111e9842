"""Files of parameters and optimizer, whatever ranks and ZeRO stage wrote them. Knows neither ranks nor DeepSpeed.

Each rank holds flat float32 tensors: the master copy of parameters, and Adam's two moments beside it. Pieces of
parameters lie in them, and a piece says of which parameter it is and where it begins in it. That is all a file holds
besides the numbers, so any number of ranks in any stage reads what any other wrote: pieces overlap, and what overlaps
is copied.

A rank writes one file for each kind (`master_00003.safetensors`, ...) as it holds the numbers: no copy is made but from
a GPU. Files are mapped into memory and read where pieces overlap. safetensors holds numbers and text only, so nothing
in such a file can run.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
BYTES = 4 * len(KINDS)
"""Of each parameter in a checkpoint."""
REFUSED = (OSError, SafetensorError)
"""What writing raises when the file system refuses."""


class Piece(NamedTuple):
    """A run of numbers of a parameter, counted as if it were flat."""

    name: str
    first: int
    """Where it begins in the parameter."""
    at: int
    """Where it begins in the flat tensor."""
    size: int


@dataclass(frozen=True)
class Flat:
    """Flat tensors of one rank, equally long, with equal pieces in equal places; between them may be padding."""

    pieces: list[Piece]
    tensors: dict[str, torch.Tensor]
    """float32 [n] for each of `KINDS`."""


def write(folder: Path, rank: int, flats: list[Flat], shapes: dict[str, tuple[int, ...]], updates: int) -> list[Path]:
    """This rank's files, on disk when it returns them. updates: that the optimizer has made. Raises `REFUSED`.

    shapes: of all parameters that have a piece here.
    """
    about = {"pieces": [flat.pieces for flat in flats], "shapes": shapes, "updates": updates}
    paths = []
    for kind in KINDS:
        path = folder / f"{kind}_{rank:05d}.safetensors"
        numbers = {str(i): flat.tensors[kind].detach() for i, flat in enumerate(flats)}
        save_file(numbers, path, {"foxdist": json.dumps(about)} if kind == "master" else None)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a full disk may show only after the checkpoint is declared good
        paths.append(path)
    return paths


def fill(folder: Path, rank: int, flats: list[Flat]) -> int:
    """Copies into all pieces of `flats` what files in `folder` hold of them; returns the optimizer's updates.

    `rank` is where to begin to look: with as many ranks and the same stage as wrote them, no other file is opened.
    """
    wanted: dict[str, list[tuple[int, Piece]]] = {}
    for i, flat in enumerate(flats):
        for piece in flat.pieces:
            wanted.setdefault(piece.name, []).append((i, piece))
    missing = sum(piece.size for flat in flats for piece in flat.pieces)
    masters = _masters(folder)
    start = rank % len(masters)
    updates = 0
    for path in masters[start:] + masters[:start]:
        about = _about(path)
        updates = about["updates"]
        overlaps = list(_overlaps(about["pieces"], wanted))
        missing -= sum(size for *_, size in overlaps)
        for kind in KINDS if overlaps else ():
            with safe_open(path.with_name(path.name.replace("master", kind, 1)), framework="pt") as file:
                for there, begin, here, at, size in overlaps:
                    source = file.get_slice(str(there))[begin : begin + size]
                    flats[here].tensors[kind][at : at + size].copy_(source)
        if missing <= 0:
            break
    assert missing == 0, f"{folder} lacks {missing} numbers, or has them twice"
    return updates


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters, float32 on the CPU, from the files of all ranks."""
    found: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for path in _masters(folder):
        about = _about(path)
        for name, shape in about["shapes"].items():
            if name not in found:
                found[name] = torch.empty(shape)
                missing[name] = found[name].numel()
        with safe_open(path, framework="pt") as file:
            for i, pieces in enumerate(about["pieces"]):
                numbers = file.get_slice(str(i))
                for piece in pieces:
                    whole = found[piece.name].view(-1)
                    whole[piece.first : piece.first + piece.size] = numbers[piece.at : piece.at + piece.size]
                    missing[piece.name] -= piece.size
    assert not any(missing.values()), f"{folder} does not hold whole parameters: {missing}"
    return found


def _masters(folder: Path) -> list[Path]:
    """One file for each rank, in order."""
    return sorted(folder.glob("master_*.safetensors"))


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["foxdist"])
    about["pieces"] = [[Piece(*piece) for piece in pieces] for pieces in about["pieces"]]
    return about


def _overlaps(
    saved: list[list[Piece]], wanted: dict[str, list[tuple[int, Piece]]]
) -> Iterator[tuple[int, int, int, int, int]]:
    """What saved and wanted pieces share: flat tensor and place in it there, the same here, size."""
    for there, pieces in enumerate(saved):
        for piece in pieces:
            for here, mine in wanted.get(piece.name, ()):
                first = max(piece.first, mine.first)
                end = min(piece.first + piece.size, mine.first + mine.size)
                if first < end:
                    yield there, piece.at + first - piece.first, here, mine.at + first - mine.first, end - first
