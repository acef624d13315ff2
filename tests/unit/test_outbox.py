"""Files of a layer: larger elements first, none much larger than the limit, every tensor once."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.blocks import Block
from pipeline.checkpoint.writer import RawTensor, ShardWriter
from pipeline.outbox import Outbox

CPU = torch.device("cpu")


def test_blocks_and_copies_are_split_at_the_limit(tmp_path: Path) -> None:
    blocks = [Block((f"scale{i}",), torch.float32, ()) for i in range(1)]
    blocks += [Block((f"a{i}", f"b{i}"), torch.uint8, (100,)) for i in range(5)]
    copies = {
        f"copy{i}": RawTensor("BF16", (60,), torch.full((120,), i, dtype=torch.uint8).numpy().data)
        for i in range(6)
    }
    with ShardWriter(tmp_path, threads=2) as writer:
        outbox = Outbox(writer, "layer", blocks, copies, None, CPU, limit=450)
        for number, block in enumerate(blocks):
            values = torch.full((len(block.names), *block.shape), number, dtype=block.dtype)
            outbox.send([(block, values)])
        records = [file.result() for file in outbox.finish()]
    assert [record.name for record in records] == [
        f"layer{number}.safetensors" for number in ("", "-01", "-02", "-03")
    ]
    found: dict[str, torch.Tensor] = {}
    for record in records:
        tensors = load_file(tmp_path / record.name)
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert set(found) == {*copies, *(name for block in blocks for name in block.names)}
    assert found["a3"].unique().tolist() == [4]
    assert found["copy5"].view(torch.uint8).unique().tolist() == [5]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / r.name).values()) for r in records]
    assert max(sizes) <= 2 * 450  # blocks and copies of the first file are counted apart


def test_a_layer_without_packed_tensors_has_its_copies(tmp_path: Path) -> None:
    copies = {"x": RawTensor("F32", (2,), bytes(8))}
    with ShardWriter(tmp_path, threads=1) as writer:
        (file,) = Outbox(writer, "l", [], copies, None, CPU, limit=10**9).finish()
        assert file.result().bytes == (tmp_path / "l.safetensors").stat().st_size
