"""A rank that dies, stalls, fails or plans differently ends every rank, with the right words; and the run goes on."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from foxdist.progress import Place
from foxdist.verdict import HANG, SUSPECT, Heard, Word, judge, longest_step, word_at
from foxdist.watch import LOST

from ranks import PATIENCE
from runs import TRAIN, go, losses, processes, tree, write_yaml

SCRIPT = Path(__file__).with_name("faulty.py")
TIMEOUT = 12.0  # seconds; a step takes a tenth of one
LATE = 30.0  # seconds that the ranks may take to notice, to speak and to end, on a busy machine


def settings(data, folder):
    values = tree(data, folder, parallel__cp=2, train__steps=8, checkpoint__every=4)
    values["parallel"] |= {"timeout_minutes": TIMEOUT / 60, "checksum_every": 2}
    return values


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """The losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("watch") / "whole"
    ranks(2, go, settings(data, folder))
    return losses(folder)


def run_with(fault, guilty, values, folder, gpus="", size=2):
    """What each rank said and how it ended, and in how many seconds. No launcher stands between them."""
    config, noted = write_yaml(folder, values), folder / "fault"
    with processes(SCRIPT, fault, guilty, noted, "--config", config, folder=folder, gpus=gpus, size=size) as started:
        for rank, process in enumerate(started):
            if not (fault == "frozen" and rank == guilty):
                process.wait(timeout=PATIENCE)
        seconds = time.time() - float(noted.read_text())
    return [((folder / f"said{rank}").read_text(), process.returncode) for rank, process in enumerate(started)], seconds


LAST = "the same command goes on from the newest checkpoint"
THERE = "at step 6, layer 1, backward"
WAITS = f"waits {THERE}, gradients, stage 1 of 1"
GONE = "error on rank 1: rank 0 died: its store does not answer"
SLEEPS = [
    "nothing moves for",
    "rank 0 waits at step 6, layer 1, forward, gate sums; not there yet: rank 1 is at step 6, layer 1, forward;",
]
HANGS = [
    "a step takes",
    "rank 1 is at step 8, layer 1, forward, rank 0 waits at step 8, layer 1, forward, gate sums; the stacks of its",
]
FAILED = "failed at step 6, layer 1, forward: MemoryError: no room for a page"
DIFFERS = "layer 1 was planned differently: rank 1 not as rank 0 of the same cp group;"
KILLED = (-signal.SIGKILL, [])
SAID = {  # fault, rank: of each rank the status and words
    ("killed", 1): [(LOST, ["rank 1 died: nothing heard for", f"rank 1 was last {THERE}; rank 0 {WAITS}"]), KILLED],
    ("killed", 0): [KILLED, (LOST, [GONE, f"rank 0 was last {THERE}; rank 1 {WAITS}"])],
    ("frozen", 0): [KILLED, (LOST, [f"{GONE} (no answer for", f"rank 0 was last {THERE}; rank 1 {WAITS}"])],
    ("asleep", 1): [(LOST, SLEEPS)] * 2,
    ("hangs", 1): [(LOST, HANGS)] * 2,
    ("fails", 1): [(LOST, [f"rank 1 {FAILED}"]), (1, ["Traceback", "MemoryError: no room for a page"])],
    ("plans everything", 1): [(LOST, [f"{DIFFERS} ranks 0-1 wait at step 6, layer 1, forward, pages, stage 1 of 1;"])]
    * 2,
    ("plans another page", 1): [(1, [f"step 6: {DIFFERS}", "the update was not made"])] * 2,
}
RESUMED = [("killed", 1), ("asleep", 1), ("plans everything", 1)]


@pytest.mark.parametrize("fault, guilty", SAID, ids=[f"rank {guilty} {fault}" for fault, guilty in SAID])
def test_every_rank_ends_and_the_run_goes_on(ranks, data, tmp_path, whole, fault, guilty):
    values = settings(data, tmp_path / "run")
    values["parallel"]["hang_factor"] = 2
    found, seconds = run_with(fault, guilty, values, tmp_path)
    for (said, status), (expected, words) in zip(found, SAID[fault, guilty]):
        assert status == expected, said
        for word in words:
            assert word in said, said
        if status == LOST:
            assert LAST in said
            assert "Traceback" not in said, said
            assert f"the stacks of its threads are in {tmp_path / 'run' / 'stacks'}" in said
    assert seconds < TIMEOUT + LATE
    for rank, (_, status) in enumerate(found):
        if status >= 0 and fault != "plans another page":  # of which all ranks know without a verdict
            stacks = (tmp_path / "run" / "stacks" / f"rank_{rank:05d}.txt").read_text()
            assert stacks.count("---- ") == 1
            assert "in _run" in stacks, "of the training thread"
            assert ("in sleep\n" in stacks) == (fault in ("asleep", "hangs") and rank == guilty)
    if (fault, guilty) in RESUMED:
        assert "after step 4" in ranks(2, go, values)[0]
        assert losses(tmp_path / "run") == whole


def two_go_on_for_four(ranks, values, folder, backend="gloo", gpus=""):
    """dp 2 x cp 2, of which one is killed in an exchange: all end and say so, and cp 2 alone goes on. Its losses."""
    found, seconds = run_with("killed", 1, values, folder, gpus, size=4)
    for rank, (said, status) in enumerate(found):
        assert status == (-signal.SIGKILL if rank == 1 else LOST), said
        assert rank == 1 or "rank 1 died: nothing heard for" in said, said
        assert rank == 1 or "rank 1 was last at step 6, layer 1, backward" in said, said
    assert seconds < TIMEOUT + LATE
    said = ranks(2, go, values, backend=backend)[0]
    assert "after step 4" in said
    assert "saved on 4 ranks with ZeRO-1; converting for 2 ranks" in said
    return losses(values["train"]["run_dir"])


def alike(found, expected):
    """Losses and gradient norms of every step, but for rounding."""
    assert list(found) == list(expected)
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step


def test_two_ranks_go_on_for_four(ranks, data, tmp_path, whole):
    """Through each other's memory; by messages in test_slurm.py."""
    values = settings(data, tmp_path / "run")
    values["parallel"]["transport"] = "peer"
    alike(two_go_on_for_four(ranks, values, tmp_path), whole)


def test_what_killed_jobs_leave_on_a_node_blocks_nobody(ranks, data, tmp_path, whole):
    """SIGKILL of every process, as SLURM does: of those, too, that would remove names of shared memory. The same run
    goes on there, beside another job."""
    values = settings(data, tmp_path / "run")
    values["data"]["workers"] = 1
    config, noted = write_yaml(tmp_path, values), tmp_path / "fault"
    with processes(SCRIPT, "asleep", 1, noted, "--config", config, folder=tmp_path) as started:
        while not noted.exists():
            assert started[1].poll() is None
            time.sleep(0.1)
        maps = [each.path for process in started for each in psutil.Process(process.pid).memory_maps()]
        names = {Path(path).name for path in maps if path.startswith("/dev/shm/")}
        os.killpg(started[0].pid, signal.SIGKILL)
    assert names & set(os.listdir("/dev/shm")), "nothing was left, so nothing is tested"
    (tmp_path / "beside").mkdir()
    beside = write_yaml(tmp_path / "beside", settings(data, tmp_path / "beside" / "run"))
    with (
        processes(TRAIN, "--config", config, folder=tmp_path) as same,
        processes(TRAIN, "--config", beside, folder=tmp_path / "beside") as other,
    ):
        assert [p.wait(timeout=PATIENCE) for p in (*same, *other)] == [0] * 4, (tmp_path / "said0").read_text()
    assert "after step 4" in (tmp_path / "said0").read_text()
    assert losses(tmp_path / "run") == losses(tmp_path / "beside" / "run") == whole


def test_a_rank_without_others_is_watched_too(data, tmp_path):
    values = settings(data, tmp_path / "run")
    values["parallel"] |= {"cp": 1, "hang_factor": 2}
    ((said, status),), seconds = run_with("hangs", 0, values, tmp_path, size=1)
    assert status == LOST, said
    # Five seconds, or twice what steps take on a busy machine.
    words = r"where (\d+) s are allowed: rank 0 is at step 8, layer 1, forward; the stacks of its threads are in"
    found = re.search(words, said)
    assert found, said
    assert int(found[1]) >= 5
    assert LAST in said
    assert seconds < TIMEOUT + LATE
    assert "in sleep\n" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()
    beat = json.loads((tmp_path / "run" / "heartbeats" / "rank_00000.json").read_text())
    assert (beat["rank"], beat["step"], beat["layer"], beat["part"], beat["ended"]) == (0, 8, 1, "forward", "")
    assert time.time() - seconds - 60 < beat["time"] < time.time()
    assert 0 < beat["median_step"] < TIMEOUT


# ---- verdicts, without processes


def place(layer=3, exchange="", order=(40, 0), **changes):
    return Place(order, 12, "forward", layer, exchange, timed=True, warm=True)._replace(**changes)


def heard(place, seconds=0.0, silent=0.0, timeout=600.0, plans=None, **changes):
    word = word_at(place, seconds, timeout, plans or {})
    return Heard(Word(**vars(word) | changes), silent)


GATES = place(exchange="gate sums", order=(40, 1))


def test_nothing_is_wrong_while_ranks_move():
    assert judge({0: heard(GATES, 599), 1: heard(place(), 599, silent=29)}, 2) == ""


def test_a_silent_rank_died():
    said = judge({0: heard(GATES, 31), 1: heard(GATES, 31), 2: heard(place(), silent=31)}, 3)
    assert said == (
        "rank 2 died: nothing heard for 31 s; rank 2 was last at step 12, layer 3, forward; "
        "ranks 0-1 wait at step 12, layer 3, forward, gate sums"
    )


def test_the_first_of_the_silent_is_named():
    said = judge(
        {0: heard(GATES), 1: heard(GATES, silent=31), 2: heard(place(), silent=40), 3: heard(place(), silent=40.9)}, 4
    )
    assert said.startswith("ranks 2-3 died: nothing heard for 41 s")


@pytest.mark.parametrize(
    "where, silent",
    [
        (place(), 30),
        (GATES, 30),
        (place(timed=False), 600),
        (place(timed=False, exchange="files of a checkpoint"), 600),
        (place(timed=False, warm=False), 600),
        (GATES._replace(timed=False, warm=False), 600),
        (place(part="metrics", layer=None, exchange="numbers of all ranks"), 30),
    ],
)
def test_who_may_be_busy_may_be_silent(where, silent):
    assert not judge({0: heard(GATES), 1: heard(where, silent=silent - 1)}, 2)
    assert "rank 1 died" in judge({0: heard(GATES), 1: heard(where, silent=silent + 1)}, 2)
    for suspicious in (heard(GATES, lost=1.0), heard(GATES, 601)):
        assert "rank 1 died" not in judge({0: suspicious, 1: heard(where, silent=SUSPECT - 1)}, 2)
        assert "rank 1 died" in judge({0: suspicious, 1: heard(where, silent=SUSPECT + 1)}, 2)


@pytest.mark.parametrize(
    "where, allowed",
    [
        (place(), 30.0),
        (GATES, 30.0),
        (GATES._replace(timed=False, warm=False), 120.0),
        (place(timed=False), None),
        (place(timed=False, exchange="names of files"), 30.0),
    ],
)
def test_how_long_a_rank_may_stay(where, allowed):
    assert word_at(where, 0.0, 30.0, {}).allowed == allowed
    if allowed:
        assert "nothing moves" in judge({0: heard(where, allowed + 1, timeout=30.0)}, 1)


def test_of_a_chain_of_waiting_ranks_the_hindmost_is_looked_at():
    """Rank 0 waits for rank 1, which waits for rank 2; rank 3 waits for all, behind a later layer."""
    said = judge(
        {
            0: heard(place(exchange="pages, stage 2 of 2", order=(40, 3), peers=(1,)), 601),
            1: heard(place(exchange="pages, stage 1 of 2", order=(40, 2), peers=(2,)), 601),
            2: heard(place(order=(40, 1)), 20),
            3: heard(Place((90, 0), 12, "optimizer", timed=True, warm=True), 601),
        },
        4,
    )
    assert said == (
        "nothing moves for 601 s: rank 1 waits at step 12, layer 3, forward, pages, stage 1 of 2; "
        "not there yet: rank 2 is at step 12, layer 3, forward"
    )


def test_a_stall_in_which_nobody_is_behind():
    said = judge({0: heard(GATES, 601), 1: heard(GATES, 600), 2: heard(GATES, 0, ended="ConfigError: no")}, 3)
    assert said == (
        "nothing moves for 601 s: ranks 0-1 wait at step 12, layer 3, forward, gate sums; nobody it needs is behind; "
        "rank 2 has ended: ConfigError: no"
    )


def test_plans_are_compared_as_soon_as_ranks_stand_still():
    plans = {2: (39, 5), 3: (40, 6)}
    same = {rank: heard(GATES, 3, plans=plans) for rank in range(4)}
    assert judge(same, 4) == ""
    assert judge(same | {1: heard(GATES, 3, plans={2: (39, 5), 3: (30, 7)})}, 4) == "", "of another time"
    assert judge(same | {1: heard(GATES, 3)}, 4) == ""
    said = judge(same | {1: heard(GATES, 3, plans={2: (39, 5), 3: (40, 7)})}, 4)
    assert said.startswith("layer 3 was planned differently: rank 1 not as ranks 0, 2-3 of the same cp group")
    assert judge(same | {r: heard(GATES, 3, plans={2: (39, 4)}) for r in (2, 3)}, 2) == "", "another cp group"


@pytest.mark.parametrize(
    "factor, steps, expected",
    [
        (10.0, [50.0, 20.0, 1.0, 30.0, 25.0], 250.0),
        (10.0, [0.1] * 5, HANG),
        (10.0, [50.0] * 4, None),
        (0.0, [50.0] * 5, None),
    ],
)
def test_how_long_a_step_may_take(factor, steps, expected):
    assert longest_step(factor, steps) == expected


def test_a_step_that_hangs():
    """On all ranks: who waits for another's saving or logging has been in its step for longer."""
    slow = heard(GATES, 200, in_step=201.0, longest=200.0)
    assert judge({0: heard(place(), 30, in_step=199.0, longest=200.0), 1: slow}, 2) == ""
    assert judge({0: heard(place(part="checkpoint", timed=False), 30, longest=200.0), 1: slow}, 2) == ""
    assert judge({0: heard(place(), 30, in_step=900.0), 1: slow}, 2) == ""
    said = judge({0: heard(place(), 199, in_step=202.0, longest=200.0), 1: slow}, 2)
    assert said == (
        "a step takes 201 s, where 200 s are allowed: rank 0 is at step 12, layer 3, forward, "
        "rank 1 waits at step 12, layer 3, forward, gate sums"
    )
    assert "rank 0 is at step 12, layer 3, data" in judge(
        {0: heard(place(part="data", timed=False), 199, in_step=202.0, longest=200.0), 1: slow}, 2
    )
    ended = heard(place(), ended="done")
    assert "a step takes 201 s" in judge({0: slow, 1: ended}, 2)
    assert judge({0: ended, 1: ended}, 2) == ""


def test_a_collective_that_fails_without_a_cause():
    assert judge({0: heard(GATES), 1: heard(GATES, lost=2 * SUSPECT, failed="X: y")}, 2) == ""
    said = judge({0: heard(GATES), 1: heard(GATES, lost=2 * SUSPECT + 1, failed="X: y")}, 2)
    assert said.startswith("a collective failed on rank 1, and no rank died: X: y")


def test_words_survive_the_store():
    word = word_at(GATES._replace(peers=(0, 1)), 3.0, 600.0, {3: (40, -(2**60))})
    assert Word.from_json(word.to_json()) == word
    assert Word.from_json(Word().to_json()) == Word()
