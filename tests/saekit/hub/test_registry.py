"""The registry of known releases: what the rules make, and that the file is what the rules make."""

import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saekit.hub import known_entries
from saekit.hub.registry import known_names, known_repos, place_of, width_of
from scripts.make_registry import TARGET, registry_text

ENTRIES = list(known_entries())


def test_file_is_what_the_rules_make() -> None:
    assert TARGET.read_text(encoding="utf-8") == registry_text(), "run python -m scripts.make_registry"


def test_names_and_places_are_each_there_once() -> None:
    for values in ([entry.name for entry in ENTRIES], [entry.ref for entry in ENTRIES], known_names()):
        assert [value for value, times in collections.Counter(values).items() if times > 1] == []
    assert len(known_repos()) > 100
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", repo) for repo in known_repos())


@pytest.mark.parametrize(
    ("release", "count"),
    [
        # Folders, each with a few dictionaries of different L0: 26 layers of two widths, four wider ones of layer 12, three of
        # a million features, and the embedding's.
        ("gemma-scope-2b-pt-res", 2 * 26 + 4 + 3 + 1),
        ("gemma-scope-9b-it-res", 2 * 3),
        ("llama-scope-lxr-8x", 32),
        ("llama-scope-r1-distill", 96),
        ("qwen-scope-qwen3-1.7b-base-w32k-l50", 28),
        ("gpt2-small-res-jb", 13),
    ],
)
def test_rules_make_as_many_as_are_known(release: str, count: int) -> None:
    assert len([entry for entry in ENTRIES if entry.name.split("/")[0] == release]) == count


@pytest.mark.parametrize(("kind", "count"), [("sae", 5208), ("transcoder", 3576)])
def test_gemma_scope_2_is_complete(kind: str, count: int) -> None:
    found = [entry for entry in ENTRIES if (entry.family, entry.kind) == ("gemma-scope-2", kind)]
    assert len(found) == count


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k", "google/gemma-scope-2b-pt-res:layer_12/width_16k"),
        (
            "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
            "google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82",
        ),
        ("gemma-scope-2b-pt-res", "google/gemma-scope-2b-pt-res"),
        ("llama-scope-lxr-8x/layer_15", "fnlp/Llama3_1-8B-Base-LXR-8x:Llama3_1-8B-Base-L15R-8x"),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted:blocks.8.hook_resid_pre"),
        (
            "goodfire-llama-3.1-8b-instruct/layer_19",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19:Llama-3.1-8B-Instruct-SAE-l19.pth",
        ),
        ("eleuther-sae-llama-3-8b-32x/layers.10", "EleutherAI/sae-llama-3-8b-32x:layers.10"),
        ("google/gemma-scope-2b-pt-res", None),
        ("gemma-scope-2b-pt-res/../x", None),
        ("runs/mine/sae", None),
    ],
)
def test_name_stands_for_a_place(name: str, place: str | None) -> None:
    assert place_of(name) == place


def test_every_name_leads_to_its_place() -> None:
    for entry in ENTRIES[::97]:
        assert place_of(entry.name) == entry.ref


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"model": "gemma-2-2b", "site": "resid_post", "width": "1m"}, {"gemma-scope-2b-pt-res"}),
        (
            {"model": "Llama_3.1-8B", "family": "llama-scope", "site": "attn"},
            {"llama-scope-lxa-8x", "llama-scope-lxa-32x"},
        ),
        ({"model": "qwen3-8b-base", "l0": "100"}, {"qwen-scope-qwen3-8b-base-w64k-l100"}),
        (
            {"model": "gemma-3-270m-it", "l0": "MEDIUM", "width": "262144", "site": "attn_out"},
            {"gemma-scope-2-270m-it"},
        ),
        ({"family": "sparsify", "width": "32768"}, {"eleuther-sae-pythia-160m-deduped-32k"}),
        ({"model": "no-such-model"}, set()),
        ({"width": "nonsense"}, set()),
    ],
)
def test_filters_are_all_applied(filters: dict[str, str], names: set[str]) -> None:
    assert {entry.name.split("/")[0] for entry in known_entries(**filters)} == names


@pytest.mark.parametrize(
    ("text", "number"), [("16k", 16384), ("1m", 1048576), ("16_384", 16384), ("x", None), (None, None)]
)
def test_width_is_a_number(text: str | None, number: int | None) -> None:
    assert width_of(text) == number


def test_every_width_is_known() -> None:
    assert {entry.width for entry in ENTRIES if entry.width is not None and width_of(entry.width) is None} == set()


def test_the_list_needs_no_torch() -> None:
    program = (
        "import sys; from saekit.hub import known_entries; list(known_entries()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
