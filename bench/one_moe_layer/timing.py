"""Wall-clock seconds of what runs on a device, and the record that a measuring process leaves.

In: a device, a path. Out: seconds between two points at which the device was idle; figures that
are on disk as soon as they are known, so that a later failure does not lose them.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Figures:
    """Named figures of one process, written to a JSON file at every change.

    Args:
        path: The file.
        device: What is waited for at both ends of a measurement.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.values: dict[str, Any] = {"notes": []}

    def set(self, name: str, value: object) -> None:
        """Records one figure."""
        self.values[name] = value
        self.path.write_text(json.dumps(self.values, indent=2))

    def note(self, text: str) -> None:
        """Records one remark."""
        self.set("notes", [*self.values["notes"], text])

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Records the seconds of what is inside; adds up where a name comes again."""
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.set(name, self.values.get(name, 0.0) + time.perf_counter() - start)

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the seconds of its calls recorded."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return function(*args, **kwargs)

        return measured

    def reset_peak(self) -> None:
        """Starts the measurement of peak memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most device memory that was allocated since `reset_peak`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30


def measure_batches(
    figures: Figures,
    name: str,
    forward_of: Callable[[int], Callable[[int], object]],
    batches: Sequence[int],
    *,
    seq_len: int,
    tokens: int,
    limit_s: float,
) -> None:
    """Records, for every micro-batch, tokens per second and peak memory, or that it did not fit.

    Args:
        figures: Where the record goes.
        name: Its name.
        forward_of: For a micro-batch (in sequences), a function that makes the index-th call.
        batches: Micro-batches.
        seq_len: Tokens of a sequence.
        tokens: How many each measurement takes.
        limit_s: Seconds after which a measurement ends, with fewer.
    """
    rates: dict[str, Any] = {}
    for batch in batches:
        figures.reset_peak()
        try:
            forward = forward_of(batch)
            rate = _throughput(figures, forward, max(1, tokens // (batch * seq_len)), limit_s)
            count = rate["calls"] * batch * seq_len
            rate |= {"tokens": count, "tokens_per_s": count / rate["seconds"]}
            rates[str(batch)] = rate | {"peak_gib": figures.peak_gib()}
        except torch.OutOfMemoryError:
            rates[str(batch)] = {"error": "did not fit into memory"}
            torch.cuda.empty_cache()
        figures.set(name, rates)


def _throughput(
    figures: Figures, forward: Callable[[int], object], calls: int, limit_s: float
) -> dict[str, Any]:
    """Seconds of `calls` calls; of fewer where the first one says that `limit_s` is too short."""
    figures.synchronize()
    start = time.perf_counter()
    forward(0)
    figures.synchronize()
    calls = max(1, min(calls, int(limit_s / (time.perf_counter() - start))))
    for index in range(1, calls):
        forward(index)
    figures.synchronize()
    return {"calls": calls, "seconds": time.perf_counter() - start}
