"""Megatron-core: process groups and the one resident module per layer type.

In: an architecture, the degrees of parallelism and a callable that reads shards. Out: the hidden
states after a layer, and what was seen on the way (a `Tap`). The only package that imports
megatron, and the only place where third-party code is patched.
"""
