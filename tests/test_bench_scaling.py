"""`python -m foxdist.bench scaling`: points of a scaling experiment as one table and picture."""

import itertools
import json

import pytest

from foxdist.bench import __main__ as bench


def row(tokens, gpus, rate, **changes):
    """As `bench train` leaves it, with the GPUs that are its setup's."""
    point = {
        "model": "tiny",
        "acp": "on",
        "checkpointing": "off",
        "compile": "off",
        "gates": "opened",
        "zero": 1,
        "cp": 1,
    }
    numbers = {"tokens/s/GPU": rate, "time/step(ms)": 1000 * tokens / rate / gpus, "acp/tiles_kept(%)": 30.0}
    numbers |= {"memory/peak_allocated(GiB)": 1.5, "perf/mfu(%)": 60.0, "perf/executed(%)": 50.0}
    return {"tokens": tokens, "failed": None, "gpus": gpus, **point, **numbers, **changes}


@pytest.fixture
def folder(tmp_path):
    """Points of 1, 2 and 4 GPUs: one that ran out of memory, one that left nothing."""
    points = [row(1024, 1, 100.0), row(1024, 2, 90.0), row(1024, 4, 60.0), row(2048, 2, 80.0), row(4096, 4, 70.0)]
    points += [{**row(4096, 1, 1.0), "failed": "out of memory"}, row(1024, 1, 50.0, acp="off")]
    for i, point in enumerate(points):
        place = tmp_path / "points" / str(i)
        place.mkdir(parents=True)
        setup = {"device": "GPU", "torch": "2", "ranks": point.pop("gpus"), "date": str(i)}
        (place / "train.json").write_text(json.dumps({"setup": setup, "rows": [point]}))
        (place / "rank_00000.log").touch()
    (tmp_path / "points" / "killed").mkdir()
    (tmp_path / "points" / "killed" / "rank_00000.log").touch()
    return tmp_path


def test_points_are_compared_along_both_lines(folder, capsys):
    assert bench.main(["scaling", str(folder)]) == 0
    said = capsys.readouterr().out
    result = json.loads((folder / "scaling.json").read_text())
    found = {(r["acp"], r["tokens"], r["gpus"]): (r["strong"], r["ideal"], r["weak"]) for r in result["rows"]}
    assert found == {
        ("off", 1024, 1): (None, None, None),  # nothing to compare with: ACP is off there alone
        ("on", 1024, 1): (1.0, 1.0, 1.0),
        ("on", 1024, 2): (pytest.approx(1.8), 2.0, None),
        ("on", 1024, 4): (pytest.approx(2.4), 4.0, None),
        ("on", 2048, 2): (None, None, pytest.approx(0.8)),
        ("on", 4096, 4): (None, None, pytest.approx(0.7)),
        ("on", 4096, 1): (None, None, None),
    }
    assert len(result["setups"]) == 1
    assert "| tiny | on | 1,024 | 4 | 256 | 240 | 60 | 4,267 | 2.40 (4) | n/a | 30.0 % | 30.0 % | 1.5 |" in said
    assert "| tiny | on | 4,096 | 1 | 4,096 | out of memory | -" in said
    assert f"no result, see the logs there: {folder}/points/killed" in said
    assert (folder / "table.md").read_text().strip() == said.strip()
    assert (folder / "scaling.png").stat().st_size > 10_000


def test_points_of_other_options_are_not_compared(tmp_path, capsys):
    """Nor layouts, which stand among the overrides of the setup. What tells them apart is in the table."""
    kinds = [([], "off", 100.0), (["parallel.layout=contiguous"], "off", 50.0), ([], "on", 25.0)]
    for (overrides, checkpointing, rate), gpus in itertools.product(kinds, (1, 2)):
        place = tmp_path / f"{rate}-{gpus}"
        place.mkdir()
        setup = {"device": "GPU", "ranks": gpus, "overrides": overrides}
        point = row(1024, gpus, rate / gpus, checkpointing=checkpointing)
        (place / "train.json").write_text(json.dumps({"setup": setup, "rows": [point]}))
    assert bench.main(["scaling", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "setup 1: device GPU\n\nsetup 2: device GPU, overrides ['parallel.layout=contiguous']" in said
    assert "| model | ACP | checkpointing | setup | tokens |" in said
    found = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [r["strong"] for r in found] == [pytest.approx(1.0)] * 6
    assert "| tiny | on | off | 2 | 1,024 | 2 | 512 | 50 | 25 |" in said


def test_a_folder_without_points_is_named(tmp_path, capsys):
    assert bench.main(["scaling", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no point; must be what slurm/scaling.sbatch wrote" in capsys.readouterr().err
