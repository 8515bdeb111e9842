"""Pages on the move without processes: tables on the device against the plan, and the kernels that copy pages."""

import types
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plan_of, starts, travelling

from foxdist.attention import copies
from foxdist.attention.needs import find_needs
from foxdist.attention.pages import Pages, PoolGrads, page_bytes, pages_in
from foxdist.attention.slots import make_slots
from foxdist.attention.symmetric import reachable
from foxdist.layout import BLOCK, blocks_of, chunk_count

CPU = torch.device("cpu")


several = starts().filter(lambda case: case[2] > 1)


def needs_of(case, staged, kernels=False):
    """Slots and needs of every rank; `case` gives the start of every block by the plan's rule."""
    plan, start = plan_of(case), start_of(case)
    heads = plan.need.shape[1]
    slots = [make_slots(r, plan.size, plan.layout, plan.blocks, staged, CPU) for r in range(plan.size)]
    needs, moved = zip(*(find_needs(start, heads, s, kernels) for s in slots))
    return plan, slots, needs, moved


def start_of(case):
    return torch.from_numpy(case[0]).int()


@settings(max_examples=60, deadline=None)
@given(several, st.booleans())
def test_the_tables_are_the_plan(case, staged):
    """All ranks at once: what a rank fetches is what its lender laid out, and both are the plan's pages."""
    plan, slots, needs, moved = needs_of(case, staged)
    rows, heads = plan.need.shape[:2]
    for r in range(plan.size):
        own = blocks_of(r, plan.size, plan.blocks, plan.layout).tolist()
        pool = [(b, k, n) for b in range(rows) for k in range(heads) for n in own]
        lent_to = [{tuple(page) for page in travelling(plan, r, p)} for p in range(plan.size)]
        lent = {pool[i] for i in needs[r].lent.tolist() if i >= 0}
        assert lent == set().union(*lent_to)
        for d in range(1, plan.size):
            borrower = (r + d) % plan.size
            assert moved[r][:, d - 1].tolist()[::2] == [len(lent_to[borrower])] * 2
            assert moved[borrower][1, d - 1] == len(lent_to[borrower])
            stage = d - 1 if staged else 0
            table = slots[borrower].table(stage, rows, heads).whole(plan.blocks)
            returned = {page: slot for page, slot in zip(pool, needs[r].back[d - 1].tolist()) if slot >= 0}
            assert returned.keys() == lent_to[borrower]
            for page, slot in returned.items():
                assert table[page] == slot, "a gradient is fetched from where its page was"
                assert pool[needs[borrower].borrowed[stage, slot]] == page
    fetched = sum(int((x.borrowed >= 0).sum()) for x in needs)
    assert fetched == plan.counts.sum(), "nothing else is fetched"


@settings(max_examples=8, deadline=None)
@given(several, st.booleans())
def test_the_kernel_makes_the_same_tables(case, staged):
    _, _, expected, expected_moved = needs_of(case, staged)
    _, _, found, moved = needs_of(case, staged, kernels=True)
    for a, b in zip([*found, moved], [*expected, expected_moved]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def pool_of(dtype, dim=16, rows=2, blocks=3, heads=2, group=2):
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(rows, blocks * BLOCK, heads, dim, generator=g).to(dtype) for _ in range(2))
    return Pages(k, v, torch.randn(rows, heads * group, blocks, BLOCK, generator=g))


def empty_pages(count, dtype, dim=16, group=2):
    return pages_in(
        torch.full((count * page_bytes(dim, group, dtype),), 7, dtype=torch.uint8), count, dim, group, dtype
    )


EPS = {torch.float32: 0, torch.bfloat16: torch.finfo(torch.bfloat16).eps}  # the interpreter cuts off
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
DIM = pytest.mark.parametrize("dim", [16, 24])  # a kernel's lanes are powers of 2


@DTYPE
@DIM
@pytest.mark.parametrize("step", [1, 2])
def test_pages_are_gathered_by_number(dtype, dim, step):
    """In the kernel and in torch, from a view whose numbers do not stand together; -1 leaves a row as it is."""
    pool = pool_of(dtype, dim)
    wide = torch.zeros(2, 3 * BLOCK, 2, 3 * dim, dtype=dtype)
    view = wide[..., : dim * step : step]
    view.copy_(pool.k)
    lent = torch.tensor([5, -1, 0, 11, 5], dtype=torch.int32)
    for kernels in (False, True):
        out = empty_pages(5, dtype, dim)
        copies.gather(pool._replace(k=view), lent, out, kernels)
        for x, got in zip(pool.by_page(), out):
            for row, page in enumerate(lent.tolist()):
                if page >= 0:
                    assert torch.equal(got[row].flatten(), x.flatten(0, 2)[page].flatten()), (kernels, row)
        assert out.k[1].view(torch.uint8).eq(7).all()


@DTYPE
def test_pages_are_fetched_by_source_and_number(dtype):
    sources = []
    for i in range(3):
        sources.append(empty_pages(4, dtype))
        for x in sources[-1]:
            x.copy_(torch.arange(x.numel()).view(x.shape) % 97 + 100 * i)
    source = torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32)
    row = torch.tensor([3, 0, -1, 2, 3], dtype=torch.int32)
    for kernels in (False, True):
        out = empty_pages(5, dtype)
        copies.fetch(sources, source, row, out, kernels)
        for part, got in enumerate(out):
            for r in (0, 1, 3, 4):
                assert torch.equal(got[r], sources[source[r]][part][row[r]]), (kernels, part, r)
            assert got[2].view(torch.uint8).eq(7).all()


@DTYPE
@DIM
def test_returned_gradients_are_added_in_order(dtype, dim):
    """Float32 sums, rounded once. The kernel's bits are torch's, but for the interpreter, which cuts off in bf16."""
    where = torch.tensor([[-1, 0, -1, 2, *[-1] * 8], [1, 3, -1, -1, *[-1] * 7, 0]], dtype=torch.int32)
    returned = empty_pages(4, torch.float32, dim)
    for x in returned:
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    ending = torch.tensor([0, 1, -1, -1, 4, *[-1] * 6, 11], dtype=torch.int32)
    before = pool_of(torch.float32, dim)
    expected = before.by_page()[0].flatten(0, 2)[1] + returned.k[0, :, 0] + returned.k[3, :, 0]
    found = []
    for kernels in (False, True):
        sums = pool_of(torch.float32, dim)
        done = Pages(*(torch.full_like(x, 7.0, dtype=dtype) for x in sums[:2]), sums.c_in)
        copies.add(PoolGrads(sums, done), where, returned, ending, kernels)
        k = done.by_page()[0].flatten(0, 2)
        eps = EPS[dtype] if kernels else 0
        assert torch.allclose(k[1], expected.to(dtype), rtol=eps, atol=0)
        assert torch.allclose(k[4], before.by_page()[0].flatten(0, 2)[4].to(dtype), rtol=eps, atol=0)
        assert (k[2] == 7).all(), "it goes on"
        more = pool_of(torch.float32, dim)
        copies.add(PoolGrads(more), where, returned, None, kernels)
        assert torch.equal(more.by_page()[0].flatten(0, 2)[1], expected)
        found.append([*more, sums.c_in, *done])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=EPS[a.dtype], atol=0)
    assert torch.equal(more.by_page()[0].flatten(0, 2)[2], before.by_page()[0].flatten(0, 2)[2])


def can_reach(rank, size, numbers, gpus, count):
    """As ranks on GPUs, of one host, that are called so here and see so many."""
    properties = types.SimpleNamespace(uuid=gpus[rank])
    with (
        patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        patch.object(torch.cuda, "device_count", lambda: count),
        patch.object(torch.cuda, "can_device_access_peer", lambda a, b: True),
    ):
        return reachable.__wrapped__(dist.group.WORLD, torch.device("cuda", numbers[rank]))


def test_who_reaches_whom(ranks):
    assert ranks(2, can_reach, (0, 1), ("a", "b"), 2) == ["", ""]
    for numbers, gpus in (((0, 0), ("a", "b")), ((0, 1), ("a", "b"))):
        said = ranks(2, can_reach, numbers, gpus, 1)
        assert said == ["each rank sees only its own GPU, as CUDA_VISIBLE_DEVICES has it"] * 2


def test_slots_hold_every_foreign_block_once():
    for layout in ("zigzag", "contiguous"):
        for size in (2, 3, 5):
            blocks = 2 * chunk_count(size, layout)
            for staged in (False, True):
                slots = make_slots(1, size, layout, blocks, staged, CPU)
                own = set(blocks_of(1, size, blocks, layout).tolist())
                assert sorted(slots.block.tolist()) == sorted(set(range(blocks)) - own)
                for stage in slots.block.view(slots.stages, -1).tolist():
                    assert stage == sorted(stage), "ascending, as kernels find blocks by bisection"
