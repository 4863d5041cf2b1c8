"""All of it on a device that is not the CPU: simulated, so that mixing the two is an error and the numbers are the
CPU's (accelerator.py)."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerator
import pytest
import tiny
import torch
from healing import SETTINGS, settings
from test_resume import killed_run
from test_steps import NAMES, apply_or_refuse, check_zeros, toy_block
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, ModelError, cells, machine, make, team
from prunella.allocate import allocations
from prunella.backward import gradients
from prunella.heal.biases import bias_flags, mean_errors
from prunella.hidden import Hidden, Shelf
from prunella.machine import fork_random, free_memory, pick_device, ran_out
from prunella.order import pick_order
from prunella.registry import find
from prunella.samples import Samples
from prunella.save import Output
from prunella.sparse.bench import bench
from prunella.sparse.format import pack
from prunella.tasks.text import load_model

pytestmark = pytest.mark.usefixtures("sim")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes as any device does: in torch, and what it is given in the precision it is given in; and the
    device as much at a time as the CPU."""
    columns: Any = importlib.import_module("prunella.columns")
    dsnot: Any = importlib.import_module("prunella.steps.dsnot")
    monkeypatch.setitem(columns.tiles, "cpu", columns.plain_tile)
    monkeypatch.setitem(dsnot.swaps, "cpu", dsnot.plain_swap)
    monkeypatch.setattr(importlib.import_module("prunella.machine"), "LARGER", 1)
    monkeypatch.setattr(importlib.import_module("prunella.train.retrain"), "_fast_bfloat16", lambda device: False)


def everything(directory: Path) -> dict[str, bytes]:
    """The files of a model, without what is said of the run."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    said = ("README.md", "prunella.json", "adapter_config.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths if path.name not in said}


# ---------------------------------------------------------------------------------------------------------
# The device itself


def test_it_refuses_what_a_gpu_refuses(sim: torch.device) -> None:
    here_44, there_44 = torch.ones(4, 4), torch.ones(4, 4, device=sim)
    refused: list[Callable[[], Any]] = [
        lambda: there_44 + here_44,
        lambda: here_44 + there_44,
        lambda: here_44.add_(there_44),
        lambda: there_44 @ here_44,
        lambda: there_44 @ torch.ones(4),
        lambda: torch.cat([there_44, here_44]),
        lambda: there_44.index_select(0, torch.tensor([1])),
        lambda: here_44[there_44 > 0],
        lambda: torch.tensor(1.0).mul_(there_44[0, 0]),
        lambda: nn.functional.embedding(torch.tensor([1]), there_44),
        lambda: torch.rand(4, device=sim, generator=torch.Generator()),
    ]
    for mixing in refused:
        with pytest.raises(RuntimeError, match=r"Expected (all tensors to be on the same|a 'sim') device"):
            mixing()
    with pytest.raises(TypeError, match="convert sim"):
        there_44.numpy()
    # What a GPU lets in: numbers, and where to look.
    assert (there_44 + torch.tensor(1.0) == 2).all()
    assert torch.where(torch.tensor(True), there_44, 0).device == sim
    assert there_44[torch.tensor([0, 2])].shape == (2, 4)
    there_44[torch.tensor([1])] = 5.0
    there_44[0] = torch.tensor(3.0)
    assert there_44.sum(1).tolist() == [12, 20, 4, 4]


@pytest.mark.parametrize("architecture", ["llama", "falcon", "mamba"])
def test_it_computes_what_the_cpu_computes(architecture: str, sim: torch.device, ids: Tensor) -> None:
    network, moved = tiny.build(architecture), tiny.build(architecture).to(sim)
    moved.tie_weights()  # torch moves each name of a tensor by itself to devices that it does not know
    here = network(ids, labels=ids)
    there = moved(ids.to(sim), labels=ids.to(sim))
    assert there.logits.device == sim
    assert torch.equal(here.logits, there.logits.cpu())
    here.loss.backward()
    there.loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in moved.named_parameters():
        assert torch.equal(parameter.grad.cpu(), gradients[name]), name


def test_views_share_memory_and_tensors_grow(sim: torch.device) -> None:
    x_34 = torch.zeros(3, 4, device=sim)
    x_34[1:, 2:].fill_(1)
    x_34.diagonal().add_(2)
    assert x_34.tolist() == [[2, 0, 0, 0], [0, 2, 1, 1], [0, 0, 3, 1]]
    out = torch.empty(0, device=sim)
    torch.mul(x_34, 2, out=out)
    assert torch.equal(out.cpu(), 2 * x_34.cpu())
    out.resize_(20)
    assert out[:12].tolist() == [4, 0, 0, 0, 0, 4, 2, 2, 0, 0, 6, 2]


def test_its_random_numbers_are_its_own(sim: torch.device) -> None:
    torch.manual_seed(3)
    here, there = torch.rand(4), torch.rand(4, device=sim)
    assert torch.equal(here, there.cpu())  # both are seeded, and neither draws from the other
    with fork_random(sim):
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4), here)
        assert torch.equal(torch.rand(4, device=sim), there)
    assert not torch.equal(torch.rand(4), here)
    assert torch.equal(torch.rand(4, device=sim).cpu(), torch.rand(8, generator=torch.Generator().manual_seed(3))[4:])


def test_what_crosses_over_is_counted(sim: torch.device) -> None:
    x = torch.ones(6)
    with accelerator.count() as traffic:
        there = x.to(sim)
        there += 1
        assert not traffic.waits
        there.sum().item()
        bool((there > 0).all())
        there.half().cpu()
    there.cpu()
    assert (traffic.to_device, traffic.to_host) == (24, 12)
    assert traffic.waits == {"_local_scalar_dense": 2, "copy to the host": 1}


# ---------------------------------------------------------------------------------------------------------
# Which device, and what it has


def test_a_device_is_taken_by_its_name(sim: torch.device) -> None:
    assert pick_device("sim").type == "sim"
    assert pick_device("sim:0") == sim
    assert free_memory(sim) == accelerator.MEMORY
    for name in ("simm", "sim:1", "xpu", "cuda:99", "meta"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used"):
            pick_device(name)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("cuda", None),
        ("cuda:1", None),
        ("cuda:2", "this PyTorch sees 2, numbered from 0"),
        ("cuda:first", "Invalid device string"),
        ("mps", None),
        ("mps:0", None),
        ("mps:1", "this PyTorch sees 1, numbered from 0"),
        ("xpu:0", "this PyTorch sees no XPU device"),
        ("meta", "."),
        ("gpu", "Expected one of cpu, cuda"),
        ("cpu", None),
    ],
)
def test_devices_are_taken_where_torch_sees_them(
    name: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, count in ((torch.cuda, 2), (torch.mps, 1), (torch.xpu, 0)):
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
    make = torch.zeros
    made: list[torch.device] = []

    def zeros(*size: int, device: torch.device) -> Tensor:
        made.append(device)
        return make(*size, device="meta" if device.type == "meta" else "cpu")

    monkeypatch.setattr(torch, "zeros", zeros)
    if refused is None:
        assert pick_device(name) == torch.device(name)
        assert made == [torch.device(name)]
        return
    with pytest.raises(InputError, match=f"^device '{name}' cannot be used: .*{refused}") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("processes", "found"), [(1, "cuda:1"), (2, "cuda:0")])
def test_one_process_trains_on_the_gpu_that_is_asked_for_and_several_each_on_their_own(
    processes: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate gives them out: the first, unless it is told another."""
    state = [torch.device("cuda:0")]  # of a run before

    class State:
        def __init__(self, cpu: bool, timeout: Any):
            if not state:
                state.append(torch.device(os.environ.get(team.DEVICE, "cuda:0")))
            self.device = state[0]

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setattr(team, "forget_accelerator", state.clear)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert team.meet(torch.device("cuda:1")) == torch.device(found)
    assert team.DEVICE not in os.environ
    assert team.meet(torch.device("cuda:0")) == torch.device("cuda:0")


def test_mps_is_given_no_float64() -> None:
    """There is none here to try it: the folders of what computes on devices are read."""
    assert machine.widest(torch.device("mps")) == torch.float32
    assert machine.widest(torch.device("cuda:1")) == machine.widest(torch.device("cpu")) == torch.float64
    source = Path(prunella.__file__).parent
    said = re.compile(r"\.double\(\)|torch\.float64")
    folders = ("steps", "statistics", "heal", "train", "lenses")
    assert [p for folder in folders for p in (source / folder).rglob("*.py") if said.search(p.read_text())] == []


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_cuda_where_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device("cuda" if there else "cpu")


def test_a_device_that_torch_does_not_name_keeps_its_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's, of which there is but one."""
    state = torch.arange(3)
    kept: list[Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    with fork_random(torch.device("mps")):
        assert not kept
    assert kept == [state]


def test_states_wait_in_pinned_memory_where_that_helps(monkeypatch: pytest.MonkeyPatch, sim: torch.device) -> None:
    recipe = {"steps": ["wanda"], "allocate": "probe", "order": "block"}
    expected = pruned("cpu", recipe)
    made: list[Tensor] = []

    def pinned(like: Tensor) -> Tensor:
        made.append(torch.empty(like.shape, dtype=like.dtype))
        return made[-1]

    monkeypatch.setattr("prunella.hidden.free_memory", lambda device: 1 << 40 if device.type == "cpu" else 0)
    monkeypatch.setattr("prunella.hidden.pins", lambda device: device == sim)
    monkeypatch.setattr("prunella.hidden.pinned", pinned)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: any(tensor is room for room in made))
    assert pruned(sim, recipe) == expected
    before = len(made)
    shelf = Shelf(1, sim, Path("nowhere"))
    room = shelf.put(torch.ones(4, device=sim))
    assert shelf.put(torch.zeros(4, device=sim), room) is room  # its room is taken again
    assert shelf.put(torch.zeros(5, device=sim), room) is not room
    assert 0 < before < before + 2 == len(made)


@pytest.mark.parametrize("free", [1 << 40, 1 << 20])
def test_the_order_is_chosen_by_sizes_and_not_by_the_memory_of_the_device(
    free: int, monkeypatch: pytest.MonkeyPatch, sim: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    model = prunella.wrap_model(tiny.build().to(sim))
    monkeypatch.setattr("prunella.order.free_memory", lambda device: free if device == sim else 1 << 40)
    need = 64 * 32 * 64 * (4 * 4 + 4)  # windows, tokens, the widest layer, bytes
    for most, order in ((need + 1, "layer"), (need, "block")):
        monkeypatch.setattr("prunella.order.ACTIVATIONS", most)
        assert pick_order("auto", [make("wanda")], tiny.token_windows(64, 32), model) == order
    assert ("GB are free" in capsys.readouterr().err) == (free < need)


def test_hidden_states_wait_where_there_is_room(monkeypatch: pytest.MonkeyPatch, sim: torch.device) -> None:
    """On the device, in main memory, or on disk; the blocks compute on the device from wherever they come."""
    recipe = {"steps": ["wanda", "reconstruct"], "allocate": "probe", "order": "block"}
    expected = pruned("cpu", recipe)
    places: set[Any] = set()
    keep = Hidden.__setitem__

    def spy(hidden: Hidden, index: int, value: Tensor) -> None:
        keep(hidden, index, value)
        places.add((hidden.shelf.place.type, hidden.shelf.on_disk))

    monkeypatch.setattr(Hidden, "__setitem__", spy)
    free = {"sim": 1 << 40, "cpu": 1 << 40}
    monkeypatch.setattr("prunella.hidden.free_memory", lambda device: free[device.type])
    for device, size, place in (
        ("cpu", 1 << 40, ("sim", False)),
        ("sim", 0, ("cpu", False)),
        ("cpu", 0, ("cpu", True)),
    ):
        free[device] = size
        places.clear()
        assert pruned(sim, recipe) == expected
        assert places == {place}


@pytest.mark.parametrize("main", [1 << 40, 0], ids=["memory", "disk"])
def test_gradients_are_those_of_the_cpu(
    main: int, llama: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch, sim: torch.device
) -> None:
    """Wherever the hidden states wait."""
    expected = [*gradients(load_model(str(llama), device="cpu"), ids)]
    monkeypatch.setattr("prunella.hidden.free_memory", lambda device: main if device.type == "cpu" else 0)
    found = gradients(load_model(str(llama), device="sim"), ids)
    for (_, _, layers), (_, _, there) in zip(expected, found, strict=True):
        assert all(gradient.device == sim for gradient in there.values())
        assert all(torch.equal(there[name].cpu(), gradient) for name, gradient in layers.items())


def test_other_gpus_are_not_opened_for_their_random_numbers(monkeypatch: pytest.MonkeyPatch, sim: torch.device) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    with monkeypatch.context() as patch:
        patch.setattr(accelerator.module, "here", False)  # else torch takes this one for granted
        with fork_random(torch.device("cpu")):
            assert asked == []
        with fork_random(torch.device("cuda:3")):
            assert asked == [torch.device("cuda:3")]


# ---------------------------------------------------------------------------------------------------------
# Steps, allocations, architectures


def on(device: str | torch.device, work: Callable[[str | torch.device], Any]) -> Any:
    """What comes of it there; the message, if it is refused."""
    torch.manual_seed(3)
    try:
        return work(device)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_keep_their_contract(name: str, pattern: str, dtype: torch.dtype, sim: torch.device) -> None:
    after = {}
    for device in ("cpu", sim):
        torch.manual_seed(3)
        block = toy_block(make(name), pattern, dtype=dtype, device=device)
        torch.manual_seed(3)
        after[device] = apply_or_refuse(make(name), block)
    here, there = after["cpu"], after[sim]
    assert (here is None) == (there is None)
    if here is None or there is None:
        return
    check_zeros(there, 0.5)
    for one, other in zip(here.layers, there.layers, strict=True):
        for field in fields(other):
            value = getattr(other, field.name)
            assert not isinstance(value, Tensor) or value.device == sim, field.name
        if dtype == torch.float32:  # of bfloat16 the CPU makes other products
            assert torch.equal(one.weight_OI, other.weight_OI.cpu())
            assert torch.equal(one.mask_OI, other.mask_OI.cpu())


def pruned(device: str | torch.device, recipe: dict[str, Any], architecture: str = "llama") -> Any:
    """The weights of a tiny network, pruned there, and the report's errors."""
    network = tiny.build(architecture).to(device)
    report = prunella.prune(network, recipe, calibration=tiny.token_windows(4, 24))
    assert report.recipe["device"] == str(device)
    assert network.device == torch.device(device)
    weights = {name: tensor.tolist() for name, tensor in network.state_dict().items()}
    return weights, [layer.error for layer in report.layers]


GRID: list[dict[str, Any]] = [
    *({"steps": [name], "order": "layer" if find(name).per_layer else "block"} for name in NAMES),
    *({"steps": ["wanda"], "allocate": name, "order": "block"} for name in sorted(allocations)),
    {"steps": ["sparsegpt", "gptq"], "pattern": "2:4", "order": "block"},
    {"steps": ["wanda", "dsnot", "align", "reconstruct"], "pattern": "2:4"},
    {"steps": [f"{Path(__file__).parent / 'extensions' / 'toy_statistic.py'}:toy-fisher"], "order": "back"},
]


@pytest.mark.parametrize(
    "recipe",
    GRID,
    ids=lambda recipe: "-".join(Path(name).name for name in (*recipe["steps"], recipe.get("allocate", ""))),
)
def test_every_step_and_allocation_gives_the_weights_of_the_cpu(recipe: dict[str, Any], sim: torch.device) -> None:
    here, there = (on(device, lambda device: pruned(device, recipe)) for device in ("cpu", sim))
    assert there == here


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_transposed_layers_experts_and_convolutions_are_pruned_there(architecture: str, sim: torch.device) -> None:
    recipe = {"steps": ["wanda", "reconstruct"]}
    here, there = (on(device, lambda device: pruned(device, recipe, architecture)) for device in ("cpu", sim))
    assert there == here


def test_pruning_in_bfloat16_leaves_weights_on_the_device(sim: torch.device, ids: Tensor) -> None:
    network = tiny.build(dtype=torch.bfloat16).to(sim)
    report = prunella.prune(network, {"steps": ["sparsegpt", "update"]}, calibration=ids)
    assert report.sparsity == 0.5
    assert {parameter.device for parameter in network.parameters()} == {sim}


# ---------------------------------------------------------------------------------------------------------
# Memory that runs out

SHORT = 600_000  # bytes of one tensor: hidden states of all 2,048 tokens fit, wider ones of a quarter of them


def in_full_batches(
    device: str | torch.device, recipe: dict[str, Any], architecture: str = "llama", width: int = 256
) -> Any:
    """Masks, weights and what is reported of the layers; 32 windows of 64 tokens go through a block at once."""
    width = 128 if architecture == "mixtral" else width
    network = tiny.build(architecture, max_position_embeddings=128, intermediate_size=width).to(device)
    report = prunella.prune(network, {"order": "block", **recipe}, calibration=tiny.token_windows(32, 64))
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    return weights, [(layer.tokens, layer.error) for layer in report.layers]


@pytest.mark.parametrize(
    ("recipe", "architecture"),
    [
        ({"steps": ["wanda"]}, "llama"),
        ({"steps": ["sparsegpt"]}, "llama"),
        ({"steps": ["magnitude"]}, "llama"),
        ({"steps": ["wanda", "align"]}, "llama"),
        ({"steps": ["wanda", "dsnot"]}, "mixtral"),
        ({"steps": ["wanda"], "allocate": "probe"}, "llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join([*value["steps"], *value.get("allocate", "-")[1:]]),
)
def test_where_memory_runs_out_fewer_windows_go_at_a_time(
    recipe: dict[str, Any], architecture: str, sim: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, told = in_full_batches(sim, recipe, architecture)
    assert "ran out" not in capsys.readouterr().err
    with accelerator.largest(SHORT):
        short, said = in_full_batches(sim, recipe, architecture)
    assert capsys.readouterr().err.count("the memory of sim:0 ran out: from here on 16 samples and not more") == 1
    for name, weight in plain.items():  # but for sums in another order
        differ = ((weight == 0) != (short[name] == 0)).float().mean()
        assert differ <= 2e-3, name
        if not differ:
            torch.testing.assert_close(short[name], weight, rtol=1e-3, atol=1e-5)
    assert [tokens for tokens, _ in said] == [tokens for tokens, _ in told]
    for (_, one), (_, other) in zip(said, told, strict=True):
        # Of an expert, whose tokens are spread unevenly, the few on which errors are measured may be others.
        assert one == pytest.approx(other, rel=0.1 if architecture == "mixtral" else 1e-3)


def test_perplexities_do_not_depend_on_it(sim: torch.device, tmp_path: Path) -> None:
    """Neither where blocks want too much of it, nor where the head does; the weights come from files."""
    windows_NL = tiny.token_windows(32, 64)
    network = tiny.build(max_position_embeddings=128, intermediate_size=256, vocab_size=320)
    network.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    whole = prunella.perplexity(load_model(str(tmp_path), device="sim"), windows_NL)
    for nbytes in (SHORT, 1_200_000):
        with accelerator.largest(nbytes):
            found = prunella.perplexity(load_model(str(tmp_path), device="sim"), windows_NL)
        assert found.perplexity == pytest.approx(whole.perplexity)


def test_what_enters_the_first_block_may_be_too_much_already(
    sim: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = in_full_batches(sim, {"steps": ["wanda"]}, width=64)
    capsys.readouterr()
    with accelerator.largest(200_000):  # hidden states of 2,048 tokens are 262,144
        short, _ = in_full_batches(sim, {"steps": ["wanda"]}, width=64)
    assert capsys.readouterr().err.count("from here on 16 samples and not more") == 1
    for name, weight in plain.items():
        assert ((weight == 0) != (short[name] == 0)).float().mean() <= 2e-3, name


def test_new_biases_are_the_same_where_memory_runs_out(sim: torch.device, tmp_path: Path) -> None:
    network = tiny.build(max_position_embeddings=128, intermediate_size=256)
    network.save_pretrained(tmp_path / "dense")
    tiny.write_tokenizer(tmp_path / "dense")
    prunella.prune(tmp_path / "dense", {**SETTINGS, "heal": {}, "steps": ["magnitude"]}, output=tmp_path / "out")

    def found() -> dict[str, Tensor]:
        model, dense = (load_model(str(tmp_path / name), device="sim") for name in ("out", "dense"))
        names = frozenset(name for some in bias_flags(model).values() for name in some)
        return mean_errors(model, dense, Samples.of(tiny.token_windows(32, 64)), names)

    plain = found()
    with accelerator.largest(SHORT):
        short = found()
    assert plain.keys() == short.keys() != set()
    for name, value in plain.items():
        torch.testing.assert_close(short[name].cpu(), value.cpu(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (MemoryError(), False),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_by_what_is_said(error: Exception, so: bool) -> None:
    assert ran_out(error) == so


def test_what_cannot_be_halved_is_told_as_it_is(sim: torch.device) -> None:
    network = tiny.build(max_position_embeddings=128).to(sim)
    for order, windows_NL, said in (
        ("layer", tiny.token_windows(32, 64), "^the memory of sim:0 ran out: in order 'layer' .* Use --order block"),
        ("block", tiny.token_windows(1, 64), "^the memory of sim:0 ran out where no fewer samples can"),
    ):
        with accelerator.largest(50_000 if order == "layer" else 10_000), pytest.raises(InputError, match=said):
            prunella.prune(network, {"steps": ["wanda"], "order": order}, calibration=windows_NL)


# ---------------------------------------------------------------------------------------------------------
# From file to file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a tokenizer, its head tied. Read only."""
    path = tmp_path_factory.mktemp("accelerator") / "dense"
    tiny.build(max_position_embeddings=128, tie_word_embeddings=True).save_pretrained(path)
    tiny.write_tokenizer(path)
    return path


def both(tmp_path: Path, work: Callable[[str, Path], Any]) -> Path:
    """Run it on the CPU and on the device: the same files come of it. Returns the device's."""
    for device in ("cpu", "sim"):
        work(device, tmp_path / device)
    here, there = everything(tmp_path / "cpu"), everything(tmp_path / "sim")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    return tmp_path / "sim"


@pytest.mark.parametrize(
    "recipe",
    [
        {"steps": ["wanda"], "evaluate": {"source": "pydoc", "length": 32, "windows": 2}},
        {"steps": ["wanda"], "format": "packed", "bits": 8},
        {"steps": ["sparsegpt", "gptq"], "pattern": "2:4", "format": "packed", "round_head": True},
        pytest.param({"steps": ["sparsegpt", "gptq"]}, marks=pytest.mark.slow),
        pytest.param({"steps": ["magnitude"], "format": "packed", "bits": 4}, marks=pytest.mark.slow),
    ],
    ids=["plain", "packed", "packed-gptq", "gptq", "packed-4"],
)
def test_the_files_are_those_of_the_cpu(recipe: dict[str, Any], source: Path, tmp_path: Path) -> None:
    def work(device: str, output: Path) -> None:
        prunella.prune(source, {**SETTINGS, "heal": {}, **recipe, "device": device}, output=output)

    both(tmp_path, work)


@pytest.mark.parametrize("packing", [{}, {"format": "packed", "bits": 8, "round_head": True}], ids=["plain", "packed"])
def test_a_model_in_memory_is_saved_from_there(packing: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    def work(device: str, output: Path) -> None:
        network = tiny.build("mixtral").to(device)
        prunella.prune(network, {"steps": ["gptq"], **packing}, output=output, calibration=ids)

    both(tmp_path, work)


def test_a_run_that_is_killed_goes_on_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**SETTINGS, "heal": {}, "steps": ["sparsegpt"], "order": "block", "device": "sim"}
    prunella.prune(source, recipe, output=tmp_path / "whole")
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(source, recipe, output=out))
    report = prunella.prune(source, recipe, output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 1
    assert everything(out) == everything(tmp_path / "whole")


HEALED: list[dict[str, Any]] = [
    {"train": ["mask-lora", "new-biases", "embeddings"], "distill": 0.5},
    {"train": ["all"], "checkpointing": True},
    {"train": ["all"], "way": "reconstruct"},
    {"train": ["mask-lora"]},
    {"train": ["scale-lora", "norms", "head"]},
    {"train": ["lora-prune"]},
    {"train": ["lora"]},
    {"train": ["mask-lora", "norms"], "way": "reconstruct"},
]


@pytest.mark.parametrize(
    "healing",
    [*HEALED[:3], *(pytest.param(healing, marks=pytest.mark.slow) for healing in HEALED[3:])],
    ids=["-".join([*healing["train"], healing.get("way", "retrain")]) for healing in HEALED],
)
def test_healing_there_gives_the_weights_of_the_cpu(healing: dict[str, Any], source: Path, tmp_path: Path) -> None:
    plain = {**SETTINGS, "heal": {}, "steps": ["magnitude"]}
    prunella.prune(source, plain, output=tmp_path / "pruned")

    def work(device: str, output: Path) -> None:
        prunella.heal(tmp_path / "pruned", {**settings(tokens=256, **healing), "device": device}, output=output)

    assert everything(both(tmp_path, work)) != everything(tmp_path / "pruned")


# ---------------------------------------------------------------------------------------------------------
# Running


@pytest.mark.parametrize(
    "options", [("--bits", 8, "--round-head"), pytest.param((), marks=pytest.mark.slow)], ids=["rounded", "exact"]
)
def test_commands_take_the_device_by_name(
    options: tuple[Any, ...], source: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    short = ("--calibration", "pydoc", "--samples", 2, "--length", 32, "--evaluate", "none")
    assert run("prune", source, "-o", tmp_path / "p", "--step", "wanda", "--device", "sim", *short).code == 0
    assert run("pack", tmp_path / "p", "-o", tmp_path / "packed", *options).code == 0
    asked = ("eval", tmp_path / "packed", "--text", "pydoc", "--length", 32, "--windows", 3, "--json", "--device")
    here, there = run(*asked, "cpu"), run(*asked, "sim")
    assert (here.code, there.code) == (0, 0)
    assert there.out == here.out
    write = ("generate", tmp_path / "packed", "Trees are", "--tokens", 8, "--device")
    assert run(*write, "sim").out == run(*write, "cpu").out


def test_a_packed_model_runs_there_without_the_cpus_kernels(ids: Tensor, tmp_path: Path) -> None:
    recipe = {"steps": ["magnitude"], "format": "packed", "bits": 8}
    network = tiny.build("mixtral", tie_word_embeddings=True)
    prunella.prune(network, recipe, output=tmp_path / "packed", calibration=ids)
    logits = {}
    network = load_model(str(tmp_path / "packed"), device="sim", packed=True).network
    assert network.lm_head.weight is network.model.embed_tokens.weight
    for device in ("cpu", "sim"):
        model = load_model(str(tmp_path / "packed"), device=device, packed=True)
        with torch.no_grad():
            logits[device] = model.network(ids.to(model.device)).logits.cpu()
    torch.testing.assert_close(logits["sim"], logits["cpu"])


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weights_are_packed_where_they_lie_into_parts_on_the_host(bits: int | None, sim: torch.device) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(24, 200)
    mask_OI = prunella.keep(weight_OI.abs(), 0.5)
    weight_OI *= mask_OI
    here, there = pack(weight_OI, mask_OI, bits), pack(weight_OI.to(sim), mask_OI.to(sim), bits)
    for name, part in there.parts().items():
        assert part.device.type == "cpu"
        assert torch.equal(part, here.parts()[name])


def test_transformers_loads_a_packed_model_onto_the_device(sim: torch.device, ids: Tensor, tmp_path: Path) -> None:
    recipe = {"steps": ["magnitude"], "format": "packed", "bits": 8, "round_head": True}
    network = tiny.build(tie_word_embeddings=True)
    prunella.prune(network, recipe, output=tmp_path / "packed", calibration=ids)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=sim)
    assert {tensor.device for tensor in (*there.parameters(), *there.buffers())} == {sim}
    with torch.no_grad():
        torch.testing.assert_close(there(ids.to(sim)).logits.cpu(), here(ids).logits)


def test_a_sweep_there_finds_what_it_finds_on_the_cpu(source: Path, tmp_path: Path) -> None:
    plan = {
        "calibration": SETTINGS["calibration"],
        "evaluate": {"windows": 2, "length": 32},
        "grid": {"steps": ["magnitude", "wanda"]},
    }
    found = {
        device: cells.sweep(str(source), {**plan, "device": device}, tmp_path / device) for device in ("cpu", "sim")
    }
    here, there = ([(row["perplexity"], row["error"]) for row in result.rows[1:]] for result in found.values())
    assert here == there


def test_speed_is_that_of_this_machines_processor(sim: torch.device) -> None:
    network = tiny.build(dtype=torch.bfloat16).to(sim)
    for layer in network.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    assert bench(network, prompt=8, tokens=2, rounds=1)["sparsity"] == 0.5
    assert {parameter.device for parameter in network.parameters()} == {sim}


def test_a_model_that_is_spread_over_devices_is_refused(sim: torch.device, ids: Tensor) -> None:
    network = tiny.build()
    network.model.layers[1].to(sim)
    with pytest.raises(ModelError, match="LlamaForCausalLM lie on cpu and sim:0: load all of them on one device"):
        prunella.prune(network, {"steps": ["wanda"]}, calibration=ids)
    with pytest.raises(ModelError, match="lie on meta"):
        prunella.prune(tiny.build().to("meta"), {"steps": ["wanda"]}, calibration=ids)
