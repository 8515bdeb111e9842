import torch

from foxdist.attention.merge import merge

EMPTY = torch.zeros(3, 4), torch.full((3,), -torch.inf)


def part(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=g), 30 * torch.randn(3, generator=g)


def test_merging_is_the_softmax_over_both():
    logits, values = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 10, 4, dtype=torch.float64)

    def attend(keys):
        weights = logits[:, keys].softmax(-1)
        out = (weights[..., None] * values[:, keys]).sum(1)
        return out, logits[:, keys].logsumexp(-1) / torch.tensor(2.0).log()

    out, lse2 = merge(*attend(slice(0, 4)), *attend(slice(4, 10)))
    expected = attend(slice(0, 10))
    assert torch.allclose(out, expected[0])
    assert torch.allclose(lse2, expected[1])


def test_order_does_not_matter():
    a, b = merge(*part(0), *part(1)), merge(*part(1), *part(0))
    assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(a, b))


def test_an_empty_part_changes_nothing():
    for merged in (merge(*part(0), *EMPTY), merge(*EMPTY, *part(0))):
        assert all(torch.equal(x, y) for x, y in zip(merged, part(0)))


def test_two_empties_are_an_empty():
    assert all(torch.equal(x, y) for x, y in zip(merge(*EMPTY, *EMPTY), EMPTY))
