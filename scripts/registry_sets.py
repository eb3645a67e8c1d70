"""Rules of smaller sets: sparsify, dictionary_learning, SAELens' own format, single dictionaries."""

from scripts.registry_rules import Group, Release, release

__all__ = ["dictionary_learning", "eleuther", "others", "saelens"]


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
            release(f"eleuther-{repo.lower()}", "sparsify", f"EleutherAI/{repo}", model, [group], kind=kind)
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
    return release(name, "dictionary-learning", repo, model, groups)


def saelens() -> list[Release]:
    """Releases in SAELens' own format."""
    gpt2, pythia = "openai-community/gpt2", "EleutherAI/pythia-70m-deduped"
    releases = [
        release(
            "gpt2-small-res-jb",
            "saelens",
            "jbloom/GPT2-Small-SAEs-Reformatted",
            gpt2,
            [
                {"site": "resid_pre", "path": "blocks.{layer}.hook_resid_pre", "layer": "0-11", "width": "24576"},
                {"site": "resid_post", "path": "blocks.{layer}.hook_resid_post", "layer": "11", "width": "24576"},
            ],
        ),
        release(
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
        release(
            "gpt2-small-mlp-tm",
            "saelens",
            "tommmcgrath/gpt2-small-mlp-out-saes",
            gpt2,
            [{"site": "mlp_out", "path": "", "below": "sae_group_gpt2_blocks.*", "width": "24576"}],
        ),
        release(
            "mistral-7b-res-wg",
            "saelens",
            "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
            "mistralai/Mistral-7B-v0.1",
            [{"site": "resid_pre", "as": "layer_{layer}", "path": "mistral_7b_layer_{layer}", "layer": "8,16,24"}],
        ),
        release(
            "llama-3-8b-it-res-jh",
            "saelens",
            "Juliushanhanhan/llama-3-8b-it-res",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            [{"site": "resid_post", "path": "blocks.{layer}.hook_resid_post", "layer": "25"}],
        ),
        release(
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
        release(
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
            releases.append(release(f"gpt2-small-{tail}-v5-{width}", "saelens", repo, gpt2, [group]))
    for tail in ("sce", "scefr", "scl", "sle", "slefr", "sll"):
        group = {"site": "resid_pre", "as": "layer_{layer}", "path": f"{{layer}}-res_{tail}-ajt", "layer": "2,6,10"}
        releases.append(
            release(f"gpt2-small-res_{tail}-ajt", "saelens", f"neuronpedia/gpt2-small__res_{tail}-ajt", gpt2, [group])
        )
    for tail, site in (("att", "attn_out"), ("mlp", "mlp_out"), ("res", "resid_post")):
        groups: list[Group] = [{"site": site, "as": "layer_{layer}", "path": f"{{layer}}-{tail}-sm", "layer": "0-5"}]
        if tail == "res":
            groups.append({"site": "embed", "path": "e-res-sm"})
        repo = f"ctigges/pythia-70m-deduped__{tail}-sm_processed"
        releases.append(release(f"pythia-70m-deduped-{tail}-sm", "saelens", repo, pythia, groups))
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
        releases.append(release(f"{name}-res-matryoshka-dc", "saelens", repo, model, groups))
    return releases


def others() -> list[Release]:
    """Single dictionaries and small sets."""
    llama = "meta-llama/Llama-3.1-8B"
    return [
        release(
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
        release(
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
        release(
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
        release(
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
        release(
            "gpt2-small-hook-z-kk",
            "kissane",
            "ckkissane/attn-saes-gpt2-small-all-layers",
            "openai-community/gpt2",
            [{"site": "attn_z", "path": "", "below": "gpt2-small_L*_Hcat_z_*.pt"}],
        ),
        release(
            "gpt2-transcoders-dunefsky",
            "dunefsky",
            "pchlenski/gpt2-transcoders",
            "openai-community/gpt2",
            [{"site": "mlp", "path": "", "below": "*"}],
            kind="transcoder",
        ),
        release(
            "temporal-gemma-2-2b",
            "temporal",
            "canrager/temporalSAEs",
            "google/gemma-2-2b",
            [{"site": "resid_post", "as": "layer_{layer}", "path": "gemma-2-2B/layer_{layer}/temporal", "layer": "12"}],
        ),
        release(
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
        release(
            "bytedance-clt",
            "bytedance",
            "ByteDance-Seed/Cross-Layer-TopK-CLT",
            None,
            [{"site": "mlp", "path": "", "below": "*"}],
            kind="clt",
        ),
    ]
