"""The scorers that ask a labelling model, by name."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from saekit.labelling.llmconfig import LLMConfig, LLMScorer
from saekit.labelling.negatives import sibling_features
from saekit.labelling.scoring.detection import Judge, PieceScorer
from saekit.labelling.scoring.fuzzing import Fuzzer
from saekit.labelling.scoring.intruder import IntruderJudge
from saekit.labelling.scoring.near import NUM_SIBLINGS
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.rule import HeldOut
from saekit.labelling.scoring.simulation import Simulator
from saekit.labelling.scoring.surprisal import SurprisalScorer
from saekit.sae import SAE

__all__ = ["make_scorers", "scoring_setup", "siblings_of", "without_reading"]


def siblings_of(sae: SAE, features: Sequence[int], config: LLMConfig) -> dict[int, list[int]]:
    """Returns feature -> its nearest others, from which near negatives are drawn; none where none are asked for."""
    num = min(NUM_SIBLINGS, sae.cfg.d_sae - 1)
    if config.near_share == 0 or num < 1 or not {"detection", "fuzzing"}.intersection(config.scorers):
        return {}
    return dict(zip(features, sibling_features(sae, features, num=num).tolist(), strict=True))


def scoring_setup(held_out: HeldOut, config: LLMConfig) -> str:
    """Returns a hash of what scores depend on beside label, judge and prompt: held-out documents and what is drawn of them."""
    drawn = config.num_judged, config.near_share, config.num_simulated, config.seed, config.temperature
    return hashlib.sha256(json.dumps([held_out.fingerprint, *drawn]).encode()).hexdigest()[:12]


def make_scorers(
    held_out: HeldOut, config: LLMConfig, *, siblings: Mapping[int, Sequence[int]] | None = None
) -> list[PieceScorer]:
    """Returns the scorers over held-out pieces that a config names; none where nothing is to be judged.

    Args:
        siblings: see `siblings_of`.
    """
    if config.num_judged == 0:
        return []
    table = PieceTable(held_out)
    known: dict[LLMScorer, Callable[[], PieceScorer]] = {
        "detection": lambda: Judge(table, config, siblings=siblings),
        "fuzzing": lambda: Fuzzer(table, config, siblings=siblings),
        "simulation": lambda: Simulator(table, config),
        "surprisal": lambda: SurprisalScorer(table, config),
        "intruder": lambda: IntruderJudge(table, config),
    }
    return [known[name]() for name in dict.fromkeys(config.scorers) if name in known]


def without_reading(scorers: Sequence[PieceScorer]) -> list[PieceScorer]:
    """Returns the scorers for a model that does not say how likely a text's tokens are: simulation in writing, no surprisal."""
    written = [scorer.in_writing() if isinstance(scorer, Simulator) else scorer for scorer in scorers]
    return [scorer for scorer in written if not scorer.needs_reading]
