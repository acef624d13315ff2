"""The records that the sweep fills and the report reads: plain numbers, nothing of torch.

Every figure of a kind is a sum over its tensors (over all ranks), so kinds and layers add up.
Relative error is sqrt(squared_error / squared_weight); both sums are taken in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation.records import EvaluationReport


@dataclass(kw_only=True)
class KindReport:
    """The tensors of one role in one layer (or outside the layers) that share format and method.

    Attributes:
        role: routed_expert, shared_expert, mamba_in, ... (see `pipeline.architecture.Role`).
        format: nvfp4, fp8 or bf16.
        method: max, four_over_six, mse, ...; empty for tensors that are copied.
        tensors: Number of weights (their scales not counted).
        parameters: Number of elements.
        stored_bytes: Bytes in the output, scales included.
        squared_error: Sum of (dequantized - weight)**2; 0 for copied tensors.
        squared_weight: Sum of weight**2.
        squared_error_of_max: What squared_error would be under `max`; None where not measured.
        blocks: NVFP4 blocks of 16.
        blocks_m4: Those whose maximum was put on 4 instead of 6 (four-over-six).
        blocks_flushed: Non-zero blocks whose scale is below 2**-6 (Hopper flushes them to zero).
        zero_blocks: Blocks of sixteen zeros.
        input_amax: Largest absolute input by projection; empty without a forward pass.
        worst_tensor: Name of the tensor with the largest relative error; empty for copied ones.
        worst_relative_error: Its relative error (a ratio).
    """

    role: str
    format: str
    method: str
    tensors: int
    parameters: int
    stored_bytes: int
    squared_error: float = 0.0
    squared_weight: float = 0.0
    squared_error_of_max: float | None = None
    blocks: int = 0
    blocks_m4: int = 0
    blocks_flushed: int = 0
    zero_blocks: int = 0
    input_amax: dict[str, float] = field(default_factory=dict)
    worst_tensor: str = ""
    worst_relative_error: float = 0.0


@dataclass(kw_only=True)
class AgainstMax:
    """Squared error over what it would be under `max`, of all NVFP4 weights.

    Attributes:
        median: Over the tensors.
        worst: The largest of them.
        worst_tensor: Whose it is.
    """

    median: float
    worst: float
    worst_tensor: str


@dataclass(kw_only=True)
class LayerReport:
    """One layer: its kinds, and where its time went.

    Attributes:
        layer: Index in the model.
        layer_type: mamba, attention, moe or mlp.
        tokens: Calibration tokens that passed through it (over all ranks); 0 without a forward.
        seconds: Seconds of computing, of waiting for the source, and of waiting for the disk.
        kinds: Its tensors by role, format and method.
    """

    layer: int
    layer_type: str
    tokens: int
    seconds: dict[str, float]
    kinds: list[KindReport]


@dataclass(kw_only=True)
class ExpertCoverage:
    """Tokens that each routed expert of one layer received (they add up to tokens x top-k)."""

    layer: int
    tokens_per_expert: list[int]


@dataclass(kw_only=True)
class KVAmax:
    """Largest absolute key and value of one attention layer."""

    layer: int
    k_amax: float
    v_amax: float


@dataclass(kw_only=True)
class RunReport:
    """Everything that a finished run tells about itself.

    Attributes:
        source: Checkpoint that was read.
        output: Directory that was published.
        recipe: Name or path of the recipe.
        layers: In the model's order.
        outside: Tensors outside the layers (embedding, head, norms, MTP).
        coverage: MoE layers only; empty without a forward pass.
        kv_amax: Attention layers whose KV cache was calibrated.
        loss: BF16 next-token loss, nats per token; None without a forward pass.
        unigram_loss: Loss of token frequencies alone on the same tokens, nats per token.
        bf16_bytes: Size of all parameters in BF16.
        quantized_bytes: Tensor bytes of the output.
        predicted_bytes: What the plan said; None where there was no plan.
        effective_bits: Stored weight bits over all parameters.
        phases: Wall-clock seconds by phase of the whole run, in order.
        layout: Degrees by axis (world, tp, ep, etp, dp).
        versions: Package name to version.
        hardware: Devices in words, such as `2 x NVIDIA H100` or `CPU`.
        peak_bytes: Most device memory allocated at any time on rank 0; None on CPU.
        planned_peak_bytes: What the plan said about it.
        micro_batch: Sequences per forward call; None without a forward pass.
        warnings: What the user should read.
        audit: `passed` (bool), and whatever else the audit counted or found.
        unmatched_patterns: Patterns of the recipe that matched no module.
        against_max: How NVFP4 weights compare with `max`; None where that was not measured.
        evaluation: What quantization cost on evaluation text; None where it was not measured.
        attempts: How each attempt at the run began and ended.
    """

    source: str
    output: str
    recipe: str
    layers: list[LayerReport]
    outside: list[KindReport] = field(default_factory=list)
    coverage: list[ExpertCoverage] = field(default_factory=list)
    kv_amax: list[KVAmax] = field(default_factory=list)
    loss: float | None = None
    unigram_loss: float | None = None
    bf16_bytes: int
    quantized_bytes: int
    predicted_bytes: int | None = None
    effective_bits: float
    phases: dict[str, float] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    peak_bytes: int | None = None
    planned_peak_bytes: int | None = None
    micro_batch: int | None = None
    warnings: list[str] = field(default_factory=list)
    audit: dict[str, object] = field(default_factory=dict)
    unmatched_patterns: list[str] = field(default_factory=list)
    against_max: AgainstMax | None = None
    evaluation: EvaluationReport | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_rejected(self) -> bool:
        """Whether the checkpoint missed a gate."""
        return self.evaluation is not None and bool(self.evaluation.rejected)
