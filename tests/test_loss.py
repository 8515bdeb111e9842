import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from foxdist import loss as losses
from foxdist.loss import IGNORE, cross_entropy_sum


def case(tokens=50, hidden=8, vocab=31, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[::7] = IGNORE
    return x, weight, labels


@pytest.mark.parametrize("at_once", [31, 31 * 7, 10**9])
def test_matches_torch(monkeypatch, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    x, weight, labels = case()
    got = cross_entropy_sum(x, weight, labels)
    expected = F.cross_entropy((x @ weight.T).double(), labels, ignore_index=IGNORE, reduction="sum")
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(3.0 * v, (x, weight)) for v in (got, expected))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_keeps_the_loss_in_float32():
    x, weight, labels = case(dtype=torch.bfloat16)
    got = cross_entropy_sum(x, weight, labels)
    expected = F.cross_entropy((x @ weight.T).double(), labels, ignore_index=IGNORE, reduction="sum")
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [g.dtype for g in torch.autograd.grad(got, (x, weight))] == [torch.bfloat16] * 2


def test_all_labels_ignored_is_zero():
    x, weight, labels = case()
    loss = cross_entropy_sum(x, weight, torch.full_like(labels, IGNORE))
    assert loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, weight)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_full_logits_never_exist(monkeypatch):
    """The largest tensor does not grow with tokens x vocabulary."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2**14)
    for tokens in (500, 4000):
        x, weight, labels = case(tokens, 16, 1000)
        with Largest() as largest:
            cross_entropy_sum(x, weight, labels).backward()
        assert largest.numel <= max(2**14, tokens * 16, 1000 * 16) < tokens * 1000
