"""Starting and stopping the process group, and the mesh of ranks: dp x cp, with cp innermost.

Rank r is cp rank r % cp of data-parallel group r // cp: the ranks that share a sequence are neighbours, on one host
wherever cp allows, and mosaicml-streaming's `replication` asks for the same order. DeepSpeed's ZeRO spans all ranks.

| axis | ranks | used by |
| --- | --- | --- |
| cp | r // cp equal | attention's exchange, K/V shift |
| dp | r % cp equal | the data each group reads |
| world | all | gradients and ZeRO, the loss, checkpoints |

What listens on the network while a job runs: the store where ranks meet, at MASTER_ADDR alone (torchrun hosts its own,
on every interface), and the connections of gloo and NCCL, on the interfaces that GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME name. None of them asks who calls: the network between the hosts must be the cluster's own.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from foxdist.config import ConfigError
from foxdist.ports import free_port
from foxdist.progress import name_ranks, progress

BACKSTOP = timedelta(minutes=3)
"""How much later than the watch (watch.py), which says more, the process group itself ends what takes too long."""
SAME_COMMAND = "start all ranks with the same file and overrides, and another job at a port of its own"
T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands."""

    rank: int
    world: int
    local_rank: int
    cp: int
    device: torch.device
    cp_group: dist.ProcessGroup
    """The ranks that share this rank's sequences."""

    @property
    def dp(self) -> int:
        return self.world // self.cp

    @property
    def cp_rank(self) -> int:
        return self.rank % self.cp


def world_from_environment() -> int:
    """How many ranks the launcher started: deepspeed, torchrun, srun, or 1."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def local_world_from_environment() -> int:
    """How many of these are on this host."""
    env = os.environ
    if "RANK" in env:
        # DeepSpeed's launcher calls it LOCAL_SIZE.
        return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"])
    if not _under_srun():
        return 1
    # "2(x3),1": tasks of each node, in order.
    per_node = [
        int(n.split("(")[0])
        for n in env["SLURM_STEP_TASKS_PER_NODE"].split(",")
        for _ in range(int(n.partition("(x")[2].rstrip(")") or 1))
    ]
    return per_node[int(env["SLURM_NODEID"])]


def _under_srun() -> bool:
    """Only srun sets the names of a step: in the batch script, plain python is one rank whatever the job's size."""
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def start(cp: int, timeout_minutes: float, gpu: bool | None = None) -> Mesh:
    """Joins the process group and makes the cp groups. Every rank must call; `cp` divides the world.

    timeout_minutes: of the configuration; a collective itself is given up `BACKSTOP` later. gpu: whether ranks have one
    each. Default: where torch finds any.
    """
    _complete_environment()
    _choose_for_torch()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpu = torch.cuda.is_available() if gpu is None else gpu
    device = _gpu(local) if gpu else torch.device("cpu")
    timeout = timedelta(minutes=timeout_minutes) + BACKSTOP
    if gpu:
        torch.cuda.set_device(device)
        # As torchrun and deepspeed have it, for launchers that do not say: with as many as the host has cores, all that
        # ranks do there waits for threads that get in each other's way, 80 ms a step on a host of 64.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    else:
        # Ranks of one host share its cores; torch would give each of them all.
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        # What is nearly forgotten has weights below 1e-38, with which a CPU calculates many times slower than with 0:
        # the quickstart trains 1.5 times as fast without, with the same losses.
        torch.set_flush_denormal(True)
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if gpu else "gloo",
                store=_store(rank, world, timeout),
                rank=rank,
                world_size=world,
                timeout=timeout,
                device_id=device if gpu else None,
            )
        except (dist.DistNetworkError, OSError) as error:
            raise ConfigError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: ranks cannot meet at {os.environ['MASTER_ADDR']} ({error}); "
                "must be a port that no other job uses; choose another (deepspeed --master_port N, torchrun "
                "--standalone), or end what is left of a killed job"
            ) from None
    agree({"parallel.cp": cp})  # before groups are made of it
    groups = [dist.new_group(range(at, at + cp), timeout=timeout) for at in range(0, world, cp)]
    return Mesh(rank, world, local, cp, device, groups[rank // cp])


def stop() -> None:
    """Leaves the process group, all ranks together: none takes away what another still reads."""
    if dist.is_initialized():
        dist.barrier()
    leave()


def leave() -> None:
    """Leaves it at once, as on an error: a process that ends inside one is aborted."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_connection(error: BaseException) -> bool:
    """Whether a collective raised it because of what another rank did: NCCL and the store have types of their own, and
    gloo's errors begin with the place in its source."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


def broadcast(value: T) -> T:
    """Rank 0's value on every rank; every rank must call. Any object that pickles."""
    box = [value]
    if dist.is_initialized():
        with progress.exchange("word of rank 0"):
            dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(fn: Callable[[], T]) -> T | None:
    """Calls `fn` on rank 0 alone: its result there, None elsewhere. Every rank must call.

    If it fails all ranks fail, instead of waiting for one that has gone: rank 0 with what `fn` raised, the others with
    the same `ConfigError` or, for anything else, a `RuntimeError`.
    """
    result: T | None = None
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = fn()
        except Exception as e:
            error = e
    # Of an exception only its text is sure to pickle.
    failed, known, text = broadcast((type(error).__name__ if error else "", isinstance(error, ConfigError), str(error)))
    if error is not None:
        raise error
    if failed:
        raise ConfigError(text) if known else RuntimeError(f"rank 0 failed: {failed}: {text}")
    return result


def agree(mine: dict[str, Any], remedy: str = SAME_COMMAND) -> None:
    """Raises the same `ConfigError` on all ranks if they do not have the same values; every rank must call.

    mine: by the names that users know; they pickle. remedy: the part of the error that says what to change.
    """
    first = broadcast(mine)
    differing = {key: mine.get(key) for key in {**first, **mine} if mine.get(key) != first.get(key)}
    every: list[dict[str, Any]] = [{}] * dist.get_world_size()
    with progress.exchange("comparison of configurations"):
        dist.all_gather_object(every, differing)
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, values in enumerate(every):
        for key, value in values.items():
            ranks.setdefault((key, str(value)), []).append(rank)
    if ranks:
        found = [
            f"{key}: is {value} on {name_ranks(some)} and {first.get(key)} on rank 0; must be the same on all; {remedy}"
            for (key, value), some in ranks.items()
        ]
        raise ConfigError("\n".join(found))


def hosts() -> list[str]:
    """The host of every rank of the world, in rank order. Every rank must call."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def _store(rank: int, world: int, timeout: timedelta) -> dist.Store | None:
    """Where ranks meet: a store that rank 0 hosts at MASTER_ADDR; None if torchrun hosts one.

    torch itself would let it listen on every interface. Ranks of another job that was given the same port come to it,
    too: those of a job of another size see nothing of this one, and the second rank of a number raises `OSError`. A job
    that starts again has a new store. torchrun's may outlive a start, and its agents say who takes part.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = None
    if rank == 0:
        listening = listen(host, port, one_host=int(os.environ["LOCAL_WORLD_SIZE"]) == world)
    store = dist.TCPStore(
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listening.detach() if listening else None,
    )
    ours = dist.PrefixStore(f"{world} ranks", store)
    if ours.add(f"arrived/{rank}", 1) > 1:
        raise OSError(f"another rank {rank} is there already")
    return ours


def listen(host: str, port: int, *, one_host: bool) -> socket.socket:
    """Listens at the address of `host` alone. one_host: no other host has ranks.

    At every address where that one is not for others: a name that means this host's loopback here (as Debian's own name
    does), or an address that is translated on the way. Raises `OSError` if the port is taken.
    """
    found = sorted(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), key=lambda found: found[0])  # IPv4 first
    family, *_, address = found[0]
    if one_host or not ipaddress.ip_address(address[0]).is_loopback:
        try:
            return socket.create_server(address[:2], family=family, backlog=2048)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return socket.create_server(("", port), family=family, backlog=2048)


def _gpu(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if count <= local_rank:  # DeepSpeed, too, takes the GPU of the rank's number
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this rank sees {count} GPU{'s' if count > 1 else ''}; must see one for every "
            "rank of its host; start fewer ranks, or under srun leave out --gpus-per-task (or add --gpu-bind=none)"
        )
    return torch.device("cuda", local_rank)


def _complete_environment() -> None:
    """Fills in what the launcher left out, in torchrun's names: DeepSpeed and streaming read them too."""
    env = os.environ
    # Without it streaming takes every rank for a node of its own.
    env["LOCAL_WORLD_SIZE"] = str(local_world_from_environment())
    if _under_srun():
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                "MASTER_ADDR, MASTER_PORT: not set under srun; must be an address of the job's first node and a free "
                "port, the same for all ranks; export them before srun"
            )
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def _choose_for_torch() -> None:
    """What torch reads from the environment when it first needs it, where the user has not chosen."""
    env = os.environ
    # NCCL's kernels get the next free processors, where attention's, which stay until all tiles are done, would keep
    # messages, gradients and ZeRO's parameters waiting.
    env.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    # Else some 12 GiB of a GPU's memory lie between what is used, and long sequences run out of it that fit with this
    # (README, "Measuring training": 917,504 tokens of a 760M over two H200s).
    if "PYTORCH_CUDA_ALLOC_CONF" not in env:  # the older of its names
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
