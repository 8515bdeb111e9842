import torch

from foxdist.attention.merge import Partial, merge
from foxdist.layout import BLOCK

EMPTY = Partial(torch.zeros(1, BLOCK, 1, 4), torch.full((1, 1, 1, BLOCK), -torch.inf))


def part(seed):
    g = torch.Generator().manual_seed(seed)
    return Partial(torch.randn(1, BLOCK, 1, 4, generator=g), 30 * torch.randn(1, 1, 1, BLOCK, generator=g))


def test_merging_is_the_softmax_over_both():
    logits, values = (torch.randn(BLOCK, 10, *more, dtype=torch.float64) for more in ((), (4,)))

    def attend(keys):
        out = (logits[:, keys].softmax(-1)[..., None] * values[:, keys]).sum(1)
        lse2 = logits[:, keys].logsumexp(-1) / torch.tensor(2.0).log()
        return Partial(out[None, :, None], lse2[None, None, None])

    out, lse2, _ = merge(attend(slice(0, 4)), attend(slice(4, 10)))
    expected = attend(slice(0, 10))
    assert torch.allclose(out, expected.out)
    assert torch.allclose(lse2, expected.lse2)


def test_order_does_not_matter():
    a, b = merge(part(0), part(1)), merge(part(1), part(0))
    assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(a[:2], b))


def test_an_empty_part_changes_nothing():
    for merged in (merge(part(0), EMPTY), merge(EMPTY, part(0))):
        assert all(torch.equal(x, y) for x, y in zip(merged[:2], part(0)))


def test_two_empties_are_an_empty():
    assert all(torch.equal(x, y) for x, y in zip(merge(EMPTY, EMPTY)[:2], EMPTY))
