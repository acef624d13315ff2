"""A few injections of the campaign of faults, and that the campaign would notice what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import fault_runs, faults
from bench.fault_injections import KINDS, Attempt, Injection
from bench.fault_runs import Ended

# What the other tests of restarts, failures and refusals do not do.
CHOSEN = (
    "short reads",
    "EIO while reading",
    "EIO while writing",
    "wall clock set by a day",
    "snapshot damaged between attempts",
    "journal damaged between attempts",
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> faults.Campaign:
    fault_runs.prepare()
    return faults.Campaign(tmp_path_factory.mktemp("faults"), seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHOSEN)
def test_nothing_wrong_is_published(campaign: faults.Campaign, kind: str) -> None:
    row = campaign.inject(CHOSEN.index(kind), kind)
    assert row["wrong"] == []
    assert row["attempts"][-1]["statuses"] == [0, 0]


@pytest.mark.slow
def test_other_bytes_are_noticed(
    campaign: faults.Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is another one than that of the undisturbed run, and nobody puts it right."""

    def spoil(scene: Any) -> Injection:
        shard = next(scene.source.glob("model-00002*"))
        data = bytearray(shard.read_bytes())
        data[-2] ^= 0x40
        shard.write_bytes(data)
        return Injection([Attempt()])

    monkeypatch.setitem(KINDS, "spoiled", spoil)
    row = campaign.inject(99, "spoiled")
    assert any("other bytes are published" in wrong for wrong in row["wrong"])


def ended(*statuses: int, words: str = "") -> Ended:
    return Ended(list(statuses), 1.0, 0.5, [words])


def test_wrong_endings_are_noticed(tmp_path: Path) -> None:
    output, expected = tmp_path / "out", {"a": b"1"}
    refused = Attempt(statuses=frozenset({2}), named="shard-3")
    assert not faults._faults_of(ended(2, words="shard-3 is bad"), refused, output, expected)
    assert "nobody says" in faults._faults_of(ended(2), refused, output, expected)[0]
    assert "exit statuses" in faults._faults_of(ended(3), Attempt(), output, expected)[0]
    assert "nothing is published" in faults._faults_of(ended(0), Attempt(), output, expected)[0]
    output.mkdir()
    (output / "a").write_bytes(b"2")
    # Published although it was refused, and not what it should be.
    assert "other bytes" in faults._faults_of(ended(2), refused, output, expected)[0]
    (output / "a").write_bytes(b"1")
    assert not faults._faults_of(ended(0), Attempt(), output, expected)


def test_a_campaign_goes_on_after_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[int, str]] = []

    def inject(_: faults.Campaign, number: int, kind: str) -> dict[str, Any]:
        done.append((number, kind))
        attempts = [{"statuses": [0, 0], "seconds": 1.0, "after_s": None, "words": ""}]
        wrong = ["other bytes"] if number == 3 else []
        return {"number": number, "kind": kind, "layout": "EP2", "attempts": attempts} | {
            "wrong": wrong
        }

    monkeypatch.setattr(faults.Campaign, "inject", inject)
    monkeypatch.setattr(faults.Campaign, "__init__", lambda *_: None)
    monkeypatch.setattr(fault_runs, "prepare", lambda: None)
    results = tmp_path / "faults.jsonl"
    for count, status in ((2, 0), (4, 1)):
        argv = ["faults", "--injections", str(count), "--json", str(results)]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as end:
            faults.main()
        assert end.value.code == status
    assert done == list(enumerate(list(KINDS)[:4]))
    assert len([json.loads(line) for line in results.read_text().splitlines()]) == 4
    assert "WRONG other bytes" in capsys.readouterr().out
