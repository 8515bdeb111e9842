"""Ranks as launchers describe them."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from foxdist import mesh
from foxdist.config import ConfigError
from foxdist.ports import free_port

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SLURM = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}


@pytest.fixture
def environment(monkeypatch):
    """A process without a launcher; what a test or the code under test sets is undone."""
    before = dict(os.environ)
    for name in (*LAUNCHER, *ALLOCATOR, *SLURM, "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def completed():
    mesh._complete_environment()
    return [os.environ[name] for name in LAUNCHER[:4]]


def test_torch_is_told_in_time_how_to_allocate(environment):
    """It has been imported by then."""
    code = "import torch; from foxdist import mesh; mesh._choose_for_torch(); "
    code += "print(torch._C._accelerator_getAllocatorSettings())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "expandable_segments:True\n"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_chose_for_torch_stays(environment, name):
    chosen = {name: "max_split_size_mb:512", "TORCH_NCCL_HIGH_PRIORITY": "0"}
    for each, value in chosen.items():
        environment.setenv(each, value)
    mesh._choose_for_torch()
    assert {each: os.environ[each] for each in (*ALLOCATOR, *chosen) if each in os.environ} == chosen


def test_plain_python_is_one_rank(environment):
    assert mesh.world_from_environment() == 1
    assert completed() == ["0", "1", "0", "1"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize("per_node, local", [("2(x3),1", "2"), ("3,2,2", "2"), ("2,2,3", "3")])
def test_srun(environment, per_node, local):
    for name, value in (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": per_node, "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    ).items():
        environment.setenv(name, value)
    assert mesh.world_from_environment() == 7
    assert mesh.local_world_from_environment() == int(local)
    assert completed() == ["5", "7", "1", local]
    assert mesh.local_world_from_environment() == int(local)


@pytest.mark.parametrize("name, local", [("LOCAL_WORLD_SIZE", 2), ("LOCAL_SIZE", 2), ("UNKNOWN", 4)])
def test_how_many_are_on_this_host_is_known_before_the_start(environment, name, local):
    """torchrun, deepspeed, and one that does not say."""
    assert mesh.local_world_from_environment() == 1
    for each, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", name: "2"}.items():
        environment.setenv(each, value)
    assert mesh.local_world_from_environment() == local
    assert completed() == ["1", "4", "1", str(local)]


def test_a_batch_script_is_one_rank(environment):
    """Plain python in it sees the job's size, and no step's."""
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "8"}.items():
        environment.setenv(name, value)
    assert mesh.world_from_environment() == 1
    assert completed() == ["0", "1", "0", "1"]


def test_a_rank_without_a_gpu_of_its_number_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert mesh._gpu(0).index == 0
    with pytest.raises(ValueError, match="LOCAL_RANK=3: this rank sees 1 GPU; must see one for every rank"):
        mesh._gpu(3)


def test_srun_without_an_address_is_named(environment):
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2,2"}).items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        completed()


def test_deepspeed_names_the_local_world_otherwise(environment):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        environment.setenv(name, value)
    assert completed() == ["3", "4", "1", "2"]


@pytest.mark.parametrize(
    "host, one_host, at",
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("localhost", True, "127.0.0.1"),
        ("127.0.0.1", False, "0.0.0.0"),  # a name of this host that others do not share
        ("192.0.2.1", False, "0.0.0.0"),  # not an address of this host
    ],
)
def test_ranks_meet_at_one_address(host, one_host, at):
    with mesh.listen(host, free_port(), one_host=one_host) as listening:
        assert listening.getsockname()[0] == at
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_port_that_is_taken_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        environment.setenv("MASTER_PORT", str(other.getsockname()[1]))
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            environment.setenv(name, value)
        with pytest.raises(ConfigError, match=r"ranks cannot meet at 127.0.0.1 .*in use.*choose another"):
            mesh.start(1, 2)


def test_ranks_of_another_job_on_the_port_are_sent_away(environment):
    """One of a larger job that comes before this job's own is not taken for it, and one of its size that comes after
    is told of the port. The job itself notices neither."""
    port, wait = free_port(), timedelta(seconds=20)
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    environment.setenv("MASTER_PORT", str(port))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        environment.setenv(name, value)
    with ThreadPoolExecutor() as threads:
        hosting = threads.submit(mesh._store, 0, 2, wait)
        mesh._store(1, 3, wait)
        own = mesh._store(1, 2, wait)
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: .*another rank 1 is there already.*choose anoth"):
            mesh.start(1, 2)
        hosting.result().set("word", "ours")
    assert own.get("word") == b"ours"


def compare(rank, size, values):
    """What ranks with these values are told, and ranks with values of `parallel.cp` that do not go together."""
    said = []
    for call in (lambda: mesh.agree(values[rank]), lambda: mesh.start(1 + rank % 2, 2)):
        try:
            call()
        except ConfigError as error:
            said.append(str(error))
    return said


def test_ranks_that_differ_are_named_on_all(ranks):
    same = {"a.b": [1.5, None], "a.c": 1}
    values = [same, same | {"a.b": 2}, same, same | {"a.b": 2, "a.d": "new"}]
    answers = ranks(4, compare, values)
    told, of_cp = answers[0]
    lines = [
        line.partition("; must be the same on all; start all ranks with the same file") for line in told.split("\n")
    ]
    assert all(found for _, found, _ in lines)
    assert sorted(what for what, *_ in lines) == [
        "a.b: is 2 on ranks 1, 3 and [1.5, None] on rank 0",
        "a.d: is new on rank 3 and None on rank 0",
    ]
    assert of_cp.startswith("parallel.cp: is 2 on ranks 1, 3 and 1 on rank 0;")
    assert answers == [answers[0]] * 4


def places(rank, size, cp):
    m = mesh.start(cp, 2)
    return m.dp, m.cp_rank, sorted(dist.get_process_group_ranks(m.cp_group))


def test_cp_is_innermost(ranks):
    assert ranks(4, places, 2) == [(2, 0, [0, 1]), (2, 1, [0, 1]), (2, 0, [2, 3]), (2, 1, [2, 3])]


def first_speaks(rank, size):
    def fail(kind):
        raise kind(f"a.b=1: seen by rank {dist.get_rank()}")

    answers = [mesh.on_rank_0(lambda: f"rank {rank}"), mesh.broadcast([rank])]
    for kind in (ConfigError, OSError):
        try:
            mesh.on_rank_0(lambda kind=kind: fail(kind))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def test_what_rank_0_meets_every_rank_learns(ranks):
    seen = "a.b=1: seen by rank 0"
    zero, one = ranks(2, first_speaks)
    assert zero == ["rank 0", [0], f"ConfigError: {seen}", f"OSError: {seen}"]
    assert one == [None, [0], f"ConfigError: {seen}", f"RuntimeError: rank 0 failed: OSError: {seen}"]
