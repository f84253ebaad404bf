import os

import jaxtyping
import pytest
import torch
from goldens import golden, notes, weights

from maskset.errors import AttentionError
from maskset.kernels import library
from maskset.kernels.attention import ATTENTION_ENV, deformable_attention, implementations, using
from maskset.layers.transformer import DeformableAttention

CPU = ["reference", "bag", "gather", "c"]
SHAPES = [tuple(shape) for shape in golden("solq", "msda.shapes").tolist()]


@pytest.fixture(params=CPU)
def implementation(request):
    if why := implementations()[request.param]:
        pytest.skip(f"{request.param}: {why}")
    with using(request.param):
        yield request.param


def test_output_and_gradients_are_the_official_ones(implementation):
    value, locations, share = (golden("solq", f"msda.{n}").double().requires_grad_() for n in ("value", "loc", "weight"))
    out = deformable_attention(value, SHAPES, locations, share)
    torch.testing.assert_close(out, golden("solq", "msda.out").double(), atol=1e-6, rtol=1e-6)
    (out * golden("solq", "msda.grad_out")).sum().backward()
    for tensor, name in ((value, "value"), (locations, "loc"), (share, "weight")):
        torch.testing.assert_close(tensor.grad, golden("solq", f"msda.grad_{name}").double(), atol=1e-5, rtol=1e-5)


def naive(value, shapes, locations, share):
    """Equation 3, one sample at a time."""
    batch, _, heads, width = value.shape
    out = torch.zeros(batch, locations.shape[1], heads, width, dtype=value.dtype)
    for b, q, m in torch.cartesian_prod(*(torch.arange(n) for n in (batch, locations.shape[1], heads))).tolist():
        first = 0
        for level, (h, w) in enumerate(shapes):
            for p in range(locations.shape[4]):
                x = locations[b, q, m, level, p, 0] * w - 0.5
                y = locations[b, q, m, level, p, 1] * h - 0.5
                for row in range(h):
                    for column in range(w):
                        near = (1 - (x - column).abs()).clamp(min=0) * (1 - (y - row).abs()).clamp(min=0)
                        out[b, q, m] += share[b, q, m, level, p] * near * value[b, first + row * w + column, m]
            first += h * w
    return out.flatten(2)


@pytest.mark.parametrize("shapes", [[(3, 4), (2, 1)], [(1, 1)], [(1, 5), (4, 1), (2, 2)]])
def test_every_sample_is_bilinear_with_zeros_outside(implementation, shapes):
    generator = torch.Generator().manual_seed(0)
    total = sum(h * w for h, w in shapes)
    value = torch.randn(2, total, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 4, 2, len(shapes), 2, 2, generator=generator, dtype=torch.float64) * 2 - 0.5
    share = torch.rand(2, 4, 2, len(shapes), 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(deformable_attention(value, shapes, locations, share), naive(value, shapes, locations, share))


def test_gradients_are_those_of_finite_differences(implementation):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 10, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(1, 2, 2, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    share = torch.rand(1, 2, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: deformable_attention(t[0], [(2, 3), (4, 1)], *t[1:]), (value, locations, share), eps=1e-7
    )


def test_locations_far_outside_or_nan_do_no_harm(implementation):
    if implementation == "reference":
        pytest.skip("grid_sample takes NaN for a place outside")
    value, share = torch.ones(1, 4, 1, 2), torch.ones(1, 3, 1, 1, 1)
    locations = torch.tensor([1e30, torch.inf, -1e9]).view(1, 3, 1, 1, 1, 1).expand(-1, -1, -1, -1, -1, 2)
    assert deformable_attention(value, [(2, 2)], locations, share).abs().sum() == 0
    assert deformable_attention(value, [(2, 2)], locations * torch.nan, share).isnan().all()


def module() -> DeformableAttention:
    names = {"value_projection": "value_proj", "output_projection": "output_proj"}
    attention = DeformableAttention(48, 4, 3, 3)
    shapes = [
        (f"solq.msda_module.{names.get(name.split('.')[0], name.split('.')[0])}.{name.split('.')[1]}", value.shape)
        for name, value in attention.state_dict().items()
    ]
    attention.load_state_dict(dict(zip(attention.state_dict(), weights(shapes).values(), strict=True)))
    return attention


@pytest.mark.parametrize(("reference", "width"), [("points", 2), ("boxes", 4)])
def test_the_module_is_the_official_one(implementation, reference, width):
    query, memory, boxes, padding = (golden("solq", f"msda.module.{n}") for n in ("query", "src", "ref", "padding"))
    out = module()(query, boxes[..., :width], memory, SHAPES, padding)
    torch.testing.assert_close(out, golden("solq", f"msda.module.out_{reference}"), atol=1e-5, rtol=1e-5)


def test_the_first_offsets_are_the_official_ones():
    attention = DeformableAttention(384, 8, 4, 4)
    torch.testing.assert_close(attention.sampling_offsets.bias, golden("solq", "msda.init.offsets_bias"), atol=1e-6, rtol=0)
    assert attention.sampling_offsets.weight.abs().sum() == 0
    assert "msda_module" in notes("solq")["arrays"]["msda.module.query"]["meaning"]


def test_bfloat16_stays_close(implementation):
    query, memory, boxes, padding = (golden("solq", f"msda.module.{n}") for n in ("query", "src", "ref", "padding"))
    exact = module()(query, boxes, memory, SHAPES, padding)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module()(query, boxes, memory, SHAPES, padding)
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_autograd_keeps_nothing_but_what_it_was_given():
    if why := library.unavailable_reason():
        pytest.skip(why)
    kept = []
    value, share = torch.rand(1, 4, 2, 3, requires_grad=True), torch.rand(1, 5, 2, 1, 2, requires_grad=True)
    locations = torch.rand(1, 5, 2, 1, 2, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        deformable_attention(value, [(2, 2)], locations, share)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted(t.data_ptr() for t in (value, locations, share))


def test_the_operator_obeys_the_rules_of_torch_library():
    if why := library.unavailable_reason():
        pytest.skip(why)
    from maskset.kernels.attention import fused

    value, locations, share = (
        torch.rand(size, requires_grad=True) for size in ((1, 5, 2, 4), (1, 3, 2, 2, 1, 2), (1, 3, 2, 2, 1))
    )
    torch.library.opcheck(fused, (value, [2, 2, 1, 1], locations, share), test_utils=["test_schema", "test_faketensor"])
    torch.library.opcheck(fused, (value, [2, 2, 1, 1], locations, share), test_utils=["test_autograd_registration"])


def test_gradients_of_tensors_with_gaps_lie_as_the_compiler_is_told():
    if why := library.unavailable_reason():
        pytest.skip(why)
    from maskset.kernels.attention import fused_backward

    value, locations, share, grad = (
        torch.rand(size).transpose(0, 1) for size in ((5, 2, 2, 4), (3, 2, 2, 2, 1, 2), (3, 2, 2, 2, 1), (3, 2, 8))
    )
    arguments = (grad, value, [2, 2, 1, 1], locations, share)
    torch.library.opcheck(fused_backward, arguments, test_utils=["test_schema", "test_faketensor"])


def test_a_compiled_network_has_the_operator_in_its_one_graph(monkeypatch):
    if why := library.unavailable_reason():
        pytest.skip(why)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the compiler cannot follow the checks
    called = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    value, locations, share = torch.rand(1, 4, 2, 8), torch.rand(1, 5, 2, 1, 2, 2), torch.rand(1, 5, 2, 1, 2)
    compiled = torch.compile(
        lambda *tensors: deformable_attention(tensors[0], [(2, 2)], *tensors[1:]), backend=backend, fullgraph=True
    )
    out = compiled(value, locations, share)
    assert "maskset.deformable_attention.default" in called
    torch.testing.assert_close(out, deformable_attention(value, [(2, 2)], locations, share))


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_no_image_and_no_query_see_nothing(implementation, batch, queries):
    value, locations, share = (
        torch.rand(size) for size in ((batch, 4, 2, 8), (batch, queries, 2, 1, 3, 2), (batch, queries, 2, 1, 3))
    )
    assert deformable_attention(value, [(2, 2)], locations, share).shape == (batch, queries, 16)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    if why := library.unavailable_reason():
        pytest.skip(why)
    generator = torch.Generator().manual_seed(0)
    value, locations, share = (
        torch.rand(2, *size, generator=generator).requires_grad_() for size in ((500, 4, 8), (1000, 4, 1, 4, 2), (1000, 4, 1, 4))
    )

    def run() -> list[torch.Tensor]:
        out = deformable_attention(value, [(20, 25)], locations, share)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (value, locations, share))]

    alone = run()
    torch.set_num_threads(threads)
    try:
        together = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "no implementation 'cuda'.*c, triton, reference, bag, gather"),
        ("triton", "MASKSET_ATTENTION=triton cannot be used"),
    ],
)
def test_an_implementation_that_does_not_work_here_is_refused(name, message):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("it works here, though not for these tensors")
    with using(name), pytest.raises(AttentionError, match=message):
        deformable_attention(torch.rand(1, 1, 1, 1), [(1, 1)], torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1))


def test_without_the_library_the_next_best_is_taken(monkeypatch):
    monkeypatch.setenv(library.NATIVE_ENV, "off")
    monkeypatch.setattr("maskset.kernels.attention.fused", None)  # would fail
    value, locations, share = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
    assert deformable_attention(value, [(1, 1)], locations, share).item() == 1
    assert implementations()["c"] == "MASKSET_NATIVE=off disables it"


@pytest.mark.parametrize("choice", ["OFF", "0", "false"])
def test_a_library_that_is_hidden_in_other_words_is_not_used_silently(monkeypatch, choice):
    monkeypatch.setenv(library.NATIVE_ENV, choice)
    with pytest.raises(ValueError, match=f"MASKSET_NATIVE is '{choice}'; allowed are on and off"):
        library.unavailable_reason()
    with pytest.raises(ValueError, match="allowed are on and off"):
        library.supports(torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "locations", "share"),
    [
        ((1, 5, 1, 2), (1, 3, 1, 1, 2, 2), (1, 3, 1, 1, 2)),
        ((1, 4, 1, 2), (1, 3, 1, 2, 2, 2), (1, 3, 1, 2, 2)),
        ((1, 4, 2, 2), (1, 3, 1, 1, 2, 2), (1, 3, 1, 1, 2)),
        ((2, 4, 1, 2), (1, 3, 1, 1, 2, 2), (1, 3, 1, 1, 2)),
        ((1, 4, 1, 2), (1, 2, 1, 1, 2, 2), (1, 3, 1, 1, 2)),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_before_a_kernel_reads_them(value, locations, share):
    from maskset.kernels.attention import fused

    with pytest.raises(ValueError, match="do not fit together"):
        fused(torch.rand(value), [2, 2], torch.rand(locations), torch.rand(share))


def test_an_export_gathers_and_multiplies():
    query, memory, boxes, padding = (golden("solq", f"msda.module.{n}") for n in ("query", "src", "ref", "padding"))
    attention = module().eval()
    program = torch.export.export(attention, (query, boxes, memory, SHAPES, padding))
    called = {str(node.target) for node in program.graph.nodes}
    assert "aten.gather.default" in called
    assert not [name for name in called if "maskset" in name or "embedding_bag" in name or "grid_sample" in name]
    out = program.module()(query, boxes, memory, SHAPES, padding)
    torch.testing.assert_close(out, golden("solq", "msda.module.out_boxes"), atol=1e-5, rtol=1e-5)


def test_the_environment_is_as_before_after_a_choice(monkeypatch):
    monkeypatch.delenv(ATTENTION_ENV, raising=False)
    with using("bag"):
        assert os.environ[ATTENTION_ENV] == "bag"
    assert ATTENTION_ENV not in os.environ
