"""Sparse autoencoders: one class per architecture, the same for training and inference."""

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from saekit.sae.checkpoint import AnySAEConfig, build_sae, load_sae_folder
from saekit.sae.crosscoder import (
    BatchTopKCrosscoder,
    BatchTopKCrosscoderConfig,
    Crosscoder,
    ReLUCrosscoder,
    ReLUCrosscoderConfig,
    TopKCrosscoder,
    TopKCrosscoderConfig,
)
from saekit.sae.dictionary import Dictionary, DictionaryConfig
from saekit.sae.fold import Normalization, PairNormalization, SiteNormalization
from saekit.sae.gated import GatedConfig, GatedSAE
from saekit.sae.jumprelu import JumpReLUConfig, JumpReLUSAE
from saekit.sae.lorsa import LorsaConfig, LorsaDictionary
from saekit.sae.matryoshka import (
    MatryoshkaBatchTopKConfig,
    MatryoshkaBatchTopKSAE,
    MatryoshkaTopKConfig,
    MatryoshkaTopKSAE,
)
from saekit.sae.mlsae import MLSAE, MLSAEConfig
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.relu import ReLUConfig, ReLUSAE
from saekit.sae.site import Site
from saekit.sae.sites import SitesConfig, SitesSAE
from saekit.sae.temporal import TemporalConfig, TemporalDictionary
from saekit.sae.topk import TopKConfig, TopKSAE
from saekit.sae.transcoder import Transcoder, TranscoderConfig

__all__ = [
    "MLSAE",
    "SAE",
    "AnySAEConfig",
    "BatchTopKConfig",
    "BatchTopKCrosscoder",
    "BatchTopKCrosscoderConfig",
    "BatchTopKSAE",
    "Crosscoder",
    "Dictionary",
    "DictionaryConfig",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "LorsaConfig",
    "LorsaDictionary",
    "MLSAEConfig",
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaTopKConfig",
    "MatryoshkaTopKSAE",
    "MultiLayerConfig",
    "MultiLayerDictionary",
    "Normalization",
    "PairNormalization",
    "ReLUConfig",
    "ReLUCrosscoder",
    "ReLUCrosscoderConfig",
    "ReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "Site",
    "SiteNormalization",
    "SitesConfig",
    "SitesSAE",
    "TemporalConfig",
    "TemporalDictionary",
    "TopKConfig",
    "TopKCrosscoder",
    "TopKCrosscoderConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "build_sae",
    "load_sae_folder",
]
