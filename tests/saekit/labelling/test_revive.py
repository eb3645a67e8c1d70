"""Reviving features: those whose trigger the corpus lacks wake up on probe sentences, those that nothing wakes are reported."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations import CacheConfig, StoreView, cache_activations
from saekit.errors import ConfigError, LabelerError
from saekit.labelling import (
    LabelConfig,
    ReviveConfig,
    collect_contexts,
    estimate_revival,
    firing_rule,
    read_labels,
    read_revivals,
    revive_features,
)
from saekit.labelling.revival.firing import _fisher
from saekit.models import LanguageModel, find_unembedding, load_model
from saekit.sae import SAE, JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE
from tests.saekit.labelling.stub import StubServer, serving

HOOK = "model.embed_tokens"
ABSENT, IMPOSSIBLE, COMMON = 0, 1, 2
"""A feature whose trigger the corpus lacks, one that nothing can wake, and one that fires on the corpus."""
SMALL: dict[str, object] = {
    "num_controls": 40,
    "num_templates": 4,
    "num_corpus": 3,
    "probe_tokens": 24,
    "num_tokens": 1,
}
OFFLINE: dict[str, object] = {"token_change": None, "contexts": {"num_top": 5}}


@dataclass
class Planted:
    lm: LanguageModel
    train: StoreView
    trigger: int
    common: int

    def sae(self, kind: str = "jumprelu") -> SAE:
        """A dictionary that reads its triggers from the embedding, each feature promoting what it fires on."""
        embedding = self.lm.model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
        readers = torch.stack([embedding[self.trigger], 0 * embedding[0], embedding[self.common]])
        head = find_unembedding(self.lm).weight.detach().float()
        decoder = (head - head.mean(dim=0))[[self.trigger, self.common, self.common]]
        sizes = readers.square().sum(dim=1)
        if kind == "topk":
            sae: SAE = TopKSAE(TopKConfig(d_in=self.lm.d_model, d_sae=3, k=1), hook_point=HOOK)
            shift = torch.tensor([-0.8, 0.0, -0.8]) * sizes
        else:
            sae = JumpReLUSAE(JumpReLUConfig(d_in=self.lm.d_model, d_sae=3, target_l0=1), hook_point=HOOK)
            shift = torch.zeros(3)
        with torch.no_grad():
            sae.W_enc.copy_(readers.T)
            sae.W_dec.copy_(decoder)
            sae.b_enc.copy_(shift)
            sae.b_dec.zero_()
            if isinstance(sae, JumpReLUSAE):
                sae.threshold.copy_(torch.tensor([0.8, 0.0, 0.8]) * sizes + torch.tensor([0.0, 1.0, 0.0]))
        return sae


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_model_dir, many_documents_file) -> Planted:
    lm = load_model(str(tiny_model_dir("llama")))
    values = {
        "model": {"name": str(tiny_model_dir("llama"))},
        "text": {"kind": "files", "paths": [str(many_documents_file)]},
        "tokens": {"context_len": 32},
        "hook_points": [HOOK],
        "num_tokens": 1024,
    }
    store = cache_activations(CacheConfig.parse(values), tmp_path_factory.mktemp("revive-cache") / "cache", lm=lm)
    train, _ = store.split(0.2)
    seen = np.bincount(store.tokens().reshape(-1), minlength=len(lm.tokenizer))
    ids = [
        lm.tokenizer(f"This is{lm.tokenizer.decode([t])}", add_special_tokens=False)["input_ids"] for t in range(380)
    ]
    kept = [t for t, found in enumerate(ids) if found[-1] == t and lm.tokenizer.decode([t]).strip().isalpha()]
    return Planted(
        lm=lm,
        train=train,
        trigger=next(token for token in kept if seen[token] == 0),
        common=max(kept, key=lambda token: seen[token]),
    )


def _revive(planted: Planted, folder: Path, sae: SAE, *, label: dict[str, object] | None = None, **options: object):
    return revive_features(
        sae,
        planted.train,
        lm=planted.lm,
        labels=folder / "label",
        out=folder / "revive",
        config=ReviveConfig.parse({**SMALL, **options}),
        label=LabelConfig.parse({**OFFLINE, **(label or {})}),
    )


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_a_feature_without_its_trigger_in_the_corpus_wakes_up_and_an_impossible_one_does_not(
    planted, tmp_path, kind
) -> None:
    sae = planted.sae(kind)
    found = {one.feature: one for one in _revive(planted, tmp_path, sae)}
    assert sorted(found) == [ABSENT, IMPOSSIBLE]
    woken, never = found[ABSENT], found[IMPOSSIBLE]
    assert (woken.status, woken.firings_before, woken.fired_by_source) == ("revived", 0, {"templates": 4})
    assert woken.tried == 4
    assert woken.controls == 40
    assert woken.controls_fired == 0
    assert woken.p_value < 1e-4
    # Of k largest the k-th is its own bar.
    assert woken.nearest >= woken.bar * (1 - 1e-5)
    assert woken.relabelled == ("lexical",)
    assert never.status == "silent"
    assert never.tried_by_source == {"templates": 4, "corpus": 3}
    assert "silent on all of its 7 sentences" in never.reason
    assert never.relabelled == ()
    [label] = read_labels(tmp_path / "revive")
    assert label.feature == ABSENT
    assert planted.lm.tokenizer.decode([planted.trigger]).strip() in label.label
    assert label.description.startswith("Hardly fires on the corpus")
    assert read_revivals(tmp_path / "revive") == list(found.values())


def test_a_finished_folder_is_left_alone_and_another_config_is_refused(planted, tmp_path) -> None:
    sae = planted.sae()
    first = _revive(planted, tmp_path, sae)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert _revive(planted, tmp_path, sae) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(ConfigError, match="num_controls"):
        _revive(planted, tmp_path, sae, num_controls=41)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sources": ["llm"]}, r"needs a labelling model"), ({"features": [3]}, "features 0 to 2")],
    ids=["no model", "no such feature"],
)
def test_what_cannot_be_tried_is_refused(planted, tmp_path, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        _revive(planted, tmp_path, planted.sae(), **options)


class Writer:
    """Labels by the output side, writes sentences with the first promoted token, and explains what it is shown."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def __call__(self, body: dict[str, object], _: int) -> str:
        user = str(body["messages"][1]["content"])  # type: ignore[index]
        if "Write 2 sentences" in user:
            words = re.findall("Tokens it makes likely: (.*)", user)[0]
            return json.dumps({"sentences": [f"A sentence on{words}", f"It is{words}"]})
        marked = re.findall("\u00ab(.*?)\u00bb", user)
        label = f"marked {marked[0]}" if marked else "tokens alone"
        return json.dumps({"label": label, "fires_on": "x", "promotes": "", "suppresses": "", "confidence": 0.5})


def _with_server(server: StubServer, **options: object) -> dict[str, object]:
    llm = {
        "model": "stub",
        "base_url": server.url,
        "explainers": ["input", "vocabproj", "raw", "concat"],
        "price_input": 1.0,
        "price_output": 1.0,
        "wait_seconds": 0.001,
        **options,
    }
    return {"labelers": ["lexical", "llm"], "llm": llm}


def test_every_explainer_relabels_and_sentences_of_a_model_are_paid_for_once(planted, tmp_path) -> None:
    sae, options = planted.sae(), {"sources": ["llm"], "num_written": 2}
    writer = Writer(planted.lm.tokenizer.decode([planted.trigger]))
    with serving(writer) as server:
        capped = _with_server(server, max_requests=3)
        with pytest.raises(LabelerError, match="max_requests 3"):
            _revive(planted, tmp_path, sae, label=capped, **options)
        found = _revive(planted, tmp_path, sae, label=_with_server(server), **options)
        num_requests = len(server.requests)
        assert len({json.dumps(request, sort_keys=True) for request in server.requests}) == num_requests
    assert [one.fired_by_source for one in found] == [{"llm": 2}, {}]
    # Output-side labels and sentences of both, then contexts and both together of the one that woke up.
    assert num_requests == 2 + 2 + 2
    labels = {(label.feature, label.labeler): label for label in read_labels(tmp_path / "revive")}
    assert found[0].relabelled == ("lexical", "llm:stub", "llm:stub:concat", "llm:stub:input", "llm:stub:vocabproj")
    assert writer.trigger.strip() in labels[ABSENT, "llm:stub:input"].label
    assert labels[IMPOSSIBLE, "llm:stub:vocabproj"].label == "tokens alone"
    assert (IMPOSSIBLE, "llm:stub:input") not in labels


def test_a_dry_run_sends_nothing_and_foresees_what_is_asked(planted, tmp_path) -> None:
    sae, options = planted.sae(), ReviveConfig.parse({**SMALL, "num_written": 2})
    writer = Writer("")
    with serving(writer) as server:
        label = LabelConfig.parse({**OFFLINE, **_with_server(server, explainers=["input"])})
        estimate = estimate_revival(
            sae,
            planted.train,
            lm=planted.lm,
            labels=tmp_path / "label",
            out=tmp_path / "revive",
            config=options,
            label=label,
        )
        assert not server.requests
        assert (estimate.num_features, estimate.num_probes) == (2, 4 + 7 + 40 + 2 * 2)
        assert estimate.writing.num_requests == 4
        assert estimate.relabelling.num_requests == 2
        assert "if all of them fire" in str(estimate)
        found = revive_features(
            sae,
            planted.train,
            lm=planted.lm,
            labels=tmp_path / "label",
            out=tmp_path / "revive",
            config=options,
            label=label,
        )
        assert len(server.requests) == 4 + sum(one.status == "revived" for one in found)


def test_a_feature_that_fires_rarely_keeps_its_corpus_contexts(planted, tmp_path) -> None:
    [one] = _revive(planted, tmp_path, planted.sae(), features=[COMMON])
    contexts = collect_contexts(
        planted.sae(), planted.train, config=LabelConfig.parse(OFFLINE).contexts, out=tmp_path / "label" / "contexts"
    )
    assert one.firings_before == contexts.firing_count[COMMON] > 0
    assert one.controls_fired > 0
    assert one.fired == one.tried == 7
    [label] = read_labels(tmp_path / "revive")
    told = int(re.findall(r"Fires on ([\d,]+) training", label.description)[0].replace(",", ""))
    assert told > one.firings_before


def test_the_rule_of_firing_is_stated() -> None:
    topk = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    assert "k = 2 largest; bar: the k-th largest" in firing_rule(topk)
    assert "threshold" in firing_rule(JumpReLUSAE(JumpReLUConfig(d_in=4, d_sae=8, target_l0=1)))


@pytest.mark.parametrize(
    ("table", "p"), [((4, 4, 0, 40), 1 / 135751), ((0, 4, 3, 40), 1.0), ((1, 2, 1, 2), 5 / 6)], ids=str
)
def test_fisher(table: tuple[int, int, int, int], p: float) -> None:
    assert _fisher(*table) == pytest.approx(p)
