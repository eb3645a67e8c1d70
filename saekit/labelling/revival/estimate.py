"""What a revive run would try and ask, before anything is sent."""

from dataclasses import dataclass, replace

import numpy as np

from saekit.labelling.estimate import LLMEstimate, estimate_requests, token_counter
from saekit.labelling.ledger import LEDGER_NAME, Ledger
from saekit.labelling.llm import stand_in
from saekit.labelling.revival.stage import RevivalStage
from saekit.labelling.revival.writing import ProbeWriter

__all__ = ["RevivalEstimate", "estimate_questions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RevivalEstimate:
    """Nothing is sent to find out."""

    num_features: int
    """That would be tried."""
    num_probes: int
    """Sentences, those to be written by the labelling model and the random ones included."""
    writing: LLMEstimate | None
    """Labels of the output side and sentences; None without a labelling model among the sources."""
    relabelling: LLMEstimate | None
    """If every feature fired, on texts as long as those of other features; None without a labelling model."""

    def __str__(self) -> str:
        if not self.num_features:
            return "nothing to try, no feature is as rare as revive.max_firings"
        parts = [f"{self.num_features:,} features, {self.num_probes:,} sentences through the model"]
        parts += [f"sentences: {self.writing}"] if self.writing is not None else []
        parts += [f"new labels if all of them fire: {self.relabelling}"] if self.relabelling is not None else []
        return "; ".join(parts)


def estimate_questions(stage: RevivalStage) -> RevivalEstimate:
    """Returns what a run would take; answers that its ledger has cost nothing."""
    config, own = stage.label.llm, stage.config
    num_probes = len(stage.local_probes()) + own.num_controls if stage.features else 0
    writing = relabelling = None
    if config is not None:
        path = stage.out / LEDGER_NAME
        ledger = Ledger(path) if path.exists() else None
        count = token_counter(stage.lm.tokenizer)
        try:
            if "llm" in stage.sources:
                explainer, writer = stage.output_explainer(config), ProbeWriter(config, num=own.num_written)
                asked = [feature for feature in stage.features if explainer.has_evidence(feature)]
                num_probes += own.num_written * len(asked)
                known = {label.feature: label for label in stage.labels.records if label.labeler == explainer.labeler}
                requests = [explainer.request(feature) for feature in asked]
                requests += [
                    writer.request(known.get(f, stand_in(f, explainer.labeler)), stage.words(f)) for f in asked
                ]
                writing = estimate_requests(requests, config, count=count, ledger=ledger)
            live = np.flatnonzero(stage.contexts.firing_count > own.max_firings)
            # The texts that would wake them are not known yet: those of other features stand for them.
            likes = np.resize(live, len(stage.features)).tolist() if len(live) else []
            requests = []
            for kind in config.explainers:
                if kind != "concat":
                    explainer = stage.explainer(config, kind, stage.train.store, stage.contexts)
                    shown = likes if kind in {"input", "raw"} else stage.features
                    # One that stands for several counts as many.
                    requests += [
                        replace(explainer.request(feature), seed=place)
                        for place, feature in enumerate(shown)
                        if explainer.has_evidence(feature)
                    ]
            relabelling = estimate_requests(requests, config, count=count, ledger=None)
        finally:
            if ledger is not None:
                ledger.close()
    return RevivalEstimate(
        num_features=len(stage.features), num_probes=num_probes, writing=writing, relabelling=relabelling
    )
