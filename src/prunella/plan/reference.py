"""Steps in torch, until they are there in C."""

import torch
from torch.nn import functional as F

ACT = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}


def view(memory, plane):
    return memory.as_strided((plane.channels, plane.positions), (plane.ld, 1), plane.buffer.start + plane.offset)


def call(step, memory):
    p = {k: view(memory, v) for k, v in step.planes.items() if v.ld}
    f = step.fields
    act = ACT[f.get("act", "none")]
    kind = step.kind

    def done(y, out):
        r = p.get("residual")
        if r is not None:
            y = act(y) + r if f["residual_last"] else act(y + r)
        else:
            y = act(y)
        out.copy_(y)

    def run():
        if kind == "depthwise":
            x = p["x"].reshape(f["channels"], f["batch"], f["height"], f["width"]).transpose(0, 1)
            k, s, d = f["kernel"], f["stride"], f["dilation"]
            ph = max(0, (f["out_height"] - 1) * s[0] + (k[0] - 1) * d[0] + 1 - f["height"] - f["pad"][0])
            pw = max(0, (f["out_width"] - 1) * s[1] + (k[1] - 1) * d[1] + 1 - f["width"] - f["pad"][1])
            x = F.pad(x, (f["pad"][1], pw, f["pad"][0], ph))
            w = f["weight"].view(f["rows"], 1, *k)
            y = F.conv2d(x, w, f["bias"], s, 0, d, f["channels"])[:, :, : f["out_height"], : f["out_width"]]
            done(y.transpose(0, 1).reshape(f["rows"], -1), p["y"])
        elif kind == "pool":
            x = p["x"].reshape(f["channels"], f["batch"], f["height"], f["width"]).transpose(0, 1)
            if f["mean"]:
                y = F.avg_pool2d(x, f["kernel"], f["stride"], f["pad"], False, bool(f["count_pad"]))
            else:
                y = F.max_pool2d(x, f["kernel"], f["stride"], f["pad"], f["dilation"], True)
                y = y[:, :, : f["out_height"], : f["out_width"]]
            p["y"].copy_(act(y).transpose(0, 1).reshape(f["channels"], -1))
        elif kind == "mean":
            p["y"].copy_(act(p["x"].reshape(f["channels"], f["batch"], f["places"]).mean(2)))
        elif kind == "scale":
            x = p["x"].reshape(f["channels"], f["batch"], f["places"])
            p["y"].copy_(act(x * p["scale"].unsqueeze(2)).reshape(f["channels"], -1))
        elif kind == "add":
            p["y"].copy_(act(p["a"] + p["b"]))
        elif kind == "map":
            p["y"].copy_(act(p["x"]))
        elif kind == "norm":
            x = p["x"].T
            n = [f["channels"]]
            y = (
                F.rms_norm(x, n, f["weight"], f["eps"])
                if f["rms"]
                else F.layer_norm(x, n, f["weight"], f["bias"], f["eps"])
            )
            p["y"].copy_(y.T)
        elif kind == "attend":
            B, H, G, D, E, Q, K = (f[n] for n in ("batch", "heads", "kv_heads", "dim", "dim_v", "queries", "keys"))
            q = p["q"].reshape(H, D, B, Q).permute(2, 0, 3, 1)
            k = p["k"].reshape(G, D, B, K).permute(2, 0, 3, 1)
            v = p["v"].reshape(G, E, B, K).permute(2, 0, 3, 1)
            mask = None
            if "mask" in step.planes:
                mask = memory[step.planes["mask"].buffer.start :]
            elif f["mask"] is not None:
                mask = f["mask"].as_strided((f["mask"].untyped_storage().nbytes() // 4,), (1,), 0)
            if mask is not None:
                mask = mask.as_strided((B, H, Q, K), f["mask_stride"], mask.storage_offset())
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=bool(f["causal"]), scale=f["scale"], enable_gqa=H != G
            )
            p["y"].copy_(y.permute(1, 3, 0, 2).reshape(H * E, B * Q))
        else:
            raise AssertionError(kind)

    return run
