"""Which dictionary this is: one hash of its config and its weights."""

import hashlib

import numpy as np

from saekit.sae.base import SAE

__all__ = ["sae_sha256"]


def sae_sha256(sae: SAE, config: str) -> str:
    """Returns the sha256 of a config and of all weights by name, in float32.

    Args:
        config: the dictionary's config, in the form that the manifests of a stage have always hashed.
    """
    digest = hashlib.sha256(config.encode())
    for name, value in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).data)
    return digest.hexdigest()
