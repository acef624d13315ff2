"""Triton kernels of the layers, each beside its meaning in plain torch (used for CPU tensors).

Tiles are fixed: timing them would choose others in other processes, which add in another order.
"""
