"""The shipped demo checkpoint: its size, its names and widths, and what it has learned."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, NemotronHForCausalLM

from pipeline.demo import demo_checkpoint_dir
from pipeline.demo.checkpoint import load_model
from pipeline.demo.evaluate import ByteTrigram, ModelFigures, measure_model
from pipeline.demo.model import DemoModel
from pipeline.demo.text import Split, read_documents
from pipeline.demo.tokenizer import load_tokenizer

SLICE_BYTES_PER_FILE = 3000
LEAST_SHARE = 0.01


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return load_model(demo_checkpoint_dir())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The middle of each held-out file."""
    middles = []
    for document in read_documents(Split.evaluation)[:10]:
        middle = len(document.text) // 2
        middles.append(document.text[middle : middle + SLICE_BYTES_PER_FILE])
    return middles


@pytest.fixture(scope="module")
def measured(model: DemoModel, texts: list[str]) -> ModelFigures:
    return measure_model(model, load_tokenizer(demo_checkpoint_dir()), texts)


def shapes() -> dict[str, tuple[list[int], str]]:
    with safe_open(demo_checkpoint_dir() / "model.safetensors", "pt") as file:
        return {
            name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype())
            for name in file.keys()  # noqa: SIM118 (not a mapping)
        }


def moe_names(prefix: str) -> set[str]:
    names = {"gate.weight", "gate.e_score_correction_bias"}
    names |= {f"{name}.weight" for name in ("fc1_latent_proj", "fc2_latent_proj")}
    names |= {f"shared_experts.{name}_proj.weight" for name in ("up", "down")}
    names |= {
        f"experts.{expert}.{name}_proj.weight" for expert in range(16) for name in ("up", "down")
    }
    return {f"{prefix}.{name}" for name in names}


def test_size_is_at_most_six_megabytes() -> None:
    files = [path for path in demo_checkpoint_dir().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_key_set_is_nvidias() -> None:
    mamba = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias")
    mixers = {
        "M": {*mamba, "norm.weight", "out_proj.weight"},
        "*": {f"{name}_proj.weight" for name in "qkvo"},
    }
    expected = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    expected |= {f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
    expected |= {"mtp.layers.1.final_layernorm.weight"}
    for prefix, pattern in (("backbone", "MEM*EMEME"), ("mtp", "*E")):
        for index, kind in enumerate(pattern):
            layer = f"{prefix}.layers.{index}"
            expected.add(f"{layer}.norm.weight")
            if kind == "E":
                expected |= moe_names(f"{layer}.mixer")
            else:
                expected |= {f"{layer}.mixer.{name}" for name in mixers[kind]}
    assert set(shapes()) == expected


def test_dtypes_are_bf16_but_the_routers() -> None:
    for name, (_, dtype) in shapes().items():
        assert dtype == ("F32" if ".gate." in name else "BF16"), name


def test_inputs_of_linears_suit_hopper_and_four_way_sharding() -> None:
    """K a multiple of 64; and K/4 of 16, so that TP=4 and ETP=2 keep whole blocks."""
    for name, (shape, _) in shapes().items():
        if len(shape) == 2 and "embeddings" not in name:
            assert shape[1] % 64 == 0, name


def test_config_is_nvidias_and_loads_in_transformers(model: DemoModel) -> None:
    written = json.loads((demo_checkpoint_dir() / "config.json").read_text())
    assert written["hybrid_override_pattern"] == "MEM*EMEME"
    assert written["num_nextn_predict_layers"] == 1
    config = AutoConfig.from_pretrained(demo_checkpoint_dir())
    assert config.mtp_hybrid_override_pattern == "*E"
    assert config.layers_block_type.count("moe") == 4
    config.chunk_size = 256
    reference = NemotronHForCausalLM.from_pretrained(
        demo_checkpoint_dir(), config=config, dtype=torch.float32
    )
    ids = torch.randint(5, 512, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-3, rtol=1e-3)


def test_beats_the_byte_trigram_model(measured: ModelFigures, texts: list[str]) -> None:
    trigram = ByteTrigram([document.text for document in read_documents(Split.train)])
    baseline = trigram.bits_per_byte(texts)
    assert measured.bits_per_byte < baseline
    assert measured.text_bytes > 20_000


def test_every_expert_is_used(measured: ModelFigures) -> None:
    assert len(measured.expert_share) == 5  # four in the backbone, one in the MTP block
    for layer, shares in measured.expert_share.items():
        assert sum(shares) == pytest.approx(4)
        assert min(shares) >= LEAST_SHARE, layer


def test_the_card_tells_the_measured_figures() -> None:
    figures = json.loads((demo_checkpoint_dir() / "training.json").read_text())["evaluation"]
    card = (demo_checkpoint_dir() / "README.md").read_text()
    assert f"{figures['bits_per_byte']:.4f}" in card
    assert f"{figures['trigram_bits_per_byte']:.4f}" in card
    assert figures["bits_per_byte"] < figures["trigram_bits_per_byte"]
    assert min(min(layer) for layer in figures["expert_share"].values()) >= LEAST_SHARE
