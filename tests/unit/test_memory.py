"""The memory plan: what a run on an H100 measured, what gives way first, what is refused."""

from pathlib import Path

import pytest

from pipeline.architecture import Architecture, LayerType
from pipeline.errors import ConfigError
from pipeline.job import Job, build_job, estimate_stored
from pipeline.memory import MemoryPlan, MemoryWish, activation_bytes, plan_memory
from pipeline.model_config import read_model_config
from pipeline.plan_ranks import GB, plan_ranks, written_bytes
from pipeline.recipe import load_recipe
from pipeline.sharding import ParallelDims

CONF = Path(__file__).parents[2] / "conf"
GIB = 2**30
H100 = round(79.18 * GIB)


def ultra(dims: ParallelDims) -> Job:
    architecture = Architecture.from_hf_config(read_model_config("nemotron3_ultra", CONF))
    recipe = load_recipe("nvfp4_four_over_six", CONF / "recipe")
    return build_job(architecture, dims, recipe, estimate_stored(architecture))


ONE = ultra(ParallelDims())
SLOTS = round(plan_ranks(ONE, written_bytes(ONE), 2)[0].slot_gb * GB)


def plan(sequences: int = 512, **wish: object) -> MemoryPlan:
    return plan_memory(
        ONE,
        tokens=(sequences, 4096),
        compute_bytes=2,
        slots=SLOTS,
        read_ahead=0,
        wish=MemoryWish(**{"device_bytes": H100, **wish}),  # type: ignore[arg-type]
    )


def test_what_one_h100_measured() -> None:
    """512 x 4,096 tokens of Nemotron 3 Ultra: 64.18 GiB allocated (bench/results)."""
    planned = plan()
    assert planned.micro_batch == 8
    assert not planned.hidden_on_host
    assert planned.peak / GIB == pytest.approx(64.18, rel=0.05)


def test_hidden_states_go_to_the_host_before_micro_batches_get_tiny() -> None:
    assert not plan(sequences=600).hidden_on_host
    smaller = plan(sequences=740)
    assert not smaller.hidden_on_host
    assert 2 <= smaller.micro_batch < 8
    on_host = plan(sequences=1024)
    assert on_host.hidden_on_host
    assert on_host.micro_batch == 8
    assert on_host.hidden == 2 * 8 * 4096 * 8192 * 2
    assert on_host.host >= 1024 * 4096 * 8192 * 2


def test_what_the_user_fixed_is_kept() -> None:
    assert plan(micro_batch=3).micro_batch == 3
    assert plan(hidden_store="host").hidden_on_host
    with pytest.raises(ConfigError, match=r"GPU memory: found 79\.2 GiB; must hold slots 21\.4"):
        plan(sequences=1024, hidden_store="device")


def test_a_small_card_is_refused_with_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"hidden states .* activations .* packing"):
        plan(device_bytes=20 * GIB)


def test_on_a_cpu_sequences_go_one_by_one() -> None:
    planned = plan(device_bytes=None)
    assert planned.micro_batch == 1
    assert not planned.hidden_on_host


def test_micro_batches_are_no_larger_than_there_are_sequences() -> None:
    assert plan(sequences=4, micro_batch=1000).micro_batch == 4


def test_many_ranks_hold_the_sums_of_all_their_tokens() -> None:
    """fp32 partial sums of 64 ranks' tokens weigh more than the rows of 8 experts."""
    dims = ParallelDims(world=64, ep=64)
    tokens = 8 * 4096
    of_one = activation_bytes(ONE.architecture, ParallelDims(), LayerType.moe, tokens, 4096)
    of_many = activation_bytes(ONE.architecture, dims, LayerType.moe, tokens, 4096)
    assert of_many > 64 * tokens * 2048 * (4 + 2) + of_one / 4


def test_evaluation_sequences_take_hidden_states_of_four_streams() -> None:
    """BF16 before and after a layer, one stream for each serving mode; flags of flushed blocks."""
    without, planned = plan(), plan(evaluated=8)
    one = 4096 * 8192 * 2
    flags = SLOTS // 2 // 16  # one byte for every 16 weights of 2 bytes
    assert without.evaluation == 0
    assert planned.evaluation == 4 * 8 * one + flags
    assert planned.peak - without.peak == planned.evaluation
    assert planned.evaluated_at_a_time == planned.micro_batch // 2 == 4
    assert plan(evaluated=16).evaluation - planned.evaluation == 4 * 8 * one


def test_evaluation_sequences_are_shared_by_the_replicas() -> None:
    job = ultra(ParallelDims(world=8, ep=8))
    wish = MemoryWish(device_bytes=H100, evaluated=12)
    sizes = {"tokens": (512, 4096), "compute_bytes": 2, "slots": SLOTS, "read_ahead": 0}
    planned = plan_memory(job, wish=wish, **sizes)  # type: ignore[arg-type]
    assert planned.evaluation == 4 * 2 * 4096 * 8192 * 2 + SLOTS // 32


def test_a_single_sequence_at_a_time_needs_room_for_its_quantized_inputs() -> None:
    single, plain = plan(micro_batch=1, evaluated=8), plan(micro_batch=1)
    assert single.evaluated_at_a_time == 1
    more = single.evaluation - plan(micro_batch=2, evaluated=8).evaluation
    assert more == pytest.approx(plain.activations / 2, rel=1e-6)


def test_the_evaluation_sends_hidden_states_to_the_host_and_stands_in_the_refusal() -> None:
    assert not plan(sequences=600).hidden_on_host
    assert plan(sequences=600, evaluated=64).hidden_on_host
    with pytest.raises(ConfigError, match=r"packing [\d.]+ \+ evaluation 1[5-9]\.\d"):
        plan(sequences=600, evaluated=64, device_bytes=40 * GIB)


def test_without_a_forward_pass_nothing_is_evaluated() -> None:
    planned = plan(sequences=0, evaluated=8)
    assert (planned.evaluation, planned.hidden, planned.activations) == (0, 0, 0)
