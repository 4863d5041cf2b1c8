"""torch.nn.utils.prune, in and out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import prunella
from prunella import InputError

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))


def under() -> nn.Sequential:
    net = network()
    for place in (0, 2):
        torch_prune.l1_unstructured(net[place], "weight", amount=0.3)  # type: ignore[no-untyped-call]
    net(X)
    return net


@pytest.mark.parametrize("remove", [False, True])
def test_a_network_under_it_is_pruned_and_is_what_it_was_or_plain(remove: bool) -> None:
    net = under()
    given = {n: net[n].weight_mask.clone() for n in (0, 2)}
    originals = {n: net[n].weight_orig for n in (0, 2)}
    plain = under()
    for place in (0, 2):
        torch_prune.remove(plain[place], "weight")  # type: ignore[no-untyped-call]
    recipe = {"steps": ["sparsegpt"], "sparsity": 0.6, "keep_zeros": True}
    report = prunella.prune(net, recipe, calibration=X, remove=remove)
    expected = prunella.prune(plain, recipe, calibration=X)
    assert report.layers == expected.layers
    assert report.layers[0].before == pytest.approx(0.3, abs=0.01)  # its masks count as pruned
    for place in (0, 2):
        weight = net[place].weight
        assert torch.equal(weight, plain[place].weight)
        assert not weight[given[place] == 0].any()  # and stay so
        assert torch_prune.is_pruned(net[place]) != remove  # type: ignore[no-untyped-call]
        if remove:
            assert net[place].weight is originals[place]
            assert set(dict(net[place].named_buffers())) == set()
        else:
            assert net[place].weight_orig is originals[place]  # which an optimizer has
            assert torch.equal(net[place].weight_mask, (weight != 0).float())
    assert not torch_prune.is_pruned(net[5])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(net(X), plain(X))


def test_a_run_that_fails_gives_back_what_was_there() -> None:
    net = under()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(prunella.PrunellaError):
        prunella.prune(net, {"steps": ["wanda"], "skip": ["nothing"]}, calibration=X)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert torch.equal(before["0.weight_mask"], after["0.weight_mask"])
    assert torch.equal(before["0.weight_orig"] * before["0.weight_mask"], after["0.weight_orig"])


@pytest.mark.parametrize("way", ["directory", "report", "layers", "parameters"])
def test_masks_are_given_to_it(way: str, tmp_path: Path) -> None:
    net = network()
    report = prunella.prune(net, {"steps": ["wanda"], "skip": ["5"]}, calibration=X, output=tmp_path / "out")
    weights = {n: net[n].weight.detach().clone() for n in (0, 2, 5)}
    given: Any = {
        "directory": tmp_path / "out",
        "report": report,
        "layers": prunella.read_masks(tmp_path / "out"),
        "parameters": {f"{n}.weight": weights[n] != 0 for n in (0, 2)},
    }[way]
    assert prunella.to_torch_prune(net, given) is net
    for place in (0, 2):
        assert torch.equal(net[place].weight_mask, (weights[place] != 0).float())
        assert torch.equal(net[place].weight, weights[place])
    assert not torch_prune.is_pruned(net[5])  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        net(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    net(X)
    assert not net[0].weight[weights[0] == 0].any()
    assert not torch.equal(net[0].weight, weights[0])
    with pytest.raises(InputError, match=r"is under torch\.nn\.utils\.prune already"):
        prunella.to_torch_prune(net, given)


def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    net = network()
    for masks, said in [
        ({"9": torch.ones(3, 3).bool()}, "'9' is no layer of this network"),
        ({"5": torch.ones(3, 3).bool()}, r"the mask of '5' is \(3, 3\), not \(5, 32\)"),
        ({"5": torch.zeros(5, 32).bool()}, "prunes weights of a Linear that are not zero"),
    ]:
        with pytest.raises(InputError, match=said):
            prunella.to_torch_prune(net, masks)
    assert not torch_prune.is_pruned(net)  # type: ignore[no-untyped-call]


def test_amounts_are_shares_of_all_weights_and_not_of_what_is_left() -> None:
    theirs = nn.Linear(40, 25)
    for _ in range(3):
        torch_prune.l1_unstructured(theirs, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    assert (theirs.weight == 0).float().mean() == 0.875  # the trap
    ours = nn.Sequential(nn.Linear(40, 25), nn.Linear(25, 7))
    recipe = {"steps": ["magnitude"], "allocate": "global", "keep_zeros": True}
    for sparsity in (0.5, 0.5, 0.5, 0.61):
        prunella.prune(ours, {**recipe, "sparsity": sparsity}, calibration=torch.randn(4, 40))
        zeros = sum(int((layer.weight == 0).sum()) for layer in ours)  # type: ignore[operator]
        assert abs(zeros - sparsity * 1175) <= 0.5


def test_a_network_is_copied_after_a_forward_pass() -> None:
    """torch's own cannot be: its weight is no leaf then; that of a removed one can."""
    net = under()
    prunella.prune(net, {"steps": ["magnitude"]}, calibration=X, remove=True)
    net(X)
    copied: Tensor = copy.deepcopy(net)[0].weight
    assert torch.equal(copied, net[0].weight)
