"""A finished cache, opened: activations by row or by token, each with its token, document and kind."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from saekit.activations.codec import AnyArray, Codec, token_bytes
from saekit.activations.layout import (
    DOCUMENTS_NAME,
    INDEX_NAME,
    KINDS_NAME,
    STATISTICS_NAME,
    TOKENS_RECORD_NAME,
    Files,
    HookIndex,
    LocalFiles,
    PartRecord,
    file_problems,
    hook_folder,
    hook_points_of,
    read_record,
    refuse_earlier,
)
from saekit.activations.location import find_cache
from saekit.activations.reader import ShardReader
from saekit.activations.remote import Remote
from saekit.activations.rows import NORMAL, TokenTable, read_token_table
from saekit.activations.statistics import Statistics, read_statistics
from saekit.activations.stored import read_arrays
from saekit.activations.view import StoreView, split_documents
from saekit.config import config_sha256
from saekit.errors import StoreError
from saekit.manifest import Manifest, manifest_sha256, read_manifest
from saekit.models.load import LanguageModel

__all__ = ["ActivationStore", "cache_identity"]

_LOCAL = LocalFiles()


def cache_identity(manifest: Manifest) -> str:
    """Returns what every part of a cache is stamped with: the hash of its config and its inputs."""
    return config_sha256({"config": manifest.config_sha256, "inputs": dict(sorted(manifest.inputs.items()))})


class ActivationStore:
    """The activations of one hook point, read from disk on demand.

    Attributes:
        path: folder of the cache; of its small files, where its shards lie elsewhere.
        hook_point: whose activations this object reads.
        hook_points: all that the cache holds.
        d_in: width of an activation.
        num_rows: token rows.
        context_len: tokens of a row, T.
        num_tokens: num_rows * context_len, padding included; flat indices run below it.
        dtype: of the stored activations.
        config: of the cache stage, as plain values.
        statistics: over normal tokens, and the counts of the others.
    """

    def __init__(
        self, path: Path, manifest: Manifest, index: HookIndex, tokens: PartRecord, remote: Remote | None = None
    ) -> None:
        """Use `ActivationStore.open`."""
        self.path = path
        self.config = manifest.config
        self.hook_point = index.hook_point
        self.hook_points = tuple(hook_points_of(manifest))
        self.d_in = index.d_in
        self.dtype = index.dtype
        self.num_rows = tokens.counts["rows"]
        self.context_len = tokens.counts["context_len"]
        self.num_documents = tokens.counts["documents"]
        self.num_tokens = self.num_rows * self.context_len
        self.statistics: Statistics = read_statistics(hook_folder(path, index.hook_point) / STATISTICS_NAME)
        self._manifest = manifest
        self._index = index
        self._reader = ShardReader(
            hook_folder(path, index.hook_point), index.shards, context_len=self.context_len, remote=remote
        )

    @classmethod
    def open(cls, path: str | Path, hook_point: str | None = None, *, verify: bool = False) -> "ActivationStore":
        """Opens a finished cache without reading its activations.

        Args:
            path: folder, or `s3://`, `gs://` or `http(s)://` URL of it; of one elsewhere the small files are copied here first.
            hook_point: may be left out where the cache holds one only.
            verify: read every byte and compare checksums now; else presence and length of every file are checked, and
                checksums when a part is first read.

        Raises:
            StoreError: no cache, an unfinished one, one without this hook point, or files missing, truncated or changed.
            ResourceError: one elsewhere cannot be reached.
            MissingDependencyError: what reads caches elsewhere is not installed.
        """
        path, remote = find_cache(path)
        where = f"cache {str(path) if remote is None else remote.url!r}"
        if remote is not None:
            remote.pull()
        manifest = read_manifest(path)
        if manifest is None or manifest.stage != "cache":
            raise StoreError(f"{where}: no cache there, needs the output folder of the cache stage")
        refuse_earlier(path)
        if manifest.status != "complete":
            raise StoreError(f"{where}: not finished; run the cache command again to go on")
        present = hook_points_of(manifest)
        if hook_point is None:
            if len(present) > 1:
                raise StoreError(f"{where}: holds {', '.join(present)}; name one of them as hook_point")
            hook_point = present[0]
        hook_point = hook_point.removesuffix(":output")
        if hook_point not in present:
            raise StoreError(f"{where}: no activations of {hook_point!r}, it holds {', '.join(present)}")
        folder = hook_folder(path, hook_point)
        index = read_record(folder / INDEX_NAME, HookIndex)
        tokens = read_record(path / TOKENS_RECORD_NAME, PartRecord)
        if index is None or tokens is None:
            missing = folder / INDEX_NAME if index is None else path / TOKENS_RECORD_NAME
            raise StoreError(
                f"{where}: {missing.relative_to(path)} is missing; run the cache command again to repair it"
            )
        identity = cache_identity(manifest)
        for part in (tokens, index, *index.shards):
            if part.cache != identity:
                raise StoreError(f"{where}: holds parts of another cache; verify it and run the cache command again")
        # Without a list of lengths, each one is a request: then shards are looked at when they are read.
        shards = index.shards if remote is None or remote.is_listed or verify else ()
        looks: list[tuple[Path, PartRecord, Files]] = [
            (path, tokens, _LOCAL),
            (folder, index, _LOCAL),
            *((folder, shard, remote or _LOCAL) for shard in shards),
        ]
        for at, part, files in looks:
            problems = file_problems(at, part, verify=verify, files=files)
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                place = "" if at == path else f"{hook_point}: "
                remedy = "run 'saekit verify --repair' on it, then" if verify else "run"
                raise StoreError(f"{where}: {place}{problems[0]}{more}; {remedy} the cache command again to repair it")
        return cls(path, manifest, index, tokens, remote)

    @property
    def model_name(self) -> str:
        """The model as the config names it."""
        model = self.config["model"]
        assert isinstance(model, dict)
        return str(model["name"])

    @property
    def model_fingerprint(self) -> str:
        """Identity of the model that wrote the cache."""
        return self._manifest.inputs["model"]

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the cache, for the manifests of what is made from it."""
        return manifest_sha256(self.path)

    @property
    def documents_path(self) -> Path:
        """One JSON line a document, in the order of their indices: source, title, first characters, sha256, tokens."""
        return self.path / DOCUMENTS_NAME

    def check_model(self, lm: LanguageModel) -> None:
        """Checks that `lm` is the model that wrote the cache.

        Raises:
            StoreError: weights, config or dtype differ.
        """
        if lm.fingerprint != self.model_fingerprint:
            raise StoreError(
                f"cache {str(self.path)!r}: written by {self.model_name!r} with fingerprint"
                f" {self.model_fingerprint[:12]}, asked for {lm.name!r} with {lm.fingerprint[:12]};"
                " use the same model, revision and dtype, or cache anew"
            )

    @functools.cached_property
    def _table(self) -> TokenTable:
        table = read_token_table(self.path, cache=cache_identity(self._manifest))
        if table is None:
            raise StoreError(
                f"cache {str(self.path)!r}: its token rows are gone or changed; run 'saekit verify --repair' on it, then the"
                " cache command again"
            )
        return table

    @functools.cached_property
    def _kinds_and_norms(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        folder = hook_folder(self.path, self.hook_point)
        if problems := file_problems(folder, self._index, verify=True):
            raise StoreError(
                f"cache {str(self.path)!r}: {self.hook_point}: {problems[0]}; run 'saekit verify --repair' on it, then the"
                " cache command again"
            )
        kinds, norms = read_arrays(folder / KINDS_NAME, "kind", "norm")
        return kinds.astype(np.uint8, copy=False), norms.astype(np.float32, copy=False)

    def tokens(self) -> npt.NDArray[np.int32]:
        """Returns the token ids, `[R, T]`."""
        return self._table.tokens

    def documents(self) -> npt.NDArray[np.int32]:
        """Returns the document of each token, `[R, T]`; -1 for padding."""
        return self._table.documents

    def document_keys(self) -> npt.NDArray[np.uint64]:
        """Returns, for each document, the first 8 bytes of its text's sha256, `[num_documents]`: equal texts, equal keys."""
        return self._table.document_keys

    def kinds(self) -> npt.NDArray[np.uint8]:
        """Returns 0 normal, 1 padding, 2 special, 3 massive for each token, `[R, T]`."""
        return self._kinds_and_norms[0]

    def norms(self) -> npt.NDArray[np.float32]:
        """Returns the norm of each stored activation, `[R, T]`."""
        return self._kinds_and_norms[1]

    def view(self, *, kinds: Sequence[int] = (NORMAL,)) -> StoreView:
        """Returns all tokens of the given kinds."""
        return StoreView(self, np.isin(self.kinds(), kinds))

    def split(self, test_fraction: float = 0.05, *, seed: int = 0) -> tuple[StoreView, StoreView]:
        """Returns normal tokens as (train, test), with no text on both sides.

        Documents are offered to the test side in the order of a hash of their text and the seed, and taken while that
        brings it nearer to `test_fraction` of the tokens; documents of equal text stay together. Both sides get at least one.

        Raises:
            StoreError: fewer than two different documents.
            ConfigError: a fraction that is not between 0 and 1.
        """
        return split_documents(self, test_fraction=test_fraction, seed=seed)

    def read_rows(self, rows: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, T, D]` activations of rows, in any order; in the stored dtype, float32 where it is quantised.

        Raises:
            StoreError: a row outside the cache, or a file that cannot be read.
        """
        return self._reader.rows(np.asarray(rows, np.int64))

    def read_tokens(self, flat: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, D]` activations of tokens (`row * T + position`), in any order; in the stored dtype, float32 where it is quantised.

        Raises:
            StoreError: a token outside the cache, or a file that cannot be read.
        """
        return self._reader.tokens(np.asarray(flat, np.int64))

    def shard_of(self, row: int) -> int:
        """Returns the number of the shard that holds a row."""
        return next(
            shard.span.index for shard in self._index.shards if row < shard.span.first_row + shard.span.num_rows
        )

    @property
    def parts(self) -> "tuple[ActivationStore, ...]":
        """The stores whose activations lie side by side in one of this store's; itself, where there is one hook point."""
        return (self,)

    @property
    def codec(self) -> Codec:
        """How activations are stored."""
        return self._reader.codec

    @property
    def chunk_bounds(self) -> npt.NDArray[np.int64]:
        """`[chunks + 1]` flat index at which each chunk of the files begins; the same for all hook points of a cache."""
        return self._reader.bounds

    def read_chunks(self, chunks: npt.NDArray[np.int64], out: AnyArray) -> None:
        """Reads all tokens of ascending chunks into `out` `[n, width]`, one chunk after another, as they are stored.

        Raises:
            StoreError: a file that cannot be read, or has changed since it was written.
        """
        self._reader.chunks(chunks, out)

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored activation, decompressed."""
        return sum(token_bytes(store.dtype, store.d_in) for store in self.parts)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, {self.hook_point!r}, num_tokens={self.num_tokens:,}, d_in={self.d_in})"
