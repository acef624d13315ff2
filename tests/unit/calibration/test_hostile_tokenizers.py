"""A checkpoint's tokenizer is data: none of its code is run, and no pickle of it is loaded."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.calibration.data import load_sequences
from pipeline.calibration.documents import DataSource
from pipeline.checkpoint.hub import DEMO_DIRECTORY
from pipeline.checkpoint.source import open_source
from pipeline.errors import DataError
from tests.unit.checkpoint.tiny import edit_json

AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoModelForCausalLM": "evil.EvilModel",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "checkpoint"))


@pytest.fixture
def witness(tmp_path: Path, checkpoint: Path) -> Path:
    """A file that the checkpoint's code would make."""
    path = tmp_path / "witness"
    code = f"open({str(path)!r}, 'w').write('ran')\n"
    for name in ("evil.py", "tokenization.py", "configuration.py", "setup.py", "conftest.py"):
        (checkpoint / name).write_text(code)
    return path


def tokenize(checkpoint: Path, text: str = "a text of some words", count: int = 1) -> Any:
    path = checkpoint.parent / "text.jsonl"
    path.write_text(json.dumps({"text": text * 50}) + "\n")
    return load_sequences(
        [DataSource(path=str(path))], checkpoint, num_sequences=count, seq_len=8, seed=0
    )


def test_auto_map_runs_nothing(checkpoint: Path, witness: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(checkpoint / name, lambda value: value.update(auto_map=AUTO_MAP))
    source = open_source(checkpoint)
    assert "evil.py" in source.small_files, "remote code is only copied"
    with contextlib.suppress(DataError):  # transformers may know the class or refuse it
        tokenize(checkpoint)
    assert not witness.exists()


@pytest.mark.parametrize("value", ["evil.EvilTokenizer", "EvilTokenizer", "os.system", 7, None])
def test_unknown_classes_run_nothing(checkpoint: Path, witness: Path, value: Any) -> None:
    edit_json(
        checkpoint / "tokenizer_config.json", lambda config: config.update(tokenizer_class=value)
    )
    with contextlib.suppress(DataError):
        tokenize(checkpoint)
    assert not witness.exists()


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_pickles_are_never_loaded(checkpoint: Path, witness: Path) -> None:
    bomb = pickle.dumps(Bomb(witness))
    pickle.loads(pickle.dumps(Bomb(witness)))
    assert witness.exists(), "the bomb works"
    witness.unlink()
    (checkpoint / "tokenizer.json").unlink()
    names = (
        "tokenizer.pkl",
        "vocab.pkl",
        "vocab.bin",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    )
    for name in names:
        (checkpoint / name).write_bytes(bomb)
    with pytest.raises(DataError, match="tokenizer in"):
        tokenize(checkpoint)
    assert not witness.exists()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 100_000, b'{"model": 7}', b"\xff", b'{"a":' * 2000, b"null"]
)
def test_broken_tokenizers_are_one_message(checkpoint: Path, data: bytes) -> None:
    (checkpoint / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError, match="tokeniz"):
        tokenize(checkpoint)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[99].x.y }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(10**9) %}{{ a }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch x') }}",
        "{% include 'x' %}",
        "{{ raise_exception('no') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_templates_run_in_a_sandbox_and_fail_with_our_error(
    checkpoint: Path, tmp_path: Path, template: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(template)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with pytest.raises(DataError, match="a conversation of calibration data"):
        load_sequences([DataSource(path=str(path))], checkpoint, num_sequences=1, seq_len=8, seed=0)


def test_only_what_is_needed_of_a_very_long_document_is_tokenized(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.calibration.data as data

    seen: list[int] = []
    original = data._encode

    def counted(source: Any, pieces: Any, tokenizer: Any) -> Any:
        seen.append(sum(len(text) for text, _ in pieces))
        return original(source, pieces, tokenizer)

    monkeypatch.setattr(data, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(data, "_encode", counted)
    tokenize(checkpoint, "word " * 20_000)
    assert seen == [data.PIECES_PER_BATCH * 1000]
