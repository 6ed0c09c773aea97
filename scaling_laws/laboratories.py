"""What published sweeps say about the best learning rate and batch size, as a prior for a table with few runs.

Each laboratory's law, log y = value + n_total log(N / 1e9) + tokens log(D / 1e10) + sparsity log(N_active / N_total), is one
draw from a common Gaussian: its mean is estimated from what the laboratories report (generalized least squares), and
`BETWEEN` is how much laboratories differ. A new laboratory is one more draw: the prior is the mean, with the spread between
laboratories plus the error of the mean. The spread does not depend on the runs, so its weight falls as they come in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from scaling_laws.counted import counted
from scaling_laws.errors import InputError
from scaling_laws.surface import Surface, without_shape

# Standard deviations between laboratories: of the value (in log) and of the exponents of N, D and sparsity. Published
# exponents of N in the learning rate lie from -0.40 to -0.81, and values at the reference within a factor of 5.
BETWEEN = {"learning_rate": (0.6, 0.2, 0.2, 0.3), "batch": (0.6, 0.15, 0.15, 0.3)}
# Exponents (a, b) of N and D in fits of E + A/N^a + B/D^b. Those of laws without E, such as Kaplan's, mean something else.
LOSS_EXPONENTS = {
    "Hoffmann et al., fitted again (arXiv 2404.10102)": (0.348, 0.366),
    "Muennighoff et al. (arXiv 2305.16264)": (0.353, 0.353),
    "Krajewski et al. (arXiv 2402.07871)": (0.115, 0.147),
}
LOSS_BETWEEN = (0.6, 0.5)  # their standard deviations, in log
NAMES = ("value", "n_total", "tokens", "sparsity")
WIDER = 30.0  # a prior this many times wider than laboratories differ says nothing
_TERMS = dict(zip(NAMES, np.eye(4), strict=True)) | {"compute": np.array([0.0, 1.0, 1.0, 0.0])}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one laboratory reports. ``value`` is the learning rate, or the batch size in tokens, at N 1e9 and D 1e10.
    ``compute`` is the sum of both exponents, which a law in compute alone gives (its N and D grow together)."""

    laboratory: str
    source: str
    learning_rate: dict[str, float]
    batch: dict[str, float]


REPORTS = (
    Report(  # 1.79 N^-0.713 D^0.307 and 0.58 D^0.571; no effect of sparsity at equal N_total
        laboratory="Step Law",
        source="arXiv 2503.04715",
        learning_rate={"value": 8.05e-4, "n_total": -0.713, "tokens": 0.307, "sparsity": 0.0},
        batch={"value": 2.97e5, "n_total": 0.0, "tokens": 0.571, "sparsity": 0.0},
    ),
    Report(  # equation 1: 0.3118 C^-0.1250 and 0.2920 C^0.3271, here at C = 6 N D
        laboratory="DeepSeek LLM",
        source="arXiv 2401.02954",
        learning_rate={"value": 1.05e-3, "compute": -0.250},
        batch={"value": 8.60e5, "compute": 0.654},
    ),
    Report(  # least squares in logs over the 18 best runs (N 4.6e7 to 2.9e9, D 1.3e8 to 1.0e9) in its table
        laboratory="Lingle",
        source="lucaslingle.substack.com/p/scaling-laws-for-optimal-lr-and-batch-1d4",
        learning_rate={"value": 1.32e-3, "n_total": -0.477, "tokens": 0.262},
        batch={"value": 5.74e5, "n_total": 0.050, "tokens": 0.574},
    ),
    Report(  # 0.003239 - 0.0001395 ln N at a batch of 0.5e6 tokens: value and slope at 1e9
        laboratory="Kaplan et al.",
        source="arXiv 2001.08361",
        learning_rate={"value": 3.48e-4, "n_total": -0.40},
        batch={},
    ),
    Report(  # exp(8.39 - 0.81 ln N_active - 0.25 ln E), here with E = 1
        laboratory="Ludziejewski et al.",
        source="arXiv 2502.05172",
        learning_rate={"value": 2.25e-4, "n_total": -0.81},
        batch={},
    ),
    Report(  # the best batch is a power of D alone
        laboratory="Cerebras",
        source="arXiv 2505.13738",
        learning_rate={},
        batch={"n_total": 0.0},
    ),
    Report(  # B ~ D^0.45, with Scion; its learning rates are not AdamW's
        laboratory="Filatov et al.",
        source="arXiv 2510.03871",
        learning_rate={},
        batch={"tokens": 0.45},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Means and covariances of (value in log, exponents of N_total, D and sparsity), for learning rate and batch size.
    ``laboratories`` are those that it was made from. ``loss``: the loss law's exponents of N and D, which vary by
    `LOSS_BETWEEN`."""

    learning_rate: tuple[np.ndarray, np.ndarray]
    batch: tuple[np.ndarray, np.ndarray]
    laboratories: tuple[str, ...]
    loss: tuple[float, float]
    removed: bool = False

    def drawn(self, rng: np.random.Generator) -> "Prior":
        """The same prior around another draw of its mean. Refits that each take another draw show what the prior leaves
        open, where the runs say nothing."""
        drawn = [(rng.multivariate_normal(mean, cov), cov) for mean, cov in (self.learning_rate, self.batch)]
        a, b = np.array(self.loss) * np.exp(rng.spawn(1)[0].normal(0, LOSS_BETWEEN))
        return replace(self, learning_rate=drawn[0], batch=drawn[1], loss=(float(a), float(b)))

    def widened(self, told: np.ndarray) -> "Prior":
        """If the prior was removed: it says nothing about the coefficients that the table tells (a mask). A coefficient that
        the table does not tell has no other source and keeps it."""
        if not self.removed:
            return self
        factor = np.where(told, WIDER, 1.0)
        wide = [(mean, cov * np.outer(factor, factor)) for mean, cov in (self.learning_rate, self.batch)]
        return replace(self, learning_rate=wide[0], batch=wide[1])


def _combined(reports: Iterable[dict[str, float]], between: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of the law of one more laboratory."""
    spread = np.diag(np.square(between))
    precision, pull = np.zeros((4, 4)), np.zeros(4)
    for report in reports:
        if not report:
            continue
        rows = np.stack([_TERMS[name] for name in report])
        values = np.array([np.log(value) if name == "value" else value for name, value in report.items()])
        weight = np.linalg.inv(rows @ spread @ rows.T)
        precision += rows.T @ weight @ rows
        pull += rows.T @ weight @ values
    # What nobody reports (sparsity without Step Law) is 0, as uncertain as laboratories differ.
    for place in np.flatnonzero(~precision.any(axis=0)):
        precision[place, place] = 1 / spread[place, place]
    error = np.linalg.inv(precision)
    return error @ pull, spread + error


def laboratory_prior(without: Iterable[str] = (), *, removed: bool = False) -> Prior:
    """The prior from all laboratories but those named in ``without``. A sweep must not be judged with a prior that was made
    from it. Raises InputError for an unknown name."""
    left_out = set(without)
    known = [report.laboratory for report in REPORTS]
    if unknown := sorted(left_out - set(known)):
        raise InputError(f"--without-laboratory {unknown[0]}: expected one of {', '.join(known)}")
    kept = [report for report in REPORTS if report.laboratory not in left_out]
    rate = _combined((report.learning_rate for report in kept), BETWEEN["learning_rate"])
    batch = _combined((report.batch for report in kept), BETWEEN["batch"])
    for what, reports in (("learning rate", [r.learning_rate for r in kept]), ("batch size", [r.batch for r in kept])):
        terms = {name for report in reports for name in report}
        if not ({"value", "n_total", "tokens"} <= terms or {"value", "n_total", "compute"} <= terms):
            raise InputError(
                f"--without-laboratory leaves no published law for the {what} "
                f"({counted(len(kept), 'laboratory remains', 'laboratories remain')}): leave out fewer"
            )
    a, b = np.exp(np.log(list(LOSS_EXPONENTS.values())).mean(0))
    return Prior(
        learning_rate=rate,
        batch=batch,
        laboratories=tuple(report.laboratory for report in kept),
        loss=(float(a), float(b)),
        removed=removed,
    )


def laboratories_law() -> Surface:
    """The laws that are expected before any run: the mean of all laboratories. The surface has no shape."""
    prior = laboratory_prior()
    return without_shape(prior.learning_rate[0], prior.batch[0])
