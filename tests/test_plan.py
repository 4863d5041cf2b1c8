"""Packed networks by plans: against the dense ones with the same zeros."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from encoders import build
from timm.models import _efficientnet_builder as builder
from timm.models import convnext, efficientnet, mobilenetv3, regnet, resnet, vision_transformer
from torch import Tensor, nn

from prunella.errors import InputError
from prunella.plan import network as planned
from prunella.plan.memory import lay_out
from prunella.plan.network import Planned, slow_down, speed_up
from prunella.plan.run import Plan
from prunella.plan.values import Buffer, new_value, plane_of
from prunella.sparse import coded
from prunella.sparse.conv import packed_module, runs_packed
from prunella.sparse.format import pack
from prunella.sparse.striped import Striped

SEE = {"pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept however slow they are: what takes how long depends on what else runs here."""
    monkeypatch.setattr(planned, "SHORT", float("inf"))


def pruned(network: nn.Module, sparsity: float) -> nn.Module:
    """Without its smallest weights, layer by layer, and with batch norms that do something."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            cut = weight.abs().flatten().kthvalue(max(1, int(weight.numel() * sparsity))).values
            weight[weight.abs() <= cut] = 0
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=random) / 8)  # type: ignore[union-attr]
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)  # type: ignore[union-attr]
    return network.eval().requires_grad_(False)


def packed(dense: nn.Module) -> nn.Module:
    """The same network, its pruned layers packed."""
    network = copy.deepcopy(dense)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and runs_packed(module)):
            weight = module.weight.data
            weight_OI = weight.movedim(1, -1).flatten(1).contiguous()
            network.set_submodule(name, packed_module(pack(weight_OI, weight_OI != 0), module))
    speed_up(network)
    return network


def plans(network: nn.Module) -> list[Plan | None]:
    forward = network.forward
    assert isinstance(forward, Planned)
    return list(forward.plans.values())


def kinds(network: nn.Module) -> set[str]:
    """The steps of the newest plan; torch's operators by their names."""
    plan = plans(network)[-1]
    assert plan is not None
    return {getattr(action, "kind", None) or str(getattr(action, "target", "")) for action in plan.actions}


def check(found: Any, wanted: Any) -> None:
    """The same outputs, in the same class, within 1e-4 of the largest."""
    assert type(found) is type(wanted)
    pairs = [(found, wanted)] if isinstance(wanted, Tensor) else [(found[key], wanted[key]) for key in wanted]
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert (a - b).nan_to_num().abs().max() <= 1e-4 * b.nan_to_num().abs().max()


def see(kind: type[nn.Module], blocks: list[list[str]], act: type[nn.Module], **options: Any) -> nn.Module:
    return kind(builder.decode_arch_def(blocks), num_classes=7, act_layer=act, **options)


VISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: resnet.ResNet(
        resnet.Bottleneck,
        (1, 2, 1, 1),
        num_classes=7,
        channels=(8, 16, 24, 32),
        stem_width=8,  # type: ignore[arg-type]
    ),
    "lite": lambda: see(
        efficientnet.EfficientNet,
        [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k5_s2_e4_c12"]],
        nn.ReLU6,
        stem_size=8,
        num_features=40,
    ),
    "mobilenetv3": lambda: see(
        mobilenetv3.MobileNetV3,
        [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r2_k5_s2_e4_c12_se0.25"]],
        nn.Hardswish,
        stem_size=8,
        num_features=40,
        se_layer=functools.partial(efficientnet.SqueezeExcite, gate_layer="hard_sigmoid"),
    ),
    "convnext": lambda: convnext.ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 16, 24), ls_init_value=0.5),
    "regnet": lambda: regnet.RegNet(
        regnet.RegNetCfg(depth=4, w0=16, wa=12.0, wm=1.6, group_size=8, se_ratio=0.25),
        num_classes=7,
        stem_width=8,  # type: ignore[call-arg]
    ),
    "vit": lambda: vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=4
    ),
}


@pytest.mark.parametrize("kind", VISION)
def test_pictures(kind: str) -> None:
    torch.manual_seed(0)
    dense = pruned(VISION[kind](), 0.7 if kind != "resnet" else 0.9)
    network = packed(dense)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            wanted = dense(x)
            check(network(x), wanted)  # as it is made, module by module
            check(network(x), wanted)
            assert len(plans(network)) == 1  # pictures go through it one after another
            if kind != "vit":
                x[0, 0, 5, 5] = torch.nan
                check(network(x), dense(x))
    assert (
        {"product"}
        <= kinds(network)
        <= {
            *("product", "conv", "depthwise", "pool", "mean", "scale", "add", "map", "norm", "attend"),
            *(name for name in kinds(network) if kind == "vit" and name in ("aten.cat.default", "aten.add.Tensor")),
            *(name for name in kinds(network) if "_same" in name),
        }
    )


@pytest.mark.parametrize(
    ("kind", "attention"), [("bert", "sdpa"), ("roberta", "sdpa"), ("distilbert", "sdpa"), ("bert", "eager")]
)
def test_encoders(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    dense = pruned(build(kind, "", num_hidden_layers=2, n_layers=2, attn_implementation=attention), 0.8)
    network = packed(dense)
    for batch, length in ((1, 9), (3, 17)):
        inputs = {"input_ids": torch.randint(5, 300, (batch, length))}
        if batch == 3:
            inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
            inputs["attention_mask"][-1, 6:] = 0
        with torch.inference_mode():
            for _ in range(2):
                check(network(**inputs), dense(**inputs))
                assert "attend" in kinds(network)
                inputs["input_ids"] = torch.randint(5, 300, (batch, length))
    assert len(plans(network)) == 2
    assert None not in plans(network)


def test_what_is_asked_for_beside_the_output() -> None:
    dense = pruned(build("bert", "SequenceClassification", num_labels=3), 0.8)
    network = packed(dense)
    ids = torch.randint(5, 300, (2, 11))
    with torch.inference_mode():
        for options in ({}, {"output_hidden_states": True}, {"return_dict": False}):
            wanted, found = dense(ids, **options), network(ids, **options)
            check(found[0], wanted[0])
            assert type(found) is type(wanted)
            assert len(found) == len(wanted)
        states = [network(ids, output_hidden_states=True).hidden_states for _ in range(2)]
        for a, b in zip(states[1], dense(ids, output_hidden_states=True).hidden_states, strict=True):
            check(a, b)
        assert states[0][0].data_ptr() != states[1][0].data_ptr()  # new ones each time
    assert len(plans(network)) > 1


def test_vit_of_transformers() -> None:
    torch.manual_seed(0)
    dense = pruned(t.ViTForImageClassification(t.ViTConfig(**SEE, image_size=32, patch_size=8)), 0.8)
    network = packed(dense)
    with torch.inference_mode():
        for batch in (1, 3, 1):
            x = torch.randn(batch, 3, 32, 32)
            check(network(pixel_values=x), dense(pixel_values=x))
    assert len(plans(network)) == 1
    assert None not in plans(network)


class Odd(nn.Module):
    """What no step exists for, between what there is."""

    def __init__(self, choose: bool = False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.out = nn.Linear(8 * 16, 5)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.first(x), (1, 1, 1, 1), mode="reflect")
        x = torch.cumsum(self.second(x[:, :, 1:-1, 1:-1].contiguous()), 2).roll(1, 3)
        x = x.mul_(torch.linspace(0, 1, x.shape[3]))
        if self.choose and float(x.sum()) > 0:
            x = x + 1
        out: Tensor = self.out(nn.functional.adaptive_max_pool2d(x, 4).transpose(2, 3).flatten(1))
        return out


def test_what_there_is_no_step_for() -> None:
    torch.manual_seed(0)
    dense = pruned(Odd(), 0.5)
    network = packed(dense)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        for _ in range(2):
            check(network(x), dense(x))
    assert {"product", "conv", "aten.cumsum.default"} <= kinds(network)


def test_a_network_that_cannot_be_exported(capsys: pytest.CaptureFixture[str]) -> None:
    dense = pruned(Odd(choose=True), 0.5)
    network = packed(dense)
    with torch.inference_mode():
        for x in (torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)):
            torch.testing.assert_close(network(x), dense(x))
    assert plans(network) == [None, None]
    said = capsys.readouterr().err
    assert said.count("prunella: Odd runs module by module, which is slower: torch.export: ") == said.count("\n") == 1


def test_modules_run_where_plans_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    dense = pruned(VISION["lite"](), 0.8)
    network, x = packed(dense), torch.randn(1, 3, 32, 32)
    forward = network.forward
    assert isinstance(forward, Planned)
    wanted = dense(x)
    check(network(x.clone().requires_grad_()), wanted)  # gradients are asked for
    assert "torch.inference_mode()" in capsys.readouterr().err
    assert not forward.plans
    check(network(x), wanted)  # and here none could be
    assert len(forward.plans) == 1
    seen: list[Tensor] = []
    inner = network.get_submodule("blocks.0")
    hook = inner.register_forward_hook(lambda module, given, made: seen.append(made))
    check(network(x), wanted)
    assert len(seen) == 1
    assert not forward.plans
    hook.remove()
    check(network(x), wanted)
    assert len(seen) == 1
    assert len(forward.plans) == 1
    with torch.no_grad():  # a weight changes
        network.get_parameter("classifier.bias").add_(1)
    check(network(x), wanted + 1)
    network.get_submodule("bn1").eps = 0.5  # or what a module is
    dense.get_submodule("bn1").eps = 0.5
    check(network(x), dense(x) + 1)
    check(torch.export.export(network, (x,)).module()(x), dense(x) + 1)
    network.get_submodule("bn1").train()
    assert torch.isfinite(network(x)).all()
    assert not forward.plans
    network.get_submodule("bn1").eval()
    check(copy.deepcopy(network)(x), network(x))
    slow_down(network)
    assert "forward" not in network.__dict__


def test_half_precision_converts_at_the_border() -> None:
    torch.manual_seed(0)
    dense = pruned(build("bert", ""), 0.8).to(torch.bfloat16)
    network, ids = packed(dense), torch.randint(5, 300, (2, 9))
    with torch.inference_mode():
        wanted = copy.deepcopy(dense).float()(ids).last_hidden_state
        for _ in range(2):
            found = network(ids).last_hidden_state
            assert found.dtype is torch.bfloat16
            assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert plans(network) != [None]


def test_two_threads_at_once() -> None:
    torch.manual_seed(0)
    dense = pruned(VISION["lite"](), 0.8)
    network, given = packed(dense), [torch.randn(1, 3, 32, 32) for _ in range(8)]
    with torch.inference_mode():
        wanted = [dense(x) for x in given]
        network(given[0])
    found: dict[int, list[Tensor]] = {}

    def run(first: int) -> None:
        with torch.inference_mode():
            found[first] = [network(x) for _ in range(5) for x in given[first::2]]

    threads = [threading.Thread(target=run, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, outs in found.items():
        for out, right in zip(outs, wanted[first::2] * 5, strict=True):
            check(out, right)


def test_few_plans_are_kept() -> None:
    network = packed(pruned(VISION["lite"](), 0.8))
    forward = network.forward
    assert isinstance(forward, Planned)
    forward.kept = 2
    with torch.inference_mode():
        for size in (32, 40, 48, 32):
            network(torch.zeros(1, 3, size, size))
    assert [plan.inputs[0].shape[2] for plan in plans(network) if plan and plan.inputs[0]] == [48, 32]


def test_a_plan_is_made_for_what_comes_again() -> None:
    network = packed(pruned(build("bert", "", num_hidden_layers=1), 0.8))
    forward = network.forward
    assert isinstance(forward, Planned)
    with torch.inference_mode():
        for length in (3, 4, 5, 6, 7):
            network(torch.randint(5, 300, (1, length)))
        assert len(plans(network)) == 4
        network(torch.randint(5, 300, (1, 7)))
    assert len(plans(network)) == 5


def weights(network: nn.Module) -> list[Any]:
    """What the steps multiply with: machine code or strips."""
    forward = network.forward
    assert isinstance(forward, Planned)
    return [weight.held for weight in forward.weights.pruned if weight.packed is not None]


@pytest.mark.skipif(not coded.available(), reason="no AVX-512, or code cannot be made here")
@pytest.mark.parametrize("kind", ["lite", "resnet", "regnet", "mobilenetv3", "bert"])
def test_layers_get_code_as_memory_allows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = pruned(build("bert", "", num_hidden_layers=2) if kind == "bert" else VISION[kind](), 0.8)
    x = torch.randint(5, 300, (3, 17)) if kind == "bert" else torch.randn(3, 3, 33, 37)
    for allowed, wanted in (("100", coded.Coded), ("0", Striped)):
        monkeypatch.setenv("PRUNELLA_MEMORY", allowed)
        network = packed(dense)
        with torch.inference_mode():
            check(network(x), dense(x))
            check(network(x), dense(x))
        assert None not in plans(network)
        assert {type(one) for one in weights(network)} == {wanted}
    monkeypatch.setenv("PRUNELLA_MEMORY", "much")
    with pytest.raises(InputError, match="PRUNELLA_MEMORY=much"), torch.inference_mode():
        packed(dense)(x)


@pytest.mark.parametrize("allowed", ["0", "100"])
def test_numbers_that_are_too_small_are_flushed_and_counted(
    allowed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRUNELLA_MEMORY", allowed)
    dense = pruned(VISION["resnet"](), 0.5)
    conv = next(module for module in dense.modules() if isinstance(module, nn.Conv2d))
    conv.weight.data[conv.weight.data != 0] *= 1e-39
    network = packed(dense)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        check(network(x), dense(x))
        check(network(x), dense(x))
    assert "too small for normal numbers" in capsys.readouterr().err


@pytest.mark.parametrize(("plan", "modules", "taken"), [(1.0, 0.98, True), (1.0, 0.9, False), (1e-3, 1e-4, True)])
def test_a_plan_has_to_pay(plan: float, modules: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "SHORT", 2e-3)
    monkeypatch.setattr(planned, "times", lambda ways: {"plan": plan, "modules": modules})
    dense = pruned(VISION["resnet"](), 0.9)
    network, x = packed(dense), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        check(network(x), dense(x))
    assert [one is not None for one in plans(network)] == [taken]


def test_memory_is_given_again() -> None:
    buffers = [Buffer(size) for size in (100, 50, 70, 30, 100)]
    for number, buffer in enumerate(buffers):
        buffer.use(number)
        buffer.use(number + 1)
    size = lay_out(buffers)
    for a in buffers:
        for b in buffers:
            if a is not b and a.first <= b.last and b.first <= a.last:
                assert a.start + a.size <= b.start or b.start + b.size <= a.start
    assert size < sum(buffer.size for buffer in buffers)


def test_where_channels_lie() -> None:
    value = new_value((2, 3, 5, 7), 1)
    plane = plane_of(value, 1)
    assert plane is not None
    assert (plane.channels, plane.positions, plane.ld % 32) == (3, 70, 16)
    assert value.meta.stride() == (35, plane.ld, 7, 1)
    assert plane_of(value, 2) is None
