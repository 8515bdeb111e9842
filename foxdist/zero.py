"""Our configuration as a DeepSpeed engine: ZeRO stage, precision, clipping, over all dp x cp ranks.

No mesh, mpu or sequence_parallel_size is handed to DeepSpeed: measured on 0.19.8, each of those averages gradients
differently in stage 1, 2 and 3, some of them wrongly. Given none, every stage averages over all ranks, and loss.py's
scale makes that the gradient of the mean loss. DeepSpeed's own batch arithmetic then counts every rank as a data rank;
only micro-batch and accumulation are told, and the true batch is ours.
"""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from foxdist.config import Config


def make_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, accumulation: int) -> Any:
    """A DeepSpeed engine around `model`: `engine(...)`, `engine.backward(loss, scale_wrt_gas=False)`, `engine.step()`.

    Every rank must call, with equal parameters, after `mesh.start`.
    """
    deepspeed = import_deepspeed()
    with _quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(config, accumulation))
    return engine


def engine_config(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration; there is no other place that sets any of it."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        # Stage 1 adds each gradient to its float32 sum as soon as it is made, and lets go of it: else all of them stay
        # beside the sums (1.4 GiB of 760M).
        "bf16": {"enabled": config.train.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": config.parallel.zero},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own is compiled at first use (minutes)
        "steps_per_print": 2**31,
    }


def save(engine: Any, folder: Path) -> None:
    """Writes parameters and this rank's share of the optimizer into `folder`; every rank calls."""
    with _quiet():
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def load(engine: Any, folder: Path) -> None:
    """Restores what `save` wrote, on as many ranks and in the same stage; every rank calls."""
    with _quiet():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    assert path is not None, f"DeepSpeed found nothing in {folder}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's parameters that `save` wrote, float32 on the CPU; on one process, whatever ranks and stage saved."""
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    shares = _bf16_shares(folder)
    if shares:
        return _joined(shares, folder)
    with _quiet():
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)


def _bf16_shares(folder: Path) -> list[dict[str, Any]]:
    """Each rank's optimizer state, in rank order, where stage 1 in bf16 wrote it: DeepSpeed has an optimizer of its own
    for that, whose files its own conversion does not know. Empty in all other cases.

    Unpickles, as DeepSpeed's conversion does: the caller has checked the files against their manifest.
    """
    files = folder.glob("bf16_zero_pp_rank_*_optim_states.pt")
    shares = []
    for path in sorted(files, key=lambda path: int(path.name.split("_")[4])):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
        if "param_slice_mappings" not in state or "zero_stage" in state:
            return []
        shares.append(state)
    return shares


def _joined(shares: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """Parameters from the pieces that ranks hold: each rank says where in its flat groups which piece lies."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for state in shares:
        for flat, places in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"]):
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat[place.start : place.start + place.numel])
    model = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=False)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    return {name: torch.cat(pieces[name]).view(shape) for name, shape in shapes.items()}


def _quiet() -> contextlib.redirect_stdout:
    """DeepSpeed prints the memory in use, and the names of its own functions, whatever its log level."""
    return contextlib.redirect_stdout(io.StringIO())


def import_deepspeed() -> Any:
    """DeepSpeed, told the accelerator that torch has, and without its noise."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An inference-only collective that DeepSpeed compiles with g++ at every first start on a CPU (40 s).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of the next `engine.step()`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
