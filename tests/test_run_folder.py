"""Whose a run folder is."""

import errno
import fcntl
import subprocess
import sys

import pytest

from foxdist import config as configuration
from foxdist import run_folder
from foxdist.log import log

from runs import tree, write_yaml

HOLDER = """
import sys
from foxdist import config, run_folder
lock = run_folder.take(config.load(sys.argv[1], []))
print("held", flush=True)
sys.stdin.read()
"""


def test_one_job_at_a_time_and_a_killed_one_lets_go(tmp_path):
    values = tree("/data", tmp_path / "run")
    config = configuration.parse(values)
    command = [sys.executable, "-c", HOLDER, str(write_yaml(tmp_path, values))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} on \S+ trains in it; must be one job at a time"):
            run_folder.take(config)
        other.kill()
    run_folder.take(config).close()
    run_folder.take(config).close()


def test_a_configuration_binds_from_the_first_checkpoint_on(tmp_path):
    """A run that failed before it leaves nothing that another configuration could spoil."""
    run_folder.take(configuration.parse(tree("/data", tmp_path))).close()
    run_folder.record(configuration.parse(tree("/data", tmp_path)))
    other = configuration.parse(tree("/data", tmp_path, optim__lr=1e-5))
    run_folder.check(other)
    (run_folder.checkpoints(tmp_path) / "step_00000008").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.005 and is 1e-05"):
        run_folder.check(other)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(ValueError, match=r"train\.run_dir=.*must be"):
            run_folder.take(configuration.parse(tree("/data", place)))
    with pytest.raises(ValueError, match="names no folder"):
        run_folder.check(configuration.parse(tree("/data", "")))


@pytest.mark.parametrize("content", ["", "a: [1", "text"])
def test_a_damaged_config_is_named(tmp_path, content):
    config = configuration.parse(tree("/data", tmp_path))
    (tmp_path / "config.yaml").write_text(content)
    (run_folder.checkpoints(tmp_path) / "step_00000008").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        run_folder.check(config)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(log, "propagate", True)
    config = configuration.parse(tree("/data", tmp_path / "run"))
    run_folder.take(config).close()
    assert "cannot be locked (No locks available)" in caplog.text
