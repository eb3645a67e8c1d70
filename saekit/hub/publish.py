"""A dictionary from a local folder to a repository on the hub, with a card that says what it is."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saekit.errors import ConfigError, FormatError, SaekitError
from saekit.hub.card import Provenance, provenance, public_name, render_card
from saekit.hub.download import parse_hub_ref
from saekit.hub.export import TARGETS, save_sae
from saekit.hub.info import dictionary_info
from saekit.hub.patience import first_line, patiently
from saekit.hub.resolve import load_sae
from saekit.sae.checkpoint import CFG_NAME, WEIGHTS_NAME

__all__ = ["PushPlan", "plan_push", "push"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PushPlan:
    """What a push would send."""

    repo: str
    """`owner/repo`."""
    card: str
    """Content of README.md."""
    files: Mapping[str, int]
    """Path in the repository -> bytes."""


def plan_push(
    folder: str | Path,
    repo: str,
    *,
    also: Sequence[str] = (),
    model: str | None = None,
    licence: str | None = None,
    metrics: str | None = None,
) -> PushPlan:
    """Returns what `push` with the same arguments would send; sends nothing.

    Raises:
        ConfigError, FormatError: as `push`.
    """
    with _prepared(folder, repo, also=also, model=model, licence=licence, metrics=metrics) as (card, files):
        return PushPlan(repo=repo, card=card, files={name: _size(content) for name, content in files.items()})


def push(
    folder: str | Path,
    repo: str,
    *,
    also: Sequence[str] = (),
    model: str | None = None,
    licence: str | None = None,
    metrics: str | None = None,
    private: bool = False,
) -> str:
    """Publishes a dictionary in one commit, the repository made where there is none; returns the commit's address.

    Args:
        folder: an SAE as saekit writes it, e.g. `runs/mine/train/topk`.
        repo: `owner/repo`.
        also: formats of `saekit.hub.export.TARGETS` to put beside it, each in a folder of that name.
        model: the language model's name on the hub, where the folder names a local one.
        licence: the dictionary's, as the hub spells it, e.g. `apache-2.0`.
        metrics: a Markdown table for the card, e.g. `saekit.evaluate(...).to_markdown()`.
        private: whether only its owner sees it.

    Raises:
        ConfigError: no such repository can be, a format cannot express the dictionary, or the hub does not let it in.
        FormatError: the folder holds no finished dictionary of saekit.
    """
    with _prepared(folder, repo, also=also, model=model, licence=licence, metrics=metrics) as (_, files):
        try:
            return _send(repo, files, private=private, message=f"Add a dictionary of {Path(folder).name}")
        except SaekitError:
            raise
        except Exception as error:
            raise _refused(error, repo) from error


@contextmanager
def _prepared(
    folder: str | Path, repo: str, *, also: Sequence[str], model: str | None, licence: str | None, metrics: str | None
) -> Iterator[tuple[str, Mapping[str, bytes | Path]]]:
    folder = Path(folder)
    place = parse_hub_ref(repo)
    if place is None or place.path:
        raise ConfigError(f"push: repository {repo!r}, needs owner/name")
    unknown = [target for target in also if target not in TARGETS]
    if unknown:
        raise ConfigError(f"push: format {unknown[0]!r}, needs one of {', '.join(TARGETS)}")
    if not folder.is_dir():
        raise FormatError(f"push: {str(folder)!r}: no such folder, needs one that saekit wrote an SAE into")
    info = dictionary_info(folder)
    if info.format != "saekit":
        raise FormatError(
            f"push: {str(folder)!r}: files of {info.format!r}, needs a folder of saekit; 'saekit convert' makes one"
        )
    made = provenance(folder, info)
    if model is not None:
        made = Provenance(**{name: getattr(made, name) for name in made.__dataclass_fields__} | {"model": model})
    # Read whole, so that nothing broken is published.
    sae = load_sae(folder)
    if made.model is not None:
        # Exports name the model too.
        sae.source["model"] = made.model
    with tempfile.TemporaryDirectory(prefix="saekit-push-") as scratch:
        files: dict[str, bytes | Path] = {CFG_NAME: _public_config(folder, made), WEIGHTS_NAME: folder / WEIGHTS_NAME}
        for target in also:
            save_sae(sae, Path(scratch) / target, format=target)
            written = sorted((Path(scratch) / target).rglob("*"))
            files |= {path.relative_to(scratch).as_posix(): path for path in written if path.is_file()}
        licences = _licences(made)
        card = render_card(repo, info, made, exports=also, licence=licence, licences=licences, metrics=metrics)
        yield card, {"README.md": card.encode(), **files}


def _public_config(folder: Path, made: Provenance) -> bytes:
    """Returns `cfg.json` without the folders of this machine, which nobody else can use."""
    header = json.loads((folder / CFG_NAME).read_text(encoding="utf-8"))
    source = header.get("source")
    if isinstance(source, dict):
        header["source"] = {
            key: public_name(value) if isinstance(value, str) else value for key, value in source.items()
        }
        if made.model is not None:
            header["source"]["model"] = made.model
    return (json.dumps(header, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _licences(made: Provenance) -> dict[str, str | None]:
    """Returns the licences of model and text by name, as the hub's cards say them, where it can be asked."""
    found: dict[str, str | None] = {}
    if made.model is not None:
        found[made.model] = _licence(made.model, "model")
    if made.dataset is not None:
        found[made.dataset] = _licence(made.dataset, "dataset")
    return found


def _licence(name: str, kind: str) -> str | None:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or name.count("/") != 1:
        return None
    try:
        api = HfApi()
        tags = (api.model_info(name) if kind == "model" else api.dataset_info(name)).tags or []
    except Exception:
        # One line less in the card; the dictionary is what is to be published.
        return None
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)


def _send(repo: str, files: Mapping[str, bytes | Path], *, private: bool, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    patiently(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if private and api.repo_info(repo).private is False:
        raise ConfigError(f"push: {repo!r} is there and public, needs a private one, or do without private")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def _refused(error: Exception, repo: str) -> ConfigError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError("push: HF_HUB_OFFLINE is set, needs a connection; unset it")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in {401, 403, 404}:
        return ConfigError(
            f"push: {repo!r}: the hub says {error.response.status_code}, needs a token that may write there;"
            " log in with 'hf auth login' or set HF_TOKEN"
        )
    reason = first_line(error if error.__cause__ is None else Exception(f"{first_line(error)} {error.__cause__}"))
    return ConfigError(f"push: {repo!r}: {reason}; what was uploaded is kept: try again")


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
