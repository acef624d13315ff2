import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.safetensors_file import from_bytes, read_header
from pipeline.checkpoint.slices import Scratch, cut_of, pieces_of, read_piece, read_shard
from pipeline.checkpoint.writer import write_safetensors
from pipeline.errors import SourceError
from pipeline.sharding import Shard

SHARDS = {
    "whole": Shard(-1, (), (6, 40, 3)),
    "first dim, two ranges": Shard(0, ((4, 6), (0, 1)), (3, 40, 3)),
    "second dim": Shard(1, ((10, 30),), (6, 20, 3)),
    "second dim, ranges out of order": Shard(1, ((30, 40), (0, 3), (5, 6)), (6, 14, 3)),
    "third dim": Shard(2, ((1, 2),), (6, 40, 1)),
    "nothing of the first dim": Shard(0, ((2, 2),), (0, 40, 3)),
    "nothing of one range": Shard(1, ((2, 2), (0, 4)), (6, 4, 3)),
}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("piece_bytes", [2, 7, 240, 500, 1 << 20])
def test_pieces_of_any_size_make_up_the_shard(tmp_path: Path, name: str, piece_bytes: int) -> None:
    tensor = torch.arange(6 * 40 * 3, dtype=torch.int16).reshape(6, 40, 3)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(5), "t": tensor})
    info, shard = read_header(tmp_path / "x.safetensors")["t"], SHARDS[name]
    cut = cut_of(info, shard)
    pieces = list(pieces_of(cut, piece_bytes))
    assert all(piece.nbytes <= piece_bytes for piece in pieces)
    flat, scratch = torch.full([cut.nbytes], 0xEE, dtype=torch.uint8), Scratch()
    descriptor = os.open(info.path, os.O_RDONLY)
    for piece in reversed(pieces):  # threads finish them in any order
        read_piece(descriptor, cut, piece, flat.numpy(), scratch)
    os.close(descriptor)
    wanted = tensor
    if not shard.is_whole:
        parts = [tensor.narrow(shard.dim, a, b - a) for a, b in shard.ranges]
        wanted = torch.cat(parts, dim=shard.dim)
    assert torch.equal(from_bytes(flat, info.dtype, cut.shape), wanted)


def test_small_runs_come_with_their_rows_and_large_ones_alone(tmp_path: Path) -> None:
    tensors = {"narrow": torch.zeros(64, 1000), "wide": torch.zeros(2, 300_000)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    infos = read_header(tmp_path / "x.safetensors")
    narrow = list(pieces_of(cut_of(infos["narrow"], Shard(1, ((0, 500),), (64, 500)))))
    assert [(piece.rows, piece.nbytes) for piece in narrow] == [(64, 64 * 4000)]
    wide = list(pieces_of(cut_of(infos["wide"], Shard(1, ((0, 150_000),), (2, 150_000)))))
    assert [(piece.rows, piece.nbytes) for piece in wide] == [(0, 600_000)] * 2


def test_unreadable_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"t": torch.zeros(5)})
    info = read_header(tmp_path / "x.safetensors")["t"]
    descriptor = os.open(tmp_path, os.O_RDONLY)  # reading a directory fails
    with pytest.raises(SourceError, match=r"x.safetensors: t: found Is a directory; must be read"):
        read_shard(descriptor, info, None)
    os.close(descriptor)
