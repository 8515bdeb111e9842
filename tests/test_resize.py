"""A run that goes on with other ranks, another cp or another ZeRO stage: the losses that it would have had anyway."""

import pytest

from runs import go, losses, tree, write_data

STEPS, BREAK = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("resize") / "data")


def configured(data, folder, precision, **changes):
    """9 heads, so that biases and gates have odd sizes; a hidden size that few numbers of ranks divide."""
    values = tree(data, folder, train__precision=precision, train__steps=STEPS, **changes)
    values["model"].update(hidden=36, heads=9, mlp_ratio=1.0)
    values["optim"]["schedule"] = "constant"
    return values


CASES = [
    # ranks, cp, stage: before and after
    ((2, 1, 1), (1, 1, 1)),
    ((2, 2, 1), (2, 1, 3)),
    ((1, 1, 2), (2, 2, 1)),
    ((4, 2, 3), (2, 2, 1)),
    ((4, 1, 1), (2, 2, 2)),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("before, after", CASES)
def test_go(ranks, data, tmp_path, before, after, precision):
    size, cp, zero = before
    values = configured(data, tmp_path / "run", precision, parallel__cp=cp, parallel__zero=zero)
    values["train"]["steps"] = BREAK
    values["optim"]["warmup_tokens"] = 0
    ranks(size, go, values)
    size, cp, zero = after
    values["parallel"].update(cp=cp, zero=zero)
    values["train"]["steps"] = STEPS
    print(ranks(size, go, values)[0])
    whole = configured(data, tmp_path / "whole", precision, parallel__cp=cp, parallel__zero=zero)
    whole["optim"]["warmup_tokens"] = 0
    ranks(size, go, whole)
    print(losses(tmp_path / "whole"))
    print(losses(tmp_path / "run"))
