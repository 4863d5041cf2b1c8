"""Commands that store a model and run it: pack, unpack, generate, bench."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .app import RUNNING, app
from .console import print_table
from .options import (
    MAIN,
    MEASURE,
    RUN,
    Bits,
    Device,
    Dtype,
    Group,
    Head,
    Json,
    ModelName,
    Out,
    Pickle,
    Revision,
    Tokenizer,
    Trust,
    complete_from,
    flag,
    of,
    share_of,
)


@app.command(rich_help_panel=RUNNING)
def pack(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Out,
    bits: Bits = None,
    group: Group = 128,
    round_head: Head = False,
    trust_remote_code: Trust = False,
) -> None:
    """Store a pruned model without its zeros; transformers loads it where Prunella is installed."""
    from ..packing import pack_model

    result = pack_model(model, output, bits, group, head=round_head, remote_code=trust_remote_code)
    print(
        f"{result.layers} layers packed: {result.dense / 1e6:,.1f} MB became {result.packed / 1e6:,.1f} MB"
        f" ({result.packed / result.dense:.3f}); saved to {output}"
    )
    if result.kept:
        print(f"note: {len(result.kept)} layers stayed dense, {result.kept[0]} the first of them")


@app.command(rich_help_panel=RUNNING)
def unpack(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed model.")],
    output: Out,
) -> None:
    """Make a plain model of a packed one."""
    from ..packing import unpack_model

    print(f"{unpack_model(directory, output)} layers unpacked; saved to {output}")


@app.command(rich_help_panel=RUNNING)
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue.")],
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    tokens: Annotated[int, of(MAIN, metavar="N", min=1, help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, of(MAIN, metavar="NUMBER", min=0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[bool, flag(MAIN, "--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, of(RUN, metavar="N", help="Seed of the sampling.")] = 0,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Continue PROMPT, printing the text as it comes."""
    import torch
    from transformers import TextStreamer

    from ..errors import InputError
    from ..evaluate.measure import room
    from ..model.open import load_model

    opened = load_model(
        model,
        dtype=dtype,
        device=device,
        remote_code=trust_remote_code,
        pickles=allow_pickle,
        packed=True,
        revision=revision,
        tokenizer=tokenizer,
    )
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


@app.command(rich_help_panel=RUNNING)
def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A pruned or packed model.")] = None,
    random: Annotated[
        str | None,
        of(
            MAIN,
            metavar="SHAPE",
            help="In place of MODEL random weights of a shape: llama-1b, tiny, or a directory with a config.",
            autocompletion=complete_from("llama-1b", "tiny"),
        ),
    ] = None,
    sparsity: Annotated[str, of(MAIN, metavar="SHARE", help="Of random weights.")] = "0.5",
    bits: Bits = None,
    group: Group = 128,
    round_head: Head = False,
    prompt: Annotated[int, of(MEASURE, metavar="N", min=1, help="Tokens of the prefill.")] = 512,
    tokens: Annotated[int, of(MEASURE, metavar="N", min=1, help="Tokens generated, one at a time.")] = 32,
    rounds: Annotated[int, of(MEASURE, metavar="N", min=1, help="Turns of dense and packed; medians count.")] = 3,
    threads: Annotated[
        int | None, of(MEASURE, metavar="N", min=1, help="Threads to run on.", default="as PyTorch has them")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure prefill and decode speed on this machine, dense beside packed."""
    from ..sparse.bench import bench as measure

    result = measure(
        model,
        random=random,
        sparsity=share_of(sparsity),
        bits=bits,
        group=group,
        head=round_head,
        prompt=prompt,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
    )
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
    title = f"{model or random}: {prompt} tokens of prompt, {tokens} generated"
    print_table(("", "dense", "packed"), rows, title, right=("dense", "packed"))
    print(
        f"packed is {speedup['decode']:.2f} times as fast in decoding, {speedup['prefill']:.2f} times in prefill;"
        f" memory reads at {result['read_bandwidth'] / 1e9:.1f} GB/s"
    )
