"""The instance-aware transformer against a slow loop that follows the paper's equations, for any heads, channels, points."""

import math

import pytest
import torch

from maskset.kernels import library
from maskset.masks.heads.instance_transformer import encode_positions, instance_transformer, parameter_count, part_shapes

SIZES = [(8, 4, 4), (8, 8, 4), (4, 1, 2), (16, 2, 3), (12, 3, 1)]  # channels, heads, points


@pytest.fixture(autouse=True, params=["c", "torch"])
def _implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv(library.NATIVE_ENV, "off")
    elif why := library.unavailable_reason():
        pytest.skip(why)


def look(value: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return a bilinear sample of value [c h w] at pixel coordinates; zero outside."""
    total = torch.zeros(value.shape[0], dtype=value.dtype)
    left, top = math.floor(x.item()), math.floor(y.item())
    for column in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= column < value.shape[2] and 0 <= row < value.shape[1]:
                total = total + value[:, row, column] * (1 - (x - column).abs()) * (1 - (y - row).abs())
    return total


def slow(features, padding, weights, centers, heads, points, positions="relative"):
    """Return the logits of eq. 1 and 2 (with the official ReLU), one instance, pixel, head and point at a time."""
    channels, height, width = features.shape
    visible = features.masked_fill(padding, 0.0)
    logits = []
    for theta, center in zip(weights, centers, strict=True):
        shapes = part_shapes(channels, heads, points)
        parts = theta.split([math.prod(shape) for shape in shapes])
        w_offset, b_offset, w_attention, b_attention, w_out, b_out = (p.view(s) for p, s in zip(parts, shapes, strict=True))
        if positions == "none":
            places = torch.zeros_like(features)
        else:
            seen_from = center if positions == "relative" else torch.zeros(2, dtype=center.dtype)
            places = encode_positions(padding, seen_from[None], channels)[0]
        for row in range(height):
            for column in range(width):
                query = features[:, row, column] + places[:, row, column]
                offsets = (w_offset @ query + b_offset).view(heads, points, 2)
                attention = (w_attention @ query + b_attention).view(heads, points).softmax(-1)
                seen = []
                for head, own in enumerate(visible.chunk(heads)):
                    samples = [look(own, column + x, row + y) for x, y in offsets[head]]
                    seen.append(sum(a * sample for a, sample in zip(attention[head], samples, strict=True)))
                logits.append(w_out @ torch.cat(seen).relu() + b_out)
    return torch.stack(logits).view(len(weights), height, width)


def inputs(channels: int, heads: int, points: int):
    torch.manual_seed(0)
    features = torch.randn(channels, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, parameter_count(channels, heads, points), dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(5, 6, dtype=torch.bool)
    padding[:, 5] = True
    return features, padding, weights, torch.rand(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "heads", "points"), SIZES)
def test_one_computation_equals_the_slow_loop_and_so_do_its_gradients(channels, heads, points):
    features, padding, weights, centers = inputs(channels, heads, points)
    expected = slow(features, padding, weights, centers, heads, points)
    wanted = torch.autograd.grad(expected.sin().sum(), [features, weights])
    result = instance_transformer(features, padding, weights, centers, heads, points)
    gradients = torch.autograd.grad(result.sin().sum(), [features, weights])
    torch.testing.assert_close(result, expected)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", ["absolute", "none"])
def test_the_other_encodings_equal_the_slow_loop(positions):
    features, padding, weights, centers = inputs(8, 4, 4)
    expected = slow(features, padding, weights, centers, 4, 4, positions)
    result = instance_transformer(features, padding, weights, centers, 4, 4, positions)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, instance_transformer(features, padding, weights, centers, 4, 4))


def test_the_papers_sizes_have_the_papers_numbers_of_parameters():
    assert (parameter_count(8, 4, 4), parameter_count(8, 8, 4)) == (441, 873)


def test_no_instance_gives_no_mask():
    features, padding, weights, centers = inputs(8, 4, 4)
    assert instance_transformer(features, padding, weights[:0], centers[:0], 4, 4).shape == (0, 5, 6)


def test_the_kernel_equals_the_steps_in_float32_for_many_instances_and_padding_below(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, padding = torch.randn(8, 9, 7, generator=generator), torch.zeros(9, 7, dtype=torch.bool)
    padding[7:], padding[:, 6] = True, True
    weights, centers = torch.randn(11, 441, generator=generator), torch.rand(11, 2, generator=generator)

    def run() -> list[torch.Tensor]:
        leaves = features.clone().requires_grad_(), weights.clone().requires_grad_()
        logits = instance_transformer(leaves[0], padding, leaves[1], centers, 4, 4)
        return [logits, *torch.autograd.grad(logits.sin().sum(), leaves)]

    result = run()
    monkeypatch.setenv(library.NATIVE_ENV, "off")
    for one, other in zip(result, run(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


def test_places_that_are_not_finite_do_no_harm():
    features, padding, weights, centers = inputs(8, 4, 4)
    weights = weights.detach().repeat(3, 1)[:3].clone()
    shapes = part_shapes(8, 4, 4)
    bias = slice(math.prod(shapes[0]), math.prod(shapes[0]) + math.prod(shapes[1]))
    weights[0, bias], weights[1, bias], weights[2, bias] = 1e30, -1e30, torch.nan
    logits = instance_transformer(features, padding, weights, centers.repeat(2, 1)[:3], 4, 4)
    torch.testing.assert_close(logits[:2], weights[:2, -1, None, None].expand(-1, 5, 6))  # nothing is seen there but the bias
    assert logits[2].isnan().all()


def test_the_operator_obeys_the_rules_of_torch_library():
    from maskset.kernels.instance_transformer import fused

    if library.handle() is None:
        pytest.skip("it needs the C library")
    cells, halves = torch.rand(3, 2, 4), (torch.rand(2, 2, 3, 2), torch.rand(2, 2, 2, 2))
    inside = torch.tensor([1, 1, 0], dtype=torch.uint8), torch.tensor([1, 1], dtype=torch.uint8)
    leaves = [tensor.requires_grad_() for tensor in (cells, cells.clone(), torch.rand(2, 5, 3, 2), torch.rand(2, 5))]
    arguments = (*leaves[:2], *halves, *inside, *leaves[2:], 2)
    torch.library.opcheck(fused, arguments, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"])


def test_float64_centers_are_accepted_and_get_gradients():
    features, padding, weights, _ = inputs(8, 4, 4)
    centers = torch.rand(2, 2).requires_grad_()
    expected = slow(features, padding, weights, centers, 4, 4)
    result = instance_transformer(features, padding, weights, centers, 4, 4)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one.sin().sum(), centers)[0] for one in (result, expected)))
    with torch.no_grad():
        torch.testing.assert_close(instance_transformer(features, padding, weights, centers, 4, 4), expected.detach())


def test_weights_of_another_type_than_the_map_are_refused():
    features, padding, weights, centers = inputs(8, 4, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        instance_transformer(features, padding, weights.bfloat16(), centers, 4, 4)


def test_padding_of_any_shape_gives_what_the_steps_give(monkeypatch):
    features, padding, weights, centers = inputs(8, 4, 4)
    padding = padding.clone()
    padding[2, 1] = True
    result = instance_transformer(features, padding, weights, centers, 4, 4)
    monkeypatch.setenv(library.NATIVE_ENV, "off")
    torch.testing.assert_close(result, instance_transformer(features, padding, weights, centers, 4, 4))
