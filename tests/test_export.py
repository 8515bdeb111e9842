"""What an exported folder holds is the model that was trained, and stands by itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from foxdist import checkpoint, export, run_folder
from foxdist import config as configuration
from foxdist.data.folder import open_folder
from foxdist.data.loader import one_sequence


def losses(model, data):
    batches = [one_sequence(data, open_folder(data), i) for i in range(3)]
    with torch.no_grad():
        return [model(batch.tokens, batch.labels, batch.starts).item() for batch in batches]


def test_what_is_exported_is_what_was_trained(trained, tmp_path, capsys):
    run, data = trained
    before = sorted(run.rglob("*"))
    out = tmp_path / "deep" / "model"
    assert export.main([str(run), str(out)]) == 0
    assert sorted(run.rglob("*")) == before
    step, weights = checkpoint.weights(run_folder.checkpoints(run))
    count = sum(x.numel() for x in weights.values())
    assert capsys.readouterr().out == f"{out}: step {step}, {count:,} parameters in float32\n"

    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "who may read one may read all"
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    config = configuration.load(run / "config.yaml")
    about = json.loads((out / "config.json").read_text())
    assert configuration.Model(**about["model"]) == config.model
    assert about["tokens"] == 2 * config.train.tokens_per_step
    assert sorted(path.name for path in out.parent.rglob("*")) == ["config.json", "model", "model.safetensors"]

    trained_here = export.rebuild(config, weights, torch.device("cpu"))  # which prunes, as training does
    torch.testing.assert_close(losses(export.load(out), data), losses(trained_here, data), rtol=1e-4, atol=0.0)


def test_bfloat16_and_the_tokenizer(trained, tmp_path):
    """Half as large; the tokens' meaning goes with it, where the data have one of their own."""
    run, data = (shutil.copytree(folder, tmp_path / folder.name) for folder in trained)
    (data / "tokenizer.json").write_text("{}")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(trained[1]), str(data)))
    assert export.main([str(run), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    exact = losses(export.load(tmp_path / "out"), data)
    assert all(isinstance(loss, float) for loss in exact)
    shutil.rmtree(data)
    assert export.main([str(run), str(tmp_path / "again")]) == 0, "the data may be gone"


def test_mistakes_are_named(trained, tmp_path, capsys):
    run, _ = trained
    (tmp_path / "there").mkdir()
    (tmp_path / "new").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "new")
    for words, said in (
        ([run, tmp_path / "there"], "is there already; must be a new folder"),
        ([tmp_path / "nowhere", tmp_path / "out"], "no such file"),
        ([tmp_path / "new", tmp_path / "out"], "holds no good checkpoint"),
    ):
        assert export.main([str(word) for word in words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    export.export(run, tmp_path / "out")
    save_file({"other": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="does not go with config"):
        export.load(tmp_path / "out")
