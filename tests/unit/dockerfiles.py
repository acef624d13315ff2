"""Reads Dockerfiles and .dockerignore, as far as ours use them."""

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes:
        name: In capitals.
        text: What follows it, on one line.
    """

    name: str
    text: str


def read_dockerfile(path: Path) -> list[Step]:
    """Its instructions in order, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Step(name.upper(), text) for name, text in pairs]


def default_args(steps: list[Step]) -> dict[str, str]:
    """The ARGs that have a default."""
    pairs = [step.text.split("=", 1) for step in steps if step.name == "ARG" and "=" in step.text]
    return {name: value for name, value in pairs}


def copy_steps(steps: list[Step]) -> list[tuple[list[str], str, int | None]]:
    """Sources, destination and mode of each COPY."""
    found = []
    for step in steps:
        if step.name != "COPY":
            continue
        words = shlex.split(step.text)
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        places = [word for word in words if not word.startswith("--")]
        assert set(flags) <= {"chmod"}, step
        mode = int(flags["chmod"], 8) if "chmod" in flags else None
        found.append((places[:-1], places[-1], mode))
    return found


def replay_copies(steps: list[Step], context: Path, target: Path) -> None:
    """Copies what the COPY steps copy, as .dockerignore leaves it, to `target` (their WORKDIR)."""
    ignored = IgnoreFile(context / ".dockerignore")
    for sources, destination, mode in copy_steps(steps):
        for source in sources:
            files = [context / source]
            if (context / source).is_dir():
                files = [path for path in (context / source).rglob("*") if path.is_file()]
            kept = [path for path in files if not ignored.hides(path.relative_to(context))]
            assert kept, f"COPY {source}: nothing is left of it"
            for path in kept:
                inner = path.relative_to(context / source)
                place = target / destination / (inner if len(inner.parts) else path.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
                if mode is not None:
                    place.chmod(mode)


def run_step(steps: list[Step], fragment: str) -> str:
    """The command of the one RUN that holds a fragment."""
    (text,) = [step.text for step in steps if step.name == "RUN" and fragment in step.text]
    return text


class IgnoreFile:
    """A .dockerignore: the last pattern that matches a path, or a directory above it, decides."""

    def __init__(self, path: Path) -> None:
        lines = [line.strip() for line in path.read_text().splitlines()]
        self._rules = [
            (not line.startswith("!"), re.compile(_to_regex(line.removeprefix("!"))))
            for line in lines
            if line and not line.startswith("#")
        ]

    def hides(self, path: Path) -> bool:
        """Whether a path, relative to the context, is left out."""
        candidates = [path.as_posix(), *(above.as_posix() for above in path.parents)]
        hidden = False
        for hides, pattern in self._rules:
            if any(pattern.fullmatch(candidate) for candidate in candidates):
                hidden = hides
        return hidden


def _to_regex(pattern: str) -> str:
    parts: Mapping[str, str] = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    return "".join(
        word if word.startswith("[") else parts.get(word, re.escape(word)) for word in words
    )
