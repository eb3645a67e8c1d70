"""Writes saekit/hub/registry.json, the known releases, from one rule per family.

    .venv/bin/python -m scripts.make_registry

A rule says what a family's repositories are called and what their folders are made of. Layers, widths and names were
counted from the release list of SAELens 6.54.12; repositories that it does not list are those that public code loads. Where
a folder's name holds a figure that no rule gives, such as the L0 of Gemma Scope 1, the rule ends above it (`below` says
what is there) and the hub is asked at run time.
"""

import json
from pathlib import Path

from scripts.registry_scopes import circuit_tracer, gemma_scope, gemma_scope_2, llama_scope, qwen_scope
from scripts.registry_sets import dictionary_learning, eleuther, others, saelens

TARGET = Path(__file__).parents[1] / "saekit" / "hub" / "registry.json"


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
