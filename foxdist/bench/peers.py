"""Other projects' attention, loaded from a copy of their source: --peer NAME=PATH."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch

from foxdist.attention import Acp
from foxdist.bench.implementations import Implementation, direct, published_threshold, repeated

FOX_FILES = ("forgetting_attention.py", "src/forgetting_transformer/ops/forgetting_attention.py")


def load(text: str) -> Implementation:
    """The implementation that NAME=PATH names. Raises `ValueError`.

    `fox`: the official kernel, its file or its repository. `fla`: flash-linear-attention, its repository or package.
    Any other name: a Python file that defines `attend(q, k, v, log_f, acp)` with foxdist's shapes.
    """
    name, _, place = text.partition("=")
    path = Path(place)
    if not name or not place:
        raise ValueError(f"{text}: not a peer; must be NAME=PATH; for example fox=path/to/forgetting-transformer")
    if not path.exists():
        raise ValueError(f"{text}: no such path; must be the peer's source; correct the path")
    try:
        if name == "fox":
            return _fox(path)
        if name == "fla":
            return _fla(path)
        return Implementation(name, direct(_module(f"peer_{name}", path).attend))
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"{text}: cannot be imported ({type(error).__name__}: {error}); must be the peer's source; correct the "
            "path, or install what it needs"
        ) from error


def _fox(path: Path) -> Implementation:
    """The official Forgetting Transformer's kernel, given the published threshold. It knows no groups of heads."""
    file = path if path.is_file() else next((path / f for f in FOX_FILES if (path / f).is_file()), path)
    attention = _module("peer_fox", file).forgetting_attention

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, acp: Acp):  # type: ignore[no-untyped-def]
        delta = published_threshold(acp, q.shape[2]).float().expand(len(q), -1).contiguous()

        def run() -> torch.Tensor:
            keys, values = (repeated(x, q.shape[1]) for x in (k, v))
            return attention(q, keys, values, log_f, head_first=True, adaptive_threshold=delta)

        return run

    return Implementation("fox", prepare, heads_first=True)


def _fla(path: Path) -> Implementation:
    """flash-linear-attention's forgetting attention, which prunes nothing."""
    package = path / "fla" if (path / "fla").is_dir() else path
    for name, folder in (("fla", package), ("fla.ops", package / "ops")):
        # Bare packages: the real ones import every model, and transformers with them.
        module = types.ModuleType(name)
        vars(module).update(__path__=[str(folder)], __version__="0")
        sys.modules[name] = module
    attention = importlib.import_module("fla.ops.forgetting_attn").parallel_forgetting_attn
    return Implementation("fla", direct(lambda q, k, v, log_f, acp: attention(q, k, v, log_f)), prunes=False)


def _module(name: str, file: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
