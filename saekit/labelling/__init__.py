"""Labels for features: contexts and token effects as evidence, rules or a language model as labelers, honest scores."""

from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, Ask, ChatClient, ChatReply, ChatRequest
from saekit.labelling.collect import collect_contexts, collect_contexts_part
from saekit.labelling.collector import ContextConfig
from saekit.labelling.compare import LabelComparison, compare_labels
from saekit.labelling.contexts import CodeSample, Context, FeatureContexts
from saekit.labelling.estimate import LLMEstimate
from saekit.labelling.evidence.clamp import clamped_token_change
from saekit.labelling.evidence.effects import TokenEffects, effects_path
from saekit.labelling.evidence.sidescores import SideScores, input_scores, output_scores
from saekit.labelling.evidence.steering import MatchedPush, SteeredContexts, match_kl
from saekit.labelling.evidence.tokenchange import TokenChangeConfig, steering_contexts, steering_strengths, token_change
from saekit.labelling.evidence.vocabproj import vocab_projection
from saekit.labelling.label import CONTEXTS_FOLDER, estimate_labels, label_features
from saekit.labelling.labelconfig import LabelConfig
from saekit.labelling.ledger import Ledger
from saekit.labelling.llmconfig import BatchConfig, LLMConfig
from saekit.labelling.negatives import near_negatives, sibling_features
from saekit.labelling.records import Label, Score
from saekit.labelling.revival.config import ReviveConfig
from saekit.labelling.revival.estimate import RevivalEstimate
from saekit.labelling.revival.firing import firing_rule
from saekit.labelling.revival.record import Revival
from saekit.labelling.revival.revive import estimate_revival, read_revivals, revive_features
from saekit.labelling.rules import Clause, Rule
from saekit.labelling.score import estimate_scores, score_labels
from saekit.labelling.scoring.embedding import Embed, EmbeddingConfig
from saekit.labelling.scoring.rule import RuleScoringConfig, score_rules
from saekit.labelling.store import read_controls, read_labels, read_scores

__all__ = [
    "CONTEXTS_FOLDER",
    "Answer",
    "Ask",
    "BatchConfig",
    "ChatClient",
    "ChatReply",
    "ChatRequest",
    "Clause",
    "CodeSample",
    "Context",
    "ContextConfig",
    "Embed",
    "EmbeddingConfig",
    "FeatureContexts",
    "LLMConfig",
    "LLMEstimate",
    "Label",
    "LabelComparison",
    "LabelConfig",
    "LabellingModel",
    "Ledger",
    "MatchedPush",
    "Revival",
    "RevivalEstimate",
    "ReviveConfig",
    "Rule",
    "RuleScoringConfig",
    "Score",
    "SideScores",
    "SteeredContexts",
    "TokenChangeConfig",
    "TokenEffects",
    "ask_in_rounds",
    "clamped_token_change",
    "collect_contexts",
    "collect_contexts_part",
    "compare_labels",
    "effects_path",
    "estimate_labels",
    "estimate_revival",
    "estimate_scores",
    "firing_rule",
    "input_scores",
    "label_features",
    "match_kl",
    "near_negatives",
    "output_scores",
    "read_controls",
    "read_labels",
    "read_revivals",
    "read_scores",
    "revive_features",
    "score_labels",
    "score_rules",
    "sibling_features",
    "steering_contexts",
    "steering_strengths",
    "token_change",
    "vocab_projection",
]
