"""Activation scalars and expert coverage of exported checkpoints, against transformers' model.

The reference knows nothing of Layersweep: transformers reads the same directory by itself, and
plain hooks see what enters each of its modules.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.e2e.harness import is_activation_scalar, read_checkpoint, run_job
from tests.e2e.models import write_checkpoint, write_token_ids

SEQUENCES, SEQ_LEN, TOP_K = 7, 24, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "all_kinds": {},
    "biases_groups_no_latents": {
        "hybrid_override_pattern": "E*M-E",
        "use_bias": True,
        "use_conv_bias": False,
        "mlp_bias": True,
        "moe_latent_size": None,
        "n_group": 2,
        "norm_topk_prob": False,
    },
}
RECIPES = {
    "everything": "general/ptq/nvfp4_default-kv_fp8",
    "mix": "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6",
}
LAYOUTS = {"ep4": {"world": 4, "ep": 4}, "tp2-ep2": {"world": 4, "tp": 2, "ep": 2}}
NVFP4_MAX, FP8_MAX = 6.0 * 448.0, 448.0


class Made:
    """A checkpoint on disk, calibration ids, and what hooks saw of transformers' model."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.source = write_checkpoint(directory / "source", **settings)
        self.ids = write_token_ids(directory / "ids.npy", SEQUENCES, SEQ_LEN)
        self.amax: dict[str, float] = {}
        self.tokens_per_expert: dict[int, torch.Tensor] = {}
        self._run_reference()

    def run(self, output: Path, **options: Any) -> Path:
        size = {"num_sequences": SEQUENCES, "seq_len": SEQ_LEN, "loss_sequences": 2}
        return run_job(
            output,
            checkpoint=str(self.source),
            data=str(self.ids),
            calibration={**size, **options.pop("calibration", {})},
            clamp_kv_scales=False,
            unobserved_input_scale=None,
            **options,
        )

    def _run_reference(self) -> None:
        from transformers import NemotronHForCausalLM

        model, info = NemotronHForCausalLM.from_pretrained(
            self.source, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        for path, module in model.named_modules():
            name = path.replace("model.", "backbone.", 1)
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args, n=name: self._see(n, args[0]))
                if name.endswith(("k_proj", "v_proj")):
                    cache = f"{name}.{name[-6]}_scale"
                    module.register_forward_hook(lambda _, __, out, n=cache: self._see(n, out))
            elif name.endswith(".experts"):
                module.register_forward_pre_hook(
                    lambda m, args, n=name: self._see_experts(n, m, args)
                )
        with torch.no_grad():
            model.eval()(torch.from_numpy(np.load(self.ids)), use_cache=False)

    def _see(self, name: str, x: torch.Tensor) -> None:
        self.amax[name] = max(self.amax.get(name, 0.0), x.abs().amax().item())

    def _see_experts(self, name: str, experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens, chosen_TK, _probabilities = args
        self._see(f"{name}.up_proj", tokens)
        counts = torch.bincount(chosen_TK.flatten(), minlength=len(experts.up_proj))
        self.tokens_per_expert[int(name.split(".")[2])] = counts
        for expert, up in enumerate(experts.up_proj):
            mine = tokens[(chosen_TK == expert).any(dim=1)]
            if len(mine):
                self._see(f"{name}.down_proj", F.linear(mine, up).relu().square())


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_scales_equal_those_of_plain_hooks(made: Made, recipe: str, tmp_path: Path) -> None:
    tensors = read_checkpoint(made.run(tmp_path / "out", recipe=RECIPES[recipe]))
    found = {
        name: struct.unpack("<f", data)[0]
        for name, (_, _, data) in tensors.items()
        if is_activation_scalar(name)
    }
    kinds = set()
    for name, value in found.items():
        module = name.rpartition(".")[0]
        if name.endswith(".input_scale"):
            stored = tensors[f"{module}.weight"][0]
            divisor = NVFP4_MAX if stored == "U8" else FP8_MAX
            # All experts of a layer share one scale, so that any of them may get any token.
            stem, of_experts, rest = module.partition(".experts.")
            seen = f"{stem}.experts.{rest.partition('.')[2]}" if of_experts else module
        else:
            divisor, seen = FP8_MAX, name
        kinds.add(seen.split(".mixer.")[1])
        assert value == pytest.approx(made.amax[seen] / divisor, rel=1e-3), name
    assert {
        "experts.up_proj",
        "experts.down_proj",
        "in_proj",
        "out_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
        "k_proj.k_scale",
        "v_proj.v_scale",
    } <= kinds
    if recipe == "everything":
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= kinds
    scaled = {name.rpartition(".")[0] for name in found if name.endswith(".input_scale")}
    quantized = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    assert scaled == quantized


def test_tokens_per_expert_equal_transformers(made: Made, tmp_path: Path) -> None:
    assert_coverage(made, made.run(tmp_path / "out", calibration={"micro_batch": 3}))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_tokens_per_expert_with_seven_sequences_on_four_ranks(
    made: Made, layout: str, tmp_path: Path
) -> None:
    assert_coverage(made, made.run(tmp_path / "out", **LAYOUTS[layout]))


def assert_coverage(made: Made, output: Path) -> None:
    coverage = json.loads((output / "layersweep" / "run.json").read_text())["coverage"]
    assert {item["layer"] for item in coverage} == set(made.tokens_per_expert)
    for item in coverage:
        assert sum(item["tokens_per_expert"]) == SEQUENCES * SEQ_LEN * TOP_K
        assert item["tokens_per_expert"] == made.tokens_per_expert[item["layer"]].tolist()
