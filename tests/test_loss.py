import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from foxdist import loss as losses
from foxdist import loss_kernel
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
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", at_once)
    x, weight, labels = case()
    got = cross_entropy_sum(x, weight, labels)
    expected = F.cross_entropy((x @ weight.T).double(), labels, ignore_index=IGNORE, reduction="sum")
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(3.0 * v, (x, weight)) for v in (got, expected))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_filling_up_the_vocabulary_changes_nothing(monkeypatch):
    x, weight, labels = case()
    plain = cross_entropy_sum(x, weight, labels)
    grads = torch.autograd.grad(plain, (x, weight))
    monkeypatch.setitem(losses.ALIGNED, "cpu", 16)
    filled = cross_entropy_sum(x, weight, labels)
    assert filled.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(filled, (x, weight)), grads):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, columns", [(31, 32), (5000, 5056), (4096, 4096)])
def test_the_kernel_does_what_torch_does(vocab, columns, dtype):
    """With logits far apart, whose exponentials leave float32; in the interpreter, or on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, columns, generator=g) * torch.tensor([1.0, 30, 300] * 3)[:, None]).to(dtype)
    labels = torch.randint(0, vocab, (9,), generator=g)
    labels[4] = IGNORE
    expected = logits.clone()
    loss = losses.softmax_gradient(expected, labels, vocab)
    got = logits.to(device)
    found = loss_kernel.softmax_gradient(got, labels.to(device), vocab, IGNORE).cpu()
    assert torch.allclose(found, loss, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got.cpu().float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert got[:, vocab:].eq(0).all()
    assert got[4].eq(0).all()


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
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", 2**14)
    for tokens in (500, 4000):
        x, weight, labels = case(tokens, 16, 1000)
        with Largest() as largest:
            cross_entropy_sum(x, weight, labels).backward()
        assert largest.numel <= max(2**14, tokens * 16, 1000 * 16) < tokens * 1000
