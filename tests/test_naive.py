"""The definition itself, against numbers worked out by hand."""

import math

import torch

from foxdist.attention import naive_forgetting_attention


def test_three_tokens_by_hand():
    q = torch.tensor([[[[1.0]], [[2.0]], [[0.5]]]])
    k = torch.tensor([[[[1.0]], [[-1.0]], [[2.0]]]])
    v = torch.tensor([[[[1.0]], [[10.0]], [[100.0]]]])
    log_f = torch.tensor([[[-0.3], [-0.5], [-0.7]]])
    out = naive_forgetting_attention(q, k, v, log_f)
    # Token 1: logits 2 * 1 - 0.5 and 2 * -1. Token 2: 0.5 - 1.2, -0.5 - 0.7, 1.
    w1 = [math.exp(1.5), math.exp(-2.0)]
    w2 = [math.exp(0.5 - 1.2), math.exp(-0.5 - 0.7), math.exp(1.0)]
    expected = [1.0, (w1[0] + 10 * w1[1]) / sum(w1), (w2[0] + 10 * w2[1] + 100 * w2[2]) / sum(w2)]
    assert torch.allclose(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert out.dtype == torch.float64


def test_open_gates_are_causal_softmax_attention():
    q, k, v = torch.randn(3, 2, 7, 4, 8).unbind(0)
    out = naive_forgetting_attention(q, k[:, :, :2], v[:, :, :2], torch.zeros(2, 7, 4))
    k, v = (x[:, :, :2].repeat_interleave(2, 2) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    assert torch.allclose(out, expected.transpose(1, 2))
