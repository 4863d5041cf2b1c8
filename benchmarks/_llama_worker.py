"""llama.cpp in an environment of its own: writes models with random weights, then generates as it is told on stdin.

    python _llama_worker.py DIRECTORY VOCABULARY HIDDEN INTERMEDIATE LAYERS HEADS KV_HEADS THREADS

Speed does not depend on the weights: all layers get the same ones. Each line "KIND TOKENS" is answered with a line.
"""

import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


def write(path: Path, kind: str, vocabulary: int, hidden: int, wide: int, layers: int, heads: int, kv: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]

    def matrix(rows: int, columns: int) -> np.ndarray:
        weight = generator.standard_normal((rows, columns), dtype=np.float32) * 0.02
        return gguf.quants.quantize(weight, quantization)

    norm = np.ones(hidden, dtype=np.float32)
    block = {
        "attn_q": matrix(hidden, hidden),
        "attn_k": matrix(hidden // heads * kv, hidden),
        "attn_v": matrix(hidden // heads * kv, hidden),
        "attn_output": matrix(hidden, hidden),
        "ffn_gate": matrix(wide, hidden),
        "ffn_up": matrix(wide, hidden),
        "ffn_down": matrix(hidden, wide),
    }
    writer.add_tensor("token_embd.weight", matrix(vocabulary, hidden), raw_dtype=quantization)
    writer.add_tensor("output_norm.weight", norm)
    for i in range(layers):
        for name, tensor in block.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor, raw_dtype=quantization)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path, threads: int):
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = 2048
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not model or not context:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return context


def generate(context, tokens: int) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    token = (llama_cpp.llama_token * 1)(3)
    for _ in range(tokens):
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
            raise SystemExit("llama.cpp failed")
        llama_cpp.llama_get_logits_ith(context, -1)


def main() -> None:
    directory, (*shape, threads) = Path(sys.argv[1]), map(int, sys.argv[2:])
    llama_cpp.llama_backend_init()
    contexts = {}
    for kind in ("BF16", "Q8_0"):
        path = directory / f"{kind}-{'-'.join(map(str, shape))}.gguf"
        if not path.exists():
            write(path.with_suffix(".partial"), kind, *shape)
            path.with_suffix(".partial").rename(path)
        contexts[kind] = load(path, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, tokens = line.split()
        generate(contexts[kind], int(tokens))
        print("done", flush=True)


if __name__ == "__main__":
    main()
