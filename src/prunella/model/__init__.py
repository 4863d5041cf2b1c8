"""From a name to a model whose blocks come on demand. Each file imports only from those above it:

    files.py        the files of a directory: weights, and what belongs to them
    gguf.py         what a GGUF file says of itself
    quantized.py    weights that files store scaled, and how they are read
    convert.py      GGUF files and pickles to safetensors, once
    timm_models.py  networks of timm: their directories
    built_in.py     models that lie inside packages
    hub.py          models of the hub: on this machine already, or downloaded
    tokenizer.py    a model's tokenizer, or one in its place
    names.py        hub id | local directory | .gguf file | built-in name  ->  directory
    checkpoint.py   tensors in safetensors files, read one by one
    state.py        a network's state dict, from a file or directory
    cut.py          the blocks of a network, found by how it calls its modules
    walk.py         a block with its weights, and the thread that reads the next one
    network.py      Model: one block at a time has its weights
    checks.py       what is refused of a network in memory, and of its files
    divergence.py   how far outputs are from a teacher's
    open.py         a name, or a network in memory  ->  Model
    task.py         Task: what a network is for. Files above name its type, since a model has a task

A program takes what it needs from `prunella` itself.
"""
