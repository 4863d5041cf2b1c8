"""Packed networks by plans as programs use them: threads, compilers, changes, copies, batches that prove nothing."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from encoders import build
from test_plan import check, packed, plans, pruned
from torch import Tensor, nn

from prunella import InputError
from prunella.plan import network as planned
from prunella.plan.network import Planned
from prunella.sparse.conv import packed_module
from prunella.sparse.format import pack, unpack


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept however slow they are: what takes how long depends on what else runs here."""
    monkeypatch.setattr(planned, "SHORT", float("inf"))


def ids(*shape: int) -> Tensor:
    return torch.randint(5, 300, shape, generator=torch.Generator().manual_seed(0))


def test_layers_with_the_same_values_at_other_places() -> None:
    dense = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]).eval().requires_grad_(False)
    for number, layer in enumerate(dense):
        kept = torch.randperm(64 * 64, generator=torch.Generator().manual_seed(number))[:800]
        layer.weight.data = torch.zeros(64 * 64).index_fill_(0, kept, 0.05).view(64, 64)
    network, x = packed(dense), torch.randn(2, 64, 64)
    with torch.inference_mode():
        check(network(x), dense(x))
    assert None not in plans(network)


@pytest.mark.parametrize("share", ["0", "1"])
def test_layers_and_convolutions_without_weights(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELLA_MEMORY", share)
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(8, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 16, 3),
        nn.Conv2d(16, 32, 3),
        nn.Linear(12, 64),
        nn.Linear(64, 9),
    )
    dense = pruned(nn.Sequential(*parts), 0.8)
    for number in (0, 2, 4):
        dense.get_parameter(f"{number}.weight").zero_()
    network, x = packed(dense), torch.randn(2, 8, 18, 18)
    with torch.inference_mode():
        check(network(x), dense(x))
    assert None not in plans(network)


@pytest.mark.parametrize("share", ["much", "-1", "nan", "inf", ""])
def test_a_share_of_memory_that_is_none(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELLA_MEMORY", share)
    with pytest.raises(InputError, match="PRUNELLA_MEMORY"):  # when it is loaded, not when it runs
        packed(pruned(nn.Sequential(nn.Linear(32, 32)), 0.8))


class Together(nn.Module):
    """Its samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.BatchNorm2d(16, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).relu())
        return y


def test_samples_that_are_alike_do_not_prove_that_they_are_apart() -> None:
    torch.manual_seed(0)
    dense = Together().eval().requires_grad_(False)
    network = packed(dense)
    with torch.inference_mode():
        for x in (torch.zeros(8, 3, 16, 16), torch.randn(8, 3, 16, 16)):
            check(network(x), dense(x))


def test_a_weight_that_is_moved_is_noticed() -> None:
    dense = pruned(build("bert"), 0.8)
    network, x, moved = packed(dense), ids(4, 32), torch.rand(32)
    with torch.inference_mode():
        check(network(x), dense(x))
    for one in (dense, network):
        one.get_submodule("bert.encoder.layer.0.output.LayerNorm").weight.data = moved.clone()  # type: ignore[union-attr]
    with torch.inference_mode():
        check(network(x), dense(x))
    assert None not in plans(network)


def test_texts_in_pieces_whose_length_does_not_come_again_get_no_plan() -> None:
    network = packed(pruned(build("bert", "", num_hidden_layers=1), 0.8))
    forward = network.forward
    assert isinstance(forward, Planned)
    with torch.inference_mode():
        for length in (3, 4, 5, 6):
            network(ids(1, length))
        network(ids(16, 40))
        assert len(plans(network)) == 4
        network(ids(16, 40))
    assert len(plans(network)) == 5


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_layers_become_dense_without_being_rounded_again(bits: int) -> None:
    layer, conv = nn.Linear(32, 16), nn.Conv2d(32, 16, 3)
    for dense in (layer, conv):
        weight_OI = dense.weight.detach().movedim(1, -1).flatten(1).contiguous()
        module: Any = packed_module(pack(weight_OI, weight_OI.abs() > 0.02, bits, 128), dense)
        found_OI = module.weight_in(torch.float32).movedim(1, -1).flatten(1)
        assert torch.equal(found_OI, unpack(module.packed(), torch.float32))
    assert torch.equal(module.plain(torch.float32).weight, module.weight_in(torch.float32))


def test_it_compiles() -> None:
    dense = pruned(build("bert"), 0.8)
    network, x = packed(dense), ids(4, 32)
    mask = torch.ones_like(x)
    mask[1, 10:] = 0
    with torch.no_grad():
        check(network(x, attention_mask=mask), dense(x, attention_mask=mask))
        compiled = torch.compile(network, backend="eager")
        check(compiled(x, attention_mask=mask), dense(x, attention_mask=mask))


class Slow(nn.Linear):
    """Tells when it is captured, and takes its time then."""

    captured = threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            self.captured.set()
            time.sleep(0.3)
        return super().forward(x)


def test_threads_while_the_first_plan_is_made() -> None:
    torch.manual_seed(0)
    dense = (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), Slow(12, 8)).eval().requires_grad_(False)
    )
    network = packed(dense)
    network.set_submodule("3", copy.deepcopy(dense[3]))
    given = [torch.randn(1, 3, 16, 16), torch.randn(1, 3, 20, 16), torch.randn(2, 3, 16, 16)]
    wanted = [dense(x) for x in given]
    found: list[tuple[int, Tensor]] = []

    def run(number: int) -> None:
        if number:
            Slow.captured.wait()
        with torch.inference_mode():
            for _ in range(3):
                found.append((number, network(given[number])))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9  # none of them failed
    for number, out in found:
        check(out, wanted[number])
    assert None not in plans(network)
