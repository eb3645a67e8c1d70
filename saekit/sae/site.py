"""Where a dictionary reads and writes: a module of the model, its side, and what is done to the hidden states there."""

from typing import Literal

from torch import Tensor, nn

from saekit.config import Config
from saekit.errors import ConfigError

__all__ = ["Site", "parse_site"]


class Site(Config):
    """A place in a Hugging Face model, with the step between its hidden states and what the release means by its name.

    Attributes hold JSON values only, so that a site is saved with its dictionary.
    """

    path: str
    """Module path, as in `model.named_modules()`."""
    side: Literal["output", "input"] = "output"
    """Which side of the module."""
    transform: Literal["none", "centered", "without_gain", "without_gain_plus_one"] = "none"
    """`centered`: less the mean over the width (models with centred writing weights). `without_gain`: the norm's output
    before its weight and bias. `without_gain_plus_one`: the same where the norm multiplies by 1 + weight (Gemma)."""

    def __str__(self) -> str:
        """Returns the hook point: `path` or `path:input`."""
        return self.path if self.side == "output" else f"{self.path}:input"

    def values(self, hidden: Tensor, module: nn.Module) -> Tensor:
        """Returns what the dictionary reads there.

        Args:
            hidden: [..., D], the hidden states captured at this site.
            module: the module at `path`; its weight and bias are read for the kinds without gain.

        Raises:
            ConfigError: the gain is to be removed and the module has none, or one with zeros.
        """
        match self.transform:
            case "none":
                return hidden
            case "centered":
                return hidden - hidden.mean(dim=-1, keepdim=True)
            case "without_gain" | "without_gain_plus_one":
                return self._without_gain(hidden, module)

    def merged(self, values: Tensor, hidden: Tensor, module: nn.Module) -> Tensor:
        """Returns the hidden states of which `values` would be read there; the inverse of `values(...)`.

        Args:
            values: [..., D], e.g. a reconstruction.
            hidden: [..., D], what was there; its mean over the width is kept where the site leaves it out.
            module: the module at `path`.

        Raises:
            ConfigError: as `values`.
        """
        match self.transform:
            case "none":
                return values
            case "centered":
                return values + hidden.mean(dim=-1, keepdim=True)
            case "without_gain" | "without_gain_plus_one":
                gain, bias = self._gain(module)
                return values * gain if bias is None else values * gain + bias

    def _without_gain(self, hidden: Tensor, module: nn.Module) -> Tensor:
        gain, bias = self._gain(module)
        return (hidden if bias is None else hidden - bias) / gain

    def _gain(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        gain = getattr(module, "weight", None)
        if not isinstance(gain, Tensor):
            raise ConfigError(f"site {str(self)!r}: {type(module).__name__} has no weight, needs a norm with a gain")
        gain = gain.detach() + 1 if self.transform == "without_gain_plus_one" else gain.detach()
        if not bool((gain != 0).all()):
            raise ConfigError(f"site {str(self)!r}: the norm's gain has zeros, needs none to divide by")
        bias = getattr(module, "bias", None)
        return gain, None if bias is None else bias.detach()


def parse_site(hook_point: str) -> Site:
    """Returns the site that `<module path>`, `<module path>:output` or `<module path>:input` names.

    Raises:
        ConfigError: no path, or a side that is neither.
    """
    path, separator, side = hook_point.partition(":")
    if not path or (separator and side not in {"input", "output"}):
        raise ConfigError(f"hook point {hook_point!r}: needs a module path, ':input' or ':output' behind it")
    return Site(path=path, side="input" if side == "input" else "output")
