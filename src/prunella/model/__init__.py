"""From a name to a model whose blocks come on demand. Each file imports only from those above it:

    files.py        the files of a directory: weights, and what belongs to them
    convert.py      GGUF files and pickles to safetensors, once
    built_in.py     models that lie inside packages
    hub.py          models of the hub: on this machine already, or downloaded
    tokenizer.py    a model's tokenizer, or one in its place
    names.py        hub id | local directory | .gguf file | built-in name  ->  directory
    checkpoint.py   tensors in safetensors files, read one by one
    cut.py          the blocks of a network, found by how it calls its modules
    walk.py         a block with its weights, and the thread that reads the next one
    network.py      Model: one block at a time has its weights
    checks.py       what is refused of a network in memory
    open.py         a name, or a network in memory  ->  Model

A program takes what it needs from `prunella` itself.
"""
