"""Training on the language model's own loss: the step whose gradients come through the layers behind the hook point."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.activations.source import ActivationSource
from saekit.activations.view import StoreView
from saekit.errors import ConfigError
from saekit.models.hooks import resolve
from saekit.models.load import LanguageModel
from saekit.models.run_from import later_layers
from saekit.sae.base import SAE
from saekit.sae.fold import Normalization
from saekit.training.config import EndToEndConfig, TrainConfig
from saekit.training.layout import Layout
from saekit.training.micro import joined
from saekit.training.objective import StepResult
from saekit.training.rows import RowBatch, TokenRowBatches
from saekit.training.run import Gradients, StepFigures, TrainRun
from saekit.training.spliced import SplicedModel, model_terms

__all__ = ["EndToEndRun", "check_end_to_end"]

MEASURED_POSITIONS = 4096
"""Positions that the later layers' variances and the first weight of the KL are measured on."""
TERMS = ("kl", "ce", "downstream")


def check_end_to_end(train: StoreView | ActivationSource, objective: EndToEndConfig, lm: LanguageModel | None) -> None:
    """Checks that an SAE can be trained through the model on these data; `check_options` knows which kinds can.

    Raises:
        ConfigError: no model, or data without token rows.
        StoreError: the data are of another model.
        HookPointError: the model has no such module.
    """
    where = f"training: objective {objective.kind!r}"
    if lm is None:
        raise ConfigError(f"{where}: no language model, needs the one that the cache was made with; pass lm=")
    if not isinstance(train, StoreView):
        raise ConfigError(f"{where}: found a {type(train).__name__}, needs a view of a store with its token rows")
    train.store.check_model(lm)
    resolve(lm, train.store.hook_point)


class EndToEndRun(TrainRun):
    """A training whose loss is what the language model loses by the reconstructions.

    Sparsity penalty and AuxK are those of the SAE's architecture; the reconstruction is a term for `kl_finetune` only. All
    sums are over the whole batch: the loss does not depend on how rows are spread over micro-batches and processes.

    Source: Braun et al. 2024, "Identifying functionally important features with end-to-end sparse dictionary learning",
    section 2; Karvonen 2025, arXiv 2503.17272 (the fine-tuning, and a KL that is scaled to the reconstruction all along; here by
    the figures of the step before, so that parts of a batch need not know each other's).
    """

    source: TokenRowBatches
    normalization: Normalization

    def __init__(
        self,
        sae: SAE,
        source: TokenRowBatches,
        config: TrainConfig,
        *,
        normalization: Normalization,
        lm: LanguageModel,
        layout: Layout | None = None,
    ) -> None:
        """Takes an SAE of normalised activations and trains it in place; measures the model on the first rows.

        Raises:
            HookPointError: no layer behind the hook point to compare.
            ConfigError: `micro_batch_size` holds no whole row.
        """
        super().__init__(sae, source, config, normalization=normalization, layout=layout)
        assert config.objective is not None
        self.kind: EndToEndConfig = config.objective
        context_len = source.view.store.context_len
        self._part_rows = (config.micro_batch_size or config.batch_size) // context_len
        if not self._part_rows:
            raise ConfigError(
                f"training: micro_batch_size {config.micro_batch_size}, needs at least one row of {context_len} tokens"
            )
        hook_point = source.view.store.hook_point
        is_downstream = self.kind.kind == "e2e_downstream"
        self.model = SplicedModel(lm, hook_point, later_layers(lm, hook_point) if is_downstream else [])
        self.objective.reconstruction_weight = 1.0 if self.kind.kind == "kl_finetune" else 0.0
        parts = self._first_rows()
        self._later_variances = self._measure_later(parts)
        given = self.kind.kl_weight
        self._is_balanced = given is None and self.kind.kind == "kl_finetune"
        self.kl_weight = self._balanced_weight(parts) if self._is_balanced else 1.0 if given is None else given

    def train_step(self, *, stop_asked: bool = False) -> StepFigures:
        """See `TrainRun`; a weight of the KL that is not given follows the terms' sizes."""
        figures = super().train_step(stop_asked=stop_asked)
        if self._is_balanced and figures.terms["kl"] > 0:
            self.kl_weight = figures.fvu / figures.terms["kl"]
        return figures

    def state_dict(self) -> dict[str, object]:
        """Returns what is the same on every process, exactly."""
        return super().state_dict() | {"kl_weight": self.kl_weight, "later_variances": self._later_variances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        super().load_state_dict(state)
        self.kl_weight = state["kl_weight"]
        if "later_variances" in state:
            self._later_variances = state["later_variances"].to(self._later_variances)

    def add_gradients(self, dead: Tensor, coefficient: float) -> Gradients:
        """See `TrainRun`; the mean over processes of what is added is the gradient of the batch's loss."""
        rows = self.source.next_rows().to(self.layout.device)
        self.timer.mark("read")
        parts = rows.split(self._part_rows)
        raw = [part.hidden[part.is_replaced] for part in parts]
        x = [self.normalization.apply(part) for part in raw]
        num_replaced, num_counted = self._counts(rows)
        self.objective.prepare(x, dead)
        results, terms = [], torch.zeros(len(TERMS), dtype=torch.float64, device=rows.tokens.device)
        for part, own in zip(parts, x, strict=True):
            result, error = self.objective.forward_with_error(own, dead, coefficient)
            share = len(own) / num_replaced
            sums = self._terms(part, own - error)
            means = torch.stack([sums[0] / num_counted, sums[1] / num_counted, sums[2] / num_replaced])
            weights = means.new_tensor([self.kl_weight, self.kind.ce_weight, self._downstream_weight])
            loss = result.loss * share + (means * weights).sum().to(result.loss.device)
            if own is x[-1]:
                self.reducer.arm(1.0)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            terms += means.detach().to(terms)
            results.append(
                StepResult(loss.detach(), result.fvu * share, result.auxiliary * share, result.num_active, result.fired)
            )
        return Gradients(joined(results), torch.cat(raw), dict(zip(TERMS, terms, strict=True)))

    @property
    def _downstream_weight(self) -> float:
        return self.kind.downstream_weight if self.kind.kind == "e2e_downstream" else 0.0

    def _counts(self, rows: RowBatch) -> tuple[float, float]:
        """Returns the replaced and the counted positions of the whole batch, for each process."""
        own = torch.stack([rows.is_replaced.sum(), rows.is_counted.sum()]).double()
        replaced, counted = (self.layout.data.sum(own) / self.layout.data.size).tolist()
        return replaced, max(counted, 1 / self.layout.data.size)

    def _terms(self, part: RowBatch, x_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the sums of `model_terms` with normalised reconstructions x_hat [n, d_in] in the rows."""
        with torch.no_grad():
            true = self.model.predict(part)
        raw = x_hat / self.normalization.scale + self.normalization.mean.to(x_hat)
        next_tokens = part.tokens.roll(-1, dims=1)[part.is_counted]
        return model_terms(true, self.model.predict(part, raw), next_tokens, self._later_variances)

    def _first_rows(self) -> list[RowBatch]:
        """Returns the first rows of this process in parts, and moves the source back."""
        position, found, num_positions = self.source.state_dict(), [], 0
        while num_positions < MEASURED_POSITIONS // self.layout.data.size:
            rows = self.source.next_rows().to(self.layout.device)
            found += rows.split(self._part_rows)
            num_positions += rows.tokens.numel()
        self.source.load_state_dict(position)
        return found

    @torch.no_grad()
    def _measure_later(self, parts: list[RowBatch]) -> Tensor:
        """Returns E||a - E a||^2 of each later layer's output over the replaced positions of all processes, float64."""
        if not self.model.later:
            return torch.empty(0, dtype=torch.float64)
        # Sums of the values, of their squares and of their number, a row for each layer.
        moments = torch.stack(
            [
                torch.stack(
                    [
                        torch.cat(
                            [a.double().sum(0), torch.stack([a.double().square().sum(), a.new_tensor(len(a)).double()])]
                        )
                        for a in self.model.predict(part).later
                    ]
                )
                for part in parts
            ]
        ).sum(0)
        moments = self.layout.data.sum(moments.to(self.layout.device))
        means = moments[:, :-1] / moments[:, -1:]
        return means[:, -1] - means[:, :-1].square().sum(1)

    @torch.no_grad()
    def _balanced_weight(self, parts: list[RowBatch]) -> float:
        """Returns the reconstruction's term over the KL, with the SAE as it is."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.layout.device)
        for part in parts:
            x = self.normalization.apply(part.hidden[part.is_replaced])
            x_hat = self.sae(x).x_hat
            figures = [self._terms(part, x_hat)[0], part.is_counted.sum(), (x - x_hat).square().sum(), len(x)]
            sums += torch.tensor([float(figure) for figure in figures], dtype=torch.float64, device=sums.device)
        kl, counted, squares, replaced = self.layout.data.sum(sums).tolist()
        return squares / replaced / self.normalization.total_variance * counted / kl if kl > 0 else 1.0
