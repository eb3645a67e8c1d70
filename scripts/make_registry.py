"""Writes saekit/hub/registry.json, the known releases, from one rule per family.

    .venv/bin/python scripts/make_registry.py

A rule says what a family's repositories are called and what their folders are made of. Layers, widths and names were
counted from the release list of SAELens 6.54.12; repositories that it does not list are those that public code loads. Where
a folder's name holds a figure that no rule gives, such as the L0 of Gemma Scope 1, the rule ends above it (`below` says
what is there) and the hub is asked at run time.
"""

import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "saekit" / "hub" / "registry.json"

Group = dict[str, object]
Release = dict[str, object]

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
            _release(
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
            releases.append(_release(name, "gemma-scope-2", f"google/{name}", model, groups))
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
                _release(
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
        _release(
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
        _release(
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
            releases.append(_release(name, "qwen-scope", f"Qwen/{repo}", f"Qwen/{model}", [group]))
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
        releases.append(_release(repo, "circuit-tracer", f"mwhanna/{repo}", model, [group], kind="transcoder"))
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
        _release(name, "circuit-tracer", repo, model, [{"site": "mlp", "path": "", "below": "*"}], kind=kind)
        for name, repo, model, kind in others
    ]
    return releases


def eleuther() -> list[Release]:
    """EleutherAI's sparsify releases: one folder a module, which the hub lists."""
    models = {
        "sae-llama-3-8b-32x": "meta-llama/Meta-Llama-3-8B",
        "sae-llama-3-8b-32x-v2": "meta-llama/Meta-Llama-3-8B",
        "sae-Llama-3.2-1B-131k": "meta-llama/Llama-3.2-1B",
        "sae-pythia-160m-deduped-32k": "EleutherAI/pythia-160m-deduped",
        "sae-pythia-410m-65k": "EleutherAI/pythia-410m",
        "sae-DeepSeek-R1-Distill-Qwen-1.5B-65k": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "skip-transcoder-Llama-3.2-1B-131k": "meta-llama/Llama-3.2-1B",
        "skip-transcoder-SmolLM2-135M-128x": "HuggingFaceTB/SmolLM2-135M",
        "skip-transcoder-DeepSeek-R1-Distill-Qwen-1.5B-65k": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    }
    releases = []
    for repo, model in models.items():
        is_transcoder = repo.startswith("skip-transcoder")
        group: Group = {"site": "mlp" if is_transcoder else "any", "path": "", "below": "layers.*"}
        width = repo.rpartition("-")[2]
        if width in {"32k", "65k", "131k"}:
            group["width"] = width
        kind = "transcoder" if is_transcoder else "sae"
        releases.append(
            _release(f"eleuther-{repo.lower()}", "sparsify", f"EleutherAI/{repo}", model, [group], kind=kind)
        )
    return releases


def dictionary_learning() -> list[Release]:
    """Releases of dictionary_learning, whose trainers the hub lists."""
    releases = []
    gemma = "google/gemma-2-2b"
    for power in (12, 14, 16):
        groups: list[Group] = [
            {
                "site": "resid_post",
                "path": f"gemma-2-2b_{arch}_width-2pow{power}_date-1109/resid_post_layer_{{layer}}{tail}",
                "layer": "5,12,19",
            }
            for arch in ("topk", "vanilla")
            for tail in (("", "_checkpoints") if power < 16 else ("",))
        ]
        repo = f"saebench_gemma-2-2b_width-2pow{power}_date-1109"
        releases.append(_trainers(repo, f"canrager/{repo}", gemma, groups, width=str(2**power)))
    matryoshka = {
        12: ("adamkarvonen", "0108", "MatryoshkaBatchTopK_gemma-2-2b__0108"),
        14: ("canrager", "0107", "gemma-2-2b_matryoshka_batch_top_k_width-2pow14_date-0107"),
        16: ("canrager", "0107", "gemma-2-2b_matryoshka_batch_top_k_width-2pow16_date-0107"),
    }
    for power, (owner, date, folder) in matryoshka.items():
        repo = f"saebench_gemma-2-2b_width-2pow{power}_date-{date}"
        groups = [{"site": "resid_post", "path": f"{folder}/resid_post_layer_{{layer}}", "layer": "12"}]
        releases.append(_trainers(repo, f"{owner}/{repo}", gemma, groups, width=str(2**power)))
    sweeps = ("gated_ctx128_0730", "panneal_ctx128_0730", "standard_ctx128_0712", "topk_ctx128_0730")
    groups = [
        {"site": "resid_post", "path": f"pythia70m_sweep_{sweep}/resid_post_layer_{{layer}}", "layer": "3,4"}
        for sweep in sweeps
    ]
    releases.append(_trainers("saebench-pythia-70m", "canrager/lm_sae", "EleutherAI/pythia-70m-deduped", groups))
    andyrdt = {
        "llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", "3,7,11,15,19,23,27"),
        "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", "3,7,11,15,19,23,27"),
        "gpt-oss-20b": ("openai/gpt-oss-20b", "3,7,11,15,19,23"),
    }
    for tail, (model, layers) in andyrdt.items():
        groups = [{"site": "resid_post", "path": "resid_post_layer_{layer}", "layer": layers}]
        releases.append(_trainers(f"andyrdt-{tail}", f"andyrdt/saes-{tail}", model, groups))
    return releases


def _trainers(name: str, repo: str, model: str, groups: list[Group], width: str | None = None) -> Release:
    for group in groups:
        group["below"] = "trainer_*"
        if width is not None:
            group["width"] = width
    return _release(name, "dictionary-learning", repo, model, groups)


def saelens() -> list[Release]:
    """Releases in SAELens' own format."""
    gpt2, pythia = "openai-community/gpt2", "EleutherAI/pythia-70m-deduped"
    releases = [
        _release(
            "gpt2-small-res-jb",
            "saelens",
            "jbloom/GPT2-Small-SAEs-Reformatted",
            gpt2,
            [
                {"site": "resid_pre", "path": "blocks.{layer}.hook_resid_pre", "layer": "0-11", "width": "24576"},
                {"site": "resid_post", "path": "blocks.{layer}.hook_resid_post", "layer": "11", "width": "24576"},
            ],
        ),
        _release(
            "gpt2-small-res-jb-feature-splitting",
            "saelens",
            "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
            gpt2,
            [
                {
                    "site": "resid_pre",
                    "path": "blocks.{layer}.hook_resid_pre_{width}",
                    "layer": "8",
                    "width": "768,1536,3072,6144,12288,24576,49152,98304",
                }
            ],
        ),
        _release(
            "gpt2-small-mlp-tm",
            "saelens",
            "tommmcgrath/gpt2-small-mlp-out-saes",
            gpt2,
            [{"site": "mlp_out", "path": "", "below": "sae_group_gpt2_blocks.*", "width": "24576"}],
        ),
        _release(
            "mistral-7b-res-wg",
            "saelens",
            "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
            "mistralai/Mistral-7B-v0.1",
            [{"site": "resid_pre", "as": "layer_{layer}", "path": "mistral_7b_layer_{layer}", "layer": "8,16,24"}],
        ),
        _release(
            "llama-3-8b-it-res-jh",
            "saelens",
            "Juliushanhanhan/llama-3-8b-it-res",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            [{"site": "resid_post", "path": "blocks.{layer}.hook_resid_post", "layer": "25"}],
        ),
        _release(
            "gemma-2b-res-jb",
            "saelens",
            "jbloom/Gemma-2b-Residual-Stream-SAEs",
            "google/gemma-2b",
            [
                {
                    "site": "resid_post",
                    "path": f"gemma_2b_blocks.{{layer}}.hook_resid_post_16384{tail}",
                    "layer": layers,
                    "width": "16k",
                }
                for layers, tail in (("0", "_anthropic"), ("6", "_anthropic_fast_lr"), ("10,12,17", ""))
            ],
        ),
        _release(
            "gemma-2b-it-res-jb",
            "saelens",
            "jbloom/Gemma-2b-IT-Residual-Stream-SAEs",
            "google/gemma-2b-it",
            [
                {
                    "site": "resid_post",
                    "path": "gemma_2b_it_blocks.{layer}.hook_resid_post_16384",
                    "layer": "12",
                    "width": "16k",
                }
            ],
        ),
    ]
    for width in ("32k", "128k"):
        for tail, site in (
            ("attn-out", "attn_out"),
            ("mlp-out", "mlp_out"),
            ("resid-mid", "resid_mid"),
            ("resid-post", "resid_post"),
        ):
            end = ".pt" if (width, site) == ("32k", "resid_post") else ""
            group: Group = {
                "site": site,
                "as": "layer_{layer}",
                "path": f"v5_{width}_layer_{{layer}}{end}",
                "layer": "0-11",
                "width": {"128k": "131k"}.get(width, width),
                "l0": "32",
            }
            repo = f"jbloom/GPT2-Small-OAI-v5-{width}-{tail}-SAEs"
            releases.append(_release(f"gpt2-small-{tail}-v5-{width}", "saelens", repo, gpt2, [group]))
    for tail in ("sce", "scefr", "scl", "sle", "slefr", "sll"):
        group = {"site": "resid_pre", "as": "layer_{layer}", "path": f"{{layer}}-res_{tail}-ajt", "layer": "2,6,10"}
        releases.append(
            _release(f"gpt2-small-res_{tail}-ajt", "saelens", f"neuronpedia/gpt2-small__res_{tail}-ajt", gpt2, [group])
        )
    for tail, site in (("att", "attn_out"), ("mlp", "mlp_out"), ("res", "resid_post")):
        groups: list[Group] = [{"site": site, "as": "layer_{layer}", "path": f"{{layer}}-{tail}-sm", "layer": "0-5"}]
        if tail == "res":
            groups.append({"site": "embed", "path": "e-res-sm"})
        repo = f"ctigges/pythia-70m-deduped__{tail}-sm_processed"
        releases.append(_release(f"pythia-70m-deduped-{tail}-sm", "saelens", repo, pythia, groups))
    chanind = (
        ("gemma-2-2b", "google/gemma-2-2b", "w-32k-l0-40", ("standard/", "snap/"), 24),
        ("gemma-2-9b", "google/gemma-2-9b", "w-32k-l0-60", ("",), 40),
        ("gemma-3-1b", "google/gemma-3-1b-pt", "w-32k-l0-40", ("",), 24),
    )
    for name, model, tail, folders, last in chanind:
        groups = [
            {
                "site": "resid_post",
                "path": f"{folder}blocks.{{layer}}.hook_resid_post",
                "layer": f"0-{last}",
                "width": "32k",
                "l0": tail.rpartition("-")[2],
            }
            for folder in folders
        ]
        repo = f"chanind/{name}-batch-topk-matryoshka-saes-{tail}"
        releases.append(_release(f"{name}-res-matryoshka-dc", "saelens", repo, model, groups))
    return releases


def others() -> list[Release]:
    """Single dictionaries and small sets."""
    llama = "meta-llama/Llama-3.1-8B"
    return [
        _release(
            "goodfire-llama-3.1-8b-instruct",
            "goodfire",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            f"{llama}-Instruct",
            [
                {
                    "site": "resid_post",
                    "as": "layer_{layer}",
                    "path": "Llama-3.1-8B-Instruct-SAE-l{layer}.pth",
                    "layer": "19",
                }
            ],
        ),
        _release(
            "goodfire-llama-3.3-70b-instruct",
            "goodfire",
            "Goodfire/Llama-3.3-70B-Instruct-SAE-l50",
            "meta-llama/Llama-3.3-70B-Instruct",
            [
                {
                    "site": "resid_post",
                    "as": "layer_{layer}",
                    "path": "Llama-3.3-70B-Instruct-SAE-l{layer}.pt",
                    "layer": "50",
                }
            ],
        ),
        _release(
            "goodfire-gpt-oss-20b",
            "goodfire",
            "Goodfire/Hackathon-gpt-oss-20b-SAE-l15",
            "openai/gpt-oss-20b",
            [
                {
                    "site": "resid_post",
                    "as": "layer_{layer}",
                    "path": "topk_sae_l{layer}_exp16_k32.pt",
                    "layer": "15",
                    "l0": "32",
                }
            ],
        ),
        _release(
            "deepseek-r1-distill-llama-8b-qresearch",
            "deepseek",
            "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            [
                {
                    "site": "resid_post",
                    "as": "layer_{layer}",
                    "path": "DeepSeek-R1-Distill-Llama-8B-SAE-l{layer}.pt",
                    "layer": "19",
                }
            ],
        ),
        _release(
            "gpt2-small-hook-z-kk",
            "kissane",
            "ckkissane/attn-saes-gpt2-small-all-layers",
            "openai-community/gpt2",
            [{"site": "attn_z", "path": "", "below": "gpt2-small_L*_Hcat_z_*.pt"}],
        ),
        _release(
            "gpt2-transcoders-dunefsky",
            "dunefsky",
            "pchlenski/gpt2-transcoders",
            "openai-community/gpt2",
            [{"site": "mlp", "path": "", "below": "*"}],
            kind="transcoder",
        ),
        _release(
            "temporal-gemma-2-2b",
            "temporal",
            "canrager/temporalSAEs",
            "google/gemma-2-2b",
            [{"site": "resid_post", "as": "layer_{layer}", "path": "gemma-2-2B/layer_{layer}/temporal", "layer": "12"}],
        ),
        _release(
            "temporal-llama-3.1-8b",
            "temporal",
            "canrager/temporalSAEs",
            llama,
            [
                {
                    "site": "resid_post",
                    "as": "layer_{layer}",
                    "path": "llama-3.1-8B/layer_{layer}/temporal",
                    "layer": "15,26",
                }
            ],
        ),
        _release(
            "bytedance-clt",
            "bytedance",
            "ByteDance-Seed/Cross-Layer-TopK-CLT",
            None,
            [{"site": "mlp", "path": "", "below": "*"}],
            kind="clt",
        ),
    ]


def _release(
    name: str, family: str, repo: str, model: str | None, groups: list[Group], *, kind: str = "sae"
) -> Release:
    filled = [{"kind": kind, **group} for group in groups]
    return {"name": name, "family": family, "repo": repo, "model": model, "groups": filled}


def registry_text() -> str:
    """Returns the file's content: one release a line."""
    releases = [
        *gemma_scope(),
        *gemma_scope_2(),
        *llama_scope(),
        *qwen_scope(),
        *circuit_tracer(),
        *eleuther(),
        *dictionary_learning(),
        *saelens(),
        *others(),
    ]
    lines = ",\n".join(json.dumps(release, ensure_ascii=True) for release in releases)
    return f'{{"version": 1, "releases": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    TARGET.write_text(registry_text(), encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
