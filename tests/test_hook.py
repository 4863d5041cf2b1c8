"""What other libraries know of Prunella in processes that never import it."""

from __future__ import annotations

import _json
import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import auto

import prunella
from prunella.packing import unpack_model
from prunella.sparse.linear import SparseLinear

PROMPT = "The garden"


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    recipe = {"steps": ["magnitude"], "format": "packed", "evaluate": {"source": None}}
    prunella.prune(str(llama), recipe, output=path, calibration=tiny.token_windows())
    return path


def text(network: Any, directory: Path) -> str:
    """What the model writes."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out: str = tokenizer.decode(network.generate(**inputs, max_new_tokens=6, do_sample=False)[0])
    return out


NOBODY = "import sys; assert not {'prunella', 'transformers'} & sys.modules.keys()\n"
LOAD = """
assert "prunella" not in sys.modules
from transformers import AutoModelForCausalLM
import torch
print(AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(3, 20)[None]).logits.double().sum().item())
"""


@pytest.mark.parametrize(
    "first",
    [
        "import torch\n" + NOBODY,  # torch calls the entry point, which imports neither
        "import sys, transformers.quantizers\n",  # the module with the tables imports torch, before they are there
        pytest.param("import sys, transformers.modeling_utils\n", marks=pytest.mark.slow),
    ],
)
def test_a_packed_model_loads_whatever_was_imported_first(
    python: Callable[..., subprocess.CompletedProcess[str]], packed: Path, first: str
) -> None:
    done = python(first + LOAD, packed)
    assert done.returncode == 0, done.stderr
    network = AutoModelForCausalLM.from_pretrained(packed)
    assert float(done.stdout) == pytest.approx(network(torch.arange(3, 20)[None]).logits.double().sum().item())
    assert "LOAD REPORT" not in done.stderr  # nothing is missing, and nothing too much


@pytest.mark.slow
def test_pipelines_servers_and_trainers_load_it(
    python: Callable[..., subprocess.CompletedProcess[str]], packed: Path
) -> None:
    """`pipeline`; what `transformers serve` loads with; the class that config.json names, as TRL does."""
    script = f"""
import json, sys
from pathlib import Path
import transformers
from transformers import AutoTokenizer, pipeline
directory = sys.argv[1]
greedy = dict(max_new_tokens=6, do_sample=False)
print(json.dumps(pipeline("text-generation", directory)("{PROMPT}", **greedy)[0]["generated_text"]))

from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu")
served, tokenizer = manager.load_model_and_processor(directory + "@main")
name = transformers.AutoConfig.from_pretrained(directory).architectures[0]
trained = getattr(transformers, name).from_pretrained(directory, dtype="auto", device_map="cpu")
for network in served, trained:
    inputs = tokenizer("{PROMPT}", return_tensors="pt")
    print(json.dumps(tokenizer.decode(network.generate(**inputs, **greedy)[0])))
manager.shutdown()
"""
    done = python(script, packed)
    assert done.returncode == 0, done.stderr
    expected = text(AutoModelForCausalLM.from_pretrained(packed), packed)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 3


# ---------------------------------------------------------------------------------------------------------
# Where Prunella is not installed


@pytest.fixture
def without_prunella(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is where Prunella is not installed."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "prunella")


@pytest.mark.usefixtures("without_prunella")
def test_without_prunella_transformers_refuses(packed: Path) -> None:
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="mismatched"):
            kind.from_pretrained(packed)


@pytest.mark.parametrize(
    ("architecture", "skip"),
    [("gpt2", []), ("mixtral", ["self_attn", "layers.0"]), ("mixtral", ["layers.0"])],
    ids=["transposed", "experts alone", "experts"],
)
def test_it_refuses_whatever_is_packed_and_saved_again(
    architecture: str, skip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build(architecture).save_pretrained(tmp_path / "dense")
    recipe = {"steps": ["magnitude"], "skip": skip, "format": "packed", "evaluate": {"source": None}}
    prunella.prune(str(tmp_path / "dense"), recipe, output=tmp_path / "packed", calibration=tiny.token_windows())
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "again")
    for directory in (tmp_path / "packed", tmp_path / "again"):
        network, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        assert any(isinstance(module, SparseLinear) for module in network.modules())
        if skip == ["self_attn", "layers.0"] and directory.name == "again":
            continue  # a mixture's parameter is taken apart when it is saved, and cannot have a mark there
        with monkeypatch.context() as patch:
            patch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "prunella")
            with pytest.raises(RuntimeError, match="mismatched"):
                AutoModelForCausalLM.from_pretrained(directory)


def test_files_from_before_there_was_a_mark_are_read(packed: Path, tmp_path: Path) -> None:
    marked = 0
    for path in packed.iterdir():
        if path.suffix == ".safetensors":
            content = load_file(path)
            marked += sum(tensor.numel() == 0 for tensor in content.values())
            content = {name: tensor for name, tensor in content.items() if tensor.numel()}
            save_file(content, tmp_path / path.name, metadata={"format": "pt"})
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert marked == 1
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert unpack_model(str(tmp_path), tmp_path / "plain") == unpack_model(str(packed), tmp_path / "same")
    for path in (tmp_path / "plain").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "same" / path.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------
# torchvision beside a torch for which it was not compiled

TORCHVISION = """
import torch
assert not hasattr(torch.ops.torchvision, "nms") or hasattr(torch.ops.torchvision, "qnms")
declared = hasattr(torch.ops.torchvision, "nms")
if declared:  # as torchvision does it, without asking
    torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: None)
    torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: None)
"""


@pytest.mark.parametrize("first", ["import torch", "import prunella"])
@pytest.mark.parametrize("compiled", ["broken", "missing", "loads"])
def test_operators_of_torchvision_are_declared_where_its_own_do_not_load(
    python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, compiled: str, first: str
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(TORCHVISION, encoding="utf-8")
    ending = EXTENSION_SUFFIXES[-1]
    if compiled == "broken":
        (package / f"_C{ending}").write_bytes(b"made for another torch")
    elif compiled == "loads":
        shutil.copyfile(_json.__file__, package / f"_C{ending}")
    script = f"import sys; sys.path.insert(0, sys.argv[1])\n{first}\nimport torchvision; print(torchvision.declared)"
    done = python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.strip() == str(compiled != "loads")


def test_torchvision_is_imported_beside_this_torch(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    pytest.importorskip("torchvision")
    done = python("import torch, torchvision.transforms, transformers; print(transformers.LlamaConfig().vocab_size)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "32000"
