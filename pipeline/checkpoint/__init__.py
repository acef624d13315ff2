"""Checkpoints on disk: reading the source, writing shards, the journal, publication, the audit.

In: directories of safetensors files. Out: tensors and shards of them, written files with their
checksums, and a finished directory that inference servers load.
"""
