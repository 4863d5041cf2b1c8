"""Gains and shifts of the norms."""

from ..train.parts import Change, Master, Part, trains


@trains("norms")
def norms(part: Part, *, rate: float = 3e-3) -> Change | None:
    """Train the gains and shifts of all norms: a few hundredths of a percent of the parameters.

    Args:
        rate: learning rate.
    """
    return Master(part) if "norm" in part.kinds else None
