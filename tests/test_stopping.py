"""A run that a signal or the time limit stops: all ranks at one step, saved, status 0, and the same losses after."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from foxdist import checkpoint, sinks, stopping
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import train as training
from foxdist.progress import Place, progress
from foxdist.sinks import Sinks
from foxdist.stopping import ECHO, MARGIN, Listener, Stop, live_as_long_as_the_parent

from ranks import PATIENCE
from runs import go, losses, processes, rows, tree, write_yaml

SCRIPT = Path(__file__).with_name("signalled.py")


def settings(data, folder):
    return tree(data, folder, parallel__cp=2, train__steps=10, checkpoint__every=4, data__workers=1)


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """The losses of a run that nothing stops, and its folder."""
    folder = tmp_path_factory.mktemp("stopping") / "whole"
    ranks(2, go, settings(data, folder))
    return losses(folder), folder


def note(folder):
    return json.loads((folder / "ended.json").read_text())


def steps_saved(folder):
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step_????????"))


# ---- on ranks of the pool


PLACES = {  # name: (the function that the signal comes in, on the rank that gets it, when)
    "in forward": (training, "gradient_scale", lambda: progress.host.step == 6),
    "while saving": (checkpoint, "_fingerprint", lambda: progress.host.step == 4),
    "while loading": (checkpoint, "load", lambda: True),
}


def signalled(rank, size, values, place, sent):
    """Trains while `sent`, {rank: signal}, come at `place`: why it stopped, and after which step."""
    config = configuration.parse(values)
    owner, name, now = PLACES[place]
    real, left = getattr(owner, name), [sent[rank]] if rank in sent else []

    def function(*args, **kwargs):
        if left and now():
            os.kill(os.getpid(), left.pop())
            time.sleep(0.1)  # until the listener has heard
        return real(*args, **kwargs)

    setattr(owner, name, function)
    try:
        with Listener() as listener:
            run = training.build(config, meshes.start(config.parallel.cp, 2), Stop(listener))
            training.train(run)
    finally:
        setattr(owner, name, real)
    assert not left, "no signal came"
    return run.stop.why, run.step


@pytest.mark.parametrize(
    "place, sent, step",
    [
        ("in forward", {1: signal.SIGUSR1}, 6),
        ("in forward", {0: signal.SIGUSR1, 1: signal.SIGTERM}, 6),
        ("while saving", {0: signal.SIGTERM}, 4),
        ("while loading", {1: signal.SIGUSR1}, 0),
    ],
    ids=["one rank", "two signals", "saving", "before the first step"],
)
def test_all_ranks_stop_at_one_step_and_the_run_goes_on(ranks, data, tmp_path, whole, place, sent, step):
    """The last of several reasons is not lost: SIGTERM, after which nobody starts the job again, counts."""
    folder = tmp_path / "run"
    values = settings(data, folder)
    why = "SIGTERM" if signal.SIGTERM in sent.values() else "SIGUSR1"
    assert ranks(2, signalled, values, place, sent) == [(why, step)] * 2
    found = note(folder)
    assert (found["step"], found["total"], found["why"], found["job"]) == (step, 10, why, None)
    assert steps_saved(folder) == [s for s in (4, 6) if s <= step]
    assert (found["saved_seconds"] or 0) > 0 or step == 0
    said = ranks(2, go, values)[0]
    assert (f"after step {step}" in said) == (step > 0)
    assert losses(folder) == whole[0]
    assert note(folder)["why"] == "done"


def covering(rank, size, values, sent):
    """`signalled`, with the steps that each row of metrics was measured over in the row."""
    real = training.step_metrics
    training.step_metrics = lambda *args: real(*args) | {"covers": args[3]}
    try:
        return signalled(rank, size, values, "in forward", sent) if sent else go(rank, size, values)
    finally:
        training.step_metrics = real


def test_rows_cover_all_steps_since_the_one_before(ranks, data, tmp_path):
    """Where a signal stopped the run between two of them, and where it went on from an older checkpoint."""
    folder = tmp_path / "run"
    values = settings(data, folder)
    values["metrics"]["every"] = 10
    ranks(2, covering, values, {1: signal.SIGUSR1})
    assert [row["step"] for row in rows(folder)] == [1, 4, 6]
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    ranks(2, covering, values, {})
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 4, 5, 8, 10]
    assert [row["covers"] for row in found] == [1, 3, 1, 3, 2]


def test_an_ended_run_says_so_again(ranks, data, whole):
    _, folder = whole
    assert note(folder)["why"] == "done"
    seconds = float((folder / "saved_seconds").read_text())
    assert seconds == pytest.approx(note(folder)["saved_seconds"], abs=1e-3)
    assert ranks(2, signalled, settings(data, folder), "while loading", {0: signal.SIGUSR1}) == [("SIGUSR1", 10)] * 2
    found = note(folder)
    assert (found["step"], found["why"]) == (10, "done"), "there was nothing left to stop"
    assert found["saved_seconds"] == pytest.approx(seconds), "remembered"


# ---- processes


def test_a_signal_to_every_process_of_the_job_ends_it_in_order(ranks, data, tmp_path, whole):
    """Ranks and data workers: nobody dies before the step is made and saved, and nobody is left."""
    config = write_yaml(tmp_path, settings(data, tmp_path / "run"))
    with processes(SCRIPT, "whole job", tmp_path / "-", "--config", config, folder=tmp_path) as started:
        group = started[0].pid
        assert [p.wait(timeout=PATIENCE) for p in started] == [0, 0], (tmp_path / "said0").read_text()
        left = [p for p in psutil.process_iter() if _group(p) == group]
        assert not psutil.wait_procs(left, timeout=10)[1]
    said = (tmp_path / "said0").read_text()
    assert "stopped after step 6 of 10: SIGTERM; the same command goes on" in said
    assert "Traceback" not in said + (tmp_path / "said1").read_text()
    assert steps_saved(tmp_path / "run") == [4, 6]
    ranks(2, go, settings(data, tmp_path / "run"))
    assert losses(tmp_path / "run") == whole[0]


def test_a_data_worker_ends_with_its_parent_alone():
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work():
        live_as_long_as_the_parent(0)
        ready.set()
        time.sleep(60)

    worker = context.Process(target=work)
    # As a listener does: libraries may start threads in a forked process, which inherit it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    worker.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        assert ready.wait(10)
        for name in ("TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        worker.join(0.5)
        assert worker.is_alive()
        worker.terminate()
        worker.join(5)
        assert worker.exitcode == 0
    finally:
        worker.kill()


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_a_second_signal_ends_at_once(data, tmp_path):
    """Also a rank that waits in a collective for another; the same signal, passed on, is not a second one."""
    config = write_yaml(tmp_path, settings(data, tmp_path / "run"))
    with processes(SCRIPT, "asleep", tmp_path / "asleep", "--config", config, folder=tmp_path) as started:
        end = time.time() + PATIENCE
        while not (tmp_path / "asleep").exists() and time.time() < end:
            time.sleep(0.1)
        time.sleep(1)  # rank 0 waits
        for process in started:
            listens = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"}
            assert not listens & {"0.0.0.0", "::"}, "on every interface"
        for _ in range(2):
            for process in started:
                process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        time.sleep(ECHO)
        assert [p.poll() for p in started] == [None, None]
        started[0].send_signal(signal.SIGTERM)
        started[1].send_signal(signal.SIGUSR1)
        assert started[0].wait(timeout=30) == 128 + signal.SIGTERM
        assert started[1].wait(timeout=30) == 128 + signal.SIGUSR1
    assert "SIGTERM after SIGTERM: ends at once" in (tmp_path / "said0").read_text()
    assert not (tmp_path / "run" / "ended.json").exists()


def test_a_signal_while_python_starts_is_held(data, tmp_path):
    config = write_yaml(tmp_path, settings(data, tmp_path / "run") | {"parallel": {"cp": 1}})
    with processes(training.__file__, "--config", config, folder=tmp_path, size=1) as (process,):
        while signal.SIGUSR1 not in _blocked(process.pid):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=PATIENCE) == 0
    assert "stopped after step 0 of 10: SIGUSR1" in (tmp_path / "said0").read_text()


def _blocked(pid):
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("SigBlk"))
    return {number for number in signal.Signals if int(line.split()[1], 16) >> (number - 1) & 1}


@pytest.mark.parametrize(
    "ended, expected",
    [("done", ["finish 0"]), ("SIGUSR1", ["preempting", "finish 1"]), ("", ["finish 1"])],
)
def test_wandb_hears_how_it_ended(data, tmp_path, monkeypatch, ended, expected):
    called = []

    class Wandb:
        def mark_preempting(self):
            called.append("preempting")

        def finish(self, exit_code):
            called.append(f"finish {exit_code}")

    monkeypatch.setattr(sinks, "_start_wandb", lambda config: Wandb())
    Sinks(configuration.parse(tree(data, tmp_path, metrics__wandb="offline")), 0).close(ended)
    assert called == expected


# ---- the time limit


def test_the_time_limit_ends_the_run_in_time(data, tmp_path):
    """It takes longer than two seconds to start: less than the margin is left when the first step is made.

    Nothing of it shows the key of W&B, which is in the environment.
    """
    key = "0123456789abcdef" * 5
    values = settings(data, tmp_path / "run")
    values["metrics"]["wandb"] = "offline"
    config = write_yaml(tmp_path, values)
    more = {"FOXDIST_END_TIME": f"{time.time() + MARGIN + 2:.0f}", "SLURM_JOB_ID": "77", "WANDB_API_KEY": key}
    seen = set()
    with processes(training.__file__, "--config", config, folder=tmp_path, **more) as started:
        while started[0].poll() is None:
            seen |= _commands(started[0].pid)
            time.sleep(0.1)
        assert [p.wait(timeout=60) for p in started] == [0, 0], (tmp_path / "said0").read_text()
    assert any("wandb" in command for command in seen)
    assert not any(key in command for command in seen)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in written)
    assert not [p for p in written if key.encode() in p.read_bytes()]
    found = note(tmp_path / "run")
    assert (found["step"], found["why"], found["job"]) == (1, "time limit", "77")
    assert steps_saved(tmp_path / "run") == [1]


def _commands(pid):
    """The command lines of a process and all that it started."""
    try:
        process = psutil.Process(pid)
        return {" ".join(p.cmdline()) for p in (process, *process.children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


@pytest.fixture
def clock(monkeypatch):
    """Steps that took 1, 5 and 2 seconds, and `clock(now)`, which sets the time."""
    monkeypatch.setattr(progress, "host", Place(step=8))
    monkeypatch.setattr(progress, "steps", [1.0, 5.0, 2.0])

    def at(now):
        monkeypatch.setattr(stopping.time, "time", lambda: now)

    return at


@pytest.mark.parametrize("saving, enough", [("", 3 + 10), ("20.5\n", 3 + 10 + 41), ("broken", 3 + 10)])
def test_how_much_time_must_be_left(tmp_path, clock, saving, enough):
    (tmp_path / "saved_seconds").write_text(saving)
    stop = Stop(end=1000.0, margin=3.0)
    stop.take(tmp_path)
    clock(1000.0 - enough - 0.1)
    assert stop.votes() == [0, 0, 0]
    clock(1000.0 - enough + 0.1)
    assert stop.votes() == [0, 0, 1]
    stop.decide(stop.votes())
    assert stop.why == "time limit"


def test_a_new_saving_counts_and_ranks_other_than_0_do_not_look(tmp_path, clock):
    stop, other = Stop(end=1000.0, margin=3.0), Stop(end=1000.0, margin=3.0)
    stop.take(tmp_path)
    clock(1000.0 - 100)
    assert stop.votes() == [0, 0, 0]
    stop.saved(50.0)
    other.saved(50.0)
    assert stop.votes() == [0, 0, 1]
    assert other.votes() == [0, 0, 0]
    again = Stop(end=1000.0, margin=3.0)
    again.take(tmp_path)
    assert again.votes() == [0, 0, 1], "remembered by the next job"


def test_the_first_reason_of_several_counts_and_stays():
    stop = Stop()
    stop.decide([0, 2, 1])
    assert stop.why == "SIGUSR1"
    stop.decide([1, 0, 0])
    assert stop.why == "SIGUSR1"


@pytest.mark.parametrize("value", ["tomorrow", "12", "nan", "inf"])
def test_an_end_that_is_no_time_to_come_is_refused(data, tmp_path, monkeypatch, capsys, value):
    monkeypatch.setenv("FOXDIST_END_TIME", value)
    config = write_yaml(tmp_path, tree(data, tmp_path / "run"))
    assert training.main(["--config", str(config)]) == 2
    assert f"error: FOXDIST_END_TIME={value}: is not a time to come" in capsys.readouterr().err


# ---- the listener


def test_what_the_listener_changes_it_puts_back():
    def state():
        handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ()), len(os.listdir("/proc/self/fd"))

    before = state()
    with Listener() as listener:
        assert state() != before
        os.kill(os.getpid(), signal.SIGCHLD)
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 5
        while not listener.heard and time.monotonic() < end:
            time.sleep(0.01)
    assert listener.heard == "SIGUSR1"
    assert state() == before
