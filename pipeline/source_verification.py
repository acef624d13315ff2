"""`verify_source`: weights are compared with the checksums that came with them, before the work.

In: the opened source, and all ranks. Out: nothing, or one error on every rank that names the files.
Ranks read slices while they work, and whole files have these sums, so this reads everything once
more; the files are shared out over the ranks, and each rank reads several at a time.
"""

from __future__ import annotations

import logging
import time

from pipeline.checkpoint.given_checksums import find_changed, find_checksums, share_of
from pipeline.checkpoint.source import FileSource, first_five
from pipeline.errors import SourceError
from pipeline.report.summary import format_bytes
from pipeline.runtime.collectives import Ranks, broadcast_object, gather_objects

logger = logging.getLogger(__name__)


def verify_source(source: FileSource, ranks: Ranks, threads: int, interval_s: float) -> None:
    """Compares every weight file with its given checksum; a collective.

    Args:
        source: The opened checkpoint.
        ranks: All of them.
        threads: Files that a rank reads at a time.
        interval_s: Between two progress lines.

    Raises:
        SourceError: A file without a checksum, or with another one; names the files.
    """
    paths = sorted({info.path for info in source.tensors.values()})
    checksums = find_checksums(source.directory, paths)
    unknown = [path.name for path in paths if path not in checksums]
    if unknown:
        raise SourceError(
            f"verify_source: {source.location}",
            value=f"{len(unknown)} weight files without a checksum: {first_five(unknown)}",
            rule="sums come from a Hub cache (the blob's name), SHA256SUMS or *.sha256 files",
            remedy="put a SHA256SUMS beside the weights, or leave verify_source out",
        )
    mine = share_of(checksums, ranks.rank, ranks.size)
    progress = _Progress(sum(path.stat().st_size for path in mine), enabled=ranks.rank == 0)
    total = sum(path.stat().st_size for path in paths)
    if ranks.rank == 0:
        logger.info(
            "verify  %d files, %s, read once more than without verify_source; of these %d here",
            len(paths),
            format_bytes(total),
            len(mine),
        )
    changed = find_changed(mine, threads, progress.advance, interval_s, progress.tell)
    everyone = gather_objects(changed, ranks.world)
    changed = broadcast_object([fault for part in everyone for fault in part], ranks.world)
    if changed:
        raise SourceError(
            f"verify_source: {source.location}",
            value=f"{len(changed)} weight files that are not what was given: "
            + "; ".join(changed[:5]),
            rule="every file must have the checksum that came with it",
            remedy="fetch these files again",
        )
    if ranks.rank == 0:
        logger.info("verify  %d files agree with their checksums", len(paths))


class _Progress:
    """Bytes that this rank has read, in the log of rank 0."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._done, self._total, self._enabled = 0, total, enabled
        self._start = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Counts."""
        self._done += nbytes

    def tell(self) -> None:
        """One line."""
        if self._enabled:
            seconds = max(time.monotonic() - self._start, 1e-3)
            logger.info(
                "verify  %s of %s, %s/s on this rank",
                format_bytes(self._done),
                format_bytes(self._total),
                format_bytes(int(self._done / seconds)),
            )
