"""What every figure of an evaluation means: one line each, written into the artifact beside the figures."""

from types import MappingProxyType
from typing import NamedTuple

__all__ = ["METRICS", "SITE_METRICS", "MetricInfo", "definitions", "metric_at", "metric_info"]


class MetricInfo(NamedTuple):
    """How a metric is shown and what it is."""

    title: str
    """Short name with its unit."""
    digits: int
    """Decimals in tables."""
    definition: str
    """Formula and source, one line."""


# x activation, x_hat reconstruction, e = x - x_hat, mu = mean of x over the evaluated tokens; sums run over tokens.
METRICS: MappingProxyType[str, MetricInfo] = MappingProxyType(
    {
        "fvu": MetricInfo(
            "FVU",
            4,
            "fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mu||^2, pooled over the evaluated tokens in"
            " float64, mu their mean (held fixed in resamples); 0 is perfect, 1 is what always answering mu scores",
        ),
        "fvu_massive": MetricInfo(
            "FVU, massive tokens",
            4,
            "the same quotient with the same mu over the massive-activation tokens of the held-out documents, which"
            " enter no other figure (Sun et al. 2024, arXiv 2402.17762)",
        ),
        "l0": MetricInfo(
            "L0",
            2,
            "mean number of active features a token under the inference rule (per-token top-k or stored thresholds);"
            " for PCA the number of components, for the mean vector 0",
        ),
        "dead_fraction": MetricInfo(
            "dead features",
            4,
            "share of features that fire on none of the evaluated tokens; it falls as more tokens are evaluated, and has no"
            " interval because resampling documents can only lose firings",
        ),
        "cosine_similarity": MetricInfo(
            "cosine", 4, "mean over tokens of x . x_hat / (||x|| ||x_hat||), 0 where x_hat = 0"
        ),
        "norm_ratio": MetricInfo(
            "norm ratio", 4, "shrinkage: mean over tokens of ||x_hat|| / ||x||; below 1 the reconstruction is too short"
        ),
        "relative_reconstruction_bias": MetricInfo(
            "relative bias",
            4,
            "sum ||x_hat||^2 / sum x_hat . x; 1 is unbiased, below 1 is shrinkage"
            " (Rajamanoharan et al. 2024, arXiv 2404.16014, section 4)",
        ),
        "ce": MetricInfo(
            "CE (nats)",
            4,
            "mean next-token cross-entropy of the language model with x replaced by x_hat at every ordinary position"
            " (padding, special and massive tokens keep x); a position counts if its token and the next one are"
            " held-out ordinary tokens of one document",
        ),
        "delta_ce": MetricInfo(
            "delta CE (nats)", 4, "ce - ce_clean: what the replacement costs, on the same positions"
        ),
        "ce_recovered_zero": MetricInfo(
            "CE recovered, zero ablation",
            4,
            "(ce_zero - ce) / (ce_zero - ce_clean), the same positions ablated to 0; generous, since zero is far from any"
            " activation: read it beside delta_ce and the mean row",
        ),
        "ce_recovered_mean": MetricInfo(
            "CE recovered, mean ablation", 4, "(ce_mean - ce) / (ce_mean - ce_clean), the same positions ablated to mu"
        ),
        "kl": MetricInfo(
            "KL (nats)", 4, "mean KL(clean || patched) of the next-token distributions over the positions of ce"
        ),
        "kl_recovered_zero": MetricInfo("KL recovered, zero ablation", 4, "1 - kl / kl_zero"),
        "kl_recovered_mean": MetricInfo("KL recovered, mean ablation", 4, "1 - kl / kl_mean"),
    }
)
"""Every metric of a row, in the order of the tables; the mean over hook points where a dictionary has several."""

SITE_METRICS = ("fvu", "l0", "delta_ce", "ce_recovered_zero", "ce_recovered_mean")
"""Those that are also given for each hook point, where a dictionary has several."""


def metric_at(name: str, hook_point: str) -> str:
    """Returns the name of a metric at one of several hook points."""
    return f"{name}@{hook_point}"


def metric_info(name: str) -> MetricInfo:
    """Returns what a metric is, at all hook points or at the one that its name says."""
    bare, _, hook_point = name.partition("@")
    info = METRICS[bare]
    if not hook_point:
        return info
    return MetricInfo(f"{info.title} at {hook_point}", info.digits, f"{info.definition}; at {hook_point} alone")


_OTHERS = {
    "interval": "95 % percentile interval over a bootstrap of documents: documents, not tokens, are drawn with replacement,"
    " all rows of the table on the same draws (Efron and Tibshirani 1993, chapter 13)",
    "difference": "the SAE's value minus this row's, on the same draws of documents",
    "density": "histogram of log10(firings / evaluated tokens) over the features that fire at all",
    "decoder_cosine": "histogram over features of the largest cosine between its decoder row and any other one",
    "ce_clean": "ce with nothing replaced",
    "ce_zero": "ce with 0 in place of x at the replaced positions",
    "ce_mean": "ce with mu in place of x at the replaced positions",
    "kl_zero": "kl of the zero ablation",
    "kl_mean": "kl of the mean ablation",
    "mean": "null row: answers mu, the mean of the evaluated tokens, for every token",
    "pca": "null row: projection on the first principal components of training tokens, as many as the SAE has active features",
    "linear": "null row of a transcoder: the least-squares affine map from what is read to what is predicted, fitted on training"
    " tokens; its L0 is the width of what is read",
    "random": "null row: random unit decoder, tied encoder around the training mean, the SAE's own activation rule at the same"
    " L0, one gain fitted on training tokens",
}


def definitions() -> dict[str, str]:
    """Returns name -> one-line definition for every metric, reference figure, null row and histogram."""
    return {name: metric.definition for name, metric in METRICS.items()} | _OTHERS
