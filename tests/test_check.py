"""What `--check` says of memory, beside the peaks that H200s had (README, Measuring training)."""

import pytest

from foxdist import config as configuration
from foxdist.check import GIB, memory

OFF, ON, OFFLOAD = (False, False), (True, False), (True, True)
# (model, tokens, cp, ranks, checkpointing and offloading): GiB. bf16, compiled, a sequence at once.
ZERO_1 = {
    ("125m", 16384, 1, 1, OFF): 7.4,
    ("125m", 65536, 1, 1, OFF): 19.5,
    ("125m", 65536, 1, 2, OFF): 18.6,
    ("125m", 65536, 2, 2, OFF): 11.2,
    ("125m", 917504, 2, 2, OFF): 129.1,
    ("125m", 2097152, 2, 2, ON): 96.8,
    ("360m", 360448, 2, 2, OFF): 131.5,
    ("360m", 1441792, 2, 2, ON): 125.9,
    ("760m", 16384, 1, 1, OFF): 30.8,
    ("760m", 16384, 1, 1, ON): 17.5,
    ("760m", 16384, 1, 1, OFFLOAD): 15.7,
    ("760m", 65536, 1, 1, OFF): 78.7,
    ("760m", 65536, 1, 1, ON): 26.9,
    ("760m", 65536, 1, 2, OFF): 74.0,
    ("760m", 65536, 2, 2, OFF): 43.4,
    ("760m", 229376, 2, 2, OFF): 127.9,
    ("760m", 917504, 2, 2, ON): 125.0,
    ("760m", 1048576, 2, 2, OFFLOAD): 73.3,
    ("760m", 131072, 1, 4, ON): 32.6,
    ("760m", 131072, 2, 4, ON): 23.6,
    ("760m", 131072, 4, 4, ON): 17.3,
    ("760m", 262144, 1, 4, ON): 58.0,
    ("760m", 262144, 2, 4, ON): 40.1,
    ("760m", 262144, 4, 4, ON): 25.5,
    ("760m", 2097152, 4, 4, OFFLOAD): 86.1,
    # One rank of eight, alone (tests/one_rank_training.py).
    ("760m", 65536, 8, 8, OFF): 16.4,
    ("760m", 262144, 8, 8, ON): 15.2,
    ("760m", 262144, 4, 8, ON): 24.4,
    ("760m", 262144, 2, 8, ON): 39.0,
    ("760m", 1048576, 8, 8, ON): 42.8,
}
ZERO_3 = {
    ("125m", 65536, 1, 2, OFF): 18.7,
    ("125m", 65536, 2, 2, OFF): 11.3,
    ("760m", 65536, 1, 2, OFF): 74.1,
    ("760m", 65536, 2, 2, OFF): 43.5,
    ("760m", 131072, 1, 4, ON): 31.4,
    ("760m", 131072, 2, 4, ON): 22.5,
    ("760m", 131072, 4, 4, ON): 16.1,
}
MEASURED = [(stage, *row) for stage, rows in ((1, ZERO_1), (3, ZERO_3)) for row in rows.items()]


@pytest.mark.parametrize("stage, point, peak", MEASURED, ids=[f"{x[0]}-{'-'.join(map(str, x[1]))}" for x in MEASURED])
def test_memory_is_what_was_measured(stage, point, peak):
    model, tokens, cp, ranks, (checkpointing, offloading) = point
    changes = {
        "data.sequence_length": tokens,
        "parallel.cp": cp,
        "parallel.zero": stage,
        "train.micro_batch": 1,
        "train.activation_checkpointing": str(checkpointing).lower(),
        "train.activation_offloading": str(offloading).lower(),
        "train.tokens_per_step": tokens * ranks // cp,
    }
    config = configuration.load(f"configs/fox_pro_{model}.yaml", [f"{name}={x}" for name, x in changes.items()])
    assert config.train.compile
    assert sum(memory(config, ranks).values()) / GIB == pytest.approx(peak, rel=0.02 if stage == 1 else 0.025)
