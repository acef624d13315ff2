"""From what the user typed to a directory: a path, a Hub id, or `demo`.

In: a directory, a Hub id (`organisation/name`) or the word `demo`. Out: a local directory, with
the Hub's cache used first, and downloaded into only when this machine is online.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.checkpoint.source_files import INDEX_NAME, read_weight_map
from pipeline.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEVER_FETCHED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]

DEMO_DIRECTORY = Path(__file__).resolve().parent.parent / "demo" / "model"


def locate(path_or_hub_id: str | Path) -> Path:
    """The directory of a source checkpoint.

    Raises:
        SourceError: No such directory; not in the Hub cache while offline; the download failed.
    """
    text = str(path_or_hub_id)
    if text == "demo":
        return DEMO_DIRECTORY
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(text):
        raise SourceError(
            f"checkpoint {text}",
            value="a file" if path.exists() else "no such directory",
            rule="must be a directory, a Hub id (organisation/name) or demo",
            remedy="correct the path",
        )
    return _from_hub(text)


def is_complete(directory: Path) -> bool:
    """Whether a snapshot holds its config and every weight file that its index names."""
    if not (directory / "config.json").is_file():
        return False
    index = directory / INDEX_NAME
    if not index.is_file():
        return any(directory.glob("*.safetensors"))
    try:
        files = set(read_weight_map(index).values())
    except SourceError:
        return True  # opening it will say what is wrong with the index
    return all((directory / name).is_file() for name in files)


def _from_hub(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        cached = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        if is_complete(cached):
            return cached
        state = f"an incomplete copy in {cached}"
    except (LocalEntryNotFoundError, HFValidationError):
        state = "not in the Hub cache"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, ignore_patterns=_NEVER_FETCHED))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as problem:
        raise SourceError(
            f"checkpoint {hub_id}",
            value=f"{state}, and the Hub cannot be reached (offline)",
            rule="a Hub id must be in the cache or downloadable; no such directory exists either",
            remedy=f"run `hf download {hub_id}` where there is a network, or give a directory",
        ) from problem
    except (HfHubHTTPError, HFValidationError, OSError) as problem:
        raise SourceError(
            f"checkpoint {hub_id}",
            value=f"{state}, and the download failed: {problem}",
            rule="a Hub id must name a model that you may read",
            remedy="check the name, your access to the model (`hf auth login`) and the network",
        ) from problem
