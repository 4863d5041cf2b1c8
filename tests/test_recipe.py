from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunella import InputError, Recipe
from prunella.recipe import override


def test_the_default_recipe_is_complete_and_reads_itself_back() -> None:
    recipe = Recipe()
    assert Recipe.of(recipe.plain()) == recipe
    assert Recipe.of(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe
    assert Recipe.of({}) == recipe
    assert [step.name for step in recipe.make_steps()] == ["sparsegpt"]
    assert recipe.default_sparsity == 0.5


@given(
    st.builds(
        dict,
        sparsity=st.one_of(
            st.floats(0, 0.99), st.dictionaries(st.sampled_from(["*", "mlp", "q_proj"]), st.floats(0, 0.99))
        ),
        steps=st.lists(st.sampled_from(["wanda", "magnitude", {"sparsegpt": {"damping": 0.1}}]), min_size=1),
        skip=st.lists(st.sampled_from(["lm", "q_proj"])),
        seed=st.integers(0, 1 << 30),
        calibration=st.builds(dict, samples=st.integers(1, 99), length=st.one_of(st.none(), st.integers(2, 99))),
    )
)
@settings(max_examples=50, deadline=None)
def test_any_recipe_survives_the_way_through_yaml(values: dict[str, Any]) -> None:
    recipe = Recipe.of(values)
    assert Recipe.of(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("wanda", ({"wanda": {}},)),
        ({"wanda": {"variant": True}}, ({"wanda": {"variant": True}},)),
        (["wanda", "sparsegpt"], ({"wanda": {}}, {"sparsegpt": {}})),
        ([{"wanda": None}], ({"wanda": {}},)),
    ],
)
def test_steps_may_be_written_short(steps: Any, expected: Any) -> None:
    assert Recipe.of({"steps": steps}).steps == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparcity": 0.5}, "unknown recipe key 'sparcity'. Did you mean 'sparsity'?"),
        ({"calibration": {"sample": 8}}, "unknown recipe key 'calibration.sample'. Did you mean 'calibration.samples'"),
        ({"evaluate": {"window": 8}}, "unknown recipe key 'evaluate.window'. Did you mean 'evaluate.windows'"),
        ({"sparsity": 1}, "sparsity 1 for layers '*' is out of range: 0 (dense) up to, not including, 1"),
        ({"sparsity": -0.1}, "sparsity -0.1 for layers '*' is out of range"),
        ({"sparsity": float("nan")}, "sparsity nan for layers '*' is out of range"),
        ({"sparsity": {"mlp": 1.5}}, "sparsity 1.5 for layers 'mlp' is out of range"),
        ({"sparsity": "half"}, "recipe key 'sparsity': "),
        ({"sparsity": [0.5]}, "recipe key 'sparsity': "),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 prunes 0.5 of every layer, but the sparsity of '*' is 0.6"),
        ({"pattern": "4:2"}, "pattern '4:2' is none of"),
        ({"steps": ["wandda"]}, "unknown step 'wandda'. Did you mean 'wanda'?"),
        ({"steps": [{"wanda": {"varient": 1}}]}, "unknown option of step wanda 'varient'. Did you mean 'variant'?"),
        ({"steps": [{"wanda": {}, "sparsegpt": {}}]}, "steps: "),
        ({"steps": 3}, "steps: "),
        ({"steps": [3]}, "steps: "),
        ({"steps": [{"wanda": 3}]}, "recipe key 'steps.0.wanda': "),
        ({"steps": []}, "steps: "),
        ({"seed": "x"}, "recipe key 'seed': "),
        ({"order": "sideways"}, "recipe key 'order': "),
        ({"dtype": "int8"}, "recipe key 'dtype': "),
        ({"calibration": {"samples": 0}}, "recipe key 'calibration.samples': "),
        ({"calibration": {"length": 1}}, "recipe key 'calibration.length': "),
        ({"calibration": "pydoc"}, "recipe key 'calibration': "),
        ({"calibration": None}, "recipe key 'calibration': "),
        ({3: 4}, "recipe key"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.of(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_fixed_pattern_gives_its_own_sparsity_and_lets_layers_stay_dense() -> None:
    assert Recipe.of({"pattern": "1:4"}).default_sparsity == 0.75
    assert Recipe.of({"pattern": "2:4", "sparsity": {"*": 0.5, "q_proj": 0}}).default_sparsity == 0.5


# ---------------------------------------------------------------------------------------------------------
# KEY=VALUE


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("calibration.samples=8", ("calibration", "samples"), 8),
        ("sparsity=0.3", ("sparsity",), 0.3),
        ("sparsity.down_proj=0.3", ("sparsity", "down_proj"), 0.3),
        ("sparsity.model.layers.0.*=0.3", ("sparsity", "model.layers.0.*"), 0.3),
        ("skip=[q_proj, lm_head]", ("skip",), ["q_proj", "lm_head"]),
        ("evaluate.source=null", ("evaluate", "source"), None),
        ("sparsegpt.damping=0.05", ("steps", 0, "sparsegpt", "damping"), 0.05),
        ("steps=[wanda]", ("steps",), ["wanda"]),
        ("calibration.source=a=b.txt", ("calibration", "source"), "a=b.txt"),
    ],
)
def test_a_setting_lands_where_it_says(setting: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = override({}, [setting])
    Recipe.of(found)
    for part in path:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("samples", "--set samples: write KEY=VALUE"),
        ("sampels=3", "unknown recipe key 'sampels'"),
        ("wanda.variant=true", "unknown recipe key 'wanda'"),
        ("sparsegpt.dampin=1", "unknown option of step sparsegpt 'dampin'. Did you mean 'damping'?"),
        ("sparsegpt=1", "unknown option of step sparsegpt ''"),
        ("seed.x=1", "--set seed.x=1: 'seed' is a single value"),
        ("skip=[q_proj", "--set skip=[q_proj: '[q_proj' is not a YAML value"),
        ("=1", "unknown recipe key ''"),
    ],
)
def test_a_setting_that_cannot_be_made_says_why(setting: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        override({}, [setting])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_settings_apply_in_order_and_leave_the_given_values_alone() -> None:
    values = {"steps": ["wanda", "sparsegpt"], "seed": 3}
    out = override(values, ["seed=4", "wanda.variant=true", "seed=5"])
    assert out["seed"] == 5
    assert out["steps"] == [{"wanda": {"variant": True}}, {"sparsegpt": {}}]
    assert values == {"steps": ["wanda", "sparsegpt"], "seed": 3}


# ---------------------------------------------------------------------------------------------------------
# Files


def test_a_yaml_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n  - wanda: {variant: true}\nsparsity: 0.4\n", encoding="utf-8")
    recipe = Recipe.of(Recipe.read(path))
    assert recipe.steps == ({"wanda": {"variant": True}},)
    assert recipe.sparsity == {"*": 0.4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"steps: [wanda", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- wanda\n", "is not a mapping"),
        (b"", "is not a mapping"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Recipe.read(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
