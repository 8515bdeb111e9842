"""Whose a run folder is."""

import errno
import fcntl
import subprocess
import sys

import pytest
import yaml

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


def started(folder, values):
    """A run folder with this configuration and a checkpoint."""
    (run_folder.checkpoints(folder) / "step_00000008").mkdir(parents=True)
    run_folder.record(configuration.parse(values))


@pytest.mark.parametrize(
    "key, value",
    [
        ("acp.enabled", False),  # as the certificate's error asks for
        ("acp.certify_every", 0),
        ("acp.dry_run", True),
        ("acp.bound", "tight"),
        ("train.compile", True),
        ("data.path", "/elsewhere/data"),
        ("parallel.cp", 2),
        ("metrics.every", 7),
    ],
)
def test_what_changes_neither_model_nor_data_nor_recipe_may_change(tmp_path, key, value):
    values = tree("/data", tmp_path) | {"acp": {}}
    started(tmp_path, values)
    section, name = key.split(".")
    values[section][name] = value
    run_folder.check(configuration.parse(values))


def test_a_run_older_than_a_key_goes_on_with_its_default(tmp_path):
    values = tree("/data", tmp_path)
    started(tmp_path, values)
    path = tmp_path / "config.yaml"
    before = yaml.safe_load(path.read_text())
    del before["acp"], before["train"]["precision"], before["optim"]["betas"]
    path.write_text(yaml.safe_dump(before))
    values["train"]["precision"] = "bf16"
    run_folder.check(configuration.parse(values))
    values["train"]["precision"] = "fp32"
    with pytest.raises(ValueError, match=r"\(train\.precision was bf16 and is fp32\)"):
        run_folder.check(configuration.parse(values))


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
