"""What pruning really takes, measured: against brute force, over ranks, in training; and the dry run, which takes
nothing and counts all the same."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from test_acp import pruned_weight as brute_force
from test_acp import weights

from foxdist.attention import Acp, ContextParallel, certificate, forgetting_attention
from foxdist.attention import gates as definition
from foxdist.attention.queries import Queries
from foxdist.attention.stats import Meter
from foxdist.guard import PrunedTooMuchError, check_pruned
from foxdist.layout import blocks_of, shard

from cases import gradients, inputs
from runs import go, rows, tree

MANY = 6000  # samples: every query of a rank is among them


def certify(tensors, start, rank=0, size=1, layout="contiguous", samples=MANY):
    """The certificate for `start`, whatever made it."""
    c_in = definition.block_sums(tensors[3])
    base = definition.bases(definition.block_table(c_in))
    blocks = blocks_of(rank, size, start.shape[-1], layout)
    q, k = (shard(x, rank, size, layout) for x in tensors[:2])
    cp = ContextParallel(dist.group.WORLD, layout) if size > 1 else None
    queries = Queries(q, c_in[:, :, blocks], base, start, blocks, 0.25)
    return certificate.pruned_weight(queries, k, start, samples, cp)


def windows(rows, heads, blocks):
    """A start that prunes far too much: 0 to 2 blocks before each."""
    before = torch.arange(rows * heads).view(rows, heads, 1) % 3
    return (torch.arange(blocks) - before).clamp_min(0).int()


def of_head(tensors, head):
    """Its weights by the definition."""
    q, k, log_f = (x if x.shape[2] == 1 else x[:, :, head : head + 1] for x in (*tensors[:2], tensors[3]))
    return weights(q, k, log_f, 0.25)


@pytest.mark.parametrize("kind", ["open", "initial", "mixed"])
@pytest.mark.parametrize("length, kv_heads", [(640, 1), (500, 4)])
def test_it_is_the_weight_by_the_definition(kind, length, kv_heads, monkeypatch):
    monkeypatch.setattr(certificate, "NUMBERS", 2**20)  # several hundred queries at a time
    tensors = inputs(2, length, 4, kv_heads, kind=kind)
    start = windows(2, 4, -(-length // 128))
    expected = [brute_force(of_head(tensors, head), start[:, head : head + 1]) for head in range(4)]
    torch.testing.assert_close(certify(tensors, start), torch.tensor(expected), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_ranks_measure_what_one_process_measures(ranks, layout):
    tensors = inputs(1, 768, 4, 2, kind="mild")
    start = windows(1, 4, 6)
    expected = certify(tensors, start)
    for found in ranks(3, on_rank, tensors, start, layout):
        assert torch.allclose(found, expected, rtol=1e-5)


def on_rank(rank, size, tensors, start, layout):
    return certify(tensors, start, rank, size, layout)


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_attention_gives_it_with_its_stats(bound):
    tensors = inputs(1, 1500, 4, 2, kind="mixed")
    acp = Acp(bound=bound, logit_bound=4.0, log_eps=-3.0)
    _, stats = forgetting_attention(*tensors, acp=acp, return_stats=True)
    assert stats.pruned.shape == (0,)
    certified = dataclasses.replace(acp, certify=200)
    out, stats = forgetting_attention(*tensors, acp=certified, return_stats=True)
    assert torch.equal(out, forgetting_attention(*tensors, acp=acp))
    assert stats.pruned.shape == (4,)
    assert 0 < stats.pruned.max() <= math.exp(-3.0)


def dry(rank, size, tensors, acp, transport):
    """Output, gradients, start, and K and V sent and needed."""
    tensors = [shard(x, rank, size, "zigzag") for x in tensors]
    cp = ContextParallel(dist.group.WORLD, transport=transport) if size > 1 else None
    _, stats = forgetting_attention(*tensors, acp=acp, cp=cp, return_stats=True)
    results = gradients(lambda *x: forgetting_attention(*x, acp=acp, cp=cp), tensors)
    return results, stats.start, stats.traffic, stats.tiles_kept


@pytest.mark.parametrize("bound", ["paper", "tight"])
@pytest.mark.parametrize("size, transport", [(1, "auto"), (2, "nccl"), (2, "peer")])
def test_a_dry_run_counts_and_prunes_nothing(ranks, size, transport, bound):
    tensors = inputs(1, 1536, 4, 2, kind="mixed")
    real = Acp(bound=bound, logit_bound=4.0)
    off, pruned, counted = (
        ranks(size, dry, tensors, acp, transport) for acp in (None, real, dataclasses.replace(real, dry_run=True))
    )
    for without, saved, shown in zip(off, pruned, counted):
        assert all(torch.equal(a, b) for a, b in zip(shown[0], without[0]))
        assert torch.equal(shown[1], saved[1])
        assert shown[3] == saved[3] < without[3]
        assert shown[2].bytes_sent == without[2].bytes_sent
        assert shown[2].bytes_needed == saved[2].bytes_needed == saved[2].bytes_sent
        assert size == 1 or saved[2].bytes_sent < without[2].bytes_sent


def test_a_meter_keeps_the_worst():
    meter, stats = Meter(2, 2), forgetting_attention(*inputs(1, 300, 2), return_stats=True)[1]
    meter.add(stats.counted)
    assert meter.take().pruned.isnan().all()
    for worst in ([0.1, 0.3], [0.2, 0.1]):
        meter.add(stats.counted._replace(pruned=torch.tensor(worst)))
    assert meter.take().pruned.tolist() == pytest.approx([0.2, 0.3])
    assert meter.take().pruned.isnan().all()


class Layer:
    def __init__(self, worst):
        self.meter = Meter(len(worst), len(worst))
        self.meter.pruned.copy_(torch.tensor(worst))


def checked(rank, size):
    check_pruned([Layer([math.nan, 1e-5])], -10.0, 7)
    layers = [Layer([1e-6, math.nan]), Layer([1e-7, 3e-4 if rank else 1e-5])]
    try:
        check_pruned(layers, -10.0, 7)
    except PrunedTooMuchError as error:
        return str(error)


def test_too_much_ends_the_run_on_every_rank(ranks):
    for message in ranks(2, checked):
        assert "step 7" in message
        assert "layer 1, head 1" in message
        assert "0.0003" in message
        assert "4.54e-05" in message


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_certifies_every_n_steps(ranks, data, tmp_path, checkpointing):
    values = tree(data, tmp_path / "run", train__steps=4, parallel__cp=2)
    values["train"]["activation_checkpointing"] = checkpointing
    values["acp"] = {"certify_every": 2, "bound": "tight"}
    assert not any("error" in (text or "") for text in ranks(2, go, values))
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "acp/pruned_weight" in row] == [2, 4]
    for row in logged[1::2]:
        assert 0 <= row["acp/pruned_weight"] <= row["acp/pruned_weight_allowed"] == pytest.approx(math.exp(-10))
        assert max(map(max, row["acp/pruned_weight_by_head"])) == row["acp/pruned_weight"]


def wrong(rank, size, values):
    """Trains with a boundary that prunes all but a block's own keys."""
    from foxdist.attention import tight

    real = tight.start_blocks
    tight.start_blocks = lambda base, *rest: (
        torch.arange(base.shape[-1] - 1, dtype=torch.int32).expand(base[..., 1:].shape).contiguous(),
        real(base, *rest)[1],
    )
    try:
        return go(rank, size, values)
    except PrunedTooMuchError as error:
        return str(error)
    finally:
        tight.start_blocks = real


def test_a_wrong_boundary_is_found_in_training(ranks, data, tmp_path):
    values = tree(data, tmp_path / "run", train__steps=4, parallel__cp=2)
    values["acp"] = {"certify_every": 3, "bound": "tight"}
    for text in ranks(2, wrong, values):
        assert "step 3: pruning took" in text
    assert max(row["step"] for row in rows(tmp_path / "run")) == 2
