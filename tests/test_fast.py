import pytest
import tiny
import torch
import zoo
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunella import fast
from prunella.fast import add_gram, attention, use_fast_attention
from prunella.machine import threaded
from prunella.native import library

SHAPES = [(2048, 576), (77, 50), (1, 3), (513, 129), (3000, 33), (16, 16), (2, 300)]


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    """The compiled kernel where there is one, and torch's own products."""
    if request.param == "torch":
        monkeypatch.setattr(fast, "_kernels", lambda: None)
    elif fast._kernels() is None:
        pytest.skip("no kernel for this processor")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_products_are_symmetric_and_summed_in_float32(shape, dtype, way):
    torch.manual_seed(0)
    x_TI = (torch.randn(shape) * torch.rand(shape[1]).mul(8).exp2()).to(dtype)
    gram_II = torch.full((shape[1], shape[1]), 0.5)
    add_gram(gram_II, x_TI)
    exact_II = x_TI.double().T @ x_TI.double() + 0.5
    scale_II = exact_II.diagonal().sqrt()[:, None] * exact_II.diagonal().sqrt()
    # What torch sums it may sum one after the other.
    near = 2e-6 if way == "kernel" else 2e-6 + 2**-23 * shape[0] ** 0.5
    assert ((gram_II - exact_II).abs() / scale_II).max() < near
    assert torch.equal(gram_II, gram_II.T)


def test_gram_products_take_a_view_of_wider_rows(way):
    x_TI = torch.randn(100, 80).bfloat16()[:, 16:48]
    gram_II = torch.zeros(32, 32)
    add_gram(gram_II, x_TI)
    assert torch.allclose(gram_II, x_TI.float().T @ x_TI.float(), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 3, 300, 64), (2, 4, 4, 100, 32), (1, 2, 1, 1, 64), (1, 2, 2, 17, 128)])
@pytest.mark.parametrize("tokens", [None, 15, 16, 33, 47])
def test_attention_is_as_near_to_the_exact_one_as_torchs(shape, tokens):
    if fast._kernels() is None:
        pytest.skip("no kernel for this processor")
    torch.manual_seed(0)
    batch, heads, kv, length, dim = shape
    length = tokens or length
    query, key, value = (torch.randn(batch, length, h, dim).bfloat16().mul(2).transpose(1, 2) for h in (heads, kv, kv))
    with torch.no_grad():
        found, _ = attention(nn.Module(), query, key, value, None, scaling=0.3)
    repeated = (query, key.repeat_interleave(heads // kv, 1), value.repeat_interleave(heads // kv, 1))
    exact = nn.functional.scaled_dot_product_attention(*(t.double() for t in repeated), is_causal=True, scale=0.3)
    torchs = nn.functional.scaled_dot_product_attention(*repeated, is_causal=True, scale=0.3)
    error, reference = (found.transpose(1, 2) - exact).abs().max(), (torchs - exact).abs().max()
    assert error <= 1.5 * reference + 1e-6


@pytest.mark.parametrize("shape", [(2, 9, 3, 300, 64), (2, 4, 4, 100, 32), (1, 2, 1, 1, 64), (1, 2, 2, 17, 128)])
@pytest.mark.parametrize("tokens", [None, 15, 16, 31, 33, 47, 64])
def test_the_gradient_of_attention_is_as_near_to_the_exact_one_as_torchs(shape, tokens):
    if fast._kernels() is None:
        pytest.skip("no kernel for this processor")
    torch.manual_seed(0)
    batch, heads, kv, length, dim = shape
    length = tokens or length
    inputs = [torch.randn(batch, length, h, dim).bfloat16().transpose(1, 2) for h in (heads, kv, kv)]
    grad = torch.randn(batch, length, heads, dim).bfloat16()

    def pulled(run, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        run(*leaves).backward(grad.to(dtype))
        return [leaf.grad for leaf in leaves]

    def plain(query, key, value):
        key, value = (t.repeat_interleave(heads // kv, 1) for t in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
        return out.transpose(1, 2)

    found = pulled(lambda *tensors: attention(nn.Module(), *tensors, None, scaling=0.3)[0], torch.bfloat16)
    for mine, torchs, exact in zip(found, pulled(plain, torch.bfloat16), pulled(plain, torch.float64), strict=True):
        assert mine.shape == exact.shape
        assert (mine - exact).abs().max() <= 1.5 * (torchs - exact).abs().max() + 1e-6


def test_the_gradient_of_attention_does_not_depend_on_the_threads():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 70, 32).bfloat16(), torch.randn(2, 2, 70, 32).bfloat16()
    found = []
    for count in (1, 2):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_(), key.clone().requires_grad_()]
        with threaded(count):
            attention(_causal_module(), *leaves, None)[0].float().square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def _causal_module():
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # what torch's way reads
    return module


@pytest.mark.parametrize("tokens", [1, 40])
def test_attention_is_the_same_whatever_the_scale_and_the_default_device_are(tokens):
    query, key = torch.randn(2, 4, tokens, 32).bfloat16(), torch.randn(2, 2, 40, 32).bfloat16()
    module = _causal_module()
    with torch.no_grad():
        expected = attention(module, query, key, key, None, scaling=1.0)[0]
        assert torch.equal(attention(module, query, key, key, None, scaling=1)[0], expected)
        with torch.device("meta"):
            assert torch.equal(attention(module, query, key, key, None, scaling=1.0)[0], expected)


def test_what_has_no_memory_of_its_own_goes_to_torch():
    query, key = torch.randn(2, 4, 40, 32).bfloat16(), torch.randn(2, 2, 40, 32).bfloat16()

    def run(query, key):
        return attention(_causal_module(), query, key, key, None)[0]

    expected = run(query, key).float()
    pulled = torch.func.grad(lambda query: run(query, key).float().sum())(query)
    assert pulled.shape == query.shape
    with torch.no_grad():
        traced = torch.jit.trace(run, (query, key), check_trace=False)(query, key)
        with FakeTensorMode() as mode:
            assert run(mode.from_tensor(query), mode.from_tensor(key)).shape == expected.shape
    assert (traced.float() - expected).abs().max() < 0.05


def test_gram_products_of_expanded_rows():
    x_TI = torch.randn(1, 48).bfloat16().expand(20, 48)
    gram_II = torch.zeros(48, 48)
    add_gram(gram_II, x_TI)
    add_gram(gram_II, x_TI[:0])
    assert torch.allclose(gram_II, x_TI.float().T @ x_TI.float(), rtol=1e-4, atol=1e-4)


def test_attention_passes_nan_on():
    key = torch.randn(1, 1, 40, 32).bfloat16()
    query = key.clone()
    query[0, 0, 20, 3] = torch.nan
    with torch.no_grad():
        found, _ = attention(nn.Module(), query, key, key, None)
    assert torch.isnan(found[0]).any(-1).flatten().nonzero().tolist() == [[20]]


def test_what_the_kernel_does_not_cover_goes_to_torch():
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    query = torch.randn(1, 2, 24, 32).bfloat16()
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    expected = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask).transpose(1, 2)
    with torch.no_grad():
        masked, _ = attention(module, query, query, query, mask[None, None], scaling=32**-0.5)
    assert torch.equal(masked, expected)
    odd = query[..., :20]
    with torch.no_grad():
        assert attention(module, odd, odd, odd, None)[0].shape == (1, 24, 2, 20)
    differentiable = query.clone().requires_grad_()
    attention(module, differentiable, query, query, None)[0].sum().backward()
    assert differentiable.grad is not None


def test_a_model_gives_the_same_logits_with_fast_attention(ids):
    network = tiny.build("llama", head_dim=32).to(torch.bfloat16).eval()
    with torch.no_grad():
        before = network(ids).logits.float()
        use_fast_attention(network)
        after = network(ids).logits.float()
        cache = network(ids[:, :-1], use_cache=True).past_key_values
        last = network(ids[:, -1:], past_key_values=cache, use_cache=True).logits.float()
    assert (before[:, -1:] - last).abs().max() <= 0.05 * before.abs().max()
    assert (before - after).abs().max() <= 0.05 * before.abs().max()


@pytest.mark.parametrize(("kind", "ours"), [("llama", True), ("deepseek_v32", False), ("gemma4_text", False)])
def test_a_model_whose_code_asks_for_torchs_attention_by_name_keeps_it(kind: str, ours: bool) -> None:
    """DeepSeek's sparse attention hides the keys that its indexer leaves out only from attention of that name."""
    network, ids_NL = zoo.build(kind), tiny.token_windows(4, 24)
    with torch.no_grad():
        before = network(ids_NL).logits
        use_fast_attention(network)
        assert torch.equal(network(ids_NL).logits, before)
    assert (network.config._attn_implementation == "prunella") == (ours and library() is not None)
