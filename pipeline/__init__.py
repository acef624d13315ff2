"""Layersweep: BF16 Nemotron-H checkpoint in, checked NVFP4 checkpoint out, in one sweep."""

__version__ = "0.1.0"
