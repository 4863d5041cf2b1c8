import numpy as np
import pytest
import torch

from prunella.histogram import BINS, SAMPLE, SPAN, counted, histograms


def counts(text):
    return np.array([int(n) for n in text.split()])


def test_small_layers_are_counted_whole_as_numpy_counts_them():
    torch.manual_seed(0)
    dense, mask = torch.randn(24, 40), torch.rand(24, 40) > 0.5
    weight = (dense * 1.1).masked_fill(~mask, 0)
    found = histograms(counted(dense, weight, mask))
    assert found["rms"] == pytest.approx(dense.square().mean().sqrt().item())
    limit = SPAN * found["rms"]
    for name, values in (("dense", dense.flatten()), ("pruned", weight[mask])):
        expected, _ = np.histogram(values.clamp(-limit, limit).double().numpy(), BINS, (-limit, limit))
        assert np.abs(counts(found[name]) - expected).sum() <= 2  # a weight on an edge may fall to either side


@pytest.mark.parametrize("shape", [(1024, 1024), (513, 512), (64, 4096)])
def test_large_layers_are_counted_on_a_sample_that_sees_every_column(shape):
    dense = torch.arange(shape[1]).repeat(shape[0], 1) / shape[1] - 0.5  # a weight says its column
    found = histograms(counted(dense.bfloat16(), dense, torch.ones(shape, dtype=torch.bool)))
    seen = counts(found["dense"])
    assert SAMPLE // 2 <= seen.sum() <= SAMPLE
    inside = seen[seen > 0]
    assert inside.max() < 1.5 * np.median(inside)


def test_pruned_weights_are_not_counted_and_far_ones_fall_into_the_last_bins():
    dense = torch.full((8, 8), 0.01)
    dense[0, 0], dense[0, 1] = 50.0, -50.0
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, :2] = True
    found = histograms(counted(dense, dense * mask, mask))
    assert counts(found["dense"]).sum() == 64
    pruned = counts(found["pruned"])
    assert (pruned[0], pruned[-1], pruned.sum()) == (1, 1, 2)


def test_a_layer_of_zeros_has_a_histogram():
    found = histograms(counted(torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)))
    assert found["rms"] == 0
    assert counts(found["dense"]).sum() == 16
