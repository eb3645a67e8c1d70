"""One library's own labelling and scoring of a planted world, for scripts/bench_autointerp; runs in that library's environment.

    python bench_autointerp_worker.py LIBRARY JOB_JSON

The job has `world` (.npz of tokens, documents, acts, features), `words`, `out` (a folder), `url` (of an OpenAI-compatible server), and
`concurrency`. The last line of its output is JSON: `shown` and `judged` (per feature, flat indices of the tokens of the contexts that
the explainer and the judge saw, positives only), per scorer `figures` by feature, how many texts were left `unanswered`,
and when the library's own work `ended`, by this machine's clock.
"""

import asyncio
import importlib
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

GRAM = 6


class World:
    """Rows of words, of which each planted feature fires on one."""

    def __init__(self, job: dict[str, Any]) -> None:
        arrays = np.load(job["world"])
        self.tokens, self.documents = arrays["tokens"], arrays["documents"]
        self.acts, self.features = arrays["acts"], arrays["features"]
        self.words: list[str] = job["words"]
        self.flat = self.tokens.reshape(-1)
        self._places = {tuple(self.flat[at : at + GRAM].tolist()): at for at in range(len(self.flat) - GRAM + 1)}

    def place(self, tokens: Any) -> int | None:
        """Returns where these tokens stand: so many words in a row come only once."""
        return self._places.get(tuple(int(token) for token in tokens[:GRAM]))

    def decode(self, ids: Any) -> str:
        """Returns the text of some tokens."""
        return "".join(self.words[int(token)] for token in ids)

    def dense(self) -> torch.Tensor:
        """Returns all activations [R, T, F]."""
        is_own = self.tokens[..., None] == self.features
        return torch.from_numpy(np.where(is_own, self.acts[..., None], np.float32(0)))


class Tokenizer:
    """As much of a tokenizer as the libraries use."""

    bos_token_id = eos_token_id = pad_token_id = None
    all_special_ids = ()

    def __init__(self, world: World) -> None:
        self._world = world
        self._ids = {word: number for number, word in enumerate(world.words)}

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self._ids.get(part, 0) for part in re.findall(r" ?\w+|[^\w\s]", text)]}

    def decode(self, ids: Any, **_: object) -> str:
        """Returns the text."""
        return self._world.decode(ids)

    def batch_decode(self, ids: Any, **_: object) -> list[str]:
        """Returns the text of each."""
        return [self._world.decode(np.atleast_1d(np.asarray(one))) for one in ids]


def delphi(job: dict[str, Any], world: World) -> dict[str, Any]:
    """delphi's `process_cache` over a cache that its own classes wrote, at its defaults; only the server's address is changed."""
    from scripts.bench_delphi import without_vllm

    without_vllm()
    command: Any = importlib.import_module("delphi.__main__")
    config: Any = importlib.import_module("delphi.config")
    latent: Any = importlib.import_module("delphi.latents")

    out, tokenizer = Path(job["out"]), Tokenizer(world)
    latents, explanations, scores = (out / name for name in ("latents", "explanations", "scores"))
    cfg = config.RunConfig(
        config.CacheConfig(),
        config.ConstructorConfig(),
        config.SamplerConfig(),
        explainer_model="stub",
        explainer_provider="openrouter",
        pipeline_num_proc=1,
        verbose=False,
    )
    if not latents.exists():
        cache = latent.LatentCache(torch.nn.Identity(), {}, batch_size=len(world.tokens))
        dense = world.dense()
        cache.cache.add(dense, torch.from_numpy(world.tokens), 0, "layer")
        cache.width = dense.shape[2]
        cache.cache.save()
        cache.save_splits(n_splits=cfg.cache_cfg.n_splits, save_dir=latents)
        cache.save_config(save_dir=latents, cfg=cfg.cache_cfg, model_name="planted")
    os.environ["OPENROUTER_API_KEY"] = "none"
    command.OpenRouter = partial(command.OpenRouter, base_url=job["url"] + "/chat/completions")
    if job["concurrency"] is not None:
        command.Pipeline.run = partialmethod_run(command.Pipeline.run, job["concurrency"])
    todo = command.non_redundant_hookpoints(["layer"], scores, False)
    if todo:
        arguments = (cfg, latents, explanations, scores, todo, tokenizer, None)
        asyncio.run(command.process_cache(*arguments))
    ended = time.perf_counter()
    shown, judged = {}, {}
    if job["leaks"]:
        made = latent.LatentDataset(latents, cfg.sampler_cfg, cfg.constructor_cfg, tokenizer, ["layer"])
        for record in made:
            feature = str(record.latent.latent_index)
            shown[feature] = [world.place(example.tokens) for example in record.train]
            judged[feature] = [world.place(example.tokens) for example in record.test]
    unanswered = 0
    figures: dict[str, dict[str, float]] = {}
    for scorer in ("detection", "fuzz"):
        for path in (scores / scorer).glob("*.txt"):
            given = json.loads(path.read_text())
            answers = [answer for answer in given if answer["correct"] is not None]
            unanswered += len(given) - len(answers)
            sides = [[bool(a["correct"]) for a in answers if a["activating"] == side] for side in (True, False)]
            figures.setdefault(scorer, {})[path.stem] = float(np.mean([np.mean(side) for side in sides]))
    return {"shown": shown, "judged": judged, "figures": figures, "unanswered": unanswered, "ended": ended}


def partialmethod_run(run: Any, concurrency: int) -> Any:
    """Returns `Pipeline.run` at another number of features at a time than the command allows for servers."""
    return lambda self, _: run(self, concurrency)


def saebench(job: dict[str, Any], world: World) -> dict[str, Any]:
    """SAEBench's `AutoInterp` at its defaults, given the planted activations in place of a model's."""
    autointerp: Any = importlib.import_module("sae_bench.evals.autointerp.main")

    os.environ["OPENAI_BASE_URL"] = job["url"]
    dense = world.dense().to(torch.bfloat16)
    autointerp.activation_collection.collect_sae_activations = lambda *_, selected_latents, **__: dense[
        ..., selected_latents
    ]
    model = SimpleNamespace(to_str_tokens=lambda ids: [world.words[int(token)] for token in ids])
    sae = SimpleNamespace(cfg=SimpleNamespace(hook_layer=0, hook_name="layer"))
    torch.manual_seed(42)
    autointerp.random.seed(42)
    num_features = dense.shape[2]
    cfg = autointerp.AutoInterpEvalConfig(model_name="planted", n_latents=num_features, total_tokens=world.tokens.size)
    run = autointerp.AutoInterp(
        cfg=cfg,
        model=model,
        sae=sae,
        tokenized_dataset=torch.from_numpy(world.tokens),
        sparsity=(dense > 0).float().mean((0, 1)),
        device="cpu",
        api_key="none",
    )
    gathered: list[Any] = []
    gather = run.gather_data

    def keep() -> Any:
        gathered.append(gather())
        return gathered[0]

    run.gather_data = keep
    results = asyncio.run(run.run())
    ended = time.perf_counter()
    shown, judged = (
        {str(f): [world.place(e.toks) for e in found[f] if e.is_active] for f in found} for found in gathered[0]
    )
    return {
        "shown": shown,
        "judged": judged,
        "figures": {"detection": {str(feature): result["score"] for feature, result in results.items()}},
        "unanswered": 0,
        "ended": ended,
    }


def saekit(job: dict[str, Any], world: World) -> dict[str, Any]:
    """`label_features` with detection and fuzzing, the contexts of a quarter of the documents held out."""
    from saekit.labelling import LabelConfig, estimate_labels, label_features, read_scores
    from saekit.labelling.examples import ExampleReader, feature_examples
    from saekit.labelling.scoring.detection import Judge
    from saekit.labelling.scoring.pieces import PieceTable
    from saekit.labelling.scoring.rule import HeldOut, RuleScoringConfig
    from saekit.labelling.vocabulary import Vocabulary
    from tests.saekit.labelling.planted import FakeStore, FakeView, identity_sae

    # As much of tokenizers and stores as labelling uses.
    tokenizer: Any = Tokenizer(world)
    store: Any = FakeStore(world.tokens, world.documents, world.dense())
    is_test = world.documents % 4 == 1
    train: Any = FakeView(store, ~is_test)
    test: Any = FakeView(store, is_test)
    sae = identity_sae(len(world.features))
    lm: Any = SimpleNamespace(fingerprint="1" * 64, tokenizer=tokenizer)
    llm = {
        "model": "stub",
        "base_url": job["url"],
        "concurrency": job["concurrency"] or 32,
        "scorers": ["detection", "fuzzing"],
        "price_input": 1.0,
        "price_output": 4.0,
    }
    config = LabelConfig.parse(
        {"labelers": ["llm"], "vocab_projection": False, "token_change": None, "llm": llm}, where="bench"
    )
    given: Any = {"test": test, "lm": lm, "out": job["out"], "config": config}
    if job["what"] == "estimate":
        found = estimate_labels(sae, train, **given)
        return {"requests": found.num_requests, "cost": found.cost}
    label_features(sae, train, **given)
    ended = time.perf_counter()
    figures: dict[str, dict[str, float]] = {}
    for score in read_scores(job["out"]):
        if score.scorer in {"detection", "fuzzing"} and score.balanced_accuracy is not None:
            figures.setdefault(score.scorer.replace("zing", "z"), {})[str(score.feature)] = score.balanced_accuracy
    shown, judged = {}, {}
    if job["leaks"]:
        from saekit.labelling import FeatureContexts

        assert config.llm is not None
        contexts = FeatureContexts.open(Path(job["out"]) / "contexts")
        vocabulary = Vocabulary(tokenizer)
        held_out = HeldOut(sae, test, vocabulary, config=RuleScoringConfig())
        judge = Judge(PieceTable(held_out), config.llm)
        reader = ExampleReader(store, vocabulary)
        # The held-out table has places of its own; which document a piece is from is all that is compared.
        first_of = np.unique(world.documents, return_index=True)[1]
        for feature in range(len(world.features)):
            shown[str(feature)] = [example.flat for example in feature_examples(reader, contexts, feature)]
            pieces = [piece for piece in judge.pieces(feature) if piece.is_active]
            judged[str(feature)] = [int(first_of[piece.document]) for piece in pieces]
    return {"shown": shown, "judged": judged, "figures": figures, "unanswered": 0, "ended": ended}


def main() -> None:
    """Does one job."""
    torch.set_num_threads(1)
    job = json.loads(sys.argv[2])
    world = World(job)
    work = {"delphi": delphi, "saebench": saebench, "saekit": saekit}[sys.argv[1]]
    found = json.dumps(work(job, world), default=int)
    print("\n" + found)


if __name__ == "__main__":
    main()
