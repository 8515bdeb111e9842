"""What is measured of one implementation: its errors against the definition, then time and memory.

Counting: forward is two products of 2 FLOPs a multiply-add over the causal half of T x T, 4 H D T^2 / 2; backward is
five products, 2.5 times that. `dense` rates count all of it, `kept` rates the tiles that the published boundary leaves
to an implementation that prunes (foxdist: that its own bound leaves).
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from foxdist.attention import Acp, AttentionStats, forgetting_attention, naive_forgetting_attention
from foxdist.attention.exchange import let_go
from foxdist.bench.gates import Gates
from foxdist.bench.implementations import Implementation, direct

NAMES = ("out", "dq", "dk", "dv", "dlog_f")
BACKWARD = 2.5
CHECKED = (2048, 1931)  # tokens: whole blocks, and blocks with a rest
SECONDS = 0.2  # of timed calls for each set of inputs on a GPU
HOST_CALLS = 5
L2_BYTES = 256 << 20  # more than any GPU's L2 cache holds
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATMUL = {"cuda": 8192, "cpu": 1024}


class Shape(NamedTuple):
    """Of the heads."""

    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        groups = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
        return f"{self.heads}{groups}x{self.dim}"


class Case(NamedTuple):
    """One point of the table."""

    shape: Shape
    length: int
    dtype: torch.dtype
    device: torch.device

    @property
    def forward_flops(self) -> float:
        return 4 * self.shape.heads * self.shape.dim * self.length**2 / 2


class Inputs(NamedTuple):
    """Of one call, for batch 1, in foxdist's layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_f: torch.Tensor
    grad: torch.Tensor
    """Of the output."""
    acp: Acp


class Bound(NamedTuple):
    """An implementation and its inputs, ready to run."""

    forward: Callable[[], torch.Tensor]
    both: Callable[[], tuple[torch.Tensor, ...]]
    """out, dq, dk, dv and, where there is one, dlog_f."""


def make_inputs(case: Case, gates: Gates, seed: int) -> Inputs:
    """q, k of norm sqrt(dim) as after QK-norm, v, the output's gradient, and U of each head from the rounded q, k."""
    (heads, kv_heads, dim), length, dtype, device = case
    g = torch.Generator(device).manual_seed(1234 + seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, length, count, dim, generator=g, device=device)

    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (normal(heads), normal(kv_heads)))
    q, k, v, grad = (x.to(dtype) for x in (q, k, normal(kv_heads), normal(heads)))
    largest_q, largest_k = (x.float().norm(dim=-1).amax((0, 1)) for x in (q, k))
    limit = largest_q * largest_k.repeat_interleave(heads // kv_heads) * dim**-0.5 * (1 + 2e-5)  # float32 norms
    log_f = gates.draw(heads, dim, length, seed).to(device)
    return Inputs(q, k, v, log_f, grad, Acp(logit_bound=limit))


def bind(implementation: Implementation, inputs: Inputs) -> Bound:
    """Copies the inputs into the implementation's layout. Results come in its layout too."""
    swap = implementation.heads_first
    q, k, v, log_f, grad = (x.transpose(1, 2).contiguous() if swap else x.clone() for x in inputs[:5])
    leaves = [x.requires_grad_() for x in ((q, k, v, log_f) if implementation.gate_gradient else (q, k, v))]
    forward = implementation.prepare(q, k, v, log_f, inputs.acp)

    def both() -> tuple[torch.Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return Bound(forward, both)


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error that passes, by tensor.

    bfloat16: what rounding in that dtype costs good kernels, measured over four of them on an H200 against float64 at
    2,048 tokens (out 1.9e-3, dq and dk 2.8e-3, dv 2.3e-3, dlog_f up to 3.9e-3), and a third more; float16 has 8 times
    its precision. float32: ten times the largest that was seen, the gate's gradient's 1e-5.
    """
    if dtype == torch.float32:
        return dict.fromkeys(NAMES, 1e-4)
    scale = torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    return {name: scale * limit for name, limit in zip(NAMES, (2.5e-3, 4e-3, 4e-3, 4e-3, 5e-3))}


class Checker:
    """Errors of implementations on the same inputs, against the definition in float64."""

    def __init__(self, case: Case, gates: Gates):
        self.inputs = make_inputs(case, gates, 0)
        self._expected: dict[bool, tuple[torch.Tensor, ...]] = {}

    def errors(self, implementation: Implementation) -> dict[str, float]:
        """Relative error, norm over norm, of output and gradients."""
        found = bind(implementation, self.inputs).both()
        if implementation.heads_first:
            found = tuple(x.transpose(1, 2) for x in found)
        return {name: _relative(a, b) for name, a, b in zip(NAMES, found, self.definition(implementation.gated))}

    def definition(self, gated: bool = True) -> tuple[torch.Tensor, ...]:
        """Output and gradients in float64; not `gated`: of plain softmax attention."""
        if gated not in self._expected:
            *tensors, acp = self.inputs
            naive = Implementation("naive", direct(lambda q, k, v, f, acp: naive_forgetting_attention(q, k, v, f)))
            groups = []  # one after the other: each takes several T x T of float64
            for q, k, v, log_f, grad in zip(*(x.double().chunk(tensors[1].shape[2], 2) for x in tensors)):
                inputs = Inputs(q, k, v, log_f if gated else torch.zeros_like(log_f), grad, acp)
                groups.append(bind(naive, inputs).both())
            self._expected[gated] = tuple(torch.cat(parts, 2) for parts in zip(*groups))
        return self._expected[gated]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def counted(inputs: Inputs, bound: str, backend: str = "auto") -> AttentionStats:
    """What foxdist keeps of these inputs under `bound`."""
    acp = replace(inputs.acp, bound=bound)  # type: ignore[arg-type]
    with torch.no_grad():
        found = forgetting_attention(*inputs[:4], acp=acp, backend=backend, return_stats=True)
    assert isinstance(found, tuple)
    return found[1]


def kept(stats: AttentionStats) -> float:
    """The share of the causal tiles that were computed."""
    return stats.tiles_kept / stats.tiles_causal


def measure(implementation: Implementation, case: Case, gates: Gates, repeats: int, bound: str) -> dict[str, Any]:
    """One row: median, least and greatest milliseconds of forward and of both directions, rates, memory.

    `repeats` fresh sets of inputs, for each layer of recorded gates; of several layers, the mean over them.
    """
    forward: list[list[float]] = [[] for _ in range(gates.layers)]
    both: list[list[float]] = [[] for _ in range(gates.layers)]
    shares, memory = [], None
    for seed in range(repeats * gates.layers):
        inputs = make_inputs(case, gates, seed)
        ready = bind(implementation, inputs)
        if seed == 0:
            ready.both()  # compiles
            memory = peak_memory(ready.both, case.device)
        if seed < gates.layers and implementation.prunes:
            shares.append(kept(counted(inputs, bound if implementation.ours else "paper")))
        forward[seed % gates.layers] += milliseconds(ready.forward, case.device)
        both[seed % gates.layers] += milliseconds(ready.both, case.device)
    share = statistics.mean(shares) if shares else 1.0
    row: dict[str, Any] = {"tiles_kept(%)": 100 * share}
    for name, samples, factor in (("forward", forward, 1.0), ("forward+backward", both, 1 + BACKWARD)):
        median, least, greatest = (statistics.mean(f(s) for s in samples) for f in (statistics.median, min, max))
        dense = case.forward_flops * factor / median / 1e9
        row |= {f"{name}(ms)": median, f"{name}_least(ms)": least, f"{name}_greatest(ms)": greatest}
        row |= {f"{name}_dense(TFLOP/s)": dense, f"{name}_kept(TFLOP/s)": dense * share}
    return row | {"peak_memory(MiB)": memory}


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call takes above what was there before it, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    del results
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def milliseconds(
    call: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None = None, seconds: float = SECONDS
) -> list[float]:
    """Of one call on a CPU; on a GPU of 3 to 50, as many as `seconds` have room for, by events, after one that warms up
    and one that is timed to know how many, with nothing of use in L2.

    group: ranks that must all do so. They begin every call together, and its time is that of the slowest. On GPUs it is
    the devices that wait for each other: the host gets ahead of them as in training, where it has other work to give.
    """
    times = _gpu_times(call, group, seconds) if device.type == "cuda" else _cpu_times(call, group)
    return slowest(list(times), device, group)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as one launch: a CUDA graph of it, after a call that makes what a capture must find ready."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_milliseconds(call: Callable[[], Any], device: torch.device) -> float | None:
    """Until a call returns that begins with nothing to do on the GPU; None on a CPU, which does all of it itself.

    Where it is more than the call's own time, the host is what takes that time.
    """
    if device.type != "cuda":
        return None
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def let_go_of_memory(device: torch.device) -> None:
    """Frees what a row leaves, exchanges' memory too. Every rank of the job calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    let_go()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def slowest(times: list[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """Each the largest over the ranks of a group."""
    if group is None:
        return times
    largest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.tolist()


def _cpu_times(call: Callable[[], Any], group: dist.ProcessGroup | None) -> Iterator[float]:
    if group:
        dist.barrier(group)
    begun = time.perf_counter()
    call()
    yield 1000 * (time.perf_counter() - begun)


def _gpu_times(call: Callable[[], Any], group: dist.ProcessGroup | None, seconds: float) -> Iterator[float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    together = torch.zeros(1, device="cuda")

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if group:
            dist.all_reduce(together, group=group)  # no barrier, at which the host would wait for its device
        flush.zero_()
        begun.record()
        call()
        ended.record()
        return begun, ended

    call()
    begun, ended = timed()
    torch.cuda.synchronize()
    once = slowest([begun.elapsed_time(ended)], torch.device("cuda"), group)[0]  # all ranks must call as often
    pairs = [timed() for _ in range(max(3, min(50, int(1000 * seconds / max(once, 1e-3)))))]
    torch.cuda.synchronize()
    for begun, ended in pairs:
        yield begun.elapsed_time(ended)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product here and now: 8192 rows on a GPU, 1024 on a CPU."""
    size = MATMUL[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = [ms for _ in range(3) for ms in milliseconds(lambda: torch.mm(a, b), device)]
    return 2 * size**3 / statistics.median(times) / 1e9
