"""The shell scripts, with commands that only say how they were called in place of the installed ones."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(tmp_path):
    """A checkout whose environment seems installed: `installed("dev")` with that group."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\necho 1\n')
        (programs / name).chmod(0o755)

    def mark(group):
        digest = hashlib.sha256((tmp_path / "pyproject.toml").read_bytes()).hexdigest()[:16]
        (tmp_path / ".venv" / f"installed-{group}-{digest}").touch()

    return tmp_path, mark


def calls(folder, script, *arguments):
    done = subprocess.run(["bash", folder / "launch" / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "calls").read_text().splitlines()


def test_quickstart_hands_its_arguments_to_training_alone(installed):
    folder, mark = installed
    mark("base")
    made = calls(folder, "quickstart.sh", "train.steps=300")
    assert not any("pip" in call for call in made)
    (training,) = (call for call in made if "deepspeed.launcher.runner" in call)
    assert training.endswith("foxdist/train.py --config configs/quickstart.yaml train.steps=300")
    assert made[-1] == "python -m foxdist.report runs/quickstart"


def test_tests_hand_their_arguments_to_pytest_alone(installed):
    folder, mark = installed
    mark("dev")
    made = calls(folder, "test.sh", "-k", "plan")
    assert made == ["ruff check .", "ruff format --check .", "mypy ", "python -m pytest -k plan"]


def test_a_changed_project_is_installed_again(installed):
    folder, mark = installed
    mark("base")
    (folder / "pyproject.toml").write_text("# another")
    assert any(
        call.startswith("python -m pip install") and call.endswith(f"-e {folder}")
        for call in calls(folder, "quickstart.sh")
    )
