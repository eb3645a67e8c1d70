"""Sparse autoencoders: one class per architecture, the same for training and inference."""

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from saekit.sae.checkpoint import AnySAEConfig, build_sae, load_sae_folder
from saekit.sae.dictionary import Dictionary, DictionaryConfig
from saekit.sae.fold import Normalization, PairNormalization
from saekit.sae.gated import GatedConfig, GatedSAE
from saekit.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saekit.sae.lorsa import LorsaConfig, LorsaDictionary
from saekit.sae.matryoshka import (
    MatryoshkaBatchTopKConfig,
    MatryoshkaBatchTopKSAE,
    MatryoshkaTopKConfig,
    MatryoshkaTopKSAE,
)
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.relu import ReLUConfig, ReLUSAE
from saekit.sae.site import Site
from saekit.sae.temporal import TemporalConfig, TemporalDictionary
from saekit.sae.topk import TopKConfig, TopKSAE
from saekit.sae.transcoder import Transcoder, TranscoderConfig

__all__ = [
    "SAE",
    "AnySAEConfig",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "Dictionary",
    "DictionaryConfig",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "LorsaConfig",
    "LorsaDictionary",
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaTopKConfig",
    "MatryoshkaTopKSAE",
    "MultiLayerConfig",
    "MultiLayerDictionary",
    "Normalization",
    "PairNormalization",
    "ReLUConfig",
    "ReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "Site",
    "TemporalConfig",
    "TemporalDictionary",
    "TopKConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "build_sae",
    "load_sae_folder",
]
