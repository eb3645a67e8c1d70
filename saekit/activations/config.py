"""What to cache, from which texts, and how it is stored."""

from pydantic import Field, field_validator

from saekit.activations.codec import StoredDtype
from saekit.activations.shardfile import Compression
from saekit.config import Config
from saekit.models.hooks import parse_hook_point
from saekit.models.load import ModelConfig
from saekit.models.texts import TextConfig
from saekit.models.tokens import TokenConfig

__all__ = ["CacheConfig"]


class CacheConfig(Config):
    """One cache: a model, a text, and the places in the model to store."""

    model: ModelConfig
    """Whose activations."""
    text: TextConfig
    """On which documents."""
    tokens: TokenConfig = TokenConfig()
    """How documents become rows."""
    hook_points: tuple[str, ...] = Field(min_length=1)
    """`<module path>` for its output, `<module path>:input` for its input; all are taken in one forward."""
    num_tokens: int = Field(ge=1)
    """How many, special tokens and padding included; rounded up to whole rows. Where the text ends before, all of it."""
    dtype: StoredDtype = "bfloat16"
    """Of the stored activations. float16 has three bits more precision, but ends at 65,504: it is refused above that. `int8`
    and `float8_e4m3` take half, with a scale for each token; benchmarks/store_cpu.md has what that does to an SAE's FVU."""
    compression: Compression = "none"
    """Of the stored chunks; lossless. Smaller files, written and read at a half to a third of the speed: bfloat16 loses a fifth with
    `zstd`, `int8` four tenths. None is the default, since disks cost less than GPUs that wait; benchmarks/store_cpu.md has all of them."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences a forward. Raise it on a GPU. Part of the cache's identity: batching changes the last bits of a forward."""
    shard_tokens: int = Field(default=32_768, ge=1)
    """Tokens a shard, rounded down to whole forwards, or rows where that is less than one. Work that a kill can lose, and two shards a hook point are
    held in memory."""
    massive_factor: float = Field(default=10.0, gt=1.0)
    """A token is massive where its norm exceeds this many times the median norm."""

    @field_validator("hook_points")
    @classmethod
    def _normalise(cls, hook_points: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(str(parse_hook_point(name)) for name in hook_points)
        if len(set(names)) < len(names):
            raise ValueError("a hook point is named twice, needs each once")
        return names

    @property
    def shard_rows(self) -> int:
        """Rows a shard."""
        rows = max(1, self.shard_tokens // self.tokens.context_len)
        return rows - rows % self.batch_size if rows > self.batch_size else rows
