"""The scorers that ask a labelling model, by name."""

from collections.abc import Callable

from saekit.labelling.llmconfig import LLMConfig, LLMScorer
from saekit.labelling.scoring.detection import Judge, PieceScorer
from saekit.labelling.scoring.fuzzing import Fuzzer
from saekit.labelling.scoring.intruder import IntruderJudge
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.rule import HeldOut

__all__ = ["make_scorers"]


def make_scorers(held_out: HeldOut, config: LLMConfig) -> list[PieceScorer]:
    """Returns the scorers over held-out pieces that a config names; none where nothing is to be judged."""
    if config.num_judged == 0:
        return []
    table = PieceTable(held_out)
    known: dict[LLMScorer, Callable[[PieceTable, LLMConfig], PieceScorer]] = {
        "detection": Judge,
        "fuzzing": Fuzzer,
        "intruder": IntruderJudge,
    }
    return [known[name](table, config) for name in dict.fromkeys(config.scorers) if name in known]
