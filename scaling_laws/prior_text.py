"""Says what a fit took from other laboratories: from which, how much of each exponent, and what it assumed."""

from typing import Any

import numpy as np

from scaling_laws.fitting import Fit
from scaling_laws.laboratories import NAMES, laboratory_prior
from scaling_laws.surface_fit import ASSUMED

_LAWS = {"learning_rate": "learning rate", "batch": "batch size"}
_EFFECTS = {"n_total": "N_total", "tokens": "D", "sparsity": "(N_active/N_total)"}


def assumed_spread(fit: Fit, which: str, name: str) -> float:
    """The standard deviation of an exponent between laboratories (with the error of their mean)."""
    left_out = set(laboratory_prior().laboratories) - set(fit.laboratories)
    _, covariance = getattr(laboratory_prior(left_out), which)
    return float(np.sqrt(covariance[NAMES.index(name), NAMES.index(name)]))


def prior_of(fit: Fit) -> dict[str, Any]:
    """The prior's laboratories, its share of each coefficient, the assumed exponents with their spread between laboratories,
    and ``text``, lines that say so."""
    assert fit.surface is not None
    shares = {law: dict(zip(NAMES, fit.surface.prior_share[law], strict=True)) for law in _LAWS}
    values = {"learning_rate": fit.surface.learning_rate, "batch": fit.surface.batch}
    assumed, told = {}, []
    for law, spoken in _LAWS.items():
        for name, effect in _EFFECTS.items():
            if shares[law][name] > ASSUMED:
                value, spread = values[law][NAMES.index(name)], assumed_spread(fit, law, name)
                assumed[f"{law}.{name}"] = {"exponent": value, "spread": spread}
                told.append(
                    f"assumed: {spoken} ~ {effect}^{value:.2f}, +- {spread:.2f} between laboratories; the runs hardly tell "
                    "it"
                )
    parts = [
        f"{spoken} " + ", ".join(f"{_EFFECTS[name]} {shares[law][name]:.0%}" for name in _EFFECTS)
        for law, spoken in _LAWS.items()
    ]
    use = "removed, except for what the runs do not tell" if fit.prior_removed else "used"
    text = [
        f"prior {use}: {', '.join(fit.laboratories)}; its share of each exponent: {'; '.join(parts)}",
        *told,
    ]
    return {
        "laboratories": fit.laboratories,
        "removed": fit.prior_removed,
        "share": shares,
        "assumed": assumed,
        "text": text,
    }
