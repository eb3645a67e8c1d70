"""Sentences on which silent features are tried: around the tokens that they promote, and random ones to compare with."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saekit.activations import StoreView
from saekit.labelling.answers import prompt_template
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.revival.config import ProbeSource, ReviveConfig
from saekit.labelling.vocabulary import Vocabulary
from saekit.manifest import atomic_write

__all__ = ["CONTROL", "CorpusPieces", "Probe", "fill_templates", "read_probes", "readable_tokens", "write_probes"]

TEMPLATES = "probe_templates_v1"
"""File of the sentences; its text never changes, another text gets another name."""
CONTROL: Literal["control"] = "control"
NOBODY = -1
"""Stands as feature in a control."""
BEFORE = 0.75
"""Share of a corpus piece that comes before its promoted token: a feature may fire on the way to it, or on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One sentence."""

    text: str
    feature: int
    """Whose it is; -1 for a control."""
    source: ProbeSource | Literal["control"]


def write_probes(path: Path, probes: Iterable[Probe]) -> None:
    """Writes one JSON line each, atomically; the line's number is the document in the cache."""
    with atomic_write(path) as file:
        for probe in probes:
            file.write((json.dumps(asdict(probe), ensure_ascii=False) + "\n").encode())


def read_probes(path: Path) -> list[Probe]:
    """Returns what `write_probes` wrote."""
    return [Probe(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def readable_tokens(effects: Sequence[TokenEffects], feature: int, vocabulary: Vocabulary, *, num: int) -> list[int]:
    """Returns the tokens that a feature promotes most and that can be written, from the first effects that have any."""
    for found in effects:
        tokens = [token for token, value in found.promoted(feature) if value > 0 and _is_written(vocabulary, token)]
        if tokens:
            return tokens[:num]
    return []


def _is_written(vocabulary: Vocabulary, token: int) -> bool:
    text = vocabulary.text(token)
    return token < len(vocabulary) and bool(text.strip()) and "\ufffd" not in text


def fill_templates(feature: int, words: Sequence[str], *, num: int) -> list[Probe]:
    """Returns sentences around words, each beginning with another one of them; a word brings its own space."""
    templates = prompt_template(TEMPLATES).splitlines()
    return [
        Probe(
            text=template.format(*(words[(shift + place) % len(words)] for place in range(4))),
            feature=feature,
            source="templates",
        )
        for shift, template in enumerate(templates[:num])
    ]


class CorpusPieces:
    """Draws pieces of the documents of a view, none across the border of a document or row."""

    def __init__(self, view: StoreView, vocabulary: Vocabulary, config: ReviveConfig) -> None:
        self._mask = view.mask.reshape(-1)
        self._tokens: NDArray[np.int32] = view.store.tokens().reshape(-1)
        self._documents: NDArray[np.int32] = view.store.documents().reshape(-1)
        self._row = view.store.context_len
        self._vocabulary = vocabulary
        self._longest = config.probe_tokens - 1
        self._seed = config.seed

    def around(self, tokens: Mapping[int, Sequence[int]], *, num: int) -> list[Probe]:
        """Returns, for each feature, up to `num` pieces that hold one of its tokens, of different documents where possible."""
        wanted = np.unique([token for own in tokens.values() for token in own]).astype(np.int32)
        places = np.flatnonzero(np.isin(self._tokens, wanted) & self._mask)
        places = places[np.argsort(self._tokens[places], kind="stable")]
        starts = np.searchsorted(self._tokens[places], wanted)
        ends = np.searchsorted(self._tokens[places], wanted, side="right")
        of_token = {int(token): places[start:end] for token, start, end in zip(wanted, starts, ends, strict=True)}
        before = int(BEFORE * self._longest)
        probes: list[Probe] = []
        for feature, own in tokens.items():
            generator = np.random.default_rng((self._seed, feature))
            found = generator.permutation(np.concatenate([of_token[token] for token in own]))
            _, first = np.unique(self._documents[found], return_index=True)
            # One of each document, in random order, before any second one.
            order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(found)), first)])
            probes += [
                Probe(text=self._text(place, before, self._longest - before), feature=feature, source="corpus")
                for place in found[order[:num]].tolist()
            ]
        return probes

    def random(self, lengths: Sequence[int], *, num: int) -> list[Probe]:
        """Returns pieces from random places, of lengths drawn from `lengths`."""
        generator = np.random.default_rng((self._seed, len(lengths)))
        places = generator.choice(np.flatnonzero(self._mask), size=num).tolist()
        drawn = generator.choice(np.asarray(lengths), size=num).tolist()
        texts = [self._text(place, 0, length) for place, length in zip(places, drawn, strict=True)]
        return [Probe(text=text, feature=NOBODY, source=CONTROL) for text in texts if text.strip()]

    def _text(self, place: int, before: int, after: int) -> str:
        """Returns up to `before` + `after` tokens around a place, of its document and row."""
        row = place - place % self._row
        low, high = max(row, place - before), min(row + self._row, place + after)
        same = self._documents[low:high] == self._documents[place]
        breaks = np.flatnonzero(~same[: place - low])
        start = low + (int(breaks[-1]) + 1 if len(breaks) else 0)
        ends = np.flatnonzero(~same[place - low :])
        stop = place + int(ends[0]) if len(ends) else high
        # What the mask leaves out may be a separator, which a text must not spell out.
        inside = np.arange(start, stop)[self._mask[start:stop]]
        return " ".join(self._vocabulary.join(self._tokens[inside].tolist()).split())
