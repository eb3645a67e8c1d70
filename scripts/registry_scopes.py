"""Rules of the scopes: every layer of a model, often at several widths; and sets for circuit tracing."""

from scripts.registry_rules import Group, Release, release

__all__ = ["circuit_tracer", "gemma_scope", "gemma_scope_2", "llama_scope", "qwen_scope"]

_HUGGING_FACE = {"2b": "google/gemma-2-2b", "9b": "google/gemma-2-9b", "27b": "google/gemma-2-27b"}


def gemma_scope() -> list[Release]:
    """Gemma Scope 1: `layer_12/width_16k/average_l0_82`; the L0s are listed by the hub."""
    sites = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z", "transcoders": "mlp"}
    # Repository -> width -> layers.
    widths = {
        "2b-pt-res": {"16k,65k": "0-25", "32k,131k,262k,524k": "12", "1m": "5,12,19"},
        "2b-pt-mlp": {"16k,65k": "0-25"},
        "2b-pt-att": {"16k,65k": "0-25"},
        "2b-pt-transcoders": {"16k": "0-25"},
        "9b-pt-res": {"16k,131k": "0-41", "32k,65k,262k,524k": "20", "1m": "9,20,31"},
        "9b-pt-mlp": {"16k,131k": "0-41"},
        "9b-pt-att": {"16k,131k": "0-41"},
        "9b-it-res": {"16k,131k": "9,20,31"},
        "27b-pt-res": {"131k": "10,22,34"},
    }
    releases = []
    for tail, by_width in widths.items():
        size, tuning, suffix = tail.split("-")
        shared: Group = {"site": sites[suffix], "below": "average_l0_*"}
        groups = [
            {**shared, "path": "layer_{layer}/width_{width}", "layer": layers, "width": width}
            for width, layers in by_width.items()
        ]
        if suffix == "res" and tuning == "pt" and size != "27b":
            groups.append({**shared, "site": "embed", "path": "embedding/width_{width}", "width": "4k"})
        releases.append(
            release(
                f"gemma-scope-{tail}",
                "gemma-scope",
                f"google/gemma-scope-{tail}",
                _HUGGING_FACE[size] + ("-it" if tuning == "it" else ""),
                groups,
                kind="transcoder" if suffix == "transcoders" else "sae",
            )
        )
    return releases


def gemma_scope_2() -> list[Release]:
    """Gemma Scope 2: four layers at every width and L0, and every layer (`_all`) at two."""
    last_layer = {"270m": 17, "1b": 25, "4b": 33, "12b": 47, "27b": 61}
    chosen = {"270m": "5,9,12,15", "1b": "7,13,17,22", "4b": "9,17,22,29", "12b": "12,24,31,41", "27b": "16,31,40,53"}
    releases = []
    for size, last in last_layer.items():
        for tuning in ("pt", "it"):
            groups: list[Group] = []
            for site in ("resid_post", "mlp_out", "attn_out", "transcoder"):
                # What the large base model is known to have.
                few, every = _gemma_scope_2_has(size, tuning, site)
                if few:
                    groups += _gemma_scope_2_groups(site, chosen[size], "16k,65k,262k", "small,medium,big")
                    groups += _gemma_scope_2_extras(size, site, chosen[size])
                if every:
                    groups += _gemma_scope_2_groups(f"{site}_all", f"0-{last}", "16k,262k", "small,big")
            if (size, tuning) == ("270m", "pt"):
                for layer, width, l0 in (("9", "16k", "small"), ("15", "262k", "big")):
                    groups.append(_gemma_scope_2_groups("transcoder", layer, width, l0)[1])
            for group in groups:
                missing = _GEMMA_SCOPE_2_HOLES.get((size, str(group["path"]).split("/")[0]))
                if missing and "affine" not in str(group["path"]):
                    group["except"] = missing
            groups += [
                {"site": "mlp", "kind": "clt", "path": "clt", "below": "width_*_l0_*"},
                {"site": "resid_post", "kind": "crosscoder", "path": "crosscoder", "below": "layer_*_width_*_l0_*"},
            ]
            model = f"google/gemma-3-{size}" + ("" if (size, tuning) == ("270m", "pt") else f"-{tuning}")
            name = f"gemma-scope-2-{size}-{tuning}"
            releases.append(release(name, "gemma-scope-2", f"google/{name}", model, groups))
    return releases


_GEMMA_SCOPE_2_HOLES = {
    ("27b", "transcoder_all"): [
        f"transcoder_all/layer_{layer}_width_16k_l0_{l0}"
        for layer, l0 in ((4, "big"), (4, "small"), (5, "small"), (43, "big"), (43, "small"))
    ]
}


def _gemma_scope_2_has(size: str, tuning: str, site: str) -> tuple[bool, bool]:
    """Whether the few chosen layers, and whether every layer, are known to be there."""
    if (size, tuning) == ("27b", "pt"):
        return site == "resid_post", site in {"resid_post", "transcoder"}
    return (size, tuning, site) != ("270m", "pt", "transcoder"), True


def _gemma_scope_2_groups(folder: str, layers: str, widths: str, l0: str) -> list[Group]:
    site = folder.removesuffix("_all")
    kind = "transcoder" if site == "transcoder" else "sae"
    shared: Group = {"site": "mlp" if kind == "transcoder" else site, "kind": kind}
    path = f"{folder}/layer_{{layer}}_width_{{width}}_l0_{{l0}}"
    tails = ("", "_affine") if kind == "transcoder" else ("",)
    return [{**shared, "path": path + tail, "layer": layers, "width": widths, "l0": l0} for tail in tails]


def _gemma_scope_2_extras(size: str, site: str, layers: str) -> list[Group]:
    if site == "resid_post":
        seed: Group = {"width": "262k", "l0": "medium", "tail": "_seed_1"}
        extras: list[Group] = [{"width": "1m", "l0": "small,medium,big"}, seed]
    elif site == "mlp_out" and size == "1b":
        extras = [{"width": "1m", "l0": "small,medium,big"}]
    else:
        return []
    path = f"{site}/layer_{{layer}}_width_{{width}}_l0_{{l0}}"
    return [
        {"site": site, "kind": "sae", "path": path + str(extra.pop("tail", "")), "layer": layers, **extra}
        for extra in extras
    ]


def llama_scope() -> list[Release]:
    """Llama Scope, one repository a site and width; and what was trained on a distilled model and on Qwen3."""
    sites = {"R": "resid_post", "A": "attn_out", "M": "mlp_out", "TC": "mlp"}
    releases = []
    for letter, site in sites.items():
        for factor, width in ((8, "32k"), (32, "131k")):
            group: Group = {
                "site": site,
                "as": "layer_{layer}",
                "path": f"Llama3_1-8B-Base-L{{layer}}{letter}-{factor}x",
                "layer": "0-31",
                "width": width,
            }
            releases.append(
                release(
                    f"llama-scope-lx{letter.lower()}-{factor}x",
                    "llama-scope",
                    f"fnlp/Llama3_1-8B-Base-LX{letter}-{factor}x",
                    "meta-llama/Llama-3.1-8B",
                    [group],
                    kind="transcoder" if letter == "TC" else "sae",
                )
            )
    mixtures = ("800M-Slimpajama-0", "400M-Slimpajama-400M", "0-Slimpajama-800M")
    releases.append(
        release(
            "llama-scope-r1-distill",
            "llama-scope",
            "fnlp/Llama-Scope-R1-Distill",
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            [
                {"site": "resid_post", "path": f"{mixture}-OpenR1-Math-220k/L{{layer}}R", "layer": "0-31"}
                for mixture in mixtures
            ],
        )
    )
    groups: list[Group] = [
        {"site": "mlp", "path": f"transcoder/{factor}x/k{{l0}}", "l0": "64,128,256", "below": "layer*"}
        for factor in (8, 32)
    ]
    releases.append(
        release(
            "llama-scope-2-qwen3-1.7b",
            "llama-scope",
            "OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B",
            "Qwen/Qwen3-1.7B",
            groups,
            kind="transcoder",
        )
    )
    return releases


def qwen_scope() -> list[Release]:
    """Qwen-Scope: width and k in the repository's name, one file a layer."""
    # Model -> layers, widths with their k.
    models = {
        "Qwen3-1.7B-Base": (28, ("32K-50", "32K-100")),
        "Qwen3-8B-Base": (36, ("64K-50", "64K-100")),
        "Qwen3-30B-A3B-Base": (48, ("32K-50", "128K-100")),
        "Qwen3.5-2B-Base": (24, ("32K-50", "32K-100")),
        "Qwen3.5-9B-Base": (32, ("64K-50", "64K-100")),
        "Qwen3.5-27B": (64, ("80K-50", "80K-100")),
        "Qwen3.5-35B-A3B-Base": (40, ("32K-50", "128K-100")),
    }
    releases = []
    for model, (layers, sizes) in models.items():
        for size in sizes:
            width, k = size.split("-")
            repo = f"SAE-Res-{model}-W{width}-L0_{k}"
            group: Group = {
                "site": "resid_post",
                "as": "layer_{layer}",
                "path": "layer{layer}.sae.pt",
                "layer": f"0-{layers - 1}",
                "width": {"128K": "131k"}.get(width, width.lower()),
                "l0": k,
            }
            name = f"qwen-scope-{model.lower()}-w{width.lower()}-l{k}"
            releases.append(release(name, "qwen-scope", f"Qwen/{repo}", f"Qwen/{model}", [group]))
    return releases


def circuit_tracer() -> list[Release]:
    """Sets for circuit tracing: one file a layer, or one cross-layer transcoder a repository."""
    layers = {"0.6b-lowl0": 28, "1.7b-lowl0": 28, "4b": 36, "8b": 36, "14b": 40, "14b-lowl0": 40}
    releases = []
    for tail, num in layers.items():
        size, _, low = tail.partition("-")
        repo = f"qwen3-{size}-transcoders" + (f"-{low}" if low else "")
        group: Group = {
            "site": "mlp",
            "as": "layer_{layer}",
            "path": "layer_{layer}.safetensors",
            "layer": f"0-{num - 1}",
        }
        model = f"Qwen/Qwen3-{size.upper()}"
        releases.append(release(repo, "circuit-tracer", f"mwhanna/{repo}", model, [group], kind="transcoder"))
    others = (
        ("transcoder-llama-3.2-1b", "mntss/transcoder-Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "transcoder"),
        ("clt-llama-3.2-1b-524k", "mntss/clt-llama-3.2-1b-524k", "meta-llama/Llama-3.2-1B", "clt"),
        ("clt-gemma-2-2b-426k", "mntss/clt-gemma-2-2b-426k", "google/gemma-2-2b", "clt"),
        ("clt-gemma-2-2b-2.5m", "mntss/clt-gemma-2-2b-2.5M", "google/gemma-2-2b", "clt"),
        (
            "crv-llama-3.1-8b-instruct",
            "facebook/crv-8b-instruct-transcoders",
            "meta-llama/Llama-3.1-8B-Instruct",
            "transcoder",
        ),
    )
    releases += [
        release(name, "circuit-tracer", repo, model, [{"site": "mlp", "path": "", "below": "*"}], kind=kind)
        for name, repo, model, kind in others
    ]
    return releases
