"""How tokens meet the experts of other ranks, and in which rows they stand before their own.

In: this rank's tokens and the experts they chose. Out: the tokens of all ranks that share experts,
each rank's rows sorted by expert, and the sums over the ranks.

Every rank of the group gets all tokens of the group once, computes its own experts, and the partial
sums are added up: (n - 1) * 3 units of traffic for each rank of a group of n, one unit being its
tokens in bf16 (the sums travel in fp32). Sending each token to each of its experts and back would
be 2 * top_k * (n - 1) / n units and an exchange of counts that the host has to wait for: less only
from n = 2/3 top_k on, which is 15 for Nemotron 3 Ultra. Groups within one host are smaller.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from pipeline.mcore.kernels.grouped_mm import RowGroups, group_rows


class Exchange:
    """Collectives over the ranks that together hold all experts; one rank alone needs none.

    Each returns at once with a handle; on CUDA the transfer runs beside what is computed until
    `wait`. All ranks of the group must have the same number of tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size()

    def gather(self, tokens: torch.Tensor) -> Pending:
        """[tokens, ...] of every rank, one after the other: [size * tokens, ...]."""
        if self.size == 1:
            return Pending(tokens)
        gathered = tokens.new_empty(self.size * tokens.shape[0], *tokens.shape[1:])
        work = dist.all_gather_into_tensor(
            gathered, tokens.contiguous(), group=self.group, async_op=True
        )
        return Pending(gathered, work)

    def sum_to_owners(self, partial: torch.Tensor) -> Pending:
        """Sums over the ranks, of this rank's tokens: [size * tokens, ...] to [tokens, ...].

        With one rank it is the tensor itself.
        """
        if self.size == 1:
            return Pending(partial)
        own = partial.new_empty(partial.shape[0] // self.size, *partial.shape[1:])
        work = dist.reduce_scatter_tensor(own, partial, group=self.group, async_op=True)
        return Pending(own, work)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor that a collective is perhaps still writing.

    Attributes:
        tensor: Not to be read before `wait`.
        work: The collective, or None where there was none to do.
    """

    tensor: torch.Tensor
    work: dist.Work | None = None

    def wait(self) -> torch.Tensor:
        """The tensor; on CUDA, only what is launched from now on waits for it."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """Rows sorted by local expert, and by token within an expert.

    Attributes:
        position_TK: Row of each (token, choice), int32; -1 where the expert is another rank's.
        groups: How the rows divide among the local experts.
    """

    position_TK: torch.Tensor
    groups: RowGroups


def sort_by_expert(chosen_TK: torch.Tensor, first: int, local: int, *, holds_all: bool) -> RowOrder:
    """Orders the (token, choice) pairs of the experts `first` to `first + local - 1`.

    Args:
        chosen_TK: Experts of each token, int32, each at most once in a token.
        first: First local expert.
        local: How many experts are local.
        holds_all: Whether all experts are local. Otherwise the host reads how many rows there are:
            the one time that it waits for the device.
    """
    assert local < 2**15
    pairs = chosen_TK.numel()
    is_local = (chosen_TK >= first) & (chosen_TK < first + local)
    # Two bytes: half the passes of a radix sort.
    expert = torch.where(is_local, chosen_TK - first, local).flatten().to(torch.int16)
    ordered, pair = expert.sort(stable=True)
    bounds = torch.arange(local + 1, dtype=torch.int16, device=expert.device)
    offsets = torch.searchsorted(ordered, bounds)
    rows = pairs if holds_all else int(offsets[-1])
    position = torch.full((pairs,), -1, dtype=torch.int32, device=expert.device)
    row = torch.arange(rows, dtype=torch.int32, device=expert.device)
    position.scatter_(0, pair[:rows], row)
    return RowOrder(position.view_as(chosen_TK), group_rows(offsets, rows))
