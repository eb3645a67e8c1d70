"""What became of one feature that was tried."""

from typing import Literal

from pydantic import Field

from saekit.config import Config

__all__ = ["Revival"]


class Revival(Config):
    """One feature that the corpus did not make fire, and the sentences it was tried on."""

    feature: int
    """Index of the feature in the dictionary."""
    status: Literal["revived", "silent", "no_probes"]
    """`revived`: it fired on at least one of its sentences; `no_probes`: there was nothing to build sentences from."""
    reason: str | None = None
    """Why it is not revived, or why a revived one has no new label by one of the labelers."""
    firings_before: int = 0
    """Training tokens on which it fires."""
    promoted: tuple[str, ...] = ()
    """Tokens that the sentences were built from."""
    tried: int = 0
    """Its sentences."""
    fired: int = 0
    """Those of them on which it fires."""
    tried_by_source: dict[str, int] = Field(default_factory=dict)
    """Source -> sentences."""
    fired_by_source: dict[str, int] = Field(default_factory=dict)
    """Source -> sentences on which it fires."""
    controls: int = 0
    """Random pieces of the corpus that it was tried on."""
    controls_fired: int = 0
    """Those of them on which it fires: the base rate."""
    p_value: float | None = None
    """One-sided, of as many or more of its sentences firing if they were no better than the random pieces (Fisher's test)."""
    max_act: float = 0.0
    """Its largest activation on its sentences."""
    nearest: float | None = None
    """Its pre-activation where that comes nearest to `bar` or passes it by most; None for kinds that have no such bar."""
    bar: float | None = None
    """What a pre-activation has to pass at that place, see `firing_rule`."""
    relabelled: tuple[str, ...] = ()
    """Labelers whose new label is in the folder."""
