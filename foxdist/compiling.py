"""torch.compile of a model's blocks: what is compiled, and what the compiler may keep for backward."""

import torch
import torch._functorch.config as partitioner

from foxdist.model import FoX


def compile_blocks(model: FoX) -> None:
    """Compiles each block's forward in place: parameters keep their names, so checkpoints stay the same.

    Hooks of the block, with which ZeRO-3 gathers its parameters and lets go of them, stay outside. For backward the
    compiler keeps parameters themselves, never a view of what was gathered (tests/test_compile.py).

    Left to itself the partitioner also keeps what point-wise operations made, where a product needs it again in
    backward or it is needed much later: norms, mixed k and v, the product in SwiGLU. Making those again costs about a
    pass over memory; keeping them doubles what a block of FoX Pro 760M keeps of a token, from 42.8 to 86.8 KB
    (tests/test_compile.py counts them). Products and foxdist's operators are never made twice by these settings.
    They are the process's own: whatever it compiles later has them, too.
    """
    partitioner.ban_recompute_materialized_backward = False
    partitioner.ban_recompute_used_far_apart = False
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
