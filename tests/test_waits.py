"""How often the host waits for the device, and what crosses over: counted on a simulated one (accelerator.py)."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import accelerator
import pytest
import tiny
import torch
from healing import SETTINGS, settings
from torch import Tensor, nn

import prunella
from prunella import NumericalError, keep, machine, waits
from prunella.allocate import allocations
from prunella.fast import _sums_in_float32, add_gram
from prunella.heal import groups
from prunella.layers import Slot
from prunella.lenses import Chunks
from prunella.lenses.product import Multiplied
from prunella.linalg import inverse_factor
from prunella.pattern import pack, unpack
from prunella.registry import steps
from prunella.steps import alps, swap
from prunella.tasks.loss import next_token_loss
from prunella.types import Pattern, Stats
from prunella.watch import Watch

pytestmark = pytest.mark.usefixtures("sim")

# Before the first block and behind the last, by file: how the model calls its blocks is recorded and tried.
BEGINNING = {"tasks/text.py", "examine.py", "trees.py", "calls.py", "standins.py"}
BEST = ["admm", "update", "reconstruct"]
LAYERS = 7  # of a block


def traffic(steps: list[Any], blocks: int, **recipe: Any) -> accelerator.Traffic:
    """Of a run on a model in memory there, whose blocks are all alike."""
    network = tiny.build(num_hidden_layers=blocks).to("sim")
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data[:, ::5] = 0  # some zeros, to keep
    ids = torch.randint(5, tiny.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    with accelerator.count() as counted:
        prunella.prune(network, {"steps": steps, **recipe}, calibration=ids)
    return counted


def of_a_block(steps: list[Any], **recipe: Any) -> Counter[str]:
    """How often the host waits for one block more, by file."""
    two, three = (traffic(steps, blocks, **recipe) for blocks in (2, 3))
    more: Counter[str] = Counter()
    for place, count in (Counter(three.places) - Counter(two.places)).items():
        more[place.partition(":")[0]] += count
    return Counter({place: count for place, count in more.items() if place not in BEGINNING})


# Steps whose loops are over when nothing changes any more, which is looked at after every so many rounds.
LOOKS = {"swap": "steps/swap.py", "alps": "steps/alps.py"}


@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_waits_once_in_a_block_or_after_many_rounds(name: str) -> None:
    own = [name] if steps[name].prunes else ["wanda", name]
    found = of_a_block(own, order="layer" if steps[name].per_layer else "block")
    assert found.pop("solver.py") == 1  # what became of its layers is told, see `tell`
    if name in LOOKS:
        assert found.pop(LOOKS[name]) <= LAYERS * {"swap": 100 // swap.LOOK, "alps": 300 // alps.LOOK}[name]
    assert not found


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize(
    "steps",
    [
        ["sparsegpt"],
        [{"sparsegpt": {"order": "activation"}}],
        ["wanda", "gptq"],
        ["admm", "update"],
        ["align", "wanda"],
        BEST,
    ],
    ids=str,
)
def test_a_block_waits_once_for_all_that_is_asked_of_it(steps: list[Any], order: str) -> None:
    if steps == BEST and order == "layer":
        pytest.skip("it runs whole blocks")
    for pattern in ("unstructured", "2:4"):
        assert of_a_block(steps, order=order, pattern=pattern) == {"solver.py": 1}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_zeros_that_stay_are_not_asked_about(pattern: str) -> None:
    assert of_a_block(["wanda"], keep_zeros=True, pattern=pattern) == {"solver.py": 1}


# Of a block more: once when it is pruned, and what an allocation asks before.
ALLOCATIONS = {
    "owl": {"solver.py": 2},  # its dense layers are looked at in a stream of its own
    "dlp": {"solver.py": 2},
    "probe": {"solver.py": 2, "evaluate/perplexity.py": 1},  # it is pruned in a trial, and what follows is measured
}


@pytest.mark.parametrize("name", sorted(allocations))
def test_every_allocation_waits_a_few_times_in_a_block(name: str) -> None:
    found = of_a_block(["wanda"], allocate=name, order="block")
    if name == "ramp":  # up to eight trials of the whole model
        assert 1 <= found.pop("solver.py") <= 9
        assert not found
    else:
        assert found == ALLOCATIONS.get(name, {"solver.py": 1})


def test_the_tokens_of_all_experts_are_counted_together(sim: torch.device) -> None:
    """Where a batched product shows them, with zeros in place of those of others."""
    x_ETI = torch.randn(3, 6, 8) * (torch.rand(3, 6, 1) > 0.5)
    weight_EOI = torch.randn(3, 4, 8)
    for device in (torch.device("cpu"), sim):
        module = nn.Module()
        module.weight = nn.Parameter(weight_EOI.to(device))
        lens = Multiplied(4, 8)
        slots = {str(e): Slot(str(e), module, "weight", lens, e) for e in range(3)}
        seen: dict[str, list[Tensor]] = {}

        def see(name: str, rows: Chunks, same: bool, seen: dict[str, list[Tensor]] = seen) -> None:
            seen[name] = list(rows())

        watch = Watch(slots, see)
        with accelerator.count() as counted, watch:
            there = x_ETI.to(device)
            torch.bmm(there, module.weight.mT)
        assert sum(count for place, count in counted.places.items() if place.startswith("watch.py")) <= 1
        for e, x_TI in enumerate(x_ETI):
            assert torch.equal(torch.cat(seen[str(e)]).cpu(), x_TI[x_TI.any(1)])


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pruned models, one of them with biases. Read only."""
    found = {}
    for architecture in ("llama", "qwen2"):
        path = tmp_path_factory.mktemp("waits") / architecture
        tiny.build(architecture, max_position_embeddings=128).save_pretrained(path)
        tiny.write_tokenizer(path)
        found[architecture] = path.with_name(f"{architecture}-halved")
        recipe = {**SETTINGS, "heal": {}, "steps": ["magnitude"]}
        prunella.prune(path, recipe, output=found[architecture])
    return found


@pytest.mark.parametrize("way", ["retrain", "reconstruct"])
@pytest.mark.parametrize(
    "name",
    ["mask-lora", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(groups) if name != "mask-lora")],
)
def test_every_healing_method_waits_once_in_a_step(
    name: str, way: str, halved: dict[str, Path], tmp_path: Path
) -> None:
    """Of the whole network; blocks are fitted without a look."""
    if way == "reconstruct" and name in ("embeddings", "head", "lora"):
        pytest.skip("they are not in a block, or apart from it")
    source = halved["qwen2" if name == "biases" else "llama"]
    more = {"tokens": 512} if way == "retrain" else {"epochs": 2}
    found = []
    for extra in ({}, more):
        recipe = settings(train=[name], way=way, **{"tokens": 256, "evaluations": 1, **extra})
        with accelerator.count() as counted:
            prunella.heal(source, {**recipe, "device": "sim"}, output=tmp_path / f"{len(found)}")
        found.append(counted)
    waits = Counter(place.partition(":")[0] for place in (found[1].places - found[0].places).elements())
    # What else: the network itself asks, at each pass, whether its tokens are of several texts.
    assert waits == ({"train/loop.py": 2, "tasks/text.py": 4} if way == "retrain" else {})
    assert found[1].to_host - found[0].to_host < 64  # losses
    assert found[1].to_device - found[0].to_device <= 2 * 4 * 32 * 8 + 64  # ids


def test_what_leaves_the_device_is_masks_as_bits_and_little_else() -> None:
    two, three = (traffic(["sparsegpt"], blocks) for blocks in (2, 3))
    weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    words = 7 * (2 * 64 * 4 + 4 * 8 + 2 * 4) + 100 * 4  # counts for the charts, errors, shares; what was demanded
    recorded = 4 * 16 * 32  # a block more is tried before the run
    ids = 4 * 16 * 8
    assert three.to_host - two.to_host <= weights // 8 + words + recorded
    assert three.to_device - two.to_device <= 2 * ids  # the model is there already; a block more is tried


def test_dense_layers_and_what_is_left_out_are_counted_together() -> None:
    counted = traffic(["wanda"], 3, skip=["q_proj", "model.layers.2", "model.layers.0"])
    assert sum(n for place, n in counted.places.items() if place.startswith(("solver.py", "outcome.py"))) == 3


@pytest.mark.parametrize("pinned", [False, True])
def test_from_file_to_file_weights_go_in_and_out_once(
    pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory can be pinned nothing waits for those that go out, but the thread that writes them."""
    if pinned:
        made: list[Tensor] = []

        def room(like: Tensor) -> Tensor:
            made.append(torch.empty(like.shape, dtype=like.dtype))
            return made[-1]

        monkeypatch.setattr("prunella.waits.pins", lambda device: True)
        monkeypatch.setattr("prunella.waits.pinned", room)
        monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: any(tensor is one for one in made))

    def run(blocks: int) -> accelerator.Traffic:
        source = tmp_path / f"{blocks}"
        tiny.build(max_position_embeddings=128, num_hidden_layers=blocks).save_pretrained(source)
        tiny.write_tokenizer(source)
        with accelerator.count() as counted:
            recipe = {**SETTINGS, "heal": {}, "steps": ["wanda"], "device": "sim"}
            prunella.prune(source, recipe, output=tmp_path / f"{blocks}.out")
        return counted

    two, three = run(2), run(3)
    size = sum(p.numel() * 4 for p in tiny.build().model.layers[0].parameters())
    assert three.to_device - two.to_device < 4 * size  # evaluated twice, recorded, pruned
    assert three.to_host - two.to_host < 1.5 * size + 8192
    more = Counter(place.partition(":")[0] for place in (three.places - two.places).elements())
    assert {place: n for place, n in more.items() if place not in BEGINNING} == {
        "solver.py": 1,
        **({} if pinned else {"store/dense.py": 1}),
    }


# ---------------------------------------------------------------------------------------------------------
# What is put off, and asked in the end


def test_what_does_not_hold_is_said_in_the_end_and_before_what_came_of_it(sim: torch.device) -> None:
    yes, no = torch.ones((), dtype=torch.bool, device=sim), torch.zeros((), dtype=torch.bool, device=sim)

    def run(*demands: tuple[Tensor, str]) -> None:
        with waits.together():
            for good, message in demands:
                waits.demand(good, partial(NumericalError, message))
            raise ValueError("what came of it")

    with pytest.raises(NumericalError, match="first"):
        run((yes, "none"), (no, "first"), (no, "second"))
    with pytest.raises(NumericalError, match="now"):
        run((no.cpu(), "now"), (no, "first"))
    with pytest.raises(ValueError, match="what came of it"):
        run((yes, "none"))
    with pytest.raises(NumericalError, match="alone"):
        waits.demand(no, partial(NumericalError, "alone"))


def test_tensors_of_all_kinds_are_fetched_by_one_copy(sim: torch.device) -> None:
    kinds = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]
    tensors = [(torch.rand(shape) * 3).to(kind) for kind in kinds for shape in ((), (3,), (0,), (2, 5))]
    away = [tensor.to(sim).mT if tensor.ndim == 2 else tensor.to(sim) for tensor in tensors]
    with accelerator.count() as counted:
        found = waits.fetch([*away, tensors[0]])
    assert sum(counted.waits.values()) == 1
    for one, other in zip(tensors, found, strict=False):
        expected = one.mT if one.ndim == 2 else one
        assert torch.equal(expected, other)
        assert expected.dtype == other.dtype


def test_a_hessian_that_cannot_be_factored_costs_a_second_pass_and_gives_the_same(
    sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: Any = importlib.import_module("prunella.columns")
    monkeypatch.setitem(columns.tiles, "cpu", columns.plain_tile)
    calls = []
    solver: Any = importlib.import_module("prunella.solver")
    apply = solver.Solver.apply
    monkeypatch.setattr(solver.Solver, "apply", lambda *args: calls.append(1) or apply(*args))
    for order in ("layer", "block"):
        made: dict[str, list[Tensor]] = {}
        for device in ("cpu", "sim"):
            network = tiny.build().to(device)
            block = network.model.layers[0]
            block.mlp.up_proj.weight.data[:8] = block.mlp.up_proj.weight.data[8:16]
            block.mlp.gate_proj.weight.data[:8] = block.mlp.gate_proj.weight.data[8:16]  # inputs that are equal
            ids = torch.randint(5, tiny.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
            calls.clear()
            recipe = {"steps": [{"sparsegpt": {"damping": 0.0}}], "order": order}
            report = prunella.prune(network, recipe, calibration=ids)
            made[device] = [p.detach().cpu() for p in network.parameters()]
            assert len(calls) == 14 if device == "cpu" else len(calls) > 14
            assert any("damped" in note for layer in report.layers for note in layer.notes)
        assert all(torch.equal(a, b) for a, b in zip(*made.values(), strict=True))


def test_infinite_weights_are_refused_by_the_name_of_the_layer(sim: torch.device, ids: Tensor) -> None:
    network = tiny.build().to(sim)
    network.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"'model.layers.1.mlp.up_proj' has NaN or infinite weights"):
        prunella.prune(network, {"steps": ["sparsegpt"]}, calibration=ids)


def test_dead_inputs_are_factored_as_on_the_cpu(sim: torch.device) -> None:
    x_TI = torch.randn(40, 12)
    x_TI[:, [2, 7]] = 0
    here, there = (inverse_factor(Stats.of(x, {"gram"}), 0.01) for x in (x_TI, x_TI.to(sim)))
    assert torch.allclose(here.upper_II, there.upper_II.cpu(), rtol=1e-5)
    assert torch.equal(here.dead_I, there.dead_I.cpu())
    nothing = inverse_factor(Stats.of(torch.zeros(5, 4, device=sim), {"gram"}), 0.01)
    assert torch.allclose(nothing.upper_II.cpu(), torch.eye(4) / 1.01**0.5)


# ---------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("group", ["layer", "row"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:5", "4x1"])
def test_masks_are_those_of_the_cpu_ties_and_zeros_too(pattern: str, group: str, sim: torch.device) -> None:
    torch.manual_seed(0)
    for rows in (1, 4, 100):  # few are sorted, many are not
        rows = rows * 4 if pattern == "4x1" else rows
        for score_OI in (
            torch.randn(rows, 60),
            torch.randint(-1, 2, (rows, 60)).float() * 0.0,  # zeros of both signs
            torch.randint(0, 4, (rows, 60)).float(),
            torch.randn(rows, 60).bfloat16(),
        ):
            for sparsity in (0.0, 0.3, 0.5, 0.99):
                here = keep(score_OI, sparsity, Pattern.parse(pattern), group)
                with accelerator.count() as counted:
                    there = keep(score_OI.to(sim), sparsity, Pattern.parse(pattern), group)
                assert not counted.waits
                assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 9), (16, 33), (2, 3, 4)])
def test_masks_are_packed_there_as_numpy_packs_them(shape: tuple[int, ...], sim: torch.device) -> None:
    mask = torch.rand(shape) > 0.5
    with accelerator.count() as counted:
        there = pack(mask.to(sim))
    assert there.device == sim
    assert not counted.waits
    assert torch.equal(there.cpu(), pack(mask))
    assert torch.equal(pack(mask.to(sim).mT), pack(mask.mT).to(sim))
    if len(shape) == 2:
        assert torch.equal(unpack(there, shape).cpu(), mask)


# ---------------------------------------------------------------------------------------------------------
# How much at a time, and in what precision


def test_more_goes_at_a_time_there_and_comes_to_the_same(sim: torch.device) -> None:
    assert machine.at_a_time(16, torch.device("cpu")) == 16
    assert machine.at_a_time(16, sim) == 16 * machine.LARGER
    logits, ids = torch.randn(2, 70, 11), torch.randint(0, 11, (2, 70))
    here, there = next_token_loss(logits, ids), next_token_loss(logits.to(sim), ids.to(sim))
    assert torch.allclose(here, there.cpu(), rtol=1e-6)
    x_TI = torch.randn(5000, 300)
    grams = [add(torch.zeros(300, 300, device=device), x_TI.to(device)).cpu() for device in ("cpu", sim)]
    assert torch.allclose(*grams, rtol=1e-4, atol=1e-3)


def add(gram_II: Tensor, x_TI: Tensor) -> Tensor:
    add_gram(gram_II, x_TI)
    return gram_II


@pytest.fixture
def tf32() -> Any:
    """The user has asked for TF32."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = before


def test_what_is_factored_is_never_summed_in_tf32(
    tf32: Any, sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    plain = Tensor.addmm_

    def look(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.device == sim:
            seen.append(tf32.fp32_precision)
        return plain(self, *args, **options)

    monkeypatch.setattr(Tensor, "addmm_", look)
    prunella.prune(tiny.build().to(sim), {"steps": ["sparsegpt"]}, calibration=torch.ones(2, 9, dtype=torch.long))
    assert set(seen) == {"ieee"}  # Gram products and the column pass
    assert tf32.fp32_precision == "tf32"


def test_half_precision_is_multiplied_as_it_is_where_torch_sums_it_in_float32(
    sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _sums_in_float32(sim, torch.bfloat16)  # tried: what computes here has no such product
    assert not _sums_in_float32(torch.device("cpu"), torch.bfloat16)
    x_TI = torch.randn(100, 40).bfloat16()
    expected = add(torch.zeros(40, 40, device=sim), x_TI.to(sim))
    fast: Any = importlib.import_module("prunella.fast")
    seen = []

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        seen.append((a.dtype, b.dtype, out_dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "mm", product)
    fast._sums_in_float32.cache_clear()
    try:
        assert fast._sums_in_float32(sim, torch.bfloat16)
        assert not fast._sums_in_float32(sim, torch.float32)
        seen.clear()
        assert torch.allclose(add(torch.zeros(40, 40, device=sim), x_TI.to(sim)).cpu(), expected.cpu(), rtol=1e-5)
        assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    finally:
        fast._sums_in_float32.cache_clear()
