"""How far outputs are from a teacher's, in closed form."""

from __future__ import annotations

import pytest
import torch

from prunella.model.divergence import kl, relative_error


def test_the_relative_error_is_that_of_each_sample() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    outputs = teacher + torch.tensor([[0.0, 5.0], [-1.0, 0.0]])
    assert relative_error(outputs, teacher).item() == pytest.approx((25 / 25 + 1 / 4) / 2)
    assert relative_error({"a": outputs, "b": [teacher]}, {"a": teacher, "b": [teacher]}).item() == pytest.approx(
        0.3125
    )
    assert relative_error(teacher[:, 1] + 1, teacher[:, 1]).item() == pytest.approx((1 / 16 + 1 / 4) / 2)
    with pytest.raises(ValueError, match="beside a teacher's"):
        relative_error(outputs, teacher[:1])
    with pytest.raises(ValueError, match="no tensor"):
        relative_error(torch.tensor([1]), torch.tensor([1]))


def test_the_divergence_of_logits_is_that_of_their_probabilities() -> None:
    ours, theirs = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    assert kl(ours, theirs, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert kl(ours, ours).item() == pytest.approx(0, abs=1e-6)
