"""The demo's training model: transformers' logits, and a scan that no chunk length changes."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, NemotronHForCausalLM

from pipeline.demo.checkpoint import load_model, save_checkpoint
from pipeline.demo.layers import DemoConfig, Router, selective_scan
from pipeline.demo.model import DemoModel
from pipeline.demo.train import TrainOptions, learning_rate_share, train_model

SMALL = DemoConfig(
    vocab_size=64, hybrid_override_pattern="ME*", n_routed_experts=8, moe_intermediate_size=64
)


def options(**changes: object) -> TrainOptions:
    values = {
        "output": Path("unused"),
        "minutes": None,
        "steps": 4,
        "batch": 2,
        "length": 24,
        "learning_rate": 1e-3,
        "seed": 3,
        "threads": 1,
    }
    return TrainOptions(**(values | changes))


def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DemoModel(SMALL)
    for router in model.routers().values():
        router.e_score_correction_bias.normal_(std=0.05)
    save_checkpoint(model, tmp_path)
    ids = torch.randint(0, SMALL.vocab_size, (2, 50))
    config = AutoConfig.from_pretrained(tmp_path)
    config.chunk_size = 64
    reference = NemotronHForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path, scan_chunk=16)(ids), reference(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_scan_equals_the_recurrence_at_any_chunk_length() -> None:
    torch.manual_seed(1)
    batch, length, heads, width, groups, state = 2, 13, 4, 3, 2, 5
    x, dt = torch.randn(batch, length, heads, width), torch.rand(batch, length, heads)
    a, (b, c) = -torch.rand(heads), torch.randn(2, batch, length, groups, state)
    hidden, expected = torch.zeros(batch, heads, state, width), []
    for t in range(length):
        b_t, c_t = (part[:, t].repeat_interleave(heads // groups, 1) for part in (b, c))
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        hidden = hidden * decay + b_t[..., None] * (dt[:, t, :, None] * x[:, t])[..., None, :]
        expected.append((c_t[..., None] * hidden).sum(-2))
    for chunk in (1, 4, 13, 64):
        result = selective_scan(x, dt, a, b, c, chunk)
        torch.testing.assert_close(result, torch.stack(expected, 1), atol=1e-5, rtol=1e-5)


def test_router_counts_and_balances() -> None:
    torch.manual_seed(2)
    router = Router(SMALL)
    torch.nn.init.normal_(router.weight)
    indices, weights = router(torch.randn(40, SMALL.hidden_size))
    assert indices.shape == weights.shape == (40, SMALL.num_experts_per_tok)
    torch.testing.assert_close(weights.sum(-1), torch.full((40,), SMALL.routed_scaling_factor))
    load = router.tokens_E.clone()
    assert load.sum() == 40 * SMALL.num_experts_per_tok
    router.balance(0.01)
    bias = router.e_score_correction_bias
    assert bias[load.argmax()] < bias[load.argmin()]
    assert not router.tokens_E.any()


def test_training_lowers_the_loss_and_repeats() -> None:
    stream = torch.arange(600) % 7
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DemoModel(SMALL)
        before = model(stream[None, :24])
        steps, _ = train_model(model, stream, options())
        assert steps == 4
        results.append(model.state_dict())
    loss = [
        torch.nn.functional.cross_entropy(logits[0, :-1], stream[1:24]).item()
        for logits in (before, model(stream[None, :24]))
    ]
    assert loss[1] < loss[0]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.01), (0.015, 0.5), (1.0, 0.02), (2.0, 0.02)]
)
def test_learning_rate(progress: float, share: float) -> None:
    assert math.isclose(learning_rate_share(progress), share, rel_tol=1e-6)


def test_unknown_layer_kind_is_named() -> None:
    with pytest.raises(ValueError, match="layer kind '-'"):
        DemoModel(DemoConfig(hybrid_override_pattern="M-"))
