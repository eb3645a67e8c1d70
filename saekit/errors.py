"""Everything a user can cause, as one tree.

    SaekitError
    |-- ConfigError              a recipe or a config object that cannot be run
    |-- DataError                texts, documents or token rows that cannot be used
    |-- ModelError               a language model that cannot be loaded or hooked
    |   `-- HookPointError       a module path that the model does not have
    |-- StoreError               activation shards that are missing, broken or foreign
    |-- NonFiniteError           NaN or Inf where numbers are needed
    |-- FormatError              a dictionary's files that cannot be read as what they claim to be
    |-- ResourceError            disk, permission or memory
    |-- MissingDependencyError   an extra that is not installed
    `-- LabelerError             a labelling server or its answers

The command line prints one of these as a single line and exits with 2; anything else is a bug of ours.
Messages read `<where>: <what was found>, <what is needed>[; <what to do>]`.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "FormatError",
    "HookPointError",
    "LabelerError",
    "MissingDependencyError",
    "ModelError",
    "NonFiniteError",
    "ResourceError",
    "SaekitError",
    "StoreError",
]


class SaekitError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(SaekitError, ValueError):
    """A config value that is unknown, of the wrong type, or contradicts another one."""


class DataError(SaekitError, ValueError):
    """Texts or token rows that are missing, empty or cannot be decoded."""


class ModelError(SaekitError, ValueError):
    """A language model that cannot be found, loaded or used as a causal LM."""


class HookPointError(ModelError):
    """A hook point that the model does not have, or that yields no hidden states."""


class StoreError(SaekitError, ValueError):
    """An activation store that is missing, truncated, changed, or written for something else."""


class NonFiniteError(SaekitError, ValueError):
    """NaN or Inf in activations, weights or losses."""


class FormatError(SaekitError, ValueError):
    """A dictionary folder whose files do not hold what they claim."""


class ResourceError(SaekitError, OSError):
    """Not enough disk or memory, or no permission to write."""


class MissingDependencyError(SaekitError, ImportError):
    """An optional dependency that a requested feature needs."""


class LabelerError(SaekitError, RuntimeError):
    """A labelling server that cannot be used, or a budget that is spent."""
