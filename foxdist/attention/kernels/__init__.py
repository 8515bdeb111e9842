"""Attention tiles and everything around them as GPU kernels: Triton for every GPU, Gluon for Hopper."""
