"""A made-up source: the same model under every layout, and all that a checkpoint offers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, expected_tensors
from pipeline.checkpoint import synthetic
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES, as_bytes
from pipeline.checkpoint.source import Source, open_source
from pipeline.checkpoint.source_check import check_source
from pipeline.checkpoint.synthetic import SyntheticSource, random_token_ids
from pipeline.errors import SourceError
from pipeline.job import estimate_stored
from pipeline.sharding import ParallelDims, Shard, shard_of
from tests.unit.checkpoint.tiny import tiny_config, write_source

CPU = torch.device("cpu")
# Every degree cuts something: heads and groups by tp, experts by ep and etp.
CONFIG = tiny_config(mamba_num_heads=4, n_groups=2, num_attention_heads=4, num_key_value_heads=2)
BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}
LAYOUTS = [
    ParallelDims(world=4, tp=2, ep=2),
    ParallelDims(world=4, tp=4, ep=1, etp=2),
    ParallelDims(world=2, tp=1, ep=1, etp=2),
]
UP = "backbone.layers.1.mixer.experts.{}.up_proj.weight"
IN = "backbone.layers.0.mixer.in_proj.weight"


def make(seed: int = 0, **changes: Any) -> SyntheticSource:
    config = CONFIG | changes
    stored = estimate_stored(Architecture.from_hf_config(config))
    return SyntheticSource("tiny", config, stored, seed=seed, device=CPU)


def cut(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    if shard.is_whole:
        return whole
    parts = [whole.narrow(shard.dim, start, stop - start) for start, stop in shard.ranges]
    return torch.cat(parts, dim=shard.dim)


@pytest.mark.parametrize("dims", LAYOUTS, ids=lambda dims: dims.describe())
def test_every_shard_is_a_part_of_the_whole(dims: ParallelDims) -> None:
    config = BIASES | ({"mamba_num_heads": 4, "n_groups": 4} if dims.tp == 4 else {})
    source = make(**config)
    architecture = Architecture.from_hf_config(source.config)
    cuts = 0
    for spec in expected_tensors(architecture):
        whole = source.read(spec.name)
        for rank in range(dims.world):
            shard = shard_of(spec, architecture, dims, rank)
            if shard is not None:
                assert torch.equal(source.read(spec.name, shard), cut(whole, shard)), spec.name
                cuts += not shard.is_whole
    assert cuts


def test_stacked_experts_are_filled_as_if_one_by_one() -> None:
    source, experts = make(), range(2)
    apart = [source.read(UP.format(e)) for e in experts]
    stack = torch.empty(2, *apart[0].shape, dtype=torch.bfloat16)
    source.fill_all((UP.format(e), None, stack[e]) for e in experts)
    assert torch.equal(stack, torch.stack(apart))
    backwards = torch.empty_like(stack)
    source.fill_all((UP.format(e), None, backwards[1 - e]) for e in experts)
    assert torch.equal(backwards.flip(0), stack)
    wide = torch.empty(2, apart[0].shape[0], 3 * apart[0].shape[1])[..., : apart[0].shape[1]]
    source.fill_all((UP.format(e), None, wide[e]) for e in experts)
    assert torch.equal(wide, stack.float())


def test_a_stack_is_filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fill_normal = synthetic.fill_normal

    def count(target: torch.Tensor, keys: list[Any], *args: Any, **kwargs: Any) -> None:
        calls.append(len(keys))
        fill_normal(target, keys, *args, **kwargs)

    monkeypatch.setattr(synthetic, "fill_normal", count)
    source = make(n_routed_experts=8)
    shape = source.info(UP.format(0)).shape
    up, down = (torch.empty(8, *shape, dtype=torch.bfloat16) for _ in range(2))
    down = down.transpose(1, 2).contiguous()
    fillings = []
    for e in range(8):  # in the order of a layer's tensors
        fillings.append((UP.format(e), None, up[e]))
        fillings.append((UP.format(e).replace("up_", "down_"), None, down[e]))
    source.fill_all(fillings)
    assert calls == [8, 8]


def test_dtypes_are_those_that_a_plan_assumes() -> None:
    source = make()
    for name, info in source.tensors.items():
        assert source.read(name).dtype is TORCH_DTYPES[info.dtype], name
        assert source.read(name).isfinite().all(), name
    assert source.read("backbone.layers.1.mixer.gate.weight").dtype is torch.float32


def test_names_and_seeds_give_other_weights() -> None:
    source = make()
    assert not torch.equal(source.read(UP.format(0)), source.read(UP.format(1)))
    assert not torch.equal(source.read(UP.format(0)), make(seed=1).read(UP.format(0)))
    assert torch.equal(source.read(UP.format(0)), make().read(UP.format(0)))


def test_scales_keep_a_deep_model_alive() -> None:
    source = make(hidden_size=1024, vocab_size=1024, moe_latent_size=512)

    def size(name: str) -> float:
        return source.read(name).float().std().item()

    residual = (2 * 12) ** -0.5
    layer = "backbone.layers.{}.mixer.{}.weight"
    assert size("backbone.embeddings.weight") == pytest.approx(1.0, rel=0.1)
    for name, expected in (
        (IN, 1024**-0.5),
        (layer.format(1, "gate"), 1024**-0.5),
        (layer.format(0, "out_proj"), 128**-0.5 * residual),
        (layer.format(3, "o_proj"), 128**-0.5 * residual),
        (layer.format(1, "fc2_latent_proj"), 512**-0.5 * residual),
        (layer.format(1, "shared_experts.down_proj"), 64**-0.5 * residual),
        (layer.format(6, "down_proj"), 64**-0.5 * residual),
        (layer.format(1, "experts.0.down_proj"), 64**-0.5),
        (layer.format(0, "conv1d"), 4**-0.5),
    ):
        assert size(name) == pytest.approx(expected, rel=0.25), name
    without = make(moe_latent_size=None)
    down = without.read(layer.format(1, "experts.0.down_proj")).float()
    assert down.std().item() == pytest.approx(64**-0.5 * residual, rel=0.25)


def test_state_space_parameters_are_sensible() -> None:
    source = make(mamba_num_heads=256, mamba_head_dim=8)
    prefix = "backbone.layers.0.mixer"
    a = source.read(f"{prefix}.A_log").float().exp()
    assert 0.98 < a.min() < 2
    assert 15 < a.max() < 16.2
    step = torch.nn.functional.softplus(source.read(f"{prefix}.dt_bias").float())
    assert 0.9e-3 < step.min() < 2e-3
    assert 0.07 < step.max() < 0.11
    for name in (f"{prefix}.D", f"{prefix}.norm.weight", "backbone.norm_f.weight"):
        values = source.read(name).float()
        assert (values - 1).abs().max() < 0.6, name
        assert values.std() == pytest.approx(0.1, rel=0.3), name


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 24])
def test_copies_are_the_bytes_of_the_tensor(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "CHUNK_BYTES", chunk_bytes)
    source = make()
    for name in (IN, "mtp.layers.1.mixer.gate.weight", "backbone.layers.0.mixer.conv1d.weight"):
        check_copy(source, name)
    check_copy(source, "backbone.norm_f.weight")


def check_copy(source: SyntheticSource, name: str) -> None:
    copy, tensor = source.copy_of(name), source.read(name)
    assert TORCH_DTYPES[copy.dtype] is tensor.dtype
    assert copy.shape == tuple(tensor.shape)
    assert copy.nbytes == tensor.nbytes
    assert b"".join(bytes(chunk) for chunk in copy.chunks()) == bytes(as_bytes(tensor))


def test_a_checkpoint_of_it_is_the_same_source(tmp_path: Path) -> None:
    made = make()
    tensors = {name: made.read(name) for name in made.tensors}
    opened = open_source(write_source(tmp_path, made.config, tensors))
    check_source(opened, Architecture.from_hf_config(made.config))
    sources: list[Source] = [made, opened]
    for source in sources:
        assert source.config == made.config
        assert set(source.tensors) == set(made.tensors)
        for name, tensor in tensors.items():
            info = source.info(name)
            assert (info.name, TORCH_DTYPES[info.dtype]) == (name, tensor.dtype)
            assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
            assert source.copy_of(name).nbytes == tensor.nbytes
            assert torch.equal(source.read(name), tensor)
        source.close()
    assert made.small_files == {}
    assert (made.location, opened.location) == ("synthetic tiny (seed 0)", str(tmp_path))


def test_the_digest_tells_models_apart() -> None:
    assert make().digest() == make().digest()
    others = [make(seed=1), make(vocab_size=128), make(routed_scaling_factor=2.0)]
    assert len({source.digest() for source in (make(), *others)}) == 4


def test_what_it_does_not_hold_is_refused() -> None:
    source = make()
    with pytest.raises(SourceError, match=r"synthetic tiny \(seed 0\): nothing: found no such"):
        source.read("nothing")
    rows, columns = source.info(IN).shape
    for shard in (
        Shard(0, ((0, rows + 1),), (rows + 1, columns)),
        Shard(0, ((0, 4),), (5, columns)),
        Shard(2, ((0, 4),), (rows, columns)),
        Shard(-1, (), (rows, columns - 1)),
    ):
        with pytest.raises(SourceError, match="must fit into it"):
            source.read(IN, shard)


def test_a_quantized_model_s_config_serves_as_a_shape() -> None:
    assert "quantization_config" not in make(quantization_config={"quant_algo": "NVFP4"}).config


def test_token_ids_are_uniform_and_follow_the_seed() -> None:
    ids = random_token_ids(1000, 64, 512, seed=0)
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (64, 512))
    assert (int(ids.min()), int(ids.max())) == (0, 999)
    assert ids.double().mean().item() == pytest.approx(499.5, rel=0.01)
    assert torch.equal(ids, random_token_ids(1000, 64, 512, seed=0))
    assert not torch.equal(ids, random_token_ids(1000, 64, 512, seed=1))
