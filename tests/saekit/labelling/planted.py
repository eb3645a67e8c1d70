"""A planted world: documents of known words, features that are known rules over them, and a dictionary that is the identity."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saekit.sae import TopKConfig, TopKSAE

WORDS = [
    *(" the", " a", " of", " and", " in", " to", " on", " at", " by", " it"),
    *(" river", " River", " rivers", " lake", " bank", " mill", " town", " road", " hill", " tree"),
    *(" New", " York", " Delhi", " Old", " big", " small", " red", " green", " blue", " gray"),
    *(" war", " army", " soldier", " general", " battle", " peace", " song", " music", " violin", " piano"),
    *(" quasar", " run", " walk", " sleep", " eat", " read", " write", " think", " sing", " draw"),
    *(" Alb", " Rom", "ania", "ing", "s", ".", ",", "\n", "(", ")"),
    *(" ", "0", "1", "2", "3", "4", "5", "6", "7", "8"),
    *("9", "a", '"', "!", " one", " two", " three", " four", " five", " six"),
]
ID = {word: number for number, word in enumerate(WORDS)}
CONTEXT_LEN = 64


class WordTokenizer:
    """One token per listed word; enough of a tokenizer for labelling. Unlisted words are one token each, of no meaning."""

    bos_token_id = eos_token_id = pad_token_id = None
    all_special_ids: Sequence[int] = ()

    def __len__(self) -> int:
        return len(WORDS)

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ID.get(word, 0) for word in re.findall(r" ?\w+|\s|[^\w\s]", text)]}

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(WORDS[token] for token in token_ids)


class FakeStore:
    """The reading side of an activation store, in memory."""

    sha256 = "0" * 64

    def check_model(self, lm: object) -> None:
        """Any model will do."""

    def __init__(
        self, tokens: NDArray[Any], documents: NDArray[Any], x: torch.Tensor, kinds: NDArray[Any] | None = None
    ) -> None:
        self._tokens = tokens.astype(np.int32)
        self._documents = documents.astype(np.int32)
        self._kinds = np.zeros(tokens.shape, dtype=np.uint8) if kinds is None else kinds
        self.x = x
        self.num_rows, self.context_len = tokens.shape
        self.d_in = x.shape[2]
        self.statistics = SimpleNamespace(mean_norm_centred=4.0)

    def tokens(self) -> NDArray[Any]:
        return self._tokens

    def documents(self) -> NDArray[Any]:
        return self._documents

    def kinds(self) -> NDArray[Any]:
        return self._kinds

    def read_rows(self, rows: NDArray[Any]) -> torch.Tensor:
        return self.x[torch.as_tensor(np.asarray(rows))]


class FakeView:
    """Some tokens of a `FakeStore`."""

    def __init__(self, store: FakeStore, mask: NDArray[Any]) -> None:
        self.store = store
        self.mask = mask
        self.d_in = store.d_in
        self.num_tokens = int(mask.sum())
        self.documents = np.unique(store.documents()[mask])
        self.fingerprint = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()

    def rows(self) -> NDArray[Any]:
        return np.flatnonzero(self.mask.any(axis=1))


@dataclass
class World:
    """A store, its two views, and the truth: `acts` [R * T, F]."""

    store: FakeStore
    train: FakeView
    test: FakeView
    sae: TopKSAE
    tokenizer: WordTokenizer
    acts: NDArray[Any]
    names: list[str]

    def feature(self, name: str) -> int:
        return self.names.index(name)


def sentence(generator: np.random.Generator, topic: Sequence[str]) -> list[str]:
    """Random words with the things that features look for strewn in."""
    plain = [word for word in WORDS[:50] if word not in {" New", " York", " quasar", " war", " army"}]
    words = list(generator.choice(plain, size=generator.integers(5, 12)))
    if generator.random() < 0.3:
        words += [" New", str(generator.choice([" York", " Delhi"]))]
    if generator.random() < 0.15:
        words += [" York"]
    if generator.random() < 0.3:
        words += [" ", "1", *generator.choice(list("0123456789"), size=3)]
    if generator.random() < 0.2:
        words += [str(generator.choice([" Alb", " Rom"])), "ania"]
    words += [str(generator.choice(list(topic)))] if topic else []
    return [*words, "."]


def packed(num_documents: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Documents packed into rows: (tokens, documents), both [R, T]."""
    generator = np.random.default_rng(seed)
    ids: list[int] = []
    owners: list[int] = []
    for document in range(num_documents):
        topic = [" war", " army"] if document % 5 == 0 else []
        words = [word for _ in range(generator.integers(3, 12)) for word in sentence(generator, topic)]
        if document % 7 == 3:
            words += [" quasar", " the"]
        ids += [ID[word] for word in words]
        owners += [document] * len(words)
    rows = len(ids) // CONTEXT_LEN
    shape = (rows, CONTEXT_LEN)
    return np.array(ids[: rows * CONTEXT_LEN]).reshape(shape), np.array(owners[: rows * CONTEXT_LEN]).reshape(shape)


def planted_masks(tokens: NDArray[Any], documents: NDArray[Any], seed: int) -> dict[str, NDArray[Any]]:
    """Where each planted feature fires [R, T]."""
    generator = np.random.default_rng(seed)
    text = np.array(WORDS, dtype=object)[tokens]
    same = np.zeros(tokens.shape, dtype=bool)
    same[:, 1:] = documents[:, 1:] == documents[:, :-1]
    before = np.where(same, np.roll(text, 1, axis=1), "")
    after_same = np.roll(same, -1, axis=1)
    after_same[:, -1] = False
    after = np.where(after_same, np.roll(text, -1, axis=1), "")
    near_war = np.zeros(tokens.shape, dtype=bool)
    for row, position in zip(*np.nonzero((text == " war") | (text == " army")), strict=True):
        end = min(position + 32, CONTEXT_LEN)
        near_war[row, position:end] |= documents[row, position:end] == documents[row, position]
    return {
        "river": np.isin(text, [" river", " River", " lake"]),
        "after_new": before == " New",
        "digit": np.vectorize(str.isdigit)(text),
        "new_york": (before == " New") & (text == " York"),
        "before_stop": after == ".",
        "dead": np.zeros(tokens.shape, dtype=bool),
        "near_war": near_war,
        "noise": generator.random(tokens.shape) < 0.03,
        "dense": generator.random(tokens.shape) < 0.9,
        "quasar": text == " quasar",
        "ania": text == "ania",
    }


def make_world(num_documents: int = 240, seed: int = 0) -> World:
    tokens, documents = packed(num_documents, seed)
    masks = planted_masks(tokens, documents, seed + 1)
    generator = np.random.default_rng(seed + 2)
    x = np.zeros((*tokens.shape, len(masks)), dtype=np.float32)
    for number, mask in enumerate(masks.values()):
        # Activations that float32 holds exactly, so that sums do not depend on their order.
        x[..., number] = mask * generator.integers(8, 640, size=tokens.shape) / 64
    store = FakeStore(tokens, documents, torch.from_numpy(x))
    is_test = documents % 4 == 1
    num_features = len(masks)
    sae = identity_sae(num_features)
    return World(
        store=store,
        train=FakeView(store, ~is_test),
        test=FakeView(store, is_test),
        sae=sae,
        tokenizer=WordTokenizer(),
        acts=x.reshape(-1, num_features),
        names=list(masks),
    )


def identity_sae(num_features: int) -> TopKSAE:
    """A dictionary whose activations are its input."""
    sae = TopKSAE(TopKConfig(d_in=num_features, d_sae=num_features, k=num_features))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(num_features))
        sae.W_dec.copy_(torch.eye(num_features))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae
