from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import prunella
from prunella import InputError, ModelError, Report
from prunella.outcome import LayerResult
from prunella.report.page import by_block, page, samples, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert('\"&')</script>"


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "out"
    recipe = {
        "steps": ["wanda"],
        "sparsity": {"*": 0.5, "down_proj": 0.25},
        "skip": ["q_proj"],
        "calibration": {"samples": 4, "length": 32},
        "evaluate": {"windows": 2, "length": 32},
    }
    prunella.prune(llama, recipe, output=out)
    return out


@pytest.fixture
def report(pruned: Path) -> Report:
    return Report.read(pruned)


def test_the_page_says_what_was_done_and_measured(report: Report) -> None:
    text = html.unescape(page(report))
    assert f"{report.sparsity:.1%} of the block weights of llama are zero, pruned by wanda in 18 of 21 layers" in text
    assert "4 windows of 32 tokens of pydoc" in text
    for what, dense, pruned in report.rows():
        if what != "sample of text":
            assert f'<th scope="row">{what}</th><td>{dense}</td><td>{pruned}</td>' in text


def test_every_layer_has_its_cell_in_both_heat_maps_and_its_row(report: Report) -> None:
    text = page(report)
    for layer in report.layers:
        block, kind = layer.name.split(".")[2], layer.name.rpartition(".")[2]
        shown = f"{layer.sparsity:.1%}" if layer.sparsity else "dense"
        error = f"{layer.error:.2g}" if layer.error is not None else "dense"
        assert f"<title>block {block}, {kind}: {shown}</title>" in text
        assert f"<title>block {block}, {kind}: {error}</title>" in text
        assert f'<th scope="row">{layer.name}</th>' in text


def test_the_worst_layers_are_named_worst_first(report: Report) -> None:
    text = page(report)
    text = text[text.index("What lost most") : text.index("Weights before and after")]
    ranked = sorted((la for la in report.layers if la.error is not None), key=lambda la: -la.error)
    assert re.findall(r'<th scope="row">(.*?)</th>', text) == [la.name for la in ranked[:10]]


def test_the_histograms_show_each_kind_that_was_pruned(report: Report) -> None:
    text = page(report)
    names = re.findall(r"<title>Weights of (\w+), dense and kept</title>", text)
    assert names == ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_samples_begin_with_what_both_have_in_common(report: Report) -> None:
    one = replace(report, dense={"sample": "A garden is green"}, pruned={"sample": "A garden is grey"})
    assert samples(one) == [("dense", "A garden is", "green"), ("pruned", "A garden is", "grey")]
    same = replace(report, dense={"sample": "A garden"}, pruned={"sample": "A garden"})
    assert samples(same) == [("dense", "A garden", ""), ("pruned", "A garden", "")]


def test_the_command_in_the_page_repeats_the_run(pruned: Path, tmp_path: Path) -> None:
    text = page(Report.read(pruned), pruned)
    command = html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[1])
    fake = tmp_path / "bin" / "prunella"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"PATH": path}, check=True)
    verb, model, _, out, *_ = arguments = (tmp_path / "arguments").read_text().split("\n")[:-1]
    assert arguments == [verb, model, "-o", "out-again", "--recipe", "recipe.yaml"]
    again = prunella.prune(model, prunella.Recipe.read(tmp_path / "recipe.yaml"), output=tmp_path / out)
    assert again.recipe == Report.read(pruned).recipe
    for file in pruned.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / out / file.name).read_bytes()


def test_what_was_not_measured_is_not_there(report: Report) -> None:
    nothing = {"perplexity": None, "sample": None}
    text = page(replace(report, dense=nothing, pruned=nothing, layers=report.layers[:0]))
    assert "What they write" not in text
    assert "What lost most" not in text
    assert "Weights before" not in text
    assert "Healing" not in text
    assert "<svg" not in text
    assert "Healing" not in page(report)


def test_reports_of_before_there_were_histograms_have_a_page(report: Report) -> None:
    old = replace(report, layers=tuple(replace(la, weights=None) for la in report.layers))
    assert "Weights before" not in page(old)


def test_nothing_from_the_report_becomes_markup(report: Report) -> None:
    layers = tuple(
        replace(la, name=f"model.layers.{n}.{EVIL}", pattern=EVIL, notes=(EVIL,)) for n, la in enumerate(report.layers)
    )
    side = {"perplexity": 9.0, "windows": 2, "length": 3, "source": EVIL, "sample": EVIL}
    recipe = {
        **report.recipe,
        "pattern": EVIL,
        "steps": [{EVIL: {}}],
        "calibration": {"source": EVIL, "samples": 1, "length": 2},
    }
    evil = Report(recipe, {**report.model, "name": EVIL, "dtype": EVIL}, side, side, layers, report.run, {EVIL: EVIL})
    text = page(evil, EVIL)
    assert EVIL.split("/")[-1] not in text
    assert "<script" not in text
    assert html.escape(EVIL).split("&#")[0] in text


def test_the_page_needs_nothing_from_anywhere(report: Report) -> None:
    text = page(report)
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')> ]*)', text) == ["data:,"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text


def test_a_page_of_many_blocks_is_small(report: Report) -> None:
    first = [la for la in report.layers if la.name.startswith("model.layers.0.")]
    layers = tuple(
        replace(la, name=la.name.replace("layers.0.", f"layers.{block}."), weights=report.layers[1].weights)
        for block in range(32)
        for la in first
    )
    assert len(page(replace(report, layers=layers)).encode()) < 500_000


def layer(name: str, sparsity: float = 0.5) -> LayerResult:
    return LayerResult(name, (4, 4), sparsity, sparsity, "unstructured", 0.1, 10)


def test_experts_of_a_mixture_are_one_kind_of_layer() -> None:
    names = [f"model.layers.{b}.mlp.experts.gate_up_proj.{e}" for b in range(2) for e in range(3)]
    found = by_block([layer(name) for name in names])
    assert {key: len(layers) for key, layers in found.items()} == {("0", "gate_up_proj"): 3, ("1", "gate_up_proj"): 3}


def test_kinds_that_end_alike_keep_more_of_their_names() -> None:
    names = ["transformer.h.7.attn.c_attn", "transformer.h.7.attn.c_proj", "transformer.h.7.mlp.c_proj"]
    assert list(by_block([layer(name) for name in names])) == [
        ("7", "c_attn"),
        ("7", "attn.c_proj"),
        ("7", "mlp.c_proj"),
    ]


def test_the_command_writes_the_page_beside_the_model_or_where_it_is_told(pruned: Path, tmp_path: Path, run) -> None:
    outcome = run("report", pruned, "-o", tmp_path / "deep" / "page.html")
    assert (outcome.code, outcome.err) == (0, "")
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (pruned / "report.html").exists()
    copy = shutil.copytree(pruned, tmp_path / "copy")
    assert str(copy / "report.html") in run("report", copy).out
    assert [path.name for path in copy.glob("report.html*")] == ["report.html"]


def test_what_cannot_be_read_or_written_is_named(pruned: Path, tmp_path: Path, run) -> None:
    assert run("report", tmp_path).code == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_page(pruned, tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    "damage",
    [
        {"recipe": {}},
        {"dense": {"perplexity": "much", "windows": 1, "length": 1, "source": "x"}},
        {"run": None},
        {
            "layers": [
                {
                    "name": 3,
                    "shape": [1, 1],
                    "sparsity": 0,
                    "target": 0,
                    "pattern": "",
                    "error": 1,
                    "tokens": 0,
                    "notes": [],
                }
            ]
        },
    ],
)
def test_a_damaged_report_is_named(pruned: Path, tmp_path: Path, damage: dict) -> None:
    data = json.loads((pruned / "prunella.json").read_text())
    (tmp_path / "prunella.json").write_text(json.dumps({**data, **damage}))
    with pytest.raises(ModelError, match=r"prunella\.json' is damaged"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_errors_that_are_not_numbers_leave_gaps(report: Report) -> None:
    broken = tuple(replace(la, error=float("nan") if n % 2 else 0.0) for n, la in enumerate(report.layers))
    assert "Reconstruction error" not in page(replace(report, layers=broken[1:2]))
    page(replace(report, layers=broken))


# ---------------------------------------------------------------------------------------------------------
# In a browser


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    return subprocess.run([*command, profile, *options, path.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_figure_within_its_width(pruned: Path, tmp_path: Path, width: int, scheme: str) -> None:
    path = write_page(pruned, tmp_path / "page.html")
    probe = """<script>
      addEventListener('load', () => {
        const boxes = [...document.querySelectorAll('svg[role=img]')].map(figure => figure.getBoundingClientRect());
        const shown = boxes.filter(box => box.width > 100 && box.height > 40).length;
        const paper = getComputedStyle(document.body).backgroundColor;
        parent.postMessage([innerWidth, document.documentElement.scrollWidth, shown, paper], '*');
      });
    </script></body>"""
    text = path.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    path.write_text(text.replace("</body>", probe))
    frame = tmp_path / "frame.html"  # a window of its own is never narrower than 500 pixels
    frame.write_text(f"""<script>addEventListener('message', event => document.body.dataset.probe = event.data)</script>
      <body><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>""")
    preferred = f"--blink-settings=preferredColorScheme={'01'[scheme == 'light']}"
    result = browse(frame, "--window-size=1400,900", "--virtual-time-budget=5000", preferred, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    inner, wide, figures, *paper = re.search(r'data-probe="([^"]*)"', result.stdout)[1].split(",")
    assert int(inner) == width
    assert int(wide) <= width
    assert int(figures) == 4 + 6
    brightness = sum(int(part) for part in re.findall(r"\d+", ",".join(paper)))
    assert brightness > 600 if scheme == "light" else brightness < 150


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_as_it_is_written_is_painted_without_complaint(pruned: Path, tmp_path: Path) -> None:
    path = write_page(pruned, tmp_path / "page.html")
    result = browse(path, "--window-size=390,3000", f"--screenshot={tmp_path / 'page.png'}")
    assert "CONSOLE" not in result.stderr, result.stderr
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_of_32_blocks_is_small_and_opens_at_once(report: Report, tmp_path: Path) -> None:
    names = [(la, re.sub(r"\.\d+\.", ".{}.", la.name)) for la in report.layers if ".0." in la.name]
    layers = tuple(replace(la, name=name.format(block)) for block in range(32) for la, name in names)
    assert len(layers) == 32 * 7
    text = page(replace(report, layers=layers))
    assert len(text.encode()) < 2e6
    probe = """<script>
      addEventListener('load', () => {
        document.body.getBoundingClientRect();  // lays the page out
        document.body.dataset.ready = performance.now();
      });
    </script></body>"""
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(text.replace("</body>", probe))
    result = browse(tmp_path / "page.html", "--window-size=1280,900", "--dump-dom")
    milliseconds = float(re.search(r'data-ready="([^"]*)"', result.stdout)[1])
    print(f"{len(text):,} bytes, {milliseconds:.0f} ms")
    assert milliseconds < 10_000  # a tenth of it where nothing else runs


@pytest.mark.parametrize("way", ["retrain", "reconstruct"])
def test_healing_has_its_table_losses_sample_and_command(pruned: Path, tmp_path: Path, way: str) -> None:
    recipe = {
        "heal": {"train": ["norms"], "way": way, "tokens": 512, "length": 32, "epochs": 1},
        "calibration": {"samples": 4, "length": 32},
        "evaluate": {"windows": 2, "length": 32},
    }
    report = prunella.heal(pruned, recipe, output=tmp_path / "healed")
    text = html.unescape(page(report, tmp_path / "healed"))
    title = "Loss while healing" if way == "retrain" else "Reconstruction loss of each block"
    assert f"<title>{title}</title>" in text
    for what, before, after in report.healing_rows():
        assert what == "sample of text" or f'<th scope="row">{what}</th><td>{before}</td><td>{after}</td>' in text
    assert "<h3>healed</h3>" in text
    assert "prunella prune " in text
    assert "prunella heal out-again -o healed-again --recipe heal.yaml" in text


def test_a_model_that_was_pruned_elsewhere_has_a_page_of_its_healing(pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "foreign")
    for name in ("prunella.json", "prunella.masks"):
        (copy / name).unlink()
    recipe = {"heal": {"train": ["norms"], "tokens": 256, "length": 32}, "evaluate": {"windows": 2, "length": 32}}
    prunella.heal(copy, recipe, output=tmp_path / "healed")
    text = html.unescape(write_page(tmp_path / "healed").read_text())
    assert "are zero. Then it was healed on" in text
    assert "prunella prune " not in text
    assert "prunella heal " in text
