"""Commands that store a model and run it: pack, unpack, generate, bench."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

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


def _check_language(model: str, what: str) -> None:
    """Raises InputError, which says what a command does, for a model that is no causal language model."""
    from ..errors import InputError
    from ..tasks import find_task, task_of

    for task in task_of(model):
        kind: Any = find_task(task).function
        if not kind.language:
            raise InputError(f"'{model}' is of task '{task}': {what}, and takes causal language models only.")


LOAD = (
    ask(MEASURE, "--prompt N", "prompt", "Tokens of the prefill.", 512, min=1),
    ask(MEASURE, "--tokens N", "tokens", "Tokens generated, one at a time.", 32, min=1),
    ask(MEASURE, "--rounds N", "rounds", "Turns of dense and packed; medians count.", 3, min=1),
    ask(MEASURE, "--threads N", "threads", "Threads to run on. [default: as PyTorch has them]", min=1),
)


@app.command(rich_help_panel=RUNNING)
@grouped
def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A pruned or packed model.")] = None,
    *,
    random: Annotated[
        str | None,
        of(
            MAIN,
            "--random SHAPE",
            "In place of MODEL random weights of a shape: llama-1b, tiny, or a directory with a config.",
            autocompletion=complete_from("llama-1b", "tiny"),
        ),
    ] = None,
    sparsity: Annotated[str, of(MAIN, "--sparsity SHARE", "Of random weights.")] = "0.5",
    rounding: Annotated[dict[str, Any], ROUNDING],
    load: Annotated[dict[str, Any], LOAD],
    json_: Json = False,
) -> None:
    """Measure prefill and decode speed on this machine, dense beside packed."""
    from ..sparse.bench import bench as measure

    if model is not None:
        _check_language(model, "bench measures how fast text is read and written")
    result = measure(model, random=random, sparsity=share_of(sparsity), **rounding, **load)
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
    title = f"{model or random}: {load['prompt']} tokens of prompt, {load['tokens']} generated"
    print_table(("", "dense", "packed"), rows, title, right=("dense", "packed"))
    print(
        f"packed is {speedup['decode']:.2f} times as fast in decoding, {speedup['prefill']:.2f} times in prefill;"
        f" memory reads at {result['read_bandwidth'] / 1e9:.1f} GB/s"
    )
