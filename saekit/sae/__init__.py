"""Sparse autoencoders: one class per architecture, the same for training and inference."""

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from saekit.sae.checkpoint import AnySAEConfig, build_sae, load_sae_folder
from saekit.sae.fold import Normalization
from saekit.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saekit.sae.topk import TopKConfig, TopKSAE

__all__ = [
    "SAE",
    "AnySAEConfig",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "Normalization",
    "SAEConfig",
    "SAEOutput",
    "TopKConfig",
    "TopKSAE",
    "build_sae",
    "load_sae_folder",
]
