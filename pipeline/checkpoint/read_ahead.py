"""Reading ahead: threads fill a ring of host memory while earlier weights are computed with.

In: for each layer, the tensors and shards that this rank needs. Out: the shards, one by one and in
that order, as CPU tensors inside the ring, for as long as they are not released.

    request ──planner──▶ place in the ring ──pieces──▶ readers ──▶ consumer ──release──▶ place free

The planner gives places in the order of the requests, across layers, as far as there is room. Every
shard is read in pieces of 16 MiB by several threads, so that one disk, or many, always have
requests waiting. The system is told that the order is random: its own reading ahead, of which there
is one per file for all threads, fetched 15 % too much where shards are cut and was 10 % slower.
Other advice (SEQUENTIAL, WILLNEED, DONTNEED) changed nothing, and O_DIRECT was slower.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch

from pipeline.architecture import TensorSpec
from pipeline.checkpoint.read_record import digest_piece, digest_pieces
from pipeline.checkpoint.regular_files import OpenFiles
from pipeline.checkpoint.ring import ALIGNMENT, Ring, aligned
from pipeline.checkpoint.safetensors_file import TensorInfo, from_bytes, unreadable
from pipeline.checkpoint.slices import Cut, Piece, Scratch, cut_of, pieces_of, read_piece
from pipeline.checkpoint.source import Source
from pipeline.runtime.pinned import host_memory
from pipeline.sharding import Shard

Request = tuple[TensorSpec, str, Shard]
"""A tensor, its name in the source, and this rank's part of it."""


class ReadStoppedError(RuntimeError):
    """The read-ahead was closed while somebody waited for it."""


class ReadItem:
    """A shard that was read.

    Attributes:
        spec: Which tensor.
        shard: Which part of it.
        tensor: Its values, of the shard's shape and in the source's dtype; valid until `release`.
    """

    def __init__(self, request: Request, cut: Cut, place: torch.Tensor, owner: ReadAhead) -> None:
        self.spec, _, self.shard = request
        self.tensor = from_bytes(place, cut.info.dtype, cut.shape)
        self._cut, self._bytes, self._owner = cut, place.numpy(), owner
        self._pieces_left = 0
        self._digests: list[bytes] = []
        self._error: BaseException | None = None
        self._is_released = False
        self._wait: Callable[[], None] | None = None

    def release(self, wait: Callable[[], None] | None = None) -> None:
        """Gives the memory back; from any thread, in any order, once.

        Args:
            wait: Called (from a thread of the read-ahead) before the memory is used again, e.g.
                the `synchronize` of a CUDA event that follows a copy out of it.
        """
        self._owner._release(self, wait)


class ReadAhead:
    """Begins to read at once; a context manager that stops when it is left.

    A consumer that holds on to items while it waits for later ones needs a ring that holds them.

    Args:
        layers: What each layer needs, in the order in which the consumer takes it.
        source: A checkpoint in files.
        threads: Readers. Local NVMe and parallel file systems want 8 or more.
        buffer_bytes: Size of the ring: more where one shard is larger, less where all shards take
            less.
        pinned: Whether the ring is page-locked, for copies to a GPU that do not block.

    Raises:
        SourceError: A tensor is not there, or a shard does not fit it.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Request]],
        source: Source,
        *,
        threads: int,
        buffer_bytes: int,
        pinned: bool,
    ) -> None:
        self._layers = [[(request, _cut(source, request)) for request in layer] for layer in layers]
        sizes = [aligned(cut.nbytes) for layer in self._layers for _, cut in layer]
        # Any order of taking and skipping fits into all sizes together.
        size = max(min(aligned(buffer_bytes), sum(sizes)), max(sizes, default=0), ALIGNMENT)
        self._arena = host_memory(size, pinned=pinned)
        self._ring = Ring(size)
        self._files = OpenFiles(os.POSIX_FADV_RANDOM)
        self._reads = source.reads
        self._pieces: queue.SimpleQueue[tuple[ReadItem, int, Piece] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._placed: deque[ReadItem] = deque()  # in the ring, oldest first; the planner's alone
        self._coming: deque[ReadItem] = deque()  # not yet taken by the consumer
        self._is_stopped = False
        self._planner_error: BaseException | None = None
        self._next_layer = self._left_in_layer = 0
        self.bytes_read = 0
        self.waited_s = 0.0
        self._threads = [threading.Thread(target=self._plan, name="read-plan", daemon=True)]
        self._threads += [
            threading.Thread(target=self._read, name=f"read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ReadAhead:
        """Reading has begun already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops reading."""
        self.close()

    @property
    def ring_bytes(self) -> int:
        """Size of the ring."""
        return self._ring.size

    def layer(self) -> Iterator[ReadItem]:
        """The next layer's shards, in the order of its requests; waits for each of them.

        `bytes_read` grows by each shard that is given out, `waited_s` by the time spent here.

        Raises:
            SourceError: A shard could not be read, or is not what it was when it was packed; those
                before it were given out.
            ReadStoppedError: `close` was called.
        """
        assert self._next_layer < len(self._layers), "more layers taken than requested"
        assert self._left_in_layer == 0, "a layer is taken whole before the next one"
        self._left_in_layer = len(self._layers[self._next_layer])
        self._next_layer += 1
        while self._left_in_layer:
            item = self._take()
            self._left_in_layer -= 1
            yield item

    def close(self) -> None:
        """Stops reading, whatever is under way; shards that were given out keep their memory."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        self._files.close()

    def _take(self) -> ReadItem:
        start = time.monotonic()
        with self._changed:
            self._changed.wait_for(self._is_next_known)
            self.waited_s += time.monotonic() - start
            if self._is_stopped:
                raise ReadStoppedError("the read-ahead was closed")
            if not self._coming:
                assert self._planner_error is not None
                raise self._planner_error
            item = self._coming.popleft()
        if item._error is not None:
            raise item._error
        if self._reads is not None:
            self._reads.add(item._cut.info, item.shard, digest_pieces(item._digests))
        self.bytes_read += item._cut.nbytes
        return item

    def _is_next_known(self) -> bool:
        if self._coming:
            item = self._coming[0]
            return self._is_stopped or item._pieces_left == 0 or item._error is not None
        return self._is_stopped or self._planner_error is not None

    def _release(self, item: ReadItem, wait: Callable[[], None] | None) -> None:
        with self._changed:
            assert not item._is_released, item.spec.name
            item._is_released, item._wait = True, wait
            self._changed.notify_all()

    def _plan(self) -> None:
        """The planner's thread."""
        try:
            for layer in self._layers:
                for request, cut in layer:
                    place = self._find_place(cut.nbytes)
                    if place is None:
                        return
                    item = ReadItem(request, cut, place, self)
                    pieces = list(pieces_of(cut))
                    item._pieces_left = len(pieces)
                    item._digests = [b""] * len(pieces)
                    self._placed.append(item)
                    with self._changed:
                        self._coming.append(item)
                        self._changed.notify_all()
                    for number, piece in enumerate(pieces):
                        self._pieces.put((item, number, piece))
        except BaseException as error:
            with self._changed:
                self._planner_error = error
                self._changed.notify_all()

    def _find_place(self, nbytes: int) -> torch.Tensor | None:
        """Waits for room, if need be for what still reads from it; None once stopped."""
        while (start := self._ring.take(nbytes)) is None:
            with self._changed:
                self._changed.wait_for(lambda: self._placed[0]._is_released or self._is_stopped)
                if self._is_stopped:
                    return None
            oldest = self._placed.popleft()
            if oldest._wait is not None:
                oldest._wait()
            self._ring.give_back()
        return self._arena[start : start + nbytes]

    def _read(self) -> None:
        """A reader's thread."""
        scratch = Scratch()
        while (work := self._pieces.get()) is not None:
            item, number, piece = work
            if self._is_stopped:
                continue
            error: BaseException | None = None
            try:
                try:
                    descriptor = self._files.descriptor(item._cut.info.path)
                except OSError as problem:
                    raise unreadable(item._cut.info, problem) from problem
                read_piece(descriptor, item._cut, piece, item._bytes, scratch)
                if self._reads is not None:
                    item._digests[number] = digest_piece(item._cut.kept(piece, item._bytes))
            except BaseException as caught:
                error = caught
            with self._changed:
                item._pieces_left -= 1
                item._error = item._error or error
                if item._pieces_left == 0 or error is not None:
                    self._changed.notify_all()


def _cut(source: Source, request: Request) -> Cut:
    _, name, shard = request
    place = source.copy_of(name)
    assert isinstance(place, TensorInfo), "only files are read ahead"
    return cut_of(place, shard)
