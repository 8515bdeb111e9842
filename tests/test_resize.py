"""A run that goes on with other ranks, another cp or another ZeRO stage: to the same numbers, on the same data."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist import checkpoint, run_folder, shares, zero
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import train as training
from foxdist.data.folder import open_folder
from foxdist.data.streaming_import import import_streaming
from foxdist.shares import Flat, Piece

from runs import by_step, go, losses, read, tree

SHAPES = {"matrix": (5, 7), "vector": (13,), "one": (1,), "small": (2, 1), "last": (31,)}


# ---- files alone


def cut_as_groups(world, padding):
    """For each rank its flat tensors' sizes and pieces, as stages 1 and 2 lay out two groups."""
    ranks = [[] for _ in range(world)]
    for names in (["matrix", "one", "last"], ["vector", "small"]):
        total = sum(math.prod(SHAPES[name]) for name in names)
        part = -(-total // world) + padding
        for rank, flats in enumerate(ranks):
            pieces, begin = [], 0
            for name in names:
                size = math.prod(SHAPES[name])
                first, end = max(0, rank * part - begin), min(size, (rank + 1) * part - begin)
                if first < end:
                    pieces.append(Piece(name, first, begin + first - rank * part, end - first))
                begin += size
            flats.append((part, pieces))
    return ranks


def cut_each(world, padding):
    """As stage 3 does: of each parameter a part, in one flat tensor."""
    ranks = []
    for rank in range(world):
        pieces, at = [], 0
        for name, shape in SHAPES.items():
            size = math.prod(shape)
            part = -(-size // world)
            if (mine := min(part, size - rank * part)) > 0:
                pieces.append(Piece(name, rank * part, at, mine))
            at += part
        ranks.append([(at + padding, pieces)])
    return ranks


cuts = st.builds(
    lambda cut, world, padding: cut(world, padding),
    st.sampled_from([cut_as_groups, cut_each]),
    st.integers(1, 9),
    st.integers(0, 3),
)


def numbers(kind, name):
    """Different for every number of every kind."""
    size = math.prod(SHAPES[name])
    return torch.arange(size) + 100.0 * list(SHAPES).index(name) + 1000.0 * shares.KINDS.index(kind)


@settings(max_examples=60, deadline=None)
@given(cuts, cuts)
def test_what_any_ranks_wrote_any_other_read(tmp_path_factory, before, after):
    """Parameters of odd sizes and of one number, ranks that hold nothing, padding that is nobody's."""
    folder = tmp_path_factory.mktemp("shares")
    for rank, flats in enumerate(before):
        held = []
        for size, pieces in flats:
            tensors = {kind: torch.full((size,), math.nan) for kind in shares.KINDS}
            for kind, p in itertools.product(shares.KINDS, pieces):
                tensors[kind][p.at : p.at + p.size] = numbers(kind, p.name)[p.first : p.first + p.size]
            held.append(Flat(pieces, tensors))
        names = {p.name for flat in held for p in flat.pieces}
        shares.write(folder, rank, held, {name: SHAPES[name] for name in names}, updates=12)
    for rank, flats in enumerate(after):
        wanted = [Flat(pieces, {k: torch.full((size,), -1.0) for k in shares.KINDS}) for size, pieces in flats]
        assert shares.fill(folder, rank, wanted) == 12
        for flat, kind in itertools.product(wanted, shares.KINDS):
            left = torch.ones_like(flat.tensors[kind], dtype=torch.bool)
            for p in flat.pieces:
                assert torch.equal(
                    flat.tensors[kind][p.at : p.at + p.size], numbers(kind, p.name)[p.first : p.first + p.size]
                )
                left[p.at : p.at + p.size] = False
            assert (flat.tensors[kind][left] == -1).all(), "padding is left alone"
    found = shares.weights(folder)
    assert found.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert torch.equal(found[name], numbers("master", name).view(shape))


# ---- engines

STEPS = 6


def configured(data, folder, precision="fp32", cp=1, zero=1, steps=STEPS):
    """9 heads of 4: biases and gates of odd sizes, matrices that 2 and 4 ranks cut in the middle of a row."""
    values = tree(data, folder, train__precision=precision, train__steps=steps, parallel__cp=cp, parallel__zero=zero)
    values["model"].update(hidden=36, heads=9)
    values["optim"].update(schedule="constant", warmup_tokens=0)
    return values


@pytest.fixture(scope="module")
def saved(ranks, data, tmp_path_factory):
    """Checkpoints after a step of 4 ranks and of 1, in each stage and precision."""
    root = tmp_path_factory.mktemp("saved")
    found = []
    for size, stage, precision in [
        *itertools.product([4], [1, 2, 3], ["fp32", "bf16"]),
        (1, 1, "bf16"),
        (1, 3, "fp32"),
    ]:
        folder = root / f"{size}-{stage}-{precision}"
        ranks(size, go, configured(data, folder, precision, zero=stage, steps=1))
        found.append((precision, str(run_folder.checkpoints(folder) / "step_00000001")))
    return found


def everything(folder, sizes):
    """The updates and all numbers that a checkpoint holds, in one order whoever wrote it."""
    pieces, at = [], 0
    for name, size in sizes.items():
        pieces.append(Piece(name, 0, at, size))
        at += size
    flat = Flat(pieces, {kind: torch.zeros(at) for kind in shares.KINDS})
    return shares.fill(folder, 0, [flat]), flat.tensors


def carry(rank, size, data, folder, stage, found):
    """Loads each checkpoint on these ranks in this stage, and writes it again beside it."""
    mesh, deepspeed = meshes.start(1, 2), zero.import_deepspeed()
    for precision, path in found:
        values = configured(data, folder, precision, zero=stage)
        values["train"]["tokens_per_step"] = 512 * size
        config = configuration.parse(values)
        engine = training.make_trainer(training.make_model(config, mesh), config, mesh).engine
        source = Path(path)
        zero.load(engine, source)
        again = folder / f"{size}-{stage}-{source.parent.parent.name}"
        again.mkdir(parents=True, exist_ok=True)
        zero.save(engine, again)
        torch.distributed.barrier()
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
        (updates, had), (updates_now, has) = everything(source, sizes), everything(again, sizes)
        assert updates == updates_now == 1
        for kind in shares.KINDS:
            assert had[kind].abs().sum() > 0
            assert torch.equal(had[kind], has[kind]), kind
        masters = shares.weights(source)
        for name, p in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                assert p.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
                assert torch.equal(p.detach(), masters[name].to(p.dtype)), name
        assert [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups] == [0.1, 0.0]
        torch.distributed.barrier()


@pytest.mark.parametrize("size, stage", [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_every_stage_takes_up_every_other_to_the_last_bit(ranks, data, saved, tmp_path, size, stage):
    """Masters, moments and updates; parameters are the rounding of masters; weight decay stays as it was."""
    ranks(size, carry, data, tmp_path, stage, saved)


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """Losses of a run of one rank that nothing interrupts, in each precision."""
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp("whole") / precision
        ranks(1, go, configured(data, folder, precision, steps=STEPS))
        found[precision] = losses(folder)
    return found


# Ranks, cp and stage of the first two steps, the next two and the last two.
CHAINS = {
    "4, 2, 1": [(4, 2, 3), (2, 1, 1), (1, 1, 2)],
    "1, 2, 4": [(1, 1, 1), (2, 2, 3), (4, 2, 1)],
    "dp becomes cp": [(2, 1, 2), (2, 2, 1), (4, 1, 3)],
}


@pytest.mark.parametrize(
    "chain, precision, limit", [*((chain, "fp32", 1e-5) for chain in CHAINS), ("1, 2, 4", "bf16", 3e-3)]
)
def test_the_same_command_goes_on_elsewhere(ranks, data, whole, tmp_path, chain, precision, limit):
    """Twice in one run: the losses and gradient norms of the run that stayed, to rounding."""
    place = ""
    for i, (size, cp, stage) in enumerate(CHAINS[chain]):
        said = ranks(size, go, configured(data, tmp_path / "run", precision, cp, stage, steps=2 * (i + 1)))[0]
        before, place = place, f"{size} rank{'s' * (size > 1)} with ZeRO-{stage}"
        if before:
            assert f"after step {2 * i}" in said
        if before not in ("", place):
            assert f"checkpoint of step {2 * i} was saved on {before}; converting for {place}" in said
    found = losses(tmp_path / "run")
    assert found.keys() == whole[precision].keys()
    for step, expected in whole[precision].items():
        assert found[step] == pytest.approx(expected, rel=limit), step


# ---- data


def test_the_order_of_data_is_the_same_on_any_nodes():
    """What streaming deals out, for steps of 24 sequences, from any step on: the same sequences to each step."""

    get_partitions = import_streaming().base.partition.get_partitions

    def dealt(nodes, ranks_of_each, workers, done, first_nodes):
        batch = 24 // (nodes * ranks_of_each)
        ids = get_partitions("relaxed", 240, 1, nodes, ranks_of_each, workers, batch, done, first_nodes)
        rows = ids.transpose(3, 2, 0, 1, 4).reshape(-1, 24)  # batches, workers | nodes, ranks, sequences
        return [sorted(row) for row in rows if (row >= 0).all()]

    expected = [list(range(at, at + 24)) for at in range(0, 240, 24)]
    shapes = [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (3, 1), (3, 2), (4, 2), (6, 4)]
    for (nodes, each), (first_nodes, _), workers, done in itertools.product(shapes, shapes, (1, 2), (0, 3, 7)):
        assert dealt(nodes, each, workers, 24 * done, first_nodes) == expected[done:], (nodes, each, first_nodes, done)


@pytest.mark.parametrize("size, cp, workers", [(4, 2, 0), (2, 1, 1)])
def test_a_position_holds_for_other_ranks(ranks, data, size, cp, workers):
    batch, steps = 4, 5
    assert open_folder(data).sequences >= batch * steps
    expected = by_step(ranks(1, read, data, 1, batch, steps, None), 1)
    state = json.loads(json.dumps(ranks(size, read, data, cp, batch, 2, None, workers)[0][1][-1]))
    for other, its_cp, its_workers in ((1, 1, 1), (2, 2, 0), (4, 1, 0)):
        found = by_step(ranks(other, read, data, its_cp, batch, steps - 2, state, its_workers), its_cp)
        assert found == expected[2:], (other, its_cp)


# ---- what does not go on


def test_files_of_another_version_are_neither_read_nor_set_aside(ranks, data, saved, tmp_path):
    precision, path = saved[-2]
    run = shutil.copytree(Path(path).parent.parent, tmp_path / "run")
    manifest = run / "checkpoints" / "step_00000001" / checkpoint.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": 2, "new": 1}))
    (said,) = ranks(1, go, configured(data, run, precision))
    assert "step_00000001 was written by another version of foxdist (layout 2 of files); must be layout 3" in said
    assert manifest.exists()
