"""One repository of the local hub: its commits, and what git and the large file storage call its files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
"""What the hub stores as large files."""


@dataclass
class HubRepo:
    """One repository: the files of each commit, and what branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """Adds files to what `ref` has; returns the commit."""
        held = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(held)}".encode()).hexdigest()
        self.commits[sha] = held
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Returns the commit that a branch, tag or commit names."""
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


def git_oid(content: bytes) -> str:
    """Returns what git calls a content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    """Returns what the hub's listing says of a file."""
    entry: dict[str, Any] = {"type": "file", "oid": git_oid(content), "size": len(content), "path": path}
    if path.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
        entry |= {
            "oid": git_oid(pointer.encode()),
            "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)},
        }
    return entry
