"""Backward of attention tiles for Hopper: two kernels, each its own module."""

from foxdist.attention.kernels.gluon_backward_kv import backward_kv
from foxdist.attention.kernels.gluon_backward_q import backward_q

__all__ = ["backward_kv", "backward_q"]
