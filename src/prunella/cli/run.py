"""Commands that store a model and run it: pack, unpack, generate, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import unknown
from .app import RUNNING, app
from .console import print_table
from .options import (
    MAIN,
    MEASURE,
    OPENING,
    PLACE,
    ROUNDING,
    RUN,
    TRUST,
    Json,
    ModelName,
    Out,
    ask,
    complete_from,
    grouped,
    of,
    share_of,
)


@app.command(rich_help_panel=RUNNING)
@grouped
def pack(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Out,
    rounding: Annotated[dict[str, Any], ROUNDING],
    trust: Annotated[dict[str, Any], TRUST[:1]],
) -> None:
    """Store a pruned model without its zeros; transformers loads it where Prunella is installed."""
    from ..packing import pack_model

    result = pack_model(model, output, **rounding, **trust)
    print(
        f"{result.layers} layers packed: {result.dense / 1e6:,.1f} MB became {result.packed / 1e6:,.1f} MB"
        f" ({result.packed / result.dense:.3f}); saved to {output}"
    )
    if result.kept:
        print(f"note: {len(result.kept)} layers stayed dense, {result.kept[0]} the first of them")


@app.command(rich_help_panel=RUNNING)
def unpack(directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed model.")], output: Out) -> None:
    """Make a plain model of a packed one."""
    from ..packing import unpack_model

    print(f"{unpack_model(directory, output)} layers unpacked; saved to {output}")


@app.command(rich_help_panel=RUNNING)
@grouped
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue.")],
    *,
    opening: Annotated[dict[str, Any], (*OPENING, *PLACE)],
    tokens: Annotated[int, of(MAIN, "--tokens N", "At most so many new tokens.", min=1)] = 100,
    temperature: Annotated[float, of(MAIN, "--temperature NUMBER", "0: always the likeliest token.", min=0)] = 0.0,
    chat: Annotated[bool, of(MAIN, "--chat", "Wrap the prompt in the model's chat template.")] = False,
    seed: Annotated[int, of(RUN, "--seed N", "Seed of the sampling.")] = 0,
    trust: Annotated[dict[str, Any], TRUST],
) -> None:
    """Continue PROMPT, printing the text as it comes."""
    import torch
    from transformers import TextStreamer

    from ..calibrate import room
    from ..errors import InputError
    from ..tasks.text import load_model

    _check_language(model, "generate continues text")
    opened = load_model(model, packed=True, **opening, **trust)
    reader = opened.tokenizer
    if reader is None:
        raise InputError(f"model '{model}' has no tokenizer, so it cannot read a prompt.")
    if chat:
        if not reader.chat_template:
            raise InputError(f"model '{model}' has no chat template: leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        inputs = reader.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = reader(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty.")
    tokens = room(opened, inputs["input_ids"], tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with opened.whole() as network, torch.no_grad():
        network.generate(
            inputs["input_ids"].to(opened.device),
            attention_mask=inputs["attention_mask"].to(opened.device),
            max_new_tokens=tokens,
            streamer=TextStreamer(reader, skip_prompt=chat, skip_special_tokens=True),
            pad_token_id=reader.pad_token_id or reader.eos_token_id or 0,
            **sampling,
        )


def _other_task(model: str) -> str | None:
    """The task of a model that is no causal language model; None of one that is."""
    from ..tasks import find_task, task_of

    for task in task_of(model):
        kind: Any = find_task(task).function
        if not kind.language:
            return task
    return None


def _check_language(model: str, what: str) -> None:
    """Raises InputError, which says what a command does, for a model that is no causal language model."""
    from ..errors import InputError

    if task := _other_task(model):
        raise InputError(f"'{model}' is of task '{task}': {what}, and takes causal language models only.")


LOAD = (
    ask(MEASURE, "--threads LIST", "threads", "Threads to run on, such as 1,2. [default: as PyTorch has them]"),
    ask(
        MEASURE, "--rounds N", "rounds", "Turns of dense and packed; medians count. [default: 3; of networks 5]", min=1
    ),
    ask(MEASURE, "--prompt N", "prompt", "Of language models: tokens of the prefill. [default: 512]", min=1),
    ask(MEASURE, "--tokens N", "tokens", "And tokens generated, one at a time. [default: 32]", min=1),
    ask(MEASURE, "--batch LIST", "batch", "Of other networks: samples that go together, such as 1,16. [default: 1]"),
    ask(MEASURE, "--length TOKENS", "length", "And tokens of a text. [default: 128]", min=1),
    ask(
        MEASURE,
        "--beside ENGINES",
        "beside",
        "And engines to run them in too, such as onnxruntime,openvino; or torch-bfloat16, onnxruntime-int8,"
        " openvino-int8.",
    ),
    ask(MEASURE, "--memory", "memory", "And the memory of both, when they have run, in a process for each."),
)
LANGUAGE, OTHERS = ("prompt", "tokens"), ("batch", "length", "beside", "memory")  # what only they are asked
SHAPES = ("llama-1b", "tiny", "minilm-l6", "bert-base", "efficientnet-lite0", "resnet-50")


@app.command(rich_help_panel=RUNNING)
@grouped
def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A pruned or packed model.")] = None,
    *,
    random: Annotated[
        str | None,
        of(
            MAIN,
            "--random --shape SHAPE",
            f"In place of MODEL random weights of a shape: {', '.join(SHAPES)}, or of a language model a directory with"
            " a config.",
            autocompletion=complete_from(*SHAPES),
        ),
    ] = None,
    sparsity: Annotated[str, of(MAIN, "--sparsity SHARE", "Of random weights.")] = "0.5",
    rounding: Annotated[dict[str, Any], ROUNDING],
    load: Annotated[dict[str, Any], LOAD],
    json_: Json = False,
) -> None:
    """Measure speed on this machine, dense beside packed: of a language model prefill and decode, of any other network
    latency and throughput."""
    from ..bench.run import bench_network
    from ..bench.shapes import SHAPES as NETWORKS
    from ..errors import InputError
    from ..sparse.bench import bench as bench_language

    directory = random is not None and Path(random).is_dir()
    other = _other_task(str(model or random)) if model is not None or directory else None
    if directory and other:
        raise InputError(f"--random takes directories of language models: '{random}' is of task '{other}'.")
    network = other is not None or (model is None and random in NETWORKS)
    for word in load.keys() & {*(LANGUAGE if network else OTHERS)}:
        kind = "language models" if network else "other networks"
        raise InputError(f"--{word} is of {kind}, and '{model or random}' is none.")
    if random is not None and not directory and random not in SHAPES:
        raise InputError(unknown("shape", random, SHAPES) + " Or give a directory with a config.json.")
    for word in load.keys() & {"threads", "batch"}:
        load[word] = _numbers(word, load[word])
    given: dict[str, Any] = {"random": random, "sparsity": share_of(sparsity), **rounding, **load}
    if network:
        if "beside" in load:
            given["beside"] = [name.strip() for name in load["beside"].split(",") if name.strip()]
        _print_network(bench_network(model, **given), json_)
        return
    if "threads" in load:
        if len(load["threads"]) > 1:
            raise InputError("--threads is one number for language models.")
        (given["threads"],) = load["threads"]
    result = bench_language(model, **given)
    if json_:
        print(json.dumps(result))
        return
    sides, speedup = (result["dense"], result["packed"]), result["speedup"]
    rows = (
        ("weights, MB", *(f"{side['bytes'] / 1e6:,.1f}" for side in sides)),
        ("prefill, tokens a second", *(f"{side['prefill']:,.1f}" for side in sides)),
        ("decode, tokens a second", *(f"{side['decode']:,.2f}" for side in sides)),
        ("of the read bandwidth", *(f"{side['bandwidth']:.0%}" for side in sides)),
    )
    title = f"{model or random}: {result['prompt']} tokens of prompt, {result['tokens']} generated"
    print_table(("", "dense", "packed"), rows, title, right=("dense", "packed"))
    print(
        f"packed is {speedup['decode']:.2f} times as fast in decoding, {speedup['prefill']:.2f} times in prefill;"
        f" memory reads at {result['read_bandwidth'] / 1e9:.1f} GB/s"
    )


def _numbers(word: str, text: str) -> list[int]:
    """What --batch and --threads take. Raises InputError."""
    from ..errors import InputError

    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"--{word} takes whole numbers from 1 on, such as 1,2: '{text}' is none.")
    return found


def _print_network(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    rows = (
        (
            str(row["batch"]),
            str(row["threads"]),
            row["side"],
            f"{1e3 * row['median']:,.2f} ±{(row['high'] - row['low']) / 2 / row['median']:.0%}",
            f"{row['throughput']:,.1f}",
            f"{row['speedup']:.2f}",
            f"{row['difference']:.1e}" if row["side"] != "dense" else "",
        )
        for row in result["rows"]
    )
    columns = ("batch", "threads", "", "ms", "a second", "×", "apart")
    title = f"{result['model']}: {result['dtype']}, {result['sparsity']:.1%} of the weights in layers zero"
    print_table(columns, rows, title, right=[name for name in columns if name])
    for what, key in (("weights", "bytes"), ("memory, with all else that they hold", "memory")):
        if found := result.get(key):
            dense, packed = found["dense"], found["packed"]
            print(f"{what}: {dense / 1e6:,.1f} MB dense, {packed / 1e6:,.1f} MB packed ({packed / dense:.3f})")
    print(f"instructions: {result['instructions']}")
