"""Forgetting attention: the definition, and the pruned, context-parallel implementation."""

from foxdist.attention.acp import Acp
from foxdist.attention.exchange import resolve
from foxdist.attention.gates import RESET
from foxdist.attention.interface import find_kept, forgetting_attention
from foxdist.attention.naive import naive_forgetting_attention
from foxdist.attention.stats import AttentionStats
from foxdist.attention.transport import ContextParallel

__all__ = [
    "RESET",
    "Acp",
    "AttentionStats",
    "ContextParallel",
    "find_kept",
    "forgetting_attention",
    "naive_forgetting_attention",
    "resolve",
]
