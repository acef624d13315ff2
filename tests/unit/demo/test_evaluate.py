"""The demo's measurement: the trigram baseline by hand, and windows that count each token once."""

import math

import pytest
import torch

from pipeline.demo.evaluate import ByteTrigram, measure_model
from pipeline.demo.layers import DemoConfig
from pipeline.demo.model import DemoModel
from pipeline.demo.tokenizer import train_tokenizer

TEXT = "def f(x):\n    return x\n" * 12


def test_trigram_probabilities_by_hand() -> None:
    """Witten-Bell on "aab" worked out by hand; unseen contexts fall back to shorter ones."""
    trigram = ByteTrigram(["aab"])
    unigram = {"a": (2 + 2 / 256) / 5, "b": (1 + 2 / 256) / 5}
    # after a: a once, b once; 2 kinds
    bigram_b = (1 + 2 * unigram["b"]) / 4
    # after \0\0: a once; after \0: a once
    first = (1 + (1 + unigram["a"]) / 2) / 2
    second = (1 + (1 + 2 * unigram["a"]) / 4) / 2  # after \0a: a once
    third = (1 + bigram_b) / 2  # after aa: b once
    expected = -sum(map(math.log2, (first, second, third))) / 3
    assert trigram.bits_per_byte(["aab"]) == pytest.approx(expected, rel=1e-12)


def test_trigram_probabilities_sum_to_one() -> None:
    trigram = ByteTrigram([TEXT])
    total = (2.0 ** -trigram._bits.view(-1, 256)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0)


@pytest.mark.parametrize("window", [3, 16, 1000])
def test_every_token_is_predicted_once(window: int) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 280)
    config = DemoConfig(vocab_size=280, hybrid_override_pattern="E", moe_intermediate_size=64)
    model = DemoModel(config)
    texts = [TEXT, "x = 1\n", "y"]
    figures = measure_model(model, tokenizer, texts, window)
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert figures.tokens == sum(lengths)
    assert figures.text_bytes == sum(map(len, texts))
    bits = figures.bits_per_token * figures.tokens
    assert figures.bits_per_byte == pytest.approx(bits / figures.text_bytes)
    # Without a mixer over tokens the cut into windows changes nothing.
    whole = measure_model(model, tokenizer, texts, 4096)
    assert figures.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-5)
    for shares in figures.expert_share.values():
        assert sum(shares) == pytest.approx(config.num_experts_per_tok)
