"""The shell scripts, with commands that only say how they were called in place of the installed ones."""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from foxdist import check
from foxdist.bench import context_parallel, train
from foxdist.data.folder import open_folder

from runs import WORDS

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


def launch(folder, script, *arguments, path=None, expect=0):
    """Runs a script in `folder`, with `path` as the place of programs, and returns what it said."""
    done = subprocess.run(
        [shutil.which("bash"), folder / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | ({"PATH": path} if path else {}),
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def calls(folder, script, *arguments, path=None):
    """The calls of programs that a script made."""
    (folder / "calls").unlink(missing_ok=True)
    launch(folder, script, *arguments, path=path)
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
    assert made[:3] == ["ruff check .", "ruff format --check .", "mypy "]
    (tests,) = made[3:]
    assert tests.startswith("python -m pytest ")
    assert tests.endswith(" -k plan")


@pytest.mark.parametrize(
    "script, words", [("local.sh", "--dry-run"), ("check.sh", "--nodes=1"), ("measure.sh", "faults")]
)
def test_the_first_call_goes_on_with_what_it_installed(installed, script, words):
    """And not with the Python that made the environment, which lacks everything."""
    folder, _ = installed
    (folder / "slurm").mkdir()
    (folder / "slurm" / "site.env").write_text("FOXDIST_GPUS_PER_NODE=8\n")
    shutil.copy(folder / ".venv" / "bin" / "python", folder / ".venv" / "bin" / "sbatch")
    config = [] if script == "measure.sh" else ["configs/NAME.yaml"]
    said = launch(folder, script, words, *config, path=f"{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    made = (folder / "calls").read_text().splitlines()
    assert "-m pip install" in made[0]
    assert said.count("installing foxdist") == 1
    assert len(made) > 1
    assert f"{sys.executable} " not in said


def test_a_changed_project_is_installed_again(installed):
    folder, mark = installed
    mark("base")
    (folder / "pyproject.toml").write_text("# another")
    assert any(
        call.startswith("python -m pip install") and call.endswith(f"-e {folder}")
        for call in calls(folder, "quickstart.sh")
    )


def write_kernel(folder):
    """A kernel tree: one long C file in `kernel`, a short one in `mm`, headers and a text."""
    for name, words in (("kernel/long.c", 2000), ("kernel/long.h", 2000), ("mm/short.c", 20), ("mm/notes.txt", 2000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(" ".join(WORDS[i % len(WORDS)] for i in range(words)))
    return folder


@pytest.fixture
def debian(tmp_path):
    """A place of programs like a Debian system's, whose package is a tar file."""
    programs = tmp_path / "programs"
    programs.mkdir()
    write_kernel(tmp_path / "linux-source-6.1")
    inner, package = tmp_path / "linux-source-6.1.tar", tmp_path / "package.tar"
    with tarfile.open(inner, "w") as tar:
        tar.add(tmp_path / "linux-source-6.1", "linux-source-6.1")
    with tarfile.open(package, "w") as tar:
        tar.add(inner, "usr/src/linux-source-6.1.tar")
    for name, does in {
        "apt-get": f'echo "apt-get $*" >> {tmp_path}/calls; cp {package} "$2_1_all.deb"',
        "apt-cache": "printf 'linux-source\\n  Depends: linux-source-6.1\\n'",
        "dpkg-deb": 'mkdir "$3" && tar -xf "$2" -C "$3"',
        "xz": "false",
    }.items():
        write_program(programs / name, does)
    return programs


def write_program(path, does):
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)


def test_a_kernel_tree_of_ones_own_becomes_a_corpus(installed):
    """The whole way, with the real preparation; `--min-bytes` wins over the script's own."""
    folder, mark = installed
    mark("base")
    write_program(folder / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"')
    write_kernel(folder / "my linux")
    options = ["--sequence-length", "512", "--folders", "kernel", "mm", "--output", "out"]
    said = launch(folder, "corpus_linux.sh", "--tree", "my linux", *options, "--min-bytes", "1000")
    prepared = open_folder(folder / "out")
    assert prepared.documents == 1, "a header, a short file or a text was taken"
    assert prepared.tokens == (folder / "my linux" / "kernel" / "long.c").stat().st_size + 1
    assert prepared.sequence_length == 512
    assert "left out 1 documents shorter than 1,000 bytes" in said


def test_the_kernel_package_is_fetched_once(installed, debian):
    folder, mark = installed
    mark("base")
    path = f"{debian}:{os.environ['PATH']}"
    tree = folder / "data" / "linux-source-6.1"
    preparation = f"python -m foxdist.data prepare {tree}/. --output {folder}/data/linux"
    fetching, preparing = calls(folder, "corpus_linux.sh", "--train-bpe", "300", path=path)
    assert fetching == "apt-get download linux-source-6.1"
    assert preparing.startswith(preparation)
    assert preparing.endswith(" --train-bpe 300")
    assert sorted(p.name for p in tree.rglob("*.*")) == ["long.c", "long.h", "short.c"]
    assert [p.name for p in (folder / "data").iterdir()] == ["linux-source-6.1"]
    (again,) = calls(folder, "corpus_linux.sh", "--folders", "kernel", path=path)
    assert again.startswith(preparation.replace("/. ", "/kernel "))


def test_an_interrupted_fetch_of_the_kernel_is_continued(installed, debian):
    folder, mark = installed
    mark("base")
    path = f"{debian}:{os.environ['PATH']}"
    right = (debian / "dpkg-deb").read_text()
    write_program(debian / "dpkg-deb", 'mkdir "$3"; exit 1')
    launch(folder, "corpus_linux.sh", path=path, expect=1)
    tree = folder / "data" / "linux-source-6.1"
    assert not tree.exists()
    assert not any("foxdist.data" in call for call in (folder / "calls").read_text().splitlines())
    (debian / "dpkg-deb").write_text(right)
    calls(folder, "corpus_linux.sh", path=path)
    assert (tree / "kernel" / "long.c").is_file()


@pytest.mark.parametrize(
    "change, arguments, words",
    [
        ({"apt-get": None}, [], ["apt-get not found", "--tree DIR"]),
        ({"apt-cache": ""}, [], ["apt knows no linux-source", "apt-get update"]),
        ({"apt-get": "exit 100"}, [], ["--package linux-source-6.1: not downloaded"]),
        ({"dpkg-deb": 'mkdir "$3"'}, ["--package", "other"], ["--package other: holds no linux-source-*.tar"]),
        ({}, ["--package", "a", "--tree", "b"], ["exclude each other"]),
    ],
)
def test_what_the_kernel_corpus_lacks_is_named(installed, debian, change, arguments, words):
    folder, mark = installed
    mark("base")
    for name, does in change.items():
        if does is None:
            (debian / name).unlink()
        else:
            write_program(debian / name, does)
    # Only what the script itself calls, so that a real apt-get does not come to its help.
    for name in (
        "bash",
        "cp",
        "cut",
        "dirname",
        "find",
        "flock",
        "mkdir",
        "rm",
        "sed",
        "sha256sum",
        "sh",
        "sort",
        "tail",
        "tar",
    ):
        (debian / name).symlink_to(shutil.which(name))
    said = launch(folder, "corpus_linux.sh", *arguments, path=str(debian), expect=2)
    assert all(word in said for word in words), said
    assert not (folder / "data" / "linux").exists()


PARTS = ("attention", "ways", "graphs", "dense", "training", "longest", "faults")


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_what_measure_asks_for_can_be_measured(installed, gpus):
    """Every command is one that the benchmarks understand, on lengths that so many ranks can share."""
    folder, mark = installed
    mark("dev")
    made = calls(folder, "measure.sh", *PARTS, "--gpus", str(gpus))
    assert made.pop().startswith("python -m pytest ")
    found = {}
    for call in made:
        name, *words = call.removeprefix("python -m foxdist.bench ").split()
        module = {"context-parallel": context_parallel, "train": train}[name]
        parser = argparse.ArgumentParser()
        module.add_options(parser)
        chosen = parser.parse_args(words)
        found.setdefault(name, []).append(chosen)
        if name == "train":
            assert gpus in chosen.cp
            assert (chosen.longest and not chosen.lengths) or list(train._points(chosen))
            continue
        assert max(chosen.ranks) == gpus
        context_parallel.check_points([], context_parallel.points_of(chosen, chosen.ranks))
    # Two models on few GPUs and two lengths on many; and the longest.
    assert [len(chosen) for chosen in found.values()] == [4, 2 + 1]
    for chosen in found["train"][:-1]:
        for point in train._points(chosen):
            cells = [train._cell(point, length, gpus, chosen) for length in chosen.lengths]
            assert {cell.config.train.tokens_per_step for cell in cells} == {gpus // min(chosen.cp) * chosen.lengths[0]}
            assert all(sum(check.memory(cell.config, gpus).values()) < 130 * check.GIB for cell in cells)


def test_measure_prints_goes_on_and_fails_with_what_failed(installed):
    folder, mark = installed
    mark("dev")
    python = folder / ".venv" / "bin" / "python"
    python.write_text(python.read_text() + 'case "$*" in *context-parallel*) exit 3 ;; esac\n')
    said = launch(folder, "measure.sh", "attention", "dense", "faults", "--gpus", "2", expect=3)
    assert len((folder / "calls").read_text().splitlines()) == 3, "the others ran"
    assert "--output bench/2-gpus/attention" in said
    (folder / "calls").unlink()
    launch(folder, "measure.sh", "attention", "--gpus", "2", "--dry-run")
    assert not (folder / "calls").exists()
    for words, wrong in (
        (["everything"], "everything: unknown"),
        (["faults", "--gpus", "6"], "use 4"),
        ([], "name some"),
    ):
        assert wrong in launch(folder, "measure.sh", *words, expect=2)
