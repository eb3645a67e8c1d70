"""Which SAEs scripts/bench_quality trains, and the file of their figures, from which a run that was ended goes on."""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench_peers import ROOT, WorkerProcess
from scripts.bench_quality_data import Shape
from scripts.bench_quality_measure import measure

__all__ = [
    "ARCHITECTURES",
    "FIRST_COEFFICIENTS",
    "LIBRARIES",
    "Results",
    "Setting",
    "Study",
    "Workers",
    "base_lr",
    "merit",
    "seconds_of",
]

WORKER = ROOT / "scripts" / "bench_quality_worker.py"
LIBRARIES = ("saekit", "sae-lens", "dictionary-learning", "eai-sparsify")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "topk": LIBRARIES,
    "batchtopk": LIBRARIES[:3],
    "jumprelu": LIBRARIES[:3],
    "gated": LIBRARIES[:3],
    "relu": LIBRARIES[:3],
    "matryoshka_batchtopk": LIBRARIES[:3],
    "matryoshka_topk": LIBRARIES[:1],
}
"""Who has which."""
PENALIZED = {"jumprelu", "gated", "relu"}
TRANSCODERS = {"transcoder", "skip_transcoder"}
TUNING_SEED = 0
"""Of the trainings that choose a peer's settings; on real activations the best of them counts as one of its seeds."""
LR_FACTORS = {"sae-lens": (1.0, 3.0, 10.0), "dictionary-learning": (1.0, 3.0, 10.0), "eai-sparsify": (0.1, 0.3, 1.0)}
"""Tried in multiples of the library's own rate: those of Adam are for trainings a hundred times as long."""
FIRST_COEFFICIENTS = {
    ("sae-lens", "jumprelu"): 2.0,
    ("sae-lens", "gated"): 2.0,
    ("sae-lens", "relu"): 2.0,
    ("dictionary-learning", "gated"): 0.03,
    ("dictionary-learning", "relu"): 0.03,
}
"""Where the search for the wanted L0 begins; who is not here takes a k or a target L0."""
L0_TOLERANCE = 0.2
"""Of the search, in the logarithm of L0; calibration does the rest."""
MAX_SEARCH = 4


class Setting(NamedTuple):
    """What is chosen for a peer."""

    lr: float | None
    coefficient: float | None


def base_lr(library: str, d_sae: int) -> float:
    """Returns the library's own learning rate for so many features."""
    if library == "eai-sparsify":
        return 5e-3 / math.sqrt(d_sae / 2**14)
    if library == "sae-lens":
        return 3e-4
    return 2e-4 / math.sqrt(d_sae / 2**14)


def merit(row: Mapping[str, Any], k: int) -> float:
    """Returns F1 where there is a truth, else less FVU; far less for an SAE that cannot have the wanted L0."""
    has_l0 = abs(math.log(max(row["l0"], 1e-3) / k)) < L0_TOLERANCE
    figure: float = row["f1"] if "f1" in row else -row["fvu"]
    return figure - (0 if has_l0 else 100)


def seconds_of(shape: Shape, d_in: int) -> float:
    """Returns about how long one thread trains and measures one SAE of a peer, by its five dense products a step.

    Measured: 48 billion operations a second on one thread of an AMD EPYC, and 10 ms a step and 5 s an SAE besides.
    """
    return shape.steps * (10 * shape.batch * d_in * shape.d_sae / 48e9 + 0.01) + 5


class Results:
    """Figures of trained SAEs, one line of JSON each, in the order of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            # A line that was cut off when the program was killed is trained again.
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            self.rows = [json.loads(line) for line in lines]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def find(self, **keys: object) -> list[dict[str, Any]]:
        """Returns the rows with these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in keys.items())]

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Workers:
    """One process for each library, started when it is first needed."""

    def __init__(self, peer_python: Callable[[], Path], threads: int) -> None:
        self._peer_python = peer_python
        self._threads = threads
        self._running: dict[str, WorkerProcess] = {}

    def ask(self, library: str, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a job."""
        return self._worker(library).ask(json.dumps(job))

    def version(self, library: str) -> str:
        """Returns the library's version."""
        return str(self._worker(library).started["version"])

    def close(self) -> None:
        """Lets all end."""
        for worker in self._running.values():
            worker.close()

    def _worker(self, library: str) -> WorkerProcess:
        if library not in self._running:
            is_ours = library == LIBRARIES[0]
            python = Path(sys.executable) if is_ours else self._peer_python()
            command = [str(python), str(WORKER), library]
            paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} if is_ours else {"PYTHONPATH": ""}
            self._running[library] = WorkerProcess(library, command, threads=self._threads, environment=paths)
        return self._running[library]


class Study:
    """One data set and everything that is trained on it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        shape: Shape,
        results: Results,
        *,
        workers: Workers,
        num_rates: int,
        tuned_on: "Study | None" = None,
        sites: int = 1,
        site: int | None = None,
        say: Callable[[str], None],
    ) -> None:
        """Trains nothing yet.

        Args:
            name: planted or real.
            folder: with the tokens.
            shape: sizes.
            results: of earlier calls too.
            workers: train.
            num_rates: learning rates that are tried for architectures other than TopK, TopK's best one first; with 1, penalized
                ones try one or two more around it.
            tuned_on: where peers' settings are chosen; None = here.
            sites: hook points side by side in a row of the tokens.
            site: the only one of them that counts; None = all.
            say: for progress.
        """
        self.name = name
        self.folder = folder
        self.shape = shape
        self.results = results
        self.workers = workers
        self.say = say
        self.num_rates = num_rates
        self.tuned_on = tuned_on
        self.places: dict[str, Any] = {"sites": sites, "site": site}
        self._chosen: dict[tuple[str, str], Setting] = {}

    def run(self, library: str, arch: str, seed: int) -> None:
        """Chooses a peer's settings where they are not yet chosen, and trains one SAE."""
        row = self.train(library, arch, seed, self.choose(library, arch))
        self.say(f"{self.name} {arch} {library} seed {seed}: {self._shown(row)}")

    def choose(self, library: str, arch: str) -> Setting:
        """Returns the learning rate with the best figure, and with it the coefficient that gave nearly the wanted L0.

        Each learning rate has a coefficient of its own.
        """
        if library == LIBRARIES[0]:
            return Setting(None, None)
        if self.tuned_on is not None:
            return self.tuned_on.choose(library, arch)
        if (library, arch) not in self._chosen:
            rates = self._rates(library, arch)
            best = max((self._search(library, arch, lr) for lr in rates), key=self._merit)
            # The best rate is no best one while a larger one might be better.
            while arch in {"topk", *TRANSCODERS} and best["lr"] == rates[-1]:
                rates.append(float(f"{3 * rates[-1]:.4g}"))
                best = max(best, self._search(library, arch, rates[-1]), key=self._merit)
            # Nor is it while a smaller one might be: a transcoder's scale is that of what it predicts.
            while arch in TRANSCODERS and best["lr"] == rates[0]:
                rates.insert(0, float(f"{rates[0] / 3:.4g}"))
                best = max(best, self._search(library, arch, rates[0]), key=self._merit)
            if arch in PENALIZED and self.num_rates == 1:
                # Penalties may want another rate than top-k does: a larger one, or else a smaller one.
                larger = self._search(library, arch, float(f"{3 * rates[0]:.4g}"))
                if self._merit(larger) > self._merit(best):
                    best = larger
                else:
                    best = max(best, self._search(library, arch, float(f"{0.3 * rates[0]:.4g}")), key=self._merit)
            self._chosen[library, arch] = Setting(best["lr"], best["coefficient"])
        return self._chosen[library, arch]

    def _rates(self, library: str, arch: str) -> list[float]:
        """Learning rates to try: around the library's own for TopK and transcoders, from TopK's best one downwards for others."""
        if arch in {"topk", *TRANSCODERS}:
            own = base_lr(library, self.shape.d_sae)
            return [float(f"{factor * own:.4g}") for factor in LR_FACTORS[library]]
        best = self.choose(library, "topk").lr
        assert best is not None
        return [float(f"{best * factor:.4g}") for factor in (1.0, 0.3)[: self.num_rates]]

    def train(self, library: str, arch: str, seed: int, setting: Setting) -> dict[str, Any]:
        """Returns the figures of one SAE, trained if it is not among the results."""
        key = {"data": self.name, "library": library, "arch": arch, "seed": seed, **setting._asdict()}
        for row in self.results.find(**key):
            return row
        shape = self.shape
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            job = {"arch": arch, "seed": seed, "data": str(self.folder), "out": out, **setting._asdict()}
            job |= {"d_sae": shape.d_sae, "k": shape.k, "batch": shape.batch, "steps": shape.steps} | self.places
            answer = self.workers.ask(library, job)
            is_transcoder = arch in TRANSCODERS
            figures = measure(
                Path(answer["sae"]), self.folder, answer, k=shape.k, is_transcoder=is_transcoder, **self.places
            )
        row = {**key, "seconds": answer["seconds"], "version": self.workers.version(library), **figures}
        self.results.add(row)
        return row

    def _search(self, library: str, arch: str, lr: float | None) -> dict[str, Any]:
        """The row of the coefficient whose L0 is nearest to the wanted one, found by steps in the logarithm."""
        coefficient = FIRST_COEFFICIENTS.get((library, arch))
        rows: list[dict[str, Any]] = []
        for _ in range(MAX_SEARCH):
            row = self.train(library, arch, TUNING_SEED, Setting(lr, coefficient))
            self.say(f"{self.name} {arch} {library} lr {lr:.2g} coefficient {coefficient}: {self._shown(row)}")
            rows.append(row)
            if coefficient is None or abs(self._excess(row)) < L0_TOLERANCE:
                break
            coefficient = self._next(rows)
        return min(rows, key=lambda row: abs(self._excess(row)))

    def _next(self, rows: list[dict[str, Any]]) -> float:
        """Where the logarithms of L0 and coefficient say that the wanted L0 is, at most a factor of 10 away."""
        ordered = sorted(rows, key=lambda row: abs(self._excess(row)))
        slope = -1.0
        if len(ordered) > 1:
            change = math.log(ordered[0]["coefficient"] / ordered[1]["coefficient"])
            slope = (self._excess(ordered[0]) - self._excess(ordered[1])) / change if change else slope
            slope = min(slope, -0.2)
        step = max(-2.3, min(2.3, -self._excess(ordered[0]) / slope))
        return float(f"{ordered[0]['coefficient'] * math.exp(step):.4g}")

    def _excess(self, row: dict[str, Any]) -> float:
        return math.log(max(row["raw_l0"], 1e-3) / self.shape.k)

    def _merit(self, row: dict[str, Any]) -> float:
        return merit(row, self.shape.k)

    @staticmethod
    def _shown(row: dict[str, Any]) -> str:
        found = f", F1 {row['f1']:.3f}, MCC {row['mcc']:.3f}" if "f1" in row else ""
        return (
            f"L0 {row['raw_l0']:.1f} -> {row['l0']:.1f}, FVU {row['raw_fvu']:.4f} -> {row['fvu']:.4f}, "
            f"dead {row['dead']:.3f}{found}, {row['seconds']:.0f} s"
        )
