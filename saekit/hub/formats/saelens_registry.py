"""What only SAELens' registry says of releases: facts that their files need and do not hold."""

import re

from saekit.hub.release import Release

__all__ = ["input_scale", "is_centred", "token_norm"]

_CENTRED = re.compile(r"jbloom/GPT2-Small-(SAEs|Feature-Splitting)|tommmcgrath/gpt2-small-mlp-out-saes")
_TOKEN_NORMS = {"Mistral-7B-Residual-Stream-SAEs": "constant_norm_rescale"}
# Folder of the dictionary -> what its input is multiplied by; tommmcgrath's GPT-2 MLP outputs, and one of jbloom's Gemma.
# Source: `norm_scaling_factor` in pretrained_saes.yaml of SAELens 6.54.12.
_INPUT_SCALES = {
    "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1": 1.049317316132615,
    "sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0": 2.3693984005104283,
    "sae_group_gpt2_blocks.2.hook_mlp_out_24576:v0": 1.6411934982190302,
    "sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0": 1.8958522157897557,
    "sae_group_gpt2_blocks.4.hook_mlp_out_24576:v0": 1.81673478700627,
    "sae_group_gpt2_blocks.5.hook_mlp_out_24576:v0": 1.550234472245924,
    "sae_group_gpt2_blocks.6.hook_mlp_out_24576:v0": 1.3237742807210804,
    "sae_group_gpt2_blocks.7.hook_mlp_out_24576:v0": 1.1042905114723296,
    "sae_group_gpt2_blocks.8.hook_mlp_out_24576:v1": 0.9123762783479742,
    "sae_group_gpt2_blocks.9.hook_mlp_out_24576:v0": 0.6955335635232373,
    "sae_group_gpt2_blocks.10.hook_mlp_out_24576:v0": 0.3619728926727644,
    "sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2": 0.2851548652550073,
    "gemma_2b_blocks.12.hook_resid_post_16384": 0.21381938399317255,
}


def is_centred(release: Release) -> bool:
    """Whether the release is known to be of a model with centred writing weights."""
    return _CENTRED.search(release.repo or release.ref) is not None


def token_norm(release: Release) -> str | None:
    """Returns the `normalize_activations` that replaces the config's; None where it holds."""
    place = release.repo or release.ref
    return next((norm for name, norm in _TOKEN_NORMS.items() if name in place), None)


def input_scale(release: Release) -> float | None:
    """Returns what the input is multiplied by and the reconstruction divided by; None where nothing is known."""
    # On the hub a colon separates repository and folder; these folders have one of their own too.
    parts = release.ref.split("/")
    return next((s for name, s in _INPUT_SCALES.items() if any(part.endswith(name) for part in parts)), None)
