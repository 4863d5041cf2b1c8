"""Convolutions, encoders and networks of one's own in the packed format."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import prunella
from prunella import InputError, Model, ModelError, Task, register_task
from prunella.model.open import open_files
from prunella.packed.opening import open_network
from prunella.packing import load_packed, pack_model, packed_config, unpack_model
from prunella.samples import Batch, Samples
from prunella.sparse.conv import ExpandedConv, SparseConv, packed_module, runs_packed, why_expanded
from prunella.sparse.format import mask_of, pack
from prunella.sparse.linear import SparseLinear, TrainingError
from prunella.tensors import read_grids

SHORT: dict[str, Any] = {"steps": ["magnitude"], "calibration": {"samples": 4}, "evaluate": {"windows": 2}}


@register_task("pixels")
class Pixels(Task):
    """Classifiers of transformers, or the network below, on random pictures of two sizes."""

    argument = "pixel_values"

    def open(self, name: str, packed: bool = False, **options: Any) -> Model:
        if "model_type" not in json.loads((Path(name) / "config.json").read_text()):
            where = {key: value for key, value in options.items() if key in ("dtype", "device")}
            return open_network(lambda: Net(), Path(name), self, packed=packed, name=name, **where)
        return open_files(
            name,
            self,
            "AutoModelForImageClassification",
            "classifier",
            admit=lambda name, config: None,
            check=lambda model: None,
            processor=lambda *_: None,
            packed=packed,
            **options,
        )

    def samples(
        self, model: Model, source: str, count: int, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        random = torch.Generator().manual_seed(seed)
        return Samples.of({"pixel_values": torch.randn(used + count, 3, 32, 32, generator=random)[used:]})

    def example(self, network: nn.Module) -> Batch:
        return {"pixel_values": torch.zeros(1, 3, 32, 32)}

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        return network(batch["pixel_values"])

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        return functional.cross_entropy(logits, logits.argmax(1), reduction="none")


class Net(nn.Module):
    """A chain of convolutions of all kinds, with batch norm; one of them is of a kind that no kernel knows."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2, padding_mode=around),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 1, stride=2),
            )
            for around in ("zeros", "reflect")
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def network() -> Net:
    torch.manual_seed(0)
    return nets.shaken(Net())  # type: ignore[return-value]


def tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def outputs(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = network(x)
    return out if isinstance(out, Tensor) else out.logits


def files(directory: Path) -> dict[str, bytes]:
    """All but what the report and the card say."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in ("prunella.json", "README.md")}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network above, pruned from its directory."""
    root = tmp_path_factory.mktemp("net")
    (root / "dense").mkdir()
    save_file(network().state_dict(), root / "dense" / "model.safetensors")
    (root / "dense" / "config.json").write_text('{"architecture": "mine"}')
    prunella.prune(str(root / "dense"), {"task": "pixels", **SHORT}, output=root / "pruned")
    return root / "pruned"


# ---------------------------------------------------------------------------------------------------------
# One convolution

KINDS = [
    (nn.Conv1d, {}, (2, 96, 7)),
    (nn.Conv1d, {"stride": 2}, (1, 96, 9)),
    (nn.Conv2d, {"bias": False}, (3, 96, 5, 4)),
    (nn.Conv2d, {"stride": (2, 3)}, (2, 96, 9, 8)),
    (nn.Conv2d, {"stride": 2}, (96, 7, 7)),
    (nn.Conv2d, {"padding": "same"}, (1, 96, 1, 1)),
    (nn.Conv2d, {"dilation": 2, "padding": "valid"}, (20, 96, 3, 3)),
    (nn.Conv3d, {"stride": (1, 2, 2)}, (2, 96, 3, 4, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options", "shape"), KINDS)
def test_a_convolution_of_one_place_runs_packed(kind: Any, options: Any, shape: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = kind(96, 40, 1, **options).to(dtype).eval()
    mask_OI = torch.rand(40, 96) < 0.5
    with torch.no_grad():
        conv.weight *= mask_OI.view_as(conv.weight)
    assert runs_packed(conv)
    x, weight = torch.randn(shape, dtype=dtype), conv.weight.detach().clone()
    wanted = outputs(conv, x)
    module = packed_module(pack(weight.flatten(1), mask_OI), conv)
    assert isinstance(module, SparseConv)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    found = outputs(module, x)
    torch.testing.assert_close(found, wanted, **tolerance)
    assert found.is_contiguous() == wanted.is_contiguous()
    assert torch.equal(module.weight, weight)
    if x.ndim == 4:
        inner = x.contiguous(memory_format=torch.channels_last)
        found = outputs(module, inner)
        torch.testing.assert_close(found, wanted, **tolerance)
        assert found.is_contiguous(memory_format=torch.channels_last)
    odd = torch.cat([x, x], 1 if x.ndim == weight.ndim else 0).narrow(1 if x.ndim == weight.ndim else 0, 96, 96)
    torch.testing.assert_close(outputs(module, odd), wanted, **tolerance)
    with pytest.raises(ValueError, match="a convolution of 96 channels"):
        module(torch.randn(2, 95, *shape[2:]))
    back = module.plain(dtype)
    assert type(back) is kind
    torch.testing.assert_close(outputs(back, x), wanted, **tolerance)


def test_other_convolutions_do_not() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.pad(x, (0, 1, 0, 1)))

    for conv in (
        nn.Conv3d(8, 8, 3),
        nn.Conv3d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 17),  # 289 places
        nn.ConvTranspose2d(8, 8, 1),
        Same(8, 8, 1),
    ):
        assert not runs_packed(conv)


def test_without_kernels_only_those_of_one_place_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunella.sparse.conv.library", lambda: None)
    assert runs_packed(nn.Conv2d(8, 8, 1))
    assert not runs_packed(nn.Conv2d(8, 8, 3))
    assert "without the C kernels" in why_expanded()


def test_a_packed_convolution_is_not_trained_and_looks_like_one() -> None:
    conv = nn.Conv2d(64, 16, 1, stride=2)
    module = packed_module(pack(conv.weight.detach().flatten(1), torch.ones(16, 64, dtype=torch.bool)), conv)
    assert (module.stride, module.out_channels, module.kernel_size) == ((2, 2), 16, (1, 1))
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    with pytest.raises(TrainingError):
        module(x).sum().backward()


def test_groups_and_kernels_are_stored_as_one_weight_and_come_back() -> None:
    conv = nn.Conv2d(16, 24, (3, 2), groups=2, padding=1, padding_mode="circular")
    weight, want = conv.weight.detach().clone(), outputs(conv, x := torch.randn(2, 16, 7, 7))
    matrix = weight.movedim(1, -1).flatten(1)  # a row is the 8 channels of each of 6 places
    mask = torch.ones(24, 48, dtype=torch.bool)
    module = packed_module(pack(matrix, mask), conv)
    assert isinstance(module, ExpandedConv)
    back = module.plain()
    assert torch.equal(back.weight, weight)
    assert torch.equal(outputs(back, x), want)
    again = back.packed_as.pack("conv", back.weight)
    assert torch.equal(mask_of(again.mask, 48), mask)
    assert torch.equal(again.values, pack(matrix, mask).values)


# ---------------------------------------------------------------------------------------------------------
# Networks of one's own


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_network_of_ones_own_is_packed_opened_and_unpacked(pruned: Path, tmp_path: Path, bits: int | None) -> None:
    result = pack_model(str(pruned), tmp_path / "packed", bits)
    assert result.layers == 9  # the stem, and of each block two of one place, and two groups
    assert result.expanded == ("blocks.1.3",)
    assert not result.kept
    found = packed_config(tmp_path / "packed") or {}
    assert found["modules"]["blocks.0.3"] == {"shape": [64, 288], "kernel": [3, 3], "groups": 2}
    assert found["modules"]["blocks.0.6"] == {"shape": [32, 64], "kernel": [1, 1]}
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (pruned, tmp_path / "packed")]
    assert sizes[1] < 0.75 * sizes[0]
    opened = load_packed(tmp_path / "packed", device="cpu")
    assert sum(isinstance(module, SparseConv) for module in opened.modules()) == 6
    assert type(opened.get_submodule("blocks.1.3")) is nn.Conv2d
    assert unpack_model(str(tmp_path / "packed"), tmp_path / "plain") == 9
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    plain.eval()
    for count in (1, 3, 20):
        x = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(outputs(opened, x), outputs(plain, x), rtol=2e-2 if bits else 1e-4, atol=1e-2)
    if bits is None:
        before, after = tensors(pruned), tensors(tmp_path / "plain")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        masks, again = prunella.read_masks(pruned), prunella.read_masks(tmp_path / "plain")
        assert masks.keys() == again.keys() > {"blocks.0.3.weight.0", "blocks.0.3.weight.1", "blocks.1.0"}
        assert all(torch.equal(masks[name], again[name]) for name in masks)
        kept = ("config.json", "prunella.json", "README.md")
        assert all((pruned / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in kept[1:])
        assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"architecture": "mine"}


def test_it_is_evaluated_and_looked_at_packed(pruned: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("pack", pruned, "-o", tmp_path / "packed")
    assert done.code == 0, done.err
    assert "the convolution 'blocks.1.3' is expanded when the model is loaded: those run packed" in done.err + done.out
    plain, packed = (json.loads(run("eval", d, "--windows", 5, "--json").out) for d in (pruned, tmp_path / "packed"))
    assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert run("prune", tmp_path / "packed", "-o", tmp_path / "no").err.endswith("makes a plain model of it.\n")


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_layers_are_shown_in_their_own_shapes(pruned: Path, tmp_path: Path, pattern: str) -> None:
    from prunella.inspect import inspect

    recipe = {"task": "pixels", **SHORT, "pattern": pattern, "skip": ["stem.0"]}
    report = prunella.prune(str(pruned.parent / "dense"), recipe, output=tmp_path / "pruned")
    pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    plain, packed = ({row.name: row for row in inspect(str(tmp_path / name))} for name in ("pruned", "packed"))
    assert plain.keys() == packed.keys() == {layer.name for layer in report.layers}
    assert plain["stem.0"].shape == (32, 3, 3, 3)
    assert plain["blocks.0.0"].shape == packed["blocks.0.0"].shape == (64, 32, 1, 1)
    for name in ("blocks.0.3.weight.1", "blocks.1.3.weight.0"):
        assert plain[name].shape == packed[name].shape == (32, 32, 3, 3)
        assert "32x32x3x3" in packed[name].cells()
    for layer in report.layers:
        one, other = plain[layer.name], packed[layer.name]
        assert one.zeros == other.zeros == round(layer.sparsity * layer.size)
        assert one.pattern == other.pattern == ("dense" if layer.name == "stem.0" else pattern)
        if layer.target:
            assert other.nbytes < one.nbytes
    assert "expanded when it is loaded" in packed["blocks.1.3.weight.0"].cells()[-1]
    assert "expanded" not in packed["blocks.0.3.weight.0"].cells()[-1]


def test_pruning_straight_into_the_packed_format_is_packing_afterwards(pruned: Path, tmp_path: Path) -> None:
    dense = pruned.parent / "dense"
    recipe = {"task": "pixels", **SHORT, "format": "packed"}
    prunella.prune(str(dense), recipe, output=tmp_path / "one")
    pack_model(str(pruned), tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # and a network in memory: its task writes what belongs to it
    prunella.prune(network(), recipe, output=tmp_path / "three")
    assert files(tmp_path / "three").keys() == files(tmp_path / "one").keys()
    three, one = tensors(tmp_path / "three"), tensors(tmp_path / "one")
    assert all(torch.equal(three[key], one[key]) for key in one)


def test_estimated_batch_norms_go_into_the_packed_files(pruned: Path, tmp_path: Path) -> None:
    """From a directory and in memory, and in a run that was killed after they were estimated."""
    dense = str(pruned.parent / "dense")
    recipe = {"task": "pixels", **SHORT, "batch_norm": "reset"}
    prunella.prune(dense, recipe, output=tmp_path / "plain")
    one = tensors(tmp_path / "plain")
    before = tensors(pruned.parent / "dense")
    name = "blocks.1.4.running_mean"
    assert not torch.equal(one[name], before[name])
    prunella.prune(dense, {**recipe, "format": "packed"}, output=tmp_path / "packed")
    prunella.prune(network(), {**recipe, "format": "packed"}, output=tmp_path / "memory")
    monkey = pytest.MonkeyPatch()
    monkey.setattr("prunella.pruning.Output.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prunella.prune(dense, {**recipe, "format": "packed"}, output=tmp_path / "resumed")
    monkey.undo()
    prunella.prune(dense, {**recipe, "format": "packed"}, output=tmp_path / "resumed", resume=True)
    for other in ("packed", "memory", "resumed"):
        unpack_model(str(tmp_path / other), tmp_path / f"{other}-plain")
        found = tensors(tmp_path / f"{other}-plain")
        assert found.keys() == one.keys()
        for key, tensor in one.items():  # memory laid out otherwise rounds otherwise
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{other}: {key}")


def test_a_quantized_convolution_is_packed_on_its_grid(pruned: Path, tmp_path: Path) -> None:
    dense = str(pruned.parent / "dense")
    steps = ["sparsegpt", {"gptq": {"bits": 8}}]
    prunella.prune(dense, {"task": "pixels", **SHORT, "steps": steps}, output=tmp_path / "out")
    pack_model(str(tmp_path / "out"), tmp_path / "packed")
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    before, after = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, other = read_grids(tmp_path / "out"), read_grids(tmp_path / "plain")
    assert one.keys() == other.keys() > {"blocks.0.3.weight.1"}
    assert all(torch.equal(grid.scale_OG, other[name].scale_OG) for name, grid in one.items())


def test_an_interrupted_run_goes_on_to_the_same_packed_files(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = str(pruned.parent / "dense")
    recipe = {"task": "pixels", **SHORT, "format": "packed", "steps": ["sparsegpt"]}
    prunella.prune(dense, recipe, output=tmp_path / "whole")
    from prunella.save import Output

    write = Output.write

    def once(self: Output, result: Any) -> None:
        if result.index:
            raise KeyboardInterrupt
        write(self, result)

    monkeypatch.setattr(Output, "write", once)
    with pytest.raises(KeyboardInterrupt):
        prunella.prune(dense, recipe, output=tmp_path / "out")
    monkeypatch.undo()
    report = prunella.prune(dense, recipe, output=tmp_path / "out", resume=True)
    assert report.run["resumed_after_blocks"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config["blocks.0.0"].update(shape=[32, 64]), "but the model wants"),
        (lambda config: config["blocks.0.3"].update(kernel=[9, 1]), r"kernel 9x1, groups 2\), but the model wants"),
        (lambda config: config.update({"blocks.7.0": config.pop("blocks.0.0")}), r"missing|another network"),
        (lambda config: config["blocks.0.3"].update(kernel=[5, 5]), "quantization_config.modules is damaged: kernel"),
        (lambda config: config["blocks.0.3"].update(groups=5), "is damaged"),
    ],
)
def test_a_packed_directory_of_another_network_is_refused(
    pruned: Path, tmp_path: Path, damage: Callable[[Any], Any], message: str
) -> None:
    pack_model(str(pruned), tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    damage(config["quantization_config"]["modules"])
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_packed(tmp_path / "packed")


def test_a_network_of_another_width_is_refused(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_model(str(pruned), tmp_path / "packed")
    monkeypatch.setattr("test_conv.Net", functools.partial(Net, 16))
    with pytest.raises(ModelError, match="has shape"):
        load_packed(tmp_path / "packed")
    with pytest.raises(InputError, match="is not packed"):
        load_packed(pruned)


# ---------------------------------------------------------------------------------------------------------
# transformers


def saved(kind: str, path: Path) -> Path:
    network: Any = nets.build(kind)
    network.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind", tiny.at_length(["vit", "resnet", "convnext", "efficientnet", "swin"], ["vit", "resnet"])
)
def test_vision_models_of_transformers(kind: str, tmp_path: Path) -> None:
    dense = saved(kind, tmp_path / "dense")
    prunella.prune(str(dense), {"task": "pixels", **SHORT}, output=tmp_path / "pruned")
    result = pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    assert result.layers
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    assert any(isinstance(module, SparseLinear) for module in opened.modules())
    for count in (1, 5):
        x = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(outputs(opened, x), outputs(plain, x), rtol=1e-4, atol=1e-4)
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "plain")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if kind in ("resnet", "vit"):  # saved by transformers, packed as it was
        opened.save_pretrained(tmp_path / "again")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
        assert torch.equal(outputs(again, x), outputs(opened, x))
        assert packed_config(tmp_path / "again") == packed_config(tmp_path / "packed")
        one, other = tensors(tmp_path / "again"), tensors(tmp_path / "packed")
        assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
        thawed = again.dequantize()
        torch.testing.assert_close(outputs(thawed, x), outputs(plain, x), rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, SparseLinear) for module in thawed.modules())


def test_an_encoder(tmp_path: Path) -> None:
    """On texts of several lengths, through the task that its config names."""
    saved("bert", tmp_path / "dense")
    tiny.write_tokenizer(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    network: Any = nets.build("bert")
    network.resize_token_embeddings(tiny.VOCABULARY)
    network.save_pretrained(tmp_path / "dense")
    assert config["model_type"] == "bert"
    text = tmp_path / "rows.jsonl"
    rows = [{"text": f"line {i} of many " * (1 + i % 3), "label": i % 2} for i in range(24)]
    text.write_text("\n".join(map(json.dumps, rows)))
    recipe = {"steps": ["wanda"], "calibration": {"source": str(text), "samples": 8}, "evaluate": {"source": str(text)}}
    report = prunella.prune(str(tmp_path / "dense"), recipe, output=tmp_path / "pruned")
    assert report.pruned["figure"] == "accuracy"
    pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    for count, length in ((1, 5), (7, 12)):
        ids = torch.randint(3, 300, (count, length))
        torch.testing.assert_close(outputs(opened, ids), outputs(plain, ids), rtol=1e-4, atol=1e-4)
    found = prunella.open_model(str(tmp_path / "packed"), packed=True, device="cpu")
    assert found.task.name == "classify"


def test_what_is_changed_after_loading_is_not_stored_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunella.sparse.conv.library", lambda: None)  # so that convolutions are expanded
    dense = saved("resnet", tmp_path / "dense")
    prunella.prune(str(dense), {"task": "pixels", **SHORT}, output=tmp_path / "pruned")
    pack_model(str(tmp_path / "pruned"), tmp_path / "packed")
    opened: Any = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    conv = next(module for module in opened.modules() if hasattr(module, "packed_as"))
    with torch.no_grad():
        conv.weight += 1
    with pytest.raises(ModelError, match="was changed since it was loaded"):
        opened.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "packed")
