"""Dense linear layers of an engine: values, bits, and what is not finite."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit import _ops

pytestmark = pytest.mark.skipif(sk.backend() == "reference", reason="needs the C++ kernels")
ISAS = [isa for isa in sk.available_backends() if isa != "reference"]


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(st.integers(0, 70), st.integers(129, 400)),
    st.integers(0, 600),
    st.one_of(st.integers(0, 60), st.integers(61, 200)),
    st.booleans(),
    st.sampled_from(ISAS),
)
def test_values(images, in_features, out_features, biased, isa):
    torch.manual_seed(0)
    x, weight = torch.randn(images, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if biased else None
    with sk.use_isa(isa):
        out = _ops.dense_linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_other_dimensions_and_strides(isa):
    x, weight, bias = torch.randn(20, 3, 2).permute(1, 2, 0), torch.randn(7, 20), torch.randn(7)
    with sk.use_isa(isa):
        torch.testing.assert_close(_ops.dense_linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(_ops.dense_linear(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))


@pytest.mark.parametrize("images", [1, 2, 16, 33, 100, 129, 500])
@pytest.mark.parametrize("isa", ISAS)
def test_as_exact_as_pytorch_with_the_same_bits_for_any_number_of_threads(images, isa):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(images, 5000), torch.randn(70, 5000), torch.randn(70)
    exact = F.linear(x.double(), weight.double(), bias.double())
    threads, results = torch.get_num_threads(), []
    with sk.use_isa(isa):
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                results.append(_ops.dense_linear(x, weight, bias))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)
    assert (results[0] - exact).abs().max() <= 2 * (F.linear(x, weight, bias) - exact).abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("images", [5, 130])
def test_images_do_not_see_each_other(bad, isa, images):
    x, weight = torch.randn(images, 40), torch.randn(9, 40)
    with sk.use_isa(isa):
        clean = _ops.dense_linear(x, weight, None)
        x[2, 3] = bad
        dirty = _ops.dense_linear(x, weight, None)
    assert not dirty[2].isfinite().any()
    others = torch.arange(images) != 2
    assert torch.equal(dirty[others], clean[others])


def test_bad_input_is_named():
    with pytest.raises(RuntimeError, match=r"weight must be \[4, 5\], got \[4, 6\]"):
        torch.ops.sparsekit_cpu.dense_linear(torch.empty(2, 4), torch.randn(2, 5), torch.randn(4, 6), None)
    with pytest.raises(RuntimeError, match="bias"):
        _ops.dense_linear(torch.randn(2, 5), torch.randn(4, 5), torch.randn(3))
