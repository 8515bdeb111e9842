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
        "comm/kv_sent_by_layer(MiB)": [0.25 * sent, 0.75 * sent] if cp else [0.0, 0.0],
        "comm/kv_needed_by_head(MiB)": [[0.0, 0.25 * sent], [0.25 * sent, 0.5 * sent]] if cp else [[0.0, 0.0]] * 2,
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


@pytest.mark.parametrize("cps, said", [((True, False), "none at the end"), ((False, True), "12.5 % at the end")])
def test_a_run_that_went_on_with_one_rank_a_sequence_is_shown(tmp_path, capsys, figures, cps, said):
    """Or began with it: alone and beside another run, with a gap where nothing was to be sent."""
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name, [row(step, cp=cp) for step, cp in zip((1, 3), cps)])
    assert report.main([str(tmp_path / "a")]) == 0
    assert report.main([*(str(tmp_path / name) for name in "ab"), "--output", str(tmp_path / "all.png")]) == 0
    assert capsys.readouterr().out.count(said) == 3
    share = [12.5 if cp else pytest.approx(float("nan"), nan_ok=True) for cp in cps]
    alone, both = figures
    traffic = alone["K/V between ranks, of a dense ring's 8.0 MiB a step"]
    assert list(traffic.lines[2].get_ydata()) == share
    heads = alone["K/V needed of other ranks, of a dense ring's, by layer and head"].collections[0]
    assert heads.get_array().mask.any(axis=0).tolist() == [not cp for cp in cps]
    assert [list(line.get_ydata()) for line in both["K/V sent, of a dense ring's bytes"].lines] == [share] * 2


@pytest.fixture
def figures(monkeypatch):
    """Every picture that was drawn, as a dict of its panels by title."""
    drawn = []
    monkeypatch.setattr(report.plt, "close", lambda figure: drawn.append({x.get_title(): x for x in figure.axes}))
    return drawn


def curves(axes):
    """What the lines of a panel show."""
    return [(list(line.get_xdata()), pytest.approx(list(line.get_ydata()))) for line in axes.lines]


def test_a_run_is_shown_by_layer_and_head(tmp_path, figures):
    """K/V by layer as a share of what a dense ring sends of it; an image of all heads over the steps."""
    first, last = row(1, sent=1.0), row(5, sent=2.0)
    last["acp/tiles_kept_by_head(%)"] = [[1.0, 2.0], [3.0, 4.0]]
    report.draw([first, last], tmp_path / "report.png")
    (panels,) = figures
    traffic = panels["K/V between ranks, of a dense ring's 8.0 MiB a step"]
    steps = [1, 5]
    assert curves(traffic) == [(steps, x) for x in ([6.25, 12.5], [18.75, 37.5], [12.5, 25.0], [50.0, 50.0])]
    (image,) = panels["tiles computed, of the causal ones, by layer and head"].collections[:1]
    assert image.get_array().tolist() == [[10.0, 1.0], [10.0, 2.0], [10.0, 3.0], [10.0, 4.0]]
    (image,) = panels["K/V needed of other ranks, of a dense ring's, by layer and head"].collections[:1]
    least = 12.5  # of what is not nothing
    assert image.get_array().tolist() == [[least, least], [least, 25.0], [least, 25.0], [25.0, 50.0]]
    assert image.get_coordinates()[0, :, 0].tolist() == [0, 1, 5], "a row speaks for the steps since the row before"


def test_a_run_without_traffic_by_layer_is_drawn(tmp_path, figures):
    """As an older version logged it."""
    rows = [row(1), row(2)]
    del rows[0]["comm/kv_sent_by_layer(MiB)"]
    report.draw(rows, tmp_path / "report.png")
    (panels,) = figures
    traffic = panels["K/V between ranks, of a dense ring's 8.0 MiB a step"]
    assert curves(traffic) == [([1, 2], [12.5, 12.5]), ([1, 2], [50.0, 50.0])]


def test_several_runs_are_compared(tmp_path, capsys, figures):
    """Curves of all, differences where both logged a step, the heads of those that pruned, one scale for these."""
    for name, factor, steps in (("a", 1.0, (1, 2, 4)), ("b", 1.1, (1, 4, 8)), ("c", 0.5, (9,))):
        (tmp_path / name).mkdir()
        rows = [row(step, sent=step) | {"loss": factor * 8.0 / step} for step in steps]
        if name == "a":
            rows = [x | {"acp/tiles_kept(%)": 100.0, "acp/tiles_kept_by_head(%)": [[100.0] * 2] * 2} for x in rows]
        if name == "b":
            rows[1] |= {"acp/pruned_weight": 3e-9, "acp/pruned_weight_allowed": 4.5e-5}
        write(tmp_path / name, rows)
    picture = tmp_path / "all.png"
    assert report.main([*(str(tmp_path / name) for name in "abc"), "--output", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.count("loss  ") == 5
    assert said.count("3.0e-09 at most, of 4.5e-05 allowed, by 1 certificates") == 1
    assert (
        "b from a: 0.5 nats a token apart in the mean over 2 logged steps, with its sign +0.5; +0.2 at step 4" in said
    )
    assert "c from a: no step logged by both" in said
    assert len(picture.read_bytes()) > 10_000
    assert not (tmp_path / "a" / "report.png").exists()

    (panels,) = figures
    assert curves(panels["loss"])[:2] == [([1, 2, 4], [8.0, 4.0, 2.0]), ([1, 4, 8], [8.8, 2.2, 1.1])]
    difference, nothing, _ = curves(panels["difference of loss from a"])
    assert difference == ([1, 4], [0.8, 0.2])
    assert nothing[0] == []
    traffic = panels["K/V sent, of a dense ring's bytes"]
    assert curves(traffic)[:2] == [([1, 2, 4], [12.5, 25.0, 50.0]), ([1, 4, 8], [12.5, 50.0, 100.0])]
    # Over b's steps: 1 MiB once, 4 MiB three times, 8 MiB four times, of 8.
    assert traffic.lines[1].get_label() == f"b: {100 * (1 + 3 * 4 + 4 * 8) / 64:.1f} %"
    assert "tiles computed by layer and head, a" not in panels
    images = [panels[f"tiles computed by layer and head, {name}"].collections[0] for name in "bc"]
    assert images[0].get_array()[0].tolist() == [10.0, 40.0, 80.0]
    assert [image.norm.vmin for image in images] == [10.0, 10.0]


def test_runs_of_one_rank_a_sequence_are_compared(tmp_path, figures):
    runs = {name: [row(1, cp=False), row(2, cp=False)] for name in "ab"}
    report.compare(runs, tmp_path / "both.png")
    (panels,) = figures
    traffic = panels["K/V sent, of a dense ring's bytes"]
    assert not traffic.lines
    assert "nothing to send" in traffic.texts[0].get_text()


def test_no_run_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no logged step" in capsys.readouterr().err


def test_jsonl_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n[1]\n{"step": 3}\n{"ste')
    file = _open_jsonl(path, 2)
    file.write(b'{"step": 3, "again": true}\n')
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
    lists = {"x_by_rank(MiB)": [1.0, 2.0], "y_by_head(%)": [[1.0], [2.0]], "z_by_layer(MiB)": [3.0]}
    flat = _flat({"loss": 1.0, **lists})
    assert flat == {
        "loss": 1.0,
        "x_by_rank(MiB)/rank0": 1.0,
        "x_by_rank(MiB)/rank1": 2.0,
        "y_by_head(%)/layer00/head00": 1.0,
        "y_by_head(%)/layer01/head00": 2.0,
        "z_by_layer(MiB)/layer00": 3.0,
    }
