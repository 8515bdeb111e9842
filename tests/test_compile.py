"""Every kernel compiles for Hopper without a GPU, and keeps to its registers: a slow kernel would pass all other tests.

Kernels are called as always, through `launch`, but compiled instead of run, in a process of their own: in this one they
are interpreted. To add kernels, add a function that calls them to `CALLS`.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

BF16, FP32 = torch.bfloat16, torch.float32
# Bytes that a measured kernel may spill. Forward at D = 128, under its cap of 128 registers, has 48 with the ptxas of
# Triton 3.6, as the kernel that was measured, and 148 with that of 3.9; all others have less than 60.
# What fits only may spill more, but must not live in spilled registers: some tiles spilled 10,000.
SPILLED = {"measured": 160, "fits": 1000}
SHARED = {90: 227 * 1024, 80: 99 * 1024}


def triton_calls(dim, dtype, borrowed=True):
    """Forward and backward of an own and of a borrowed pool, on zeros."""
    from foxdist.attention.kernels import launch
    from foxdist.attention.kernels.preprocess import prepare
    from foxdist.attention.pages import BlockTable, Pages, own_table
    from foxdist.attention.queries import Queries

    q, c_in = torch.zeros(1, 512, 2, dim, dtype=dtype), torch.zeros(1, 2, 4, 128)
    blocks = torch.arange(4)
    queries = Queries(q, c_in, torch.zeros(1, 2, 5).double(), torch.zeros(1, 2, 4).int(), blocks, 0.1)
    own = Pages(q, q, c_in), own_table(1, 2, blocks)
    pages = torch.zeros(5, 128, 1, dim, dtype=dtype)
    lent = Pages(pages, pages, torch.zeros(5, 1, 1, 128)), BlockTable(*torch.zeros(2, 1, 2, 3).int())
    bounded, grad = torch.ones(1, 2).int(), torch.zeros_like(q)
    prepared = prepare(q, grad, c_in, c_in)
    so_far = launch.forward("triton", queries, *own, bounded, None, partial=True)
    of_queries, _ = launch.backward("triton", queries, *own, prepared, None, partial=True)
    if borrowed:
        launch.forward("triton", queries, *lent, bounded, so_far, partial=True)
        launch.backward("triton", queries, *lent, prepared, of_queries, partial=True)


CALLS = [
    ("measured", 90, triton_calls, (64, BF16)),
    ("measured", 90, triton_calls, (128, BF16)),
    ("fits", 80, triton_calls, (64, BF16, False)),
    ("fits", 80, triton_calls, (256, BF16, False)),
    ("fits", 80, triton_calls, (64, FP32, False)),
]


def compile_all(architecture):
    """Prints one JSON line for each kernel that the calls of an architecture launch. Runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from foxdist.attention.kernels import configs, triton_backward, triton_forward

    class Driver:
        """A GPU that is not there."""

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_device_interface(self):
            return torch.cpu

    real = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = real(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # else it was compiled before
            found = {"kind": kind, "call": f"{call.__name__}{arguments}", "kernel": self.__name__}
            print(json.dumps(found | usage(log.getvalue(), kernel)), flush=True)
        return kernel

    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = run
    for module in (triton_forward, triton_backward):
        module.capability = lambda _: divmod(architecture, 10)
    assert configs.capability(torch.device("cpu")) == (9, 0)
    for kind, wanted, call, arguments in CALLS:  # noqa: B007 (`run` reads it)
        if wanted == architecture:
            call(*arguments)


def usage(log, kernel):
    """Registers of a thread, bytes spilled, bytes of shared memory, and what ptxas says of serialized products."""
    found = {"registers": r"(\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    numbers = {name: int(re.search(words, log)[1]) for name, words in found.items()}
    return {**numbers, "shared": kernel.metadata.shared, "notes": re.findall(r"C75\d\d", log)}


@pytest.mark.parametrize("architecture", [90, 80])
def test_kernels_compile_and_keep_to_their_registers(architecture, tmp_path, record_property):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import test_compile; test_compile.compile_all({architecture})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        print(*kernel.values())
        assert kernel["shared"] <= SHARED[architecture], kernel
        assert kernel["spilled"] <= SPILLED[kernel["kind"]], kernel
    expected = {call for _, wanted, call, _ in CALLS if wanted == architecture}
    names = {kernel["kernel"] for kernel in kernels}
    assert triton_calls not in expected or {"_forward", "_backward_kv", "_backward_q", "_prepare"} <= names
