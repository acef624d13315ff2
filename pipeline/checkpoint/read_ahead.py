"""Reading ahead: while one layer computes, the next one's shards are read.

In: for each layer, the tensors and shards that this rank needs. Out: a layer's shards as CPU
tensors, in the order of the sweep; at most one layer waits ready while another is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from pipeline.architecture import TensorSpec
from pipeline.sharding import Shard

Request = tuple[TensorSpec, Shard]
Read = Callable[[TensorSpec, Shard], torch.Tensor]


class ReadAhead:
    """A context manager; `take` gives the layers one by one, in the order of `requests`.

    Args:
        requests: What each layer needs.
        read: Reads one shard; called from a thread.
    """

    def __init__(self, requests: Sequence[Sequence[Request]], read: Read) -> None:
        self._requests, self._read = requests, read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._next = 0
        self._ready: Future[dict[str, torch.Tensor]] | None = None

    def __enter__(self) -> ReadAhead:
        """Starts reading the first layer."""
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops; what was not yet begun is not read."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> dict[str, torch.Tensor]:
        """The next layer's shards by name; waits for them, and begins to read the one after.

        Raises:
            SourceError: A shard could not be read.
        """
        assert self._ready is not None, "more layers taken than requested"
        shards = self._ready.result()
        self._start()
        return shards

    def _start(self) -> None:
        if self._next == len(self._requests):
            self._ready = None
            return
        self._ready = self._pool.submit(self._read_layer, self._requests[self._next])
        self._next += 1

    def _read_layer(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        return {spec.name: self._read(spec, shard) for spec, shard in requests}
