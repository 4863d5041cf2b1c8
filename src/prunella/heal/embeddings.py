"""The embeddings."""

from ..train.parts import Change, Master, Part, trains


@trains("embeddings")
def embeddings(part: Part, *, rate: float = 1e-3) -> Change | None:
    """Train the embeddings; where the head is the same tensor, it too.

    Args:
        rate: learning rate.
    """
    return Master(part) if "embedding" in part.kinds else None
