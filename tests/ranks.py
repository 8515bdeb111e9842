"""Running one function on several ranks of this machine. Processes live for the whole session and are reused."""

import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 600  # seconds for a start, or a call on all ranks; beside other work on two cores starts took over 240


def poison_memory(replace=setattr):
    """Fresh memory is NaN (or a large number): a result that was never written cannot pass by luck.

    Not DeepSpeed's buffers of gigabytes, which stay untouched, and so cost nothing, on a CPU.
    """

    def poisoned(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            if out.device.type == "cpu" and 0 < out.numel() <= 2**22:
                out.fill_(float("nan") if out.is_floating_point() else 99)
            return out

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        replace(owner, name, poisoned(getattr(owner, name)))


def place(rank, size, gpus=0):
    """The environment of a rank on this machine with so many GPUs.

    If they are fewer than ranks, all share the first: to launchers and NCCL each rank is then a host of its own, and
    NCCL's messages go through sockets. NCCL refuses two ranks on one GPU of a host, and torch shared memory of one GPU.
    """
    where = {"RANK": str(rank), "WORLD_SIZE": str(size)}
    if not 0 < gpus < size:
        return where | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    where |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    return where | {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo"}


def _serve(rank, size, backend, rendezvous, pipe):
    torch.set_num_threads(1)
    poison_memory()
    os.environ.update(place(rank, size, torch.cuda.device_count() if backend == "nccl" else 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    while (job := pipe.recv()) is not None:
        fn, args = job
        try:
            pipe.send((True, fn(rank, size, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class _Pool:
    def __init__(self, size, backend):
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.workers = [], []
        for rank in range(size):
            here, there = context.Pipe()
            worker = context.Process(
                target=_serve,
                args=(rank, size, backend, os.path.join(self.folder.name, "rendezvous"), there),
                daemon=False,
            )
            worker.start()
            self.pipes.append(here)
            self.workers.append(worker)

    def run(self, fn, args):
        for pipe in self.pipes:
            pipe.send((fn, args))
        return [self._answer(rank) for rank in range(len(self.pipes))]

    def _answer(self, rank):
        if not self.pipes[rank].poll(PATIENCE):
            return False, f"rank {rank} did not answer within {PATIENCE} s"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.workers[rank].join()
            return False, f"rank {rank} ended with status {self.workers[rank].exitcode}"

    def stop(self, kill=False):
        for pipe, worker in zip(self.pipes, self.workers):
            if kill:
                worker.kill()
            elif worker.is_alive():
                pipe.send(None)
            worker.join(timeout=20)
            if worker.is_alive():
                worker.kill()
        self.folder.cleanup()


class Ranks:
    """Pools of ranks, one for each size, started when first asked for and thrown away after a failure."""

    def __init__(self):
        self.pools = {}

    def run(self, size, fn, *args, backend="gloo"):
        """What `fn(rank, size, *args)` returned on each rank, in rank order; raises what any rank raised.

        `fn` is a module-level function. A failed collective may leave a rank waiting, so a failure ends the pool.
        """
        key = size, backend
        if key not in self.pools:
            self.pools[key] = _Pool(size, backend)
        answers = self.pools[key].run(fn, args)
        errors = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if errors:
            self.pools.pop(key).stop(kill=True)
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self):
        for pool in self.pools.values():
            pool.stop()
        self.pools = {}
