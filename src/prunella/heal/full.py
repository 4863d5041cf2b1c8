"""Every weight."""

from ..train.parts import Change, Master, Part, trains


@trains("all")
def full(part: Part, *, outside: bool = True, rate: float = 5e-4) -> Change | None:
    """Train every parameter, the mask held: full retraining, as in iterative magnitude pruning.

    Args:
        outside: the embeddings and the head too.
        rate: learning rate.
    """
    if not outside and part.kinds & {"head", "embedding"}:
        return None
    return Master(part)
