"""Activations on disk: written once from a model, opened, split, verified, and read in mixed batches."""

from saekit.activations.collect import cache_activations
from saekit.activations.config import CacheConfig
from saekit.activations.joined import JoinedStore, PairedStore
from saekit.activations.mixing import Mixing, measure_mixing
from saekit.activations.plan import CachePlan, plan_cache
from saekit.activations.ring import HeldOut, Ring, RingConfig, plan_ring
from saekit.activations.ringbatches import RingView
from saekit.activations.rows import MASSIVE, NORMAL, PADDING, SPECIAL
from saekit.activations.shuffle import ShuffledBatches
from saekit.activations.source import ActivationSource
from saekit.activations.statistics import Statistics
from saekit.activations.store import ActivationStore
from saekit.activations.verify import verify_store
from saekit.activations.view import StoreView

__all__ = [
    "MASSIVE",
    "NORMAL",
    "PADDING",
    "SPECIAL",
    "ActivationSource",
    "ActivationStore",
    "CacheConfig",
    "CachePlan",
    "HeldOut",
    "JoinedStore",
    "Mixing",
    "PairedStore",
    "Ring",
    "RingConfig",
    "RingView",
    "ShuffledBatches",
    "Statistics",
    "StoreView",
    "cache_activations",
    "measure_mixing",
    "plan_cache",
    "plan_ring",
    "verify_store",
]
