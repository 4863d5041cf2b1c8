"""The loss that is made a few tokens at a time is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from prunella.tasks.loss import next_token_loss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 90, 50, generator=generator)
    teacher = torch.randn(3, 90, 50, generator=generator)
    return logits, teacher, torch.randint(0, 50, (3, 90), generator=generator)


def test_it_is_the_cross_entropy_and_has_its_gradient(batch: tuple[torch.Tensor, ...]) -> None:
    logits, _, ids = batch
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = next_token_loss(ours, ids)
    expected = functional.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(logits, ids), expected)


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 1.0), (0.5, 2.0)])
def test_distilled_it_is_the_mixture_with_the_divergence(
    share: float, temperature: float, batch: tuple[torch.Tensor, ...]
) -> None:
    logits, teacher, ids = batch
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = next_token_loss(ours, ids, teacher, share=share, temperature=temperature)
    student, wanted = (x[:, :-1].flatten(0, 1) / temperature for x in (plain, teacher))
    divergence = functional.kl_div(
        student.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
    )
    entropy = functional.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = (1 - share) * entropy + share * temperature**2 * divergence
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(batch: tuple[torch.Tensor, ...]) -> None:
    logits, _, ids = batch
    student = logits.clone().requires_grad_()
    loss = next_token_loss(student, ids, logits, share=1.0, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert not student.grad.any()
