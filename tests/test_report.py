"""What a run leaves to read: report and sinks."""

import json

import pytest

from foxdist import report
from foxdist.log import log
from foxdist.sinks import _flat, _open_jsonl


def row(step, sent=1.0, cp=True):
    dense = 8.0 if cp else 0.0
    return {
        "step": step,
        "loss": 5.0 / step,
        "tokens/s": 100.0 * step,
        "acp/tiles_kept(%)": 10.0 * step,
        "acp/tiles_kept_by_head(%)": [[10.0 * step, 10.0 * step], [10.0 * step, 10.0 * step]],
        "acp/window_by_head(tokens)": [[128.0, 256.0], [512.0, 900.0]],
        "comm/kv_sent(MiB)": sent if cp else 0.0,
        "comm/kv_dense(MiB)": dense,
        "comm/kv_causal(MiB)": dense / 2,
    }


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return folder


def test_means_are_over_steps_not_rows(tmp_path):
    """Rows at steps 1 and 5: the second speaks for four steps."""
    rows = report.read(write(tmp_path, [row(1, sent=1.0), row(5, sent=2.0)]))
    assert report.over_run(rows, "comm/kv_sent(MiB)") == pytest.approx(1.8)
    text = report.summary(rows)
    assert "22.5 % of a dense ring's bytes" in text
    assert "45.0 % of what causality alone needs" in text
    assert "42.0 % of the causal ones" in text


@pytest.mark.parametrize("cp", [True, False])
def test_a_picture_is_drawn(tmp_path, capsys, cp):
    write(tmp_path, [row(1, cp=cp), row(2, cp=cp)])
    assert report.main([str(tmp_path)]) == 0
    assert ("K/V sent" in capsys.readouterr().out) == cp
    picture = (tmp_path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_several_runs_are_compared(tmp_path, capsys):
    """The picture holds both curves and one distance; a certificate of either is in its summary."""
    for name, factor in (("a", 1.0), ("b", 1.1)):
        (tmp_path / name).mkdir()
        rows = [row(step) | {"loss": factor * 5.0 / step} for step in (1, 2, 3)]
        if name == "b":
            rows[1] |= {"acp/pruned_weight": 3e-9, "acp/pruned_weight_allowed": 4.5e-5}
        write(tmp_path / name, rows)
    picture = tmp_path / "both.png"
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.count("loss  ") == 2
    assert said.count("3.0e-09 at most, of 4.5e-05 allowed, by 1 certificates") == 1
    assert len(picture.read_bytes()) > 10_000
    assert not (tmp_path / "a" / "report.png").exists()


def test_no_run_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no logged step" in capsys.readouterr().err


def test_jsonl_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n[1]\n{"step": 3}\n{"ste')
    file = _open_jsonl(path, 2)
    file.write('{"step": 3, "again": true}\n')
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_without_a_checkpoint_the_old_log_is_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    _open_jsonl(path, 0).close()
    assert path.read_text() == ""
    assert (tmp_path / "metrics.old.jsonl").read_text() == '{"step": 1}\n'
    assert "metrics.old.jsonl" in caplog.text


def test_a_torn_last_line_is_passed_over(tmp_path):
    write(tmp_path, [row(1), row(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "lo')
    assert [r["step"] for r in report.read(tmp_path)] == [1, 2]


def test_lists_become_names_for_wandb():
    flat = _flat({"loss": 1.0, "x_by_rank(MiB)": [1.0, 2.0], "y_by_head(%)": [[1.0], [2.0]]})
    assert flat == {
        "loss": 1.0,
        "x_by_rank(MiB)/rank0": 1.0,
        "x_by_rank(MiB)/rank1": 2.0,
        "y_by_head(%)/layer00/head00": 1.0,
        "y_by_head(%)/layer01/head00": 2.0,
    }
