"""Sparse autoencoders: one class per architecture, the same for training and inference."""

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from saekit.sae.checkpoint import AnySAEConfig, build_sae, load_sae_folder
from saekit.sae.dictionary import Dictionary, DictionaryConfig
from saekit.sae.fold import Normalization
from saekit.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.site import Site
from saekit.sae.temporal import TemporalConfig, TemporalDictionary
from saekit.sae.topk import TopKConfig, TopKSAE

__all__ = [
    "SAE",
    "AnySAEConfig",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "Dictionary",
    "DictionaryConfig",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "MultiLayerConfig",
    "MultiLayerDictionary",
    "Normalization",
    "SAEConfig",
    "SAEOutput",
    "Site",
    "TemporalConfig",
    "TemporalDictionary",
    "TopKConfig",
    "TopKSAE",
    "build_sae",
    "load_sae_folder",
]
