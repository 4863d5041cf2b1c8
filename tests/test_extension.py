"""A method in one file of a third party's own, and nothing else touched."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, make, read_masks
from prunella.allocate import allocations
from prunella.heal import groups
from prunella.registry import steps

MINE = (Path(__file__).parent / "extensions" / "toy_step.py").read_text(encoding="utf-8")
SHORT = ("--calibration", "pydoc", "--samples", 4, "--length", 32, "--windows", 1)


@pytest.fixture
def mine(tmp_path: Path) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    yield path
    steps.pop("mine", None)


def test_a_step_from_a_file_runs_by_its_path(mine: Path, llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    result = run("prune", llama, "-o", out, "--step", f"{mine}:mine", "--sparsity", 0.25, *SHORT)
    assert result.code == 0, result.err
    network = AutoModelForCausalLM.from_pretrained(out)
    for name, mask_OI in read_masks(out).items():
        assert (~mask_OI).float().mean() == 0.25
        assert (network.get_submodule(name).weight[~mask_OI] == 0).all()
    report = json.loads((out / "prunella.json").read_text())
    assert report["recipe"]["steps"] == [{f"{mine}:mine": {}}]
    again = prunella.prune(llama, report["recipe"], output=tmp_path / "again")
    assert again.layers == prunella.Report.read(out).layers


def test_its_options_are_checked_like_those_of_any_step(mine: Path) -> None:
    step = make(f"{mine}:mine", {"power": "2"})
    assert step.options == {"power": 2.0, "flip": False}
    assert step.needs == {"moments"}
    assert step.per_layer
    with pytest.raises(InputError, match=r"unknown option of step mine 'powr'\. Did you mean 'power'"):
        make(f"{mine}:mine", {"powr": 2})


def test_its_options_are_set_in_a_recipe_and_on_the_command_line(
    mine: Path, llama: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"steps:\n- '{mine}:mine': {{flip: true}}\n")
    result = run("prune", llama, "-o", tmp_path / "out", "--recipe", recipe, "--set", f"{mine}:mine.power=0", *SHORT)
    assert result.code == 0, result.err
    assert prunella.Report.read(tmp_path / "out").recipe["steps"] == [{f"{mine}:mine": {"flip": True, "power": 0}}]
    # Flipped and with power 0 it prunes the largest weights.
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "out"))
    for name, mask_OI in read_masks(tmp_path / "out").items():
        size_OI = dense.get_submodule(name).weight.abs()
        assert size_OI[mask_OI].max() <= size_OI[~mask_OI].min()
        assert torch.equal(pruned.get_submodule(name).weight, dense.get_submodule(name).weight * mask_OI)


def test_it_shows_up_among_the_methods_once_it_is_imported(mine: Path, run: Callable[..., Any]) -> None:
    make(f"{mine}:mine")
    (row,) = [row for row in json.loads(run("methods", "--json").out) if row["name"] == "mine"]
    assert row["summary"] == "Prune by |w| times the spread of its input."
    assert row["options"] == {"power": 1.0, "flip": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("def mine(:\n", "cannot be imported: SyntaxError"),
        ("import nothing_like_this\n", "cannot be imported: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("raise RuntimeError('later\\nlonger')\n", "cannot be imported: RuntimeError: later"),
        ("x = 1\n", "unknown step 'mine'"),
        (MINE.replace("layer: Layer", "layer"), "must be annotated as Layer or Block"),
        (MINE.replace('"moments"', '"moment"'), "unknown statistic 'moment'. Did you mean 'moments'"),
    ],
)
def test_a_file_that_holds_no_step_says_why(
    content: str | None, message: str, tmp_path: Path, llama: Path, run: Callable[..., Any]
) -> None:
    path = tmp_path / "broken.py"
    if content is not None:
        path.write_text(textwrap.dedent(content))
    result = run("prune", llama, "-o", tmp_path / "out", "--step", f"{path}:mine", *SHORT)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_files_of_two_steps_of_one_name_do_not_mix(mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_text(MINE.replace("1.0", "3.0"))
    assert make(f"{mine}:mine").options["power"] == 1.0
    assert make(f"{other}:mine").options["power"] == 3.0
    assert make(f"{mine}:mine").options["power"] == 1.0


Own = Callable[[str], str]


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """Write a step of this body; how it is called on the command line."""

    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(
            "import prunella\nfrom prunella import Layer\n@prunella.register('own')\n"
            f"def own(layer: Layer) -> Layer:\n    'Mine.'\n    {body}\n"
        )
        return f"{tmp_path}/mine.py:own"

    yield write
    steps.pop("own", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('boom')", r"RuntimeError: boom; the defect is in the step, line 6 of .*mine\.py"),
        ("return layer.weight_OI", "returned Tensor, not Layer; the defect is in the step"),
        ("layer.stats.nothing", "AttributeError: .*; the defect is in the step, line 6 of"),
    ],
)
@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_step_that_fails_is_named_with_the_layer(
    own: Own, body: str, message: str, order: str, tmp_path: Path, llama: Path, run: Callable[..., Any]
) -> None:
    name = own(body)
    with pytest.raises(prunella.PrunellaError, match=message) as error:
        prunella.prune(
            llama, {"steps": [name], "order": order}, output=tmp_path / "o", calibration=tiny.token_windows()
        )
    assert f"step '{name}' at layer 'model.layers.0.self_attn.q_proj'" in str(error.value)
    assert run("prune", llama, "-o", tmp_path / "p", "--step", name, "--samples", 2, "--length", 32).code == 2


def test_what_a_step_refuses_on_purpose_is_said_in_its_own_words(own: Own, ids: Tensor) -> None:
    name = own("raise prunella.InputError('not on a Friday')")
    with pytest.raises(prunella.InputError, match=r"^not on a Friday$"):
        prunella.prune(tiny.build(), {"steps": [name]}, calibration=ids)


def test_steps_that_choose_no_mask_are_an_error_of_theirs(own: Own, ids: Tensor) -> None:
    name = own("return layer")
    with pytest.raises(prunella.PrunellaError, match=r"chose no mask for layer 'model\.layers\.0\.self_attn\.q_proj'"):
        prunella.prune(tiny.build(), {"steps": [name]}, calibration=ids)


THREE = '''
from prunella import Layer, register
from prunella.allocate import register_allocation
from prunella.heal import Part, trains


@register("mine")
def step(layer: Layer) -> Layer:
    """Mine."""
    FAIL


@register_allocation("mine")
def allocation(budget):
    """Mine."""
    FAIL


@trains("mine")
def healing(part: Part, *, rate: float = 1e-3):
    """Mine."""
    FAIL
'''


@pytest.mark.parametrize(
    ("flag", "where"),
    [
        ("--step", "step 'FILE:mine' at layer 'model.layers.0.self_attn.q_proj'"),
        ("--allocate", "allocation 'FILE:mine'"),
        ("--heal", "healing method 'FILE:mine' at 'model."),
    ],
)
def test_a_method_of_ones_own_that_fails_is_named(
    tmp_path: Path, llama: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, flag: str, where: str
) -> None:
    for registry in (steps, allocations, groups):
        monkeypatch.setitem(registry, "mine", next(iter(registry.values())))  # what is registered goes again
    for body, message in {"1 / 0": "ZeroDivisionError: division by zero", "return 3": "returned int"}.items():
        path = tmp_path / f"{len(body)}.py"
        path.write_text(THREE.replace("FAIL", body))
        step = () if flag == "--step" else ("--step", "magnitude")
        words = (flag, f"{path}:mine", *step, "--evaluate", "none", *SHORT[:-2])
        said = run("prune", llama, "-o", tmp_path / f"out{len(body)}", *words)
        assert said.code == 2
        (line,) = said.err.splitlines()
        assert where.replace("FILE", str(path)) in line
        assert message in line
