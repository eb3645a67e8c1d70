"""One labelling of `scripts/test_llm`, in a process of its own that can be killed: `worker RUN OUT URL MODEL NUM [key=value ...]`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from saekit_pipelines.console import make_progress
from saekit_pipelines.recipe import Recipe
from saekit_pipelines.stages import Pipeline

from saekit.config import apply_overrides
from saekit.labelling import label_features

__all__ = ["main"]

SMALL: dict[str, object] = {
    "num_top": 3,
    "num_sample": 2,
    "num_effects": 5,
    "num_judged": 2,
    "num_controlled": 0,
    "max_output_tokens": 200,
    "concurrency": 4,
    "timeout_seconds": 1200.0,
    "price_input": 0.1,
    "price_output": 0.4,
}
"""Short prompts and answers, and made-up prices."""


def main(arguments: Sequence[str]) -> None:
    """Labels features of the first SAE of a finished run, which is only read."""
    run, out, url, model, num, *overrides = arguments
    values = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))["recipe"] | {"out": run}
    llm = {**SMALL, "model": model, "base_url": url, "max_features": int(num)}
    values["label"] = values["label"] | {"labelers": ["llm"], "llm": llm, "token_change": None}
    pipeline = Pipeline(Recipe.parse(apply_overrides(values, overrides)), progress=make_progress())
    name = next(iter(pipeline.recipe.train))
    train, test = pipeline.views(name)
    label_features(
        pipeline.sae(name),
        train,
        test=test,
        lm=pipeline.lm,
        out=out,
        config=pipeline.recipe.label,
        progress=pipeline.progress,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
