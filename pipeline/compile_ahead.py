"""Has kernels compiled by a process beside this one, while this one imports, checks and plans.

In: the model, later the recipe's formats. Out: `wait` returns once Triton's cache on disk holds the
kernels. Compiling takes some ten seconds where the cache is empty, on a fresh container or node;
the imports and the plan of a large model take longer. Nothing depends on it: what was not compiled
by then, or differs because TP or ETP cut it, is compiled when it is first used.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import torch

from pipeline.architecture import Architecture, LayerType, TensorSpec, layer_tensors
from pipeline.job import Job, StoredTensor
from pipeline.nvfp4.formats import Format
from pipeline.recipe.records import ModuleFormat
from pipeline.runtime.child import start_module

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
_DTYPES = {"F32": "float32", "F16": "float16"}


class CompileAhead:
    """The process that compiles; without a GPU, or on all but one rank of a node, there is none."""

    def __init__(
        self, process: subprocess.Popen[str] | None = None, faults: IO[str] | None = None
    ) -> None:
        self._process, self._faults = process, faults
        self._begun = time.monotonic()

    @classmethod
    def start(
        cls,
        config: Mapping[str, Any],
        stored: Mapping[str, StoredTensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seq_len: int,
        sums_in_fp32: bool,
        fills: bool,
    ) -> CompileAhead:
        """Starts it, for the layers of a model.

        Args:
            config: The model's config.json.
            stored: The source's tensors by logical name.
            device: A GPU of this process.
            dtype: Compute dtype.
            seq_len: Length of a calibration sequence.
            sums_in_fp32: Whether several ranks share the experts.
            fills: Whether weights are made up on the device.
        """
        architecture = Architecture.from_hf_config(config)
        first: dict[LayerType, int] = {}
        for layer, layer_type in enumerate(architecture.layers):
            first.setdefault(layer_type, layer)
        request = {
            "config": dict(config),
            "layers": list(first.values()),
            "sums_in_fp32": sums_in_fp32,
            "dtypes": {
                name: _DTYPES[stored[name].dtype]
                for layer in first.values()
                for name in _distinct(layer_tensors(architecture, layer))
                if name in stored and stored[name].dtype in _DTYPES
            },
            "device": str(device),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "seq_len": seq_len,
            "fills": fills,
        }
        try:
            faults = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, `stop` closes it
            ahead = cls(start_module("pipeline.mcore.compile_kernels", faults), faults)
        except OSError as problem:
            logger.warning("kernels are not compiled ahead: %s", problem)
            return cls()
        try:
            ahead._ask(request)
        except BaseException:
            ahead.stop()
            raise
        return ahead

    def pack(self, job: Job, *, compare_to_max: bool, backend: str, evaluates: bool) -> None:
        """Asks for the kernels that pack in the job's formats, and for nothing after them.

        Args:
            job: Names the formats.
            compare_to_max: Whether method max is measured too.
            backend: Name of what packs.
            evaluates: Whether layers are computed as served too.
        """
        if self._process is None:
            return
        formats = list(_formats_of(job))
        fp8 = [f for f in formats if f.weight_format is Format.fp8]
        methods = {f.weight_method.value for f in formats if f.weight_method is not None}
        self._ask(
            {
                "methods": sorted(methods),
                "compare_to_max": compare_to_max,
                "fp8": bool(fp8),
                "multipliers": sorted({f.fp8_multipliers for f in fp8 if f.fp8_multipliers}),
                "backend": backend,
                "evaluates": evaluates,
            }
        )

    def wait(self) -> None:
        """Returns once everything is compiled, or cannot be, or takes too long."""
        if self._process is None:
            return
        waiting, fault = time.monotonic(), ""
        try:
            self._process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            fault = f"it took longer than {_PATIENCE_S:.0f} s"
        now = time.monotonic()
        if self._process.wait() == 0:
            logger.debug(
                "kernels compiled ahead in %.1f s, %.1f s of them waited for",
                now - self._begun,
                now - waiting,
            )
        else:
            logger.warning(
                "kernels could not be compiled ahead (%s): the first layers take longer",
                fault or self._last_words() or f"status {self._process.returncode}",
            )
        self.stop()

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._faults is not None:
            self._faults.close()
        self._process = self._faults = None

    def _ask(self, request: Mapping[str, Any]) -> None:
        """Hands over a request; short, for the pipe must hold it until it is read."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it failed, and `wait` says why

    def _last_words(self) -> str:
        assert self._faults is not None
        self._faults.seek(0)
        lines = self._faults.read().strip().splitlines()
        return lines[-1] if lines else ""


def _distinct(specs: Sequence[TensorSpec]) -> Iterable[str]:
    """Names, of the routed experts those of the first: all are stored alike."""
    return (spec.name for spec in specs if not spec.is_routed_expert or spec.expert == 0)


def _formats_of(job: Job) -> Iterable[ModuleFormat]:
    for schedule in job.schedules:
        yield from (item.module_format for item in schedule.dense)
        yield from schedule.experts.values()
