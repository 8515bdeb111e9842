"""How commands end: with a status, quietly where nobody reads what they print, loudly where something failed."""

import os
import signal
import subprocess
import sys

import pytest

from foxdist.data.folder import open_folder
from foxdist.options import exit_with

from runs import write_texts


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_quietly(tmp_path, unbuffered):
    """As after `| head`, whenever it is that the pipe is found broken; what was to be written is."""
    texts = write_texts(tmp_path / "texts", 3)
    out = tmp_path / f"out{unbuffered}"
    for command in (
        ["foxdist.data", "prepare", str(texts), "--output", str(out), "--sequence-length", "512"],
        ["foxdist.bench", "acp", "--shapes", "4x16", "--lengths", "512", "--ranks", "2"],
    ):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
        os.close(writer)
        assert done.returncode == 128 + signal.SIGPIPE, done.stderr
        assert "Error" not in done.stderr
    assert open_folder(out).documents == 3


def test_another_broken_pipe_is_an_error():
    def main():
        raise BrokenPipeError("of a process that it started")

    with pytest.raises(BrokenPipeError, match="of a process"):
        exit_with(main)


def test_what_failed_is_said_though_nobody_reads_the_rest():
    """A defect behind a pipe that has gone is a defect all the same."""
    code = (
        "from foxdist.options import exit_with\n"
        "def main():\n"
        "    print('a line')\n"
        "    raise LookupError('a real defect')\n"
        "exit_with(main)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert done.returncode in (1, 120)  # 120: the interpreter's own flush fails, too
    assert "LookupError: a real defect" in done.stderr
