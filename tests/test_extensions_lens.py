"""A lens from a file of a third party's own, with every step there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunella
from prunella.errors import StepError
from prunella.heal.masks import masks_of
from prunella.lenses import lenses, wear
from prunella.packing import pack_model
from prunella.pattern import pack
from prunella.registry import lookup, steps
from prunella.tasks.text import load_model
from prunella.tensors import MASKS, mask_shapes, write_masks

LENS = f"{Path(__file__).parent / 'extensions' / 'toy_lens.py'}:patches"
BUILT_IN = sorted(name for name, step in steps.items() if step.function.__module__.startswith("prunella."))


class Causal(nn.Module):
    """A convolution over a window's tokens that sees those before."""

    def __init__(self, width: int, outputs: int, groups: int):
        super().__init__()
        self.conv = nn.Conv1d(width, outputs, 3, padding=4, dilation=2, groups=groups)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.conv(x_BLD.mT)[..., :-4].mT


def build() -> Any:
    """A tiny LLaMA whose values, and half of whose MLPs, come from convolutions."""
    network = tiny.build("llama")
    torch.manual_seed(3)
    for layer in network.model.layers:
        layer.self_attn.v_proj = Causal(32, 16, groups=1)
        layer.mlp.up_proj = Causal(32, 64, groups=2)
    return network.eval()


def entering(network: Any, ids: Tensor, names: set[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        network(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("step", BUILT_IN)
def test_every_step_prunes_through_it_and_reports_the_true_error(
    step: str, order: str, pattern: str, ids: Tensor
) -> None:
    if (order == "layer" and not steps[step].per_layer) or (pattern == "2:4" and step == "besa"):
        pytest.skip("not what this step does")
    network, dense = build(), build()
    chosen = [step] if steps[step].prunes else ["wanda", step]
    recipe = {"steps": chosen, "lenses": LENS, "order": order, "pattern": pattern}
    report = prunella.prune(network, recipe, calibration=ids)
    layers = {layer.name: layer for layer in report.layers}
    values = "model.layers.0.self_attn.v_proj.conv"
    gates = "model.layers.0.mlp.up_proj.conv"
    assert layers[values].shape == (16, 96)
    assert layers[f"{gates}.weight.0"].shape == layers[f"{gates}.weight.1"].shape == (32, 48)
    assert not any("conv" in item.name for item in report.left_out)
    for name in (values, gates):
        weight_OCK = network.get_submodule(name).weight
        if step != "besa":  # which chooses sparsities within a block
            assert (weight_OCK == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        if pattern == "2:4":  # along the channels
            assert ((weight_OCK.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
    # What enters the first convolution is the same in both orders, and what enters the second in the dense block.
    checked = {values: [values]} | ({gates: [f"{gates}.weight.0", f"{gates}.weight.1"]} if order == "block" else {})
    inputs = entering(dense, ids, set(checked))
    for name, parts in checked.items():
        module = dense.get_submodule(name)
        change = network.get_submodule(name).weight - module.weight
        with torch.no_grad():
            lost, whole = (
                functional.conv1d(inputs[name], weight, None, 1, 4, 2, module.groups).chunk(len(parts), 1)
                for weight in (change, module.weight)
            )
        for n, part in enumerate(parts):
            error = (lost[n].square().sum() / whole[n].square().sum()).item()
            assert layers[part].error == pytest.approx(error, rel=1e-3)


def test_without_it_convolutions_are_left_out_in_the_same_process_too(ids: Tensor) -> None:
    network = build()
    prunella.prune(network, {"steps": ["magnitude"], "lenses": LENS}, calibration=ids)
    report = prunella.prune(network, {"steps": ["magnitude"]}, calibration=ids)
    assert {item.why for item in report.left_out} == {"convolution"}
    assert "lenses" not in report.recipe


def test_masks_that_nobody_can_hold_are_refused(tmp_path: Path, ids: Tensor) -> None:
    model, strange = tmp_path / "m", "model.layers.0.self_attn.v_proj.conv"
    tiny.build("llama").save_pretrained(model)
    prunella.prune(model, {"steps": ["magnitude"]}, output=tmp_path / "p", calibration=ids)
    masks = {name: pack(mask_OI) for name, mask_OI in prunella.read_masks(tmp_path / "p").items()}
    shapes = mask_shapes(tmp_path / "p")
    write_masks(tmp_path / "p" / MASKS, masks | {strange: pack(torch.ones(2, 8).bool())}, shapes | {strange: (2, 8)})
    with pytest.raises(prunella.ModelError, match=rf"'{strange}' was pruned.*--set lenses="):
        pack_model(str(tmp_path / "p"), tmp_path / "k")
    with pytest.raises(prunella.ModelError, match=rf"'{strange}' was pruned.*--set lenses="):
        masks_of(load_model(str(tmp_path / "p")), tmp_path / "p")


def test_a_lens_that_does_not_give_a_weight_back_is_refused(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    patches: Any = lookup("lens", lenses, LENS).function
    monkeypatch.setattr(patches, "tensor", lambda self, matrices, shape: matrices.reshape(*shape))
    with pytest.raises(StepError, match=r"lens '.*' does not give a parameter of shape \(16, 32, 3\) back"):
        prunella.prune(build(), {"steps": ["magnitude"], "lenses": LENS}, calibration=ids)


def test_a_lens_that_fits_nothing_or_is_unknown_is_refused(ids: Tensor) -> None:
    with pytest.raises(prunella.InputError, match="fits no parameter"):
        prunella.prune(tiny.build(), {"steps": ["magnitude"], "lenses": LENS}, calibration=ids)
    with pytest.raises(prunella.InputError, match="lens 'patch'"):
        wear([], ["patch"])
