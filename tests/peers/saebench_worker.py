"""Runs in SAEBench's environment, with saekit on the path: SAEBench's own evaluations of our dictionaries as `load_sae` returns them.

    python saebench_worker.py < job.json

The job is `{"saes": {name: folder}, "tokenizer": folder, "texts": folder of .jsonl, "out": folder}`. The model is a random
HookedTransformer of GPT-2's layout, put where SAEBench would load one from the hub; nothing else of SAEBench is changed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformer_lens
from sae_bench.evals.core import main as core
from sae_bench.sae_bench_utils import activation_collection, general_utils
from transformers import AutoTokenizer

from saekit.hub import load_sae

CONTEXT = 16


def random_model(tokenizer: object) -> transformer_lens.HookedTransformer:
    torch.manual_seed(0)
    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=7,
        d_model=32,
        n_ctx=64,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        d_vocab=len(tokenizer),  # type: ignore[arg-type]
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
        seed=0,
    )
    return transformer_lens.HookedTransformer(cfg, tokenizer=tokenizer)


def main() -> None:
    """Does the job of standard input and writes `results.json`."""
    job = json.load(sys.stdin)
    out = Path(job["out"])
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    tokenizer.pad_token = tokenizer.eos_token
    model = random_model(tokenizer)
    transformer_lens.HookedTransformer.from_pretrained_no_processing = lambda *_, **__: model
    saes = {name: load_sae(folder) for name, folder in job["saes"].items()}
    core.multiple_evals(
        selected_saes=list(saes.items()),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=2,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=job["texts"],
        context_size=CONTEXT,
        output_folder=str(out),
        dtype="float32",
        device="cpu",
        force_rerun=True,
    )
    results = {}
    tokens = torch.randint(2, len(tokenizer), (8, CONTEXT), generator=torch.Generator().manual_seed(1))
    for name, sae in saes.items():
        _, formatted, _ = general_utils.load_and_format_sae(name, sae, "cpu")
        found = json.loads((out / f"{name}_custom_sae_eval_results.json").read_text())
        results[name] = {
            "metrics": found["eval_result_metrics"],
            "recorded": found["sae_cfg_dict"],
            "asdict": {key: str(value) for key, value in asdict(formatted.cfg).items()},
        }
        if "hook_z" in formatted.cfg.hook_name:
            continue  # its probing takes [B, T, D] only
        acts = activation_collection.get_llm_activations(
            tokens, model, 4, formatted.cfg.hook_layer, formatted.cfg.hook_name, mask_bos_pad_eos_tokens=False
        )
        # What sparse probing and SCR train their probes on.
        meaned = activation_collection.get_sae_meaned_activations({"class": acts}, formatted, 4)
        results[name] |= {"meaned": meaned["class"].tolist(), "by_hand": sae.encode(acts).mean(dim=1).tolist()}
    (out / "results.json").write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
