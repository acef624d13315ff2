"""The demo's tokenizer: every byte has a token, every text comes back exactly."""

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from pipeline.demo import demo_checkpoint_dir
from pipeline.demo.text import Split, read_documents
from pipeline.demo.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t  x = 1\r\n",
    "".join(map(chr, range(256))),
    "żółć 日本語 \U0001f600 \u2028 \x00\x7f",
    "  trailing  ",
]


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(demo_checkpoint_dir(), local_files_only=True)


def test_every_byte_has_its_own_token() -> None:
    shipped = load_tokenizer(demo_checkpoint_dir())
    ids = {shipped.token_to_id(symbol) for symbol in pre_tokenizers.ByteLevel.alphabet()}
    assert len(ids) == 256
    assert None not in ids
    # All 256 byte values through the decoder: those that start no valid text decode together.
    every_text = "".join(chr(code) for code in (*range(0x800), *range(0x800, 0x10FFFF, 997)))
    every_text = every_text.encode("utf-8", "ignore").decode()
    assert shipped.decode(shipped.encode(every_text).ids) == every_text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_come_back(tokenizer: AutoTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_source_files_come_back(tokenizer: AutoTokenizer) -> None:
    for document in read_documents(Split.evaluation)[:5]:
        ids = tokenizer.encode(document.text)
        assert tokenizer.decode(ids) == document.text
        assert max(ids) < 512


def test_special_tokens_and_chat_template(tokenizer: AutoTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == ("<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_training_is_repeatable(tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x\n" * 20, "class A:\n    pass\n" * 20]
    first, second = train_tokenizer(texts, 280), train_tokenizer(texts, 280)
    assert first.to_str() == second.to_str()
    save_tokenizer(first, tmp_path, 128)
    assert load_tokenizer(tmp_path).to_str() == first.to_str()
    assert first.get_vocab_size() == 280
