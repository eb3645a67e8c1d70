"""The ring of a recipe on named hardware: its segments, its disk, and whether filling it or training on it binds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from saekit.activations.plan import duration_text
from saekit.activations.ring import RingSizes
from saekit_pipelines.ringing import most_tokens, ring_sizes

if TYPE_CHECKING:
    from saekit_pipelines.recipe import Recipe

__all__ = ["RingStage", "plan_ring_stage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RingStage:
    """Filling a ring and training on it, planned."""

    sizes: RingSizes
    """Of its segments."""
    num_tokens: int
    """Of the longest training."""
    fill_hours: float
    """Of all forwards, by the processes that fill the ring."""
    train_hours: float
    """Still to be spent, of all SAEs."""
    has_own_devices: bool
    """Whether the ring is filled on devices beside those of the training."""

    @property
    def hours(self) -> float:
        """The longer of both at the same time; on one device, one after the other."""
        if not self.train_hours:
            return 0.0
        return max(self.fill_hours, self.train_hours) if self.has_own_devices else self.fill_hours + self.train_hours

    @property
    def bottleneck(self) -> str:
        """What takes longer."""
        return "filling" if self.fill_hours > self.train_hours else "training"

    def __str__(self) -> str:
        where = "on devices of its own" if self.has_own_devices else "on a device of the training, which waits for it"
        return (
            f"{self.sizes.summary(self.num_tokens)}; filling takes {duration_text(self.fill_hours * 3600)} {where}, training"
            f" {duration_text(self.train_hours * 3600)}: {self.bottleneck} binds"
        )

    def to_json(self) -> dict[str, object]:
        """Returns the plan as JSON values."""
        return {**asdict(self), "hours": self.hours, "bottleneck": self.bottleneck}


def plan_ring_stage(
    recipe: "Recipe",
    widths: Mapping[str, int],
    *,
    kept_bytes: int,
    fill_tokens_per_second: float,
    train_hours: float,
) -> RingStage:
    """Returns the plan of a recipe's ring.

    Args:
        recipe: that has a ring.
        widths: hook point -> width of its activations.
        kept_bytes: of the cache that stays.
        fill_tokens_per_second: of one process that fills it.
        train_hours: of all SAEs.

    Raises:
        ConfigError: the budget is too small; the least that works is named.
    """
    assert recipe.ring is not None
    devices = recipe.ring.devices
    num_tokens = most_tokens(recipe)
    return RingStage(
        sizes=ring_sizes(recipe, widths, kept_bytes),
        num_tokens=num_tokens,
        fill_hours=num_tokens / (fill_tokens_per_second * max(1, len(devices))) / 3600,
        train_hours=train_hours,
        has_own_devices=bool(devices),
    )
