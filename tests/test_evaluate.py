"""What is said of a model's use of its context: against the model's own loss, and on models that do what is known."""

import json
import math
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch

from foxdist import checkpoint, evaluate, run_folder
from foxdist import config as configuration
from foxdist.data.folder import open_folder
from foxdist.data.loader import Batch, one_sequence, shifted
from foxdist.export import rebuild
from foxdist.loss import IGNORE

VOCAB, END = 50, 49


def copies(batch):
    """Losses of a model that goes on as it went on after the same four tokens before, and else knows nothing."""
    labels = batch.labels[0].tolist()
    known = {}
    loss, right = [], []
    for i, label in enumerate(labels):
        before = tuple(labels[max(0, i - 4) : i])
        expected = known.get(before)
        right.append(expected == label)
        loss.append(0.0 if expected == label else math.log(VOCAB))
        known[before] = label
    return torch.tensor(loss), torch.tensor(right)


def knows_nothing(batch):
    length = batch.labels.shape[1]
    return torch.full((length,), math.log(VOCAB)), torch.zeros(length, dtype=torch.bool)


@pytest.mark.parametrize("depth", evaluate.DEPTHS)
@pytest.mark.parametrize("length", [128, 500])
def test_a_model_that_copies_finds_the_needle(length, depth):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, END, size) for size in (50, 600)]
    found = evaluate.needle(copies, texts, END, length, depth, 3, rng)
    assert found.right == 1.0
    assert abs(found.gain - math.log(VOCAB)) < 1e-6
    assert evaluate.needle(knows_nothing, texts, END, length, depth, 3, rng) == (0.0, 0.0)


def test_where_the_needle_stands():
    text = np.arange(1000)
    tokens, at = evaluate.hide(text, END, 300, 0.25, np.random.default_rng(0))
    both, around = evaluate.MARK + evaluate.SECRET, 300 - 2 * (evaluate.MARK + evaluate.SECRET)
    assert len(tokens) == 300
    begin = at - evaluate.MARK
    assert begin == round(0.25 * around)
    assert (tokens[begin : begin + both] == tokens[-both:]).all()
    assert (np.delete(tokens, range(begin, begin + both))[:around] == text[:around]).all()
    with pytest.raises(ValueError, match="none of 1 sequences has so much text"):
        evaluate.needle(knows_nothing, [text[:100]], END, 300, 0.5, 1, np.random.default_rng(0))


def test_positions_begin_anew_in_each_document():
    """Of five tokens and then three, with two that are fill."""
    row = shifted(np.arange(10), np.array([0, 5], np.int32), 8, END)
    batch = Batch(**{name: torch.from_numpy(x)[None] for name, x in row.items()})
    assert (batch.labels[0, 8:] == IGNORE).all()
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 99.0, 99.0])
    assert evaluate.by_position([losses], [batch]) == [
        {"from": 0, "to": 0, "tokens": 2, "loss": (1 + 6) / 2},
        {"from": 1, "to": 1, "tokens": 2, "loss": (2 + 7) / 2},
        {"from": 2, "to": 3, "tokens": 3, "loss": (3 + 4 + 8) / 3},
        {"from": 4, "to": 7, "tokens": 1, "loss": 5.0},
    ]


def test_losses_are_the_models(trained):
    """Token by token they add up to what the model trains on, and the likeliest is what logits say."""
    run, data = trained
    config = configuration.load(run / "config.yaml")
    _, weights = checkpoint.weights(run_folder.checkpoints(run))
    model = rebuild(config, weights, torch.device("cpu"))
    batch = one_sequence(data, open_folder(data), 1)
    loss, right = evaluate.losses_of(model, batch)
    with torch.no_grad():
        whole = model(batch.tokens, batch.labels, batch.starts)
        logits = model.head.norm(model.hidden(batch.tokens, batch.starts))[0] @ model.head.weight.T
    torch.testing.assert_close(loss.sum(), whole, rtol=1e-5, atol=0.0)
    assert torch.equal(right, logits.argmax(-1) == batch.labels[0])
    assert loss[batch.labels[0] == IGNORE].eq(0).all()


def test_the_command(trained, tmp_path, capsys):
    run, data = trained
    words = ["--sequences", "3", "--repeats", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    before = sorted(run.rglob("*"))
    assert evaluate.main([str(run), *words]) == 0
    assert sorted(run.rglob("*")) == before
    said = capsys.readouterr().out
    assert "step 2" in said
    assert f"{data} (which the run trained on), 3 sequences" in said
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["tokens"] for row in result["needle"]] == [n for n in (128, 256, 512) for _ in evaluate.DEPTHS]
    weighted = sum(row["loss"] * row["tokens"] for row in result["by_position"])
    assert abs(weighted / sum(row["tokens"] for row in result["by_position"]) - result["loss"]) < 1e-5
    assert 5 < result["loss"] < 6, "a new model's, near the log of its vocabulary"
    assert len(np.unique(matplotlib.image.imread(tmp_path / "out" / "evaluation.png"))) > 10

    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    assert evaluate.main([str(run), *words, "--data", str(elsewhere), "--lengths", "200"]) == 0
    assert "trained on" not in capsys.readouterr().out


def test_mistakes_are_named(trained, tmp_path, capsys):
    run, data = trained
    larger = shutil.copytree(data, tmp_path / "larger")
    about = json.loads((larger / "foxdist.json").read_text())
    (larger / "foxdist.json").write_text(json.dumps(about | {"vocab": 1000}))
    for words, said in (
        (["--lengths", "50"], "--lengths 50: must be 96 to 512"),
        (["--lengths", "1024"], "no longer than the sequences"),
        (["--data", str(larger)], "must have at most the model's 257"),
        (["--data", str(tmp_path / "nowhere")], "no such folder"),
    ):
        assert evaluate.main([str(run), "--device", "cpu", "--output", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err
