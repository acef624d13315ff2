"""Calibration data: what is read, how it is packed and mixed, and every refusal's message."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.calibration.data import (
    DataSource,
    check_token_ids,
    load_and_hold_out,
    load_sequences,
    share_out,
)
from pipeline.calibration.documents import list_files, read_documents
from pipeline.errors import ConfigError, DataError

END = 256
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)


def make_tokenizer(directory: Path, *, template: str | None = None, end: bool = True) -> Path:
    """A tokenizer of one token per byte (ids in the order of the byte alphabet), 256 = end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>" if end else None, model_max_length=8
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(sequences: torch.Tensor, tokenizer_dir: Path) -> list[str]:
    """The documents in the order packed (the sources are not mixed), the last one cut."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    return tokenizer.decode(sequences.flatten().tolist()).split("<end>")


def test_packs_full_sequences_joined_by_end_of_text(tmp_path, plain):
    texts = [chr(ord("a") + i) * (3 + i) for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, "", "  \n", None])
    one = load_sequences([DataSource(path=str(path))], plain, num_sequences=1, seq_len=200, seed=1)
    assert one.dtype == torch.int64
    assert one.shape == (1, 200)
    *whole, last = documents_of(one, plain)
    assert set(whole) < set(texts)
    assert any(text.startswith(last) for text in texts)
    assert whole != sorted(whole)
    assert len(set(whole)) == len(whole)


def test_same_seed_same_sequences_other_seed_others(tmp_path, plain):
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * 5 for i in range(40)])

    def load(seed):
        source = DataSource(path=str(path))
        return load_sequences([source], plain, num_sequences=6, seq_len=32, seed=seed)

    assert torch.equal(load(7), load(7))
    assert not torch.equal(load(7), load(8))


def test_without_end_token_documents_follow_each_other(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", end=False)
    path = write_jsonl(tmp_path / "a.jsonl", ["xx"] * 4)
    got = load_sequences(
        [DataSource(path=str(path))], tokenizer, num_sequences=1, seq_len=8, seed=0
    )
    assert len(set(got.flatten().tolist())) == 1


def test_every_kind_of_file_and_a_directory_of_them(tmp_path, plain):
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    write_jsonl(folder / "one.jsonl", ["jsonl"])
    (folder / "two.json").write_text(json.dumps([{"text": "json"}]))
    (folder / "below" / "three.txt").write_text("txt first line\n\nsecond line\n")
    Dataset.from_dict({"text": ["parquet"], "id": [3]}).to_parquet(folder / "four.parquet")
    (folder / "README.md").write_text("not data")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "empty.jsonl").write_text("")
    names = [path.relative_to(folder).as_posix() for path in list_files(folder)]
    assert names == ["below/three.txt", "four.parquet", "one.jsonl", "two.json"]
    found = set(read_documents(DataSource(path=str(folder)), (0,)))
    assert found == {"jsonl", "json", "parquet", "txt first line\n\nsecond line\n"}


def test_slices_of_the_only_split_of_a_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c", "d"])
    half = list(read_documents(DataSource(path=str(path), split="train[:2]"), (0,)))
    assert sorted(half) == ["a", "b"]
    with pytest.raises(DataError, match=r'Unknown split "test".*only split is train'):
        next(read_documents(DataSource(path=str(path), split="test"), (0,)))


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    rows = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "x": 1}]]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*rows, []]))
    text = "<user>hi<assistant>yo"
    source = DataSource(path=str(path))
    got = load_sequences([source], tokenizer, num_sequences=1, seq_len=len(text) + 1, seed=0)
    assert documents_of(got, tokenizer) == [text, ""]


def test_messages_without_template_or_refused_by_it(tmp_path, plain):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "robot", "content": "hi"}]}) + "\n")
    sources = [DataSource(path=str(path))]
    with pytest.raises(DataError, match=r"need a chat template.*has none.*text column"):
        load_sequences(sources, plain, num_sequences=1, seq_len=4, seed=0)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    with pytest.raises(DataError, match=r"with the roles robot.*no robots"):
        load_sequences(sources, tokenizer, num_sequences=1, seq_len=4, seed=0)


def test_sources_are_mixed_by_weight(tmp_path, plain):
    heavy = write_jsonl(tmp_path / "heavy.jsonl", ["a" * 50] * 20)
    light = write_jsonl(tmp_path / "light.jsonl", ["b" * 50] * 20)
    sources = [DataSource(path=str(heavy), weight=3), DataSource(path=str(light), weight=1)]
    got = load_sequences(sources, plain, num_sequences=12, seq_len=16, seed=3)
    firsts = [PreTrainedTokenizerFast.from_pretrained(plain).decode(row)[1] for row in got]
    assert firsts.count("a") == 9
    assert firsts.count("b") == 3
    assert firsts != sorted(firsts)


def test_share_out_by_largest_remainder():
    def shares(weights, total):
        return share_out([DataSource(path="x", weight=w) for w in weights], total)

    assert shares([1, 1, 1], 8) == [3, 3, 2]
    assert shares([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert shares([2, 1], 512) == [341, 171]
    with pytest.raises(ConfigError, match=r"weight of data source x: found 0.001 .* no sequence"):
        shares([1, 0.001], 8)


def test_too_little_text_says_how_much_there_is(tmp_path, plain):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 9] * 5)
    with pytest.raises(
        DataError, match=r"found 50 tokens; 4 sequences of 16 tokens need 64; 3 sequences would fit"
    ):
        load_sequences([DataSource(path=str(path))], plain, num_sequences=4, seq_len=16, seed=0)


def two_sources(folder: Path) -> list[DataSource]:
    """Every text, and so every sequence, is another one."""
    paths = [
        write_jsonl(folder / f"{name}.jsonl", [f"{name}{i:04d}" for i in range(200)])
        for name in ("heavy", "light")
    ]
    return [DataSource(path=str(p), weight=w) for p, w in zip(paths, (3, 1), strict=True)]


@pytest.mark.parametrize("held_out", [0, 1, 2, 5])
def test_what_is_held_out_follows_and_changes_nothing_else(tmp_path, plain, held_out):
    sources = two_sources(tmp_path)
    size = {"num_sequences": 8, "seq_len": 40, "seed": 3}
    alone = load_sequences(sources, plain, **size)
    chosen, others = load_and_hold_out(sources, plain, held_out=held_out, **size)
    assert torch.equal(chosen, alone)
    assert others.dtype is torch.int64
    assert others.shape == (held_out, 40)
    texts = [documents_of(part, plain) for part in (chosen, others)]
    whole = [{text for text in part if len(text) == len("heavy0000")} for part in texts]
    assert not whole[0] & whole[1]
    rows = {tuple(row) for row in [*chosen.tolist(), *others.tolist()]}
    assert len(rows) == 8 + held_out
    names = [documents_of(row, plain)[1][:5] for row in others]
    assert names == ["heavy"] * (held_out - held_out // 4) + ["light"] * (held_out // 4)


def test_a_light_source_may_give_nothing_to_the_evaluation(tmp_path, plain):
    heavy, light = two_sources(tmp_path)
    light = DataSource(path=light.path, weight=0.5)
    size = {"num_sequences": 8, "seq_len": 40, "seed": 3}
    _, others = load_and_hold_out([heavy, light], plain, held_out=2, **size)
    assert all(documents_of(row, plain)[1].startswith("heavy") for row in others)


def test_too_little_text_to_hold_any_out_says_how_to_leave_it_out(tmp_path, plain):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 9] * 5)
    size = {"num_sequences": 3, "seq_len": 16, "seed": 0}
    load_sequences([DataSource(path=str(path))], plain, **size)
    with pytest.raises(
        DataError,
        match=r"found 50 tokens; 5 sequences .*evaluation\.num_sequences \(0 leaves the evaluation",
    ):
        load_and_hold_out([DataSource(path=str(path))], plain, held_out=2, **size)


def test_reading_stops_when_there_is_enough(tmp_path, plain, monkeypatch):
    asked = []

    def endless(source, seed):
        while True:
            asked.append(seed)
            yield "x" * 100

    monkeypatch.setattr("pipeline.calibration.data.read_documents", endless)
    load_sequences([DataSource(path="x")], plain, num_sequences=4, seq_len=64, seed=5)
    assert 3 <= len(asked) <= 16
    assert asked[0] == (5, 0)


def test_long_documents_are_cut_for_the_tokenizer_only(tmp_path, plain, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["line\n" * 30 + "y" * 90])
    sources = [DataSource(path=str(path))]
    whole = load_sequences(sources, plain, num_sequences=1, seq_len=241, seed=0)
    monkeypatch.setattr("pipeline.calibration.data.PIECE_CHARACTERS", 32)
    assert torch.equal(whole, load_sequences(sources, plain, num_sequences=1, seq_len=241, seed=0))
    assert whole[0, -1] == END
    assert (whole == END).sum() == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl, line 3: found Expecting"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: found a JSON list"),
        ("a.json", '[{"text": "x"},\n {"text" "y"}]', r"a\.json, line 2: found Expecting"),
        ("a.parquet", "no parquet", r"a\.parquet.*Parquet magic bytes"),
        ("a.jsonl", '{"title": "x", "body": "y"}\n', r"the columns title, body; text is read"),
        ("a.jsonl", '{"text": "x"}\n{"text": 5}\n', r"column text of .* found a int: '5'"),
        ("a.jsonl", '{"messages": "x"}\n', r"column messages of .* found a str"),
        ("a.jsonl", "\n\n", r"a\.jsonl.*corresponds to no data"),
        ("a.csv", "text\nx\n", r"the suffix \.csv; files are \.jsonl, \.json, \.parquet, \.txt"),
        ("a.txt", "", r"1 empty file"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(DataSource(path=str(tmp_path / name)), (0,)))


def test_places_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="no data file; files are"):
        next(read_documents(DataSource(path=str(tmp_path)), (0,)))
    with pytest.raises(DataError, match=r"gone\.jsonl: found no such file or directory"):
        next(read_documents(DataSource(path=str(tmp_path / "gone.jsonl")), (0,)))


def test_hub_name_offline_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/texts' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"taken as a hub dataset.*offline.*--local-dir DIR") as got:
        next(read_documents(DataSource(path="owner/texts"), (0,)))
    assert "OfflineModeIsEnabled" in str(got.value)


def test_hub_rows_are_streamed_and_shuffled_by_seed(monkeypatch):
    table = Dataset.from_dict({"text": [f"t{i}" for i in range(30)]})
    asked = []

    def load(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DataSource(path="owner/texts", name="en", split="validation")
    first, again, other = (list(read_documents(source, (s, 0))) for s in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(table["text"])
    assert asked[0] == ("owner/texts", "en", "validation", True)


def test_demo_text(plain):
    source = DataSource(path="demo", split="calibration")
    got = load_sequences([source], plain, num_sequences=2, seq_len=512, seed=0)
    assert got.shape == (2, 512)
    with pytest.raises(ConfigError, match="splits train, calibration, evaluation"):
        next(read_documents(DataSource(path="demo", split="test"), (0,)))


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_bad_weights(weight):
    with pytest.raises(ConfigError, match="a weight is a positive finite number"):
        DataSource(path="x", weight=weight)


def test_bad_numbers(tmp_path, plain):
    source = DataSource(path=str(tmp_path))
    for numbers, message in (
        ({"num_sequences": 0}, r"data\.num_sequences: found 0; it is at least 1"),
        ({"seq_len": 1}, r"data\.seq_len: found 1; it is at least 2"),
        ({"seed": -1}, r"data\.seed: found -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_sequences(
                [source], plain, **{"num_sequences": 1, "seq_len": 4, "seed": 0} | numbers
            )
    with pytest.raises(ConfigError, match="at least one source"):
        load_sequences([], plain, num_sequences=1, seq_len=4, seed=0)
    with pytest.raises(ConfigError, match="path of a data source"):
        DataSource(path=" ")
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ConfigError, match="a name selects a subset of a hub dataset"):
        next(read_documents(DataSource(path=str(path), name="en"), (0,)))


def test_missing_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"tokenizer in .*empty: found ValueError.*put its tokenizer\.json"
    ):
        load_sequences(
            [DataSource(path="demo")], tmp_path / "empty", num_sequences=1, seq_len=4, seed=0
        )


def test_check_token_ids():
    check_token_ids(torch.tensor([[0, 9]]), 10)
    with pytest.raises(DataError, match=r"found 0 to 10; the model's vocabulary has ids 0 to 9"):
        check_token_ids(torch.tensor([[0, 10]]), 10)
