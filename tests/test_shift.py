import pytest
import torch
import torch.distributed as dist

from foxdist.attention import ContextParallel
from foxdist.attention.shift import previous_token
from foxdist.layout import shard, unshard


def whole():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 24, 5, generator=g), torch.randn(2, 24, 5, generator=g)


def shifted(rank, size, layout):
    x, weight = (shard(t, rank, size, layout) for t in whole())
    x = x.clone().requires_grad_()
    y = previous_token(x, ContextParallel(dist.group.WORLD, layout))
    return y.detach(), torch.autograd.grad((y * weight).sum(), x)[0]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_across_ranks(ranks, size, layout):
    x, weight = whole()
    answers = ranks(size, shifted, layout)
    y = unshard([a[0] for a in answers], layout)
    assert torch.equal(y[:, 1:], x[:, :-1])
    assert y[:, 0].eq(0).all()
    grad = unshard([a[1] for a in answers], layout)
    assert torch.equal(grad[:, :-1], weight[:, 1:])
    assert grad[:, -1].eq(0).all()


def test_on_one_process():
    x, weight = whole()
    x.requires_grad_()
    y = previous_token(x)
    assert torch.equal(y, torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    grad = torch.autograd.grad((y * weight).sum(), x)[0]
    assert torch.equal(grad, torch.nn.functional.pad(weight, (0, 0, 0, 1))[:, 1:])
