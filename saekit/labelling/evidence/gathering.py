"""What a label folder's features do to the model's output: measured once, kept in the folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saekit.activations import StoreView
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.clamp import clamped_token_change
from saekit.labelling.evidence.effects import TokenEffects, effects_path
from saekit.labelling.evidence.sidescores import SIDE_SCORES_NAME, SideScores, input_scores, output_scores
from saekit.labelling.evidence.tokenchange import steering_contexts, steering_strengths, token_change
from saekit.labelling.evidence.vocabproj import vocab_projection
from saekit.labelling.evidence.wording import EffectsOf
from saekit.labelling.labelconfig import LabelConfig
from saekit.models import LanguageModel, find_unembedding
from saekit.progress import Progress
from saekit.sae import SAE

__all__ = ["EffectsGathering"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectsGathering:
    """What measuring needs; what is in the folder is read and not measured again."""

    sae: SAE
    train: StoreView
    lm: LanguageModel
    out: Path
    config: LabelConfig
    contexts: FeatureContexts
    features: list[int]
    progress: Progress

    def effects(self, confidence: NDArray[np.float64]) -> EffectsOf:
        """Returns feature -> its token effects, those by steering first; input and output scores are kept beside them.

        Args:
            confidence: how well token rules predict each feature [F]; the clearest are steered where not all are.
        """
        projected, changed = self._projected(), self._changed(confidence)
        self._score_sides(projected, changed[0] if changed else None)
        gathered = [*changed, *([projected] if projected is not None else [])]
        return lambda feature: [found for found in gathered if found.promoted(feature)]

    def _projected(self) -> TokenEffects | None:
        if not self.config.vocab_projection:
            return None
        path = effects_path(self.out, "vocabproj")
        if not path.exists():
            unembedding = find_unembedding(self.lm)
            width = unembedding.weight.shape[1]
            if self.sae.d_out != width:
                self.progress.say(
                    f"no vocabulary projection: decoder rows are {self.sae.d_out} wide, the residual stream is {width}"
                )
                return None
            effects = vocab_projection(
                self.sae,
                unembedding,
                features=self.features,
                num=self.config.num_effect_tokens,
                progress=self.progress,
            )
            effects.save(path)
        return TokenEffects.open(path)

    def _changed(self, confidence: NDArray[np.float64]) -> list[TokenEffects]:
        """Returns the effects of turning features up and, where that was done, those of turning them down."""
        asked = self.config.token_change
        if asked is None:
            return []
        path, path_down = effects_path(self.out, "tokenchange"), effects_path(self.out, "tokenchange_down")
        if not path.exists():
            steered = asked.features if asked.features is not None else self._clearest(confidence, asked.num_features)
            tokens = steering_contexts(self.train, config=asked)
            if asked.match == "clamp":
                up, down = clamped_token_change(
                    self.lm, self.sae, features=steered, tokens=tokens, config=asked, progress=self.progress
                )
                down.save(path_down)
            else:
                up = token_change(
                    self.lm,
                    self.sae,
                    features=steered,
                    strengths=steering_strengths(self.contexts, strength=asked.strength),
                    tokens=tokens,
                    config=asked,
                    progress=self.progress,
                )
            # Last, as it says that all is there.
            up.save(path)
        return [TokenEffects.open(found) for found in (path, path_down) if found.exists()]

    def _score_sides(self, projected: TokenEffects | None, changed: TokenEffects | None) -> None:
        """Keeps the input score of every projected feature and the output score of those that were steered."""
        path = self.out / SIDE_SCORES_NAME
        if projected is None or path.exists():
            return
        output = np.full(len(projected.features), np.nan, dtype=np.float32)
        steered = [] if changed is None else np.intersect1d(changed.features, projected.features).tolist()
        if steered:
            output[np.searchsorted(projected.features, steered)] = output_scores(
                self.lm, self.sae, projected, features=steered, progress=self.progress
            )
        tokens = self.train.store.tokens()
        SideScores(
            projected.features, input_score=input_scores(self.contexts, tokens, projected), output_score=output
        ).save(path)

    def _clearest(self, confidence: NDArray[np.float64], num: int) -> list[int]:
        """Returns the `num` labelled features whose rules predict training firings best."""
        order = np.argsort(-confidence[self.features], kind="stable")[:num]
        return sorted(self.features[int(place)] for place in order)
