"""Tests of Layersweep (a package, so that helpers are imported as tests.distributed.helpers)."""
