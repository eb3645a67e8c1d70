"""Arrays on disk in the format of torch.distributed.checkpoint: each process writes its rows, anyone reads the whole.

Only its planner and storage interfaces are used. `dcp.async_save` would copy the whole state on every process, and ends before
a folder can be renamed into place; its file of metadata is a pickle, which is read here without running any of it.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from saekit.training.arrays import Rows

__all__ = ["METADATA_NAME", "RowsPlanner", "finish_arrays", "read_arrays", "write_rows"]

METADATA_NAME = ".metadata"
"""Written last; says in which file each part of each array is."""

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class RowsPlanner(SavePlanner):
    """Plans the parts of arrays that this process writes."""

    def __init__(self, arrays: Mapping[str, Rows]) -> None:
        self._arrays = {name: rows for name, rows in arrays.items() if len(rows.tensor)}

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the arrays are known."""

    def create_local_plan(self) -> SavePlan:
        """Returns an item for each array: rows start..start + n of it."""
        return SavePlan([self._item(name, rows) for name, rows in self._arrays.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Returns the plans of all processes and what is in the files."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns this process's part of the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Returns the rows of an item."""
        return self._arrays[write_item.index.fqn].tensor

    def _item(self, name: str, rows: Rows) -> WriteItem:
        shape, rest = rows.tensor.shape, rows.tensor.shape[1:]
        offsets = torch.Size([rows.start, *[0] * len(rest)])
        return WriteItem(
            index=MetadataIndex(name, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=shape),
                properties=TensorProperties(dtype=rows.tensor.dtype),
                size=torch.Size([rows.num_rows, *rest]),
            ),
        )


def write_rows(folder: Path, planner: RowsPlanner, plans: Sequence[SavePlan], rank: int) -> list[WriteResult]:
    """Writes the file of this process, and waits until it is on the disk.

    Args:
        folder: of the checkpoint.
        planner: of this process.
        plans: of all processes, in the order of their ranks.
        rank: of this process.
    """
    writer = FileSystemWriter(folder)
    whole, _ = planner.create_global_plan(list(plans))
    own = writer.prepare_global_plan(whole)[rank]
    return writer.write_data(own, planner).wait()


def finish_arrays(
    folder: Path, planner: RowsPlanner, plans: Sequence[SavePlan], results: Sequence[list[WriteResult]]
) -> None:
    """Writes what is in the files; after those of all processes, by one of them."""
    _, metadata = planner.create_global_plan(list(plans))
    FileSystemWriter(folder).finish(metadata, list(results))


def read_arrays(folder: Path) -> dict[str, Tensor]:
    """Returns the whole arrays of a checkpoint by name, however many processes wrote them; {} where it has none.

    Raises:
        Exception: anything, of a damaged file.
    """
    if not (folder / METADATA_NAME).is_file():
        return {}
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    arrays = {
        name: torch.empty(array.size, dtype=array.properties.dtype)
        for name, array in metadata.state_dict_metadata.items()
        if isinstance(array, TensorStorageMetadata)
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(arrays, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return arrays


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA_NAME).open("rb") as file:
            metadata = _Unpickler(file).load()
        assert isinstance(metadata, Metadata)
        return metadata


class _Unpickler(pickle.Unpickler):
    """Makes the classes of a checkpoint's metadata, dtypes, and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str, /) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"found {module}.{name}, needs the metadata of a checkpoint")
