"""Knowledge flows one way: what each module may import of foxdist. A new module gets a row here, in its place."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

import foxdist

PACKAGE = Path(foxdist.__file__).parent

# Lowest first. A module may import from rows above its own, and from no other.
ORDER = [
    "layout",
    "log",
    "files",
    "options",
    "ports",
    "config",
    "events",
    "graphs",
    "progress",
    "mesh",
    "stopping",
    "attention.naive",
    "attention.gates",
    "attention.acp",
    "attention.tight",
    "attention.pages",
    "attention.queries",
    "attention.plan",
    "attention.predict",
    "attention.replay",
    "attention.stats",
    "attention.merge",
    "attention.transport",
    "attention.streams",
    "attention.symmetric",
    "attention.slots",
    "attention.kernels.launcher",
    "attention.kernels.needs",
    "attention.kernels.copies",
    "attention.certificate",
    "attention.kernels.operands",
    "attention.kernels.gates",
    "attention.kernels.tight",
    "attention.kernels.norms",
    "attention.kernels.schedule",
    "attention.kernels.configs",
    "attention.kernels.preprocess",
    "attention.kernels.triton_forward",
    "attention.kernels.triton_backward",
    "attention.kernels.gluon_common",
    "attention.kernels.gluon_forward",
    "attention.kernels.gluon_backward_kv",
    "attention.kernels.gluon_backward_q",
    "attention.kernels.gluon_backward",
    "attention.kernels.launch",
    "attention.kernels",
    "attention.backends",
    "attention.boundary",
    "attention.tiles_torch",
    "attention.tiles",
    "attention.needs",
    "attention.copies",
    "attention.messages",
    "attention.peer",
    "attention.gather",
    "attention.shift",
    "attention.exchange",
    "attention.counting",
    "attention.ring",
    "attention.operators",
    "attention.interface",
    "attention",
    "offload",
    "loss_kernel",
    "loss",
    "layer",
    "model",
    "optim",
    "compiling",
    "shares",
    "zero",
    "data.streaming_import",
    "data.tokenizer",
    "data.packing",
    "data.folder",
    "data.prepare",
    "data.loader",
    "data.__main__",
    "data",
    "clock",
    "guard",
    "verdict",
    "heartbeat",
    "watch",
    "run_folder",
    "job",
    "metrics",
    "sinks",
    "checkpoint",
    "export",
    "check",
    "before_start",
    "train",
    "report",
    "evaluate",
    "bench.gates",
    "bench.implementations",
    "bench.peers",
    "bench.measure",
    "bench.report",
    "bench.attention",
    "bench.acp",
    "bench.processes",
    "bench.layouts",
    "bench.spread",
    "bench.spread_report",
    "bench.context_parallel",
    "bench.kernels",
    "bench.record",
    "bench.train_report",
    "bench.scaling",
    "bench.cells",
    "bench.train",
    "bench.tune",
    "bench.__main__",
    "bench",
    "simulate",
]

# What a module must not know, whatever its place.
FORBIDDEN = {
    "attention.gates": {"torch.distributed"},
    "attention.acp": {"torch.distributed"},
    "attention.boundary": {"torch.distributed"},
    "attention.plan": {"torch", "torch.distributed"},
    "attention.messages": {"torch.distributed"},
    "attention.peer": {"torch.distributed"},
    "attention.predict": {"torch", "torch.distributed"},
    "attention.tiles_torch": {"torch.distributed", "foxdist.attention.plan", "foxdist.attention.transport"},
    "attention.tiles": {"torch.distributed", "foxdist.attention.plan", "foxdist.attention.transport"},
    "attention.merge": {"torch.distributed"},
    "attention.ring": {"torch.distributed", "deepspeed"},
    "config": {"torch", "torch.distributed", "deepspeed", "streaming"},
    "ports": {"torch"},
    "layer": {"torch.distributed", "deepspeed"},
    "model": {"torch.distributed", "deepspeed", "streaming"},
    "loss": {"torch.distributed", "deepspeed"},
    "optim": {"deepspeed"},
    "shares": {"torch.distributed", "deepspeed"},
    "metrics": {"deepspeed", "wandb"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


def imported(path):
    """Every module that a file imports, with `from x import y` as both x and x.y."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name, path", modules(), ids=[name for name, _ in modules()])
def test_imports_go_one_way(name, path):
    assert name in ORDER, f"{name} has no place in ORDER"
    for target in imported(path):
        if target.startswith("foxdist."):
            inner = target.removeprefix("foxdist.")
            while inner and inner not in ORDER:
                inner = inner.rpartition(".")[0]
            if inner and not name.startswith(inner + "."):  # a package does not forbid its own parts
                assert ORDER.index(inner) < ORDER.index(name), f"{name} imports {inner}"
        assert target not in FORBIDDEN.get(name, ()), f"{name} must not import {target}"


def test_every_row_is_a_module():
    assert sorted(ORDER) == sorted(name for name, _ in modules())


def test_no_module_shadows_another_package():
    """`deepspeed foxdist/train.py` puts foxdist/ itself on the path: a file logging.py there would be `logging`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not (names - {"__init__", "__pycache__"}) & taken


def test_only_transport_talks_to_other_ranks():
    """Inside attention, one module calls torch.distributed, so bytes can be counted where they are handed over; and one
    makes the memory that ranks of a host share."""
    for name, path in modules():
        if name.startswith("attention") and name not in ("attention.transport", "attention.symmetric"):
            assert not {t for t in imported(path) if t.startswith("torch.distributed")}, name
