from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunella import InputError, Pattern, keep
from prunella.pattern import _bits, pack, unpack

PATTERNS = ["unstructured", "2:4", "4:8", "1:4", "3:5", "4x1", "1x4", "2x3"]


def brute_force(score_OI: Tensor, sparsity: float, pattern: Pattern, group: str) -> Tensor:
    """The definition, one group at a time: sort by score and then by index, prune from the front."""
    rows, columns = score_OI.shape
    mask_OI = torch.ones(rows, columns, dtype=torch.bool)
    if pattern.kind == "nm":
        n, m = pattern.first, pattern.second
        cells = [[(o, [(o, i)]) for i in range(s, s + m)] for o in range(rows) for s in range(0, columns, m)]
        counts = [m - n] * len(cells)
    else:
        r, c = (pattern.first, pattern.second) if pattern.kind == "block" else (1, 1)
        units = [
            (o, [(o + a, i + b) for a in range(r) for b in range(c)])
            for o in range(0, rows, r)
            for i in range(0, columns, c)
        ]
        starts = range(0, rows, r)
        cells = [units] if group == "layer" else [[u for u in units if u[0] == s] for s in starts]
        counts = [min(round(len(g) * sparsity), len(g) - 1) for g in cells]
    for members, count in zip(cells, counts, strict=True):
        total = [sum(score_OI[o, i].item() for o, i in unit) for _, unit in members]
        for index in sorted(range(len(members)), key=lambda k: (total[k], k))[:count]:
            for o, i in members[index][1]:
                mask_OI[o, i] = False
    return mask_OI


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, float, Pattern, str]:
    pattern = Pattern.parse(draw(st.sampled_from(PATTERNS)))
    height = pattern.first if pattern.kind == "block" else 1
    rows, columns = height * draw(st.integers(1, 4)), pattern.columns * draw(st.integers(1, 5))
    # Few distinct scores, so that there are ties everywhere.
    values = draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    sparsity = draw(st.floats(0, 1, exclude_max=True))
    return torch.tensor(values).float().view(rows, columns), sparsity, pattern, draw(st.sampled_from(["layer", "row"]))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_keep_is_the_brute_force_definition_ties_by_index(case: tuple[Tensor, float, Pattern, str]) -> None:
    assert torch.equal(keep(*case), brute_force(*case))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_keep_never_prunes_a_whole_group(case: tuple[Tensor, float, Pattern, str]) -> None:
    score_OI, _, pattern, group = case
    mask_OI = keep(score_OI, 0.999999, pattern, group)
    assert mask_OI.any()
    if group == "row" and pattern.kind == "unstructured":
        assert mask_OI.any(1).all()


def test_keep_leaves_the_scores_alone() -> None:
    score_OI = torch.randn(8, 16)
    before = score_OI.clone()
    keep(score_OI, 0.5)
    assert torch.equal(score_OI, before)


def test_kept_scores_are_never_below_pruned_ones() -> None:
    score_OI = torch.randn(64, 96)
    mask_OI = keep(score_OI, 0.3)
    assert score_OI[~mask_OI].max() <= score_OI[mask_OI].min()
    assert int((~mask_OI).sum()) == round(64 * 96 * 0.3)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_prints_as_it_is_written(text: str) -> None:
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(f" {text.upper()} ") == Pattern.parse(text)


@pytest.mark.parametrize("text", ["", "2", "4:2", "4:4", "0:4", "2:0", "-1:4", "0x4", "4x0", "2:4:8", "half", "1.5:2"])
def test_what_is_no_pattern_is_refused_with_the_ones_that_are(text: str) -> None:
    with pytest.raises(InputError, match=r"none of: unstructured, N:M .* RxC"):
        Pattern.parse(text)


@pytest.mark.parametrize(("text", "share"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("3:4", 0.25)])
def test_n_of_m_counts_the_kept(text: str, share: float) -> None:
    assert Pattern.parse(text).sparsity == share
    mask_OI = keep(torch.rand(4, 16), 0.9, Pattern.parse(text))
    assert (~mask_OI).float().mean() == share


def test_free_patterns_fix_no_sparsity() -> None:
    assert Pattern.parse("unstructured").sparsity is None
    assert Pattern.parse("16x1").sparsity is None


@pytest.mark.parametrize(
    ("text", "shape", "why"),
    [
        ("2:4", (8, 6), "rows hold 6 weights, not a multiple of 4"),
        ("1x4", (8, 6), "rows hold 6 weights, not a multiple of 4"),
        ("16x1", (8, 6), "has 8 rows, not a multiple of 16"),
    ],
)
def test_a_pattern_that_does_not_divide_names_the_layer(text: str, shape: tuple[int, int], why: str) -> None:
    with pytest.raises(InputError, match=rf"layer 'mlp\.up'.*{why}.*--skip 'mlp\.up'"):
        Pattern.parse(text).check(shape, "mlp.up")


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31))
def test_bits_give_the_mask_back(rows: int, columns: int, seed: int) -> None:
    mask_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack(mask_OI)
    assert bits.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack(bits, (rows, columns)), mask_OI)
    assert torch.equal(_bits(bits)[: rows * columns].view(rows, columns), mask_OI)  # as other devices do it
    with pytest.raises(ValueError, match="bytes are no mask"):
        unpack(bits, (rows, columns + 8))
