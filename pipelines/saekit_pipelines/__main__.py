"""`python -m saekit_pipelines`, which is also what `accelerate launch -m saekit_pipelines train RECIPE.toml` runs."""

from saekit_pipelines.cli import main

if __name__ == "__main__":
    main()
