from collections.abc import Callable
from typing import Any

import torch


def test_the_score_is_the_share_of_row_and_column_times_the_root_of_the_norm(case: Callable[..., Any]) -> None:
    given = case()
    after = given.apply("ria").layer
    size_OI = given.layer.weight_OI.abs()
    norm_I = given.x_TI.square().mean(0).sqrt()
    score_OI = (size_OI / size_OI.sum(1, keepdim=True) + size_OI / size_OI.sum(0)) * norm_I.sqrt()
    assert score_OI[after.mask_OI].min() > score_OI[~after.mask_OI].max()
    assert torch.equal(after.weight_OI, given.layer.weight_OI * after.mask_OI)


def test_group_row_prunes_the_same_number_in_every_row(case: Callable[..., Any]) -> None:
    assert set(case().apply("ria", group="row").zeros_O.tolist()) == {16}
    assert len(set(case().apply("ria").zeros_O.tolist())) > 1


def test_rows_and_columns_of_zeros_are_no_trouble(case: Callable[..., Any]) -> None:
    given = case()
    given.layer.weight_OI[3] = 0
    given.layer.weight_OI[:, 5] = 0
    after = given.apply("ria")
    assert after.zeros_O.sum() == given.layer.weight_OI.numel() // 2
    assert not after.layer.mask_OI[3].any()
    assert not after.layer.mask_OI[:, 5].any()
