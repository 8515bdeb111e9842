"""From counters on every rank to one finished dict a logged step. Never calls the model, never changes training.

Names are paths with units in parentheses. Everything is added up since the last logged step and reduced over ranks
only there; between logged steps nothing waits for the device.
"""

import math
import resource
from dataclasses import asdict, astuple
from typing import Any

import torch
import torch.distributed as dist

from foxdist.attention.stats import Counts, Traffic
from foxdist.attention.symmetric import bytes_held
from foxdist.config import Config
from foxdist.layout import BLOCK
from foxdist.mesh import Mesh
from foxdist.model import flops_per_token

MIB = 2**20
# Dense bf16 peak, TFLOP/s, from the makers' data sheets, by what the device's name holds; the first that fits counts.
# A GPU that is not listed reports no MFU rather than a guess.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def step_metrics(
    config: Config, mesh: Mesh, layers: list[Counts], steps: int, seconds: float, parts: dict[str, float]
) -> dict[str, Any]:
    """All metrics but the loss's own. Every rank calls; every rank gets the same.

    layers: what each attention layer counted over `steps` steps of `seconds` in all. parts: the clock's.
    """
    kept, possible, blocks = _reduce_tiles(layers, mesh.device)
    tokens = steps * config.train.tokens_per_step
    result: dict[str, Any] = {"tokens/s": tokens / seconds, "time/step(ms)": 1000 * seconds / steps}
    result |= {f"time/{name}(ms)": 1000 * value / steps for name, value in parts.items()}
    result |= _memory(mesh.device)
    share = 1.0 if config.acp.dry_run else float(kept.sum() / possible.sum() / kept.shape[1])
    result |= _compute(config, mesh, tokens / seconds, share)
    result |= _tiles(kept, possible, blocks)
    result |= _pruned(layers, mesh.device, config.acp.log_eps)
    result |= _traffic(layers, steps, mesh)
    return result


def _reduce_tiles(layers: list[Counts], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over ranks, float64 on the host: tiles kept [L, H], tiles of a head that causality allows [L, 1], query
    blocks of a head [L, 1]."""
    kept = torch.stack([c.kept_by_head.double() for c in layers]).to(device)
    rest = torch.tensor([[c.causal_by_head, c.query_blocks] for c in layers], dtype=torch.float64, device=device)
    table = torch.cat([kept, rest], 1)
    dist.all_reduce(table)
    table = table.cpu()
    return table[:, :-2], table[:, -2:-1], table[:, -1:]


def _tiles(kept: torch.Tensor, possible: torch.Tensor, blocks: torch.Tensor) -> dict[str, Any]:
    share = 100 * kept / possible
    window = BLOCK * kept / blocks
    return {
        "acp/tiles_kept(%)": float(share.mean()),
        "acp/window(tokens)": float(window.mean()),
        "acp/tiles_kept_by_head(%)": _rounded(share),
        "acp/window_by_head(tokens)": _rounded(window),
    }


def _pruned(layers: list[Counts], device: torch.device, log_eps: float) -> dict[str, Any]:
    """The largest weight that pruning took, over ranks, beside what it may take; nothing if none was measured."""
    # -1 stands for none: NaN has no maximum.
    weight = torch.stack([c.pruned for c in layers]).to(device).nan_to_num(-1.0)
    dist.all_reduce(weight, dist.ReduceOp.MAX)
    weight = weight.cpu()
    if weight.max() < 0:
        return {}
    return {
        "acp/pruned_weight": float(weight.max()),
        "acp/pruned_weight_allowed": math.exp(log_eps),
        "acp/pruned_weight_by_head": [[float(w) for w in row] for row in weight],
    }


def _traffic(layers: list[Counts], steps: int, mesh: Mesh) -> dict[str, Any]:
    """A step's traffic; totals are over all ranks, lists hold one number a rank or a layer."""
    total = sum((counts.traffic for counts in layers), Traffic())
    by_layer = [counts.traffic.bytes_sent for counts in layers]
    mine = torch.tensor([*astuple(total), *by_layer], dtype=torch.float64, device=mesh.device)
    by_head = torch.stack([counts.needed_by_head.double().to(mesh.device) for counts in layers])  # [L, K]
    mine = torch.cat([mine, by_head.flatten()]) / steps
    every = [torch.empty_like(mine) for _ in range(mesh.world)]
    dist.all_gather(every, mine)
    table = torch.stack(every).T.cpu()
    of = dict(zip(asdict(total), table))
    first = len(of) + len(layers)  # number of a layer and head
    sent, dense, causal, needed = (of[f"bytes_{name}"] / MIB for name in ("sent", "dense", "causal", "needed"))
    return {
        "comm/kv_sent(MiB)": float(sent.sum()),
        "comm/kv_dense(MiB)": float(dense.sum()),
        "comm/kv_causal(MiB)": float(causal.sum()),
        "comm/kv_needed(MiB)": float(needed.sum()),
        "comm/kv_skipped(MiB)": float((dense - sent).sum()),
        "comm/kv_skipped_of_causal(MiB)": float((causal - sent).sum()),
        "comm/gates_sent(MiB)": float(of["bytes_gates"].sum() / MIB),
        "comm/pairs_skipped(%)": _skipped(of["pairs_sent"], of["peers"]),
        "comm/pairs_skipped_of_causal(%)": _skipped(of["pairs_sent"], of["pairs_causal"]),
        "comm/stages_skipped(%)": _skipped(of["stages_run"], of["peers"]),
        "comm/stages_skipped_of_causal(%)": _skipped(of["stages_run"], of["stages_causal"]),
        "comm/kv_sent_by_layer(MiB)": _rounded(table[len(of) : first].sum(1) / MIB),
        "comm/kv_needed_by_head(MiB)": _rounded(table[first:].sum(1).view_as(by_head) / MIB),
        "comm/kv_sent_by_rank(MiB)": _rounded(sent),
        "comm/kv_skipped_by_rank(MiB)": _rounded(dense - sent),
        "comm/kv_skipped_of_causal_by_rank(MiB)": _rounded(causal - sent),
        "comm/pairs_skipped_by_rank": _rounded(of["peers"] - of["pairs_sent"]),
        "comm/stages_skipped_by_rank": _rounded(of["peers"] - of["stages_run"]),
    }


def _skipped(done: torch.Tensor, of: torch.Tensor) -> float:
    """Percent of `of` that was not done; 0 where there was nothing to do."""
    return float(100 * (1 - done.sum() / of.sum())) if of.sum() else 0.0


def _compute(config: Config, mesh: Mesh, rate: float, share: float) -> dict[str, Any]:
    """FLOPs of the model with attention counted dense, the share of them that was executed, and MFU in bf16.

    rate: tokens a second of the whole job. share: of the causal tiles that were kept.
    """
    matrices, attention = flops_per_token(config.model, config.data.sequence_length)
    dense = rate / mesh.world * (matrices + attention) / 1e12
    result = {
        "perf/model_per_rank(TFLOP/s)": dense,
        "perf/executed(%)": 100 * (matrices + attention * share) / (matrices + attention),
    }
    if mesh.device.type == "cuda" and config.train.precision == "bf16":
        name = torch.cuda.get_device_name(mesh.device)
        peak = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        if peak:
            result["perf/mfu(%)"] = 100 * dense / peak
    return result


def _memory(device: torch.device) -> dict[str, float]:
    """The largest of all ranks, with what they share."""
    if device.type == "cuda":
        name, used = "memory/peak_allocated(GiB)", torch.cuda.max_memory_allocated(device) + bytes_held()
    else:
        name, used = "memory/peak_resident(GiB)", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(float(used), dtype=torch.float64, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {name: float(peak) / 2**30}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _rounded(x: torch.Tensor) -> list:
    """Nested lists of numbers with six decimals: a table in a log line needs no more."""
    return [_rounded(row) for row in x] if x.ndim > 1 else [round(float(v), 6) for v in x]
