import pytest
import torch

from foxdist.layout import blocks_of, chunks_of, owner_of, positions, shard, unshard


def test_zigzag_by_hand():
    assert [chunks_of(r, 4, "zigzag") for r in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert shard(torch.arange(8), 1, 4, "zigzag", dim=0).tolist() == [1, 6]
    assert positions(0, 2, 4, "zigzag").tolist() == [0, 1, 6, 7]
    assert blocks_of(1, 2, 8, "zigzag").tolist() == [2, 3, 4, 5]


def test_contiguous_by_hand():
    assert [chunks_of(r, 3, "contiguous") for r in range(3)] == [(0,), (1,), (2,)]
    assert positions(1, 2, 4, "contiguous").tolist() == [4, 5, 6, 7]


def test_numbers_of_blocks_are_on_the_host_unless_asked():
    """Whatever torch's default device is: who plans with numpy reads them there."""
    with torch.device("meta"):
        assert blocks_of(1, 2, 8, "zigzag").tolist() == [2, 3, 4, 5]
        assert blocks_of(1, 2, 8, "zigzag", torch.device("meta")).is_meta


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_token_is_owned_once(size, layout):
    x = torch.randn(2, 12 * 2 * size, 3)
    parts = [shard(x, r, size, layout) for r in range(size)]
    assert torch.equal(unshard(parts, layout), x)
    where = torch.cat([positions(r, size, 24, layout) for r in range(size)])
    assert sorted(where.tolist()) == list(range(24 * size))
    assert all(owner_of(c, size, layout) == r for r in range(size) for c in chunks_of(r, size, layout))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: shard(torch.zeros(1, 6), 0, 2, "zigzag"), "multiple of 4"),
        (lambda: chunks_of(0, 2, "striped"), "zigzag, contiguous"),
        (lambda: chunks_of(2, 2, "zigzag"), "rank=2"),
        (lambda: positions(0, 0, 4, "zigzag"), "size=0"),
    ],
)
def test_mistakes_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()
