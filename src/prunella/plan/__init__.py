"""Packed networks run as plans: the graph of a forward pass for inputs of one shape, as a list of steps in C.

```
graph.py      the graph, by torch.export; without changes in place, constants, and what does nothing
attention.py  attention that is written out in it, as one node
nodes.py      what is asked of nodes
values.py     what a plan's values are: stretches of one memory, channel after channel
tails.py      what follows a product or a convolution and can be done with it: norms, activations, additions
lower.py      from a graph to steps; what no step exists for is torch's own operator in between
products.py   the steps of linear layers and convolutions
vision.py     the steps of networks that see pictures
encoder.py    those of encoders: attention, norms over channels
weights.py    weights as the steps take them, batch norms folded into them
memory.py     where each value lies, and for how long
run.py        a plan that is made, and one call of it
turns.py      threads: one captures a graph, or all run modules
network.py    the forward of a packed network: a plan for each shape of inputs, else module by module
```
"""
