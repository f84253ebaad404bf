"""SOTR's transformers against plain loops in float64; the released one also against a map of double width in all layers."""

import pytest
import torch
import torch.nn.functional as F

from maskset.kernels.twin import CompactLayout
from maskset.layers.blocks import recompute
from maskset.layers.twin import Attention, PaperLayer, PaperTransformer, ReleasedTransformer


@pytest.fixture(autouse=True)
def exactly():
    """Compute in float64, from the same weights in every test."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def opened(transformer: ReleasedTransformer) -> ReleasedTransformer:
    """Return the transformer with random gates, which are closed at the start."""
    for layer in transformer.layers:
        torch.nn.init.normal_(layer.gates)
    return transformer


def plain_attention(attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """Return the output for sequences [n tokens C], head by head."""
    query, key, value = (
        linear(tokens).chunk(attention.heads, -1) for linear in (attention.query, attention.key, attention.value)
    )
    heads = []
    for q, k, v in zip(query, key, value, strict=True):
        heads.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return attention.output(torch.cat(heads, -1))


def plain_columns(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([plain_attention(attention, column) for column in x.unbind(2)], 2)


def plain_rows(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([plain_attention(attention, row) for row in x.unbind(1)], 1)


def plain_convolutions(pair, x: torch.Tensor) -> torch.Tensor:
    hidden = F.leaky_relu(F.conv2d(x.permute(0, 3, 1, 2), pair.first.weight, pair.first.bias, padding=1), 0.01)
    return F.conv2d(hidden, pair.second.weight, pair.second.bias, padding=1).permute(0, 2, 3, 1)


def plain_released(transformer: ReleasedTransformer, level: torch.Tensor) -> torch.Tensor:
    """Return what the released code computes, on a map of double width in all layers."""
    x = torch.cat([level, level], 3).permute(0, 2, 3, 1)
    for layer in transformer.layers:
        x = x + layer.gates[0] * plain_columns(layer.columns, x) + layer.gates[1] * plain_rows(layer.rows, x)
        one, other = layer.convolutions
        x = x + layer.gates[2] * plain_convolutions(one, x) + layer.gates[3] * plain_convolutions(other, x)
    left, right = x.permute(0, 3, 1, 2).chunk(2, 3)
    return (left + right) / 2


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 4), (4, 7), (3, 12), (2, 13), (2, 30), (3, 31)])
@pytest.mark.parametrize("depth", [0, 1, 2, 6])
@pytest.mark.parametrize("fast", [True, False])
def test_the_released_transformer_is_that_of_a_doubled_map(size, depth, fast):
    transformer, level = opened(ReleasedTransformer(8, 2, depth)), torch.randn(2, 8, *size)
    transformer.fast = fast
    torch.testing.assert_close(transformer(level), plain_released(transformer, level), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("width", [5, 26])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_its_gradients_are_those_of_a_doubled_map(width, fast, recomputed):
    transformer, level = opened(ReleasedTransformer(8, 2, 3)), torch.randn(2, 8, 3, width, requires_grad=True)
    transformer.fast = fast
    if recomputed:
        recompute(transformer)
    inputs = [level, *transformer.parameters()]
    found = torch.autograd.grad(transformer(level).sin().sum(), inputs)
    wanted = torch.autograd.grad(plain_released(transformer, level).sin().sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_the_copies_differ_in_two_more_columns_at_each_side_after_every_layer():
    transformer, level = opened(ReleasedTransformer(8, 2, 3)), torch.randn(1, 8, 4, 20)
    x = torch.cat([level, level], 3).permute(0, 2, 3, 1)
    for i, layer in enumerate(transformer.layers):
        x = x + layer.gates[0] * plain_columns(layer.columns, x) + layer.gates[1] * plain_rows(layer.rows, x)
        x = x + sum(gate * plain_convolutions(pair, x) for gate, pair in zip(layer.gates[2:], layer.convolutions, strict=True))
        left, right = x.chunk(2, 2)
        differs = (left - right).abs().amax((0, 1, 3)) > 1e-9
        apart = 2 * (i + 1)
        assert differs.tolist() == [True] * apart + [False] * (20 - 2 * apart) + [True] * apart


def test_columns_that_are_alike_are_computed_once():
    widths = []
    transformer = opened(ReleasedTransformer(8, 2, 4))
    for layer in transformer.layers:
        layer.columns.register_forward_hook(lambda _m, given, _o: widths.append(given[0].shape[2]))
        layer.convolutions[0].register_forward_hook(lambda _m, given, _o: widths.append(given[0].shape[2]))
    transformer(torch.randn(1, 8, 2, 20))
    assert widths == [20, 28, 24, 32, 28, 36, 32, 40]  # attention, convolutions and so on; the doubled map has 40


@pytest.mark.parametrize("border", [0, 2, 4, 6])
def test_a_compact_map_gives_both_complete_copies(border):
    left, right = torch.randn(1, 2, 11, 3), torch.randn(1, 2, 11, 3)
    right[:, :, border : 11 - border] = left[:, :, border : 11 - border]
    whole = torch.cat([left, right], 2)
    layout = CompactLayout(11, border)
    kept = whole if layout.complete else torch.cat([whole[:, :, : 11 + border], whole[:, :, 22 - border :]], 2)
    assert torch.equal(layout.right(kept), right)
    assert torch.equal(layout.both(kept), whole if border else left)


def test_with_closed_gates_nothing_happens():
    level = torch.randn(2, 8, 5, 9)
    torch.testing.assert_close(ReleasedTransformer(8, 2, 3)(level), level)


@pytest.mark.parametrize("along", ["rows", "columns", "map"])
def test_attention_is_that_of_a_plain_loop(along):
    attention, x = Attention(12, 3, along), torch.randn(2, 4, 5, 12)
    wanted = {
        "rows": lambda: plain_rows(attention, x),
        "columns": lambda: plain_columns(attention, x),
        "map": lambda: plain_attention(attention, x.flatten(1, 2)).unflatten(1, (4, 5)),
    }[along]()
    torch.testing.assert_close(attention(x), wanted)


@pytest.mark.parametrize("along", ["rows", "columns", "map"])
def test_attention_makes_no_copies_of_queries_keys_and_values(along):
    attention, x = Attention(12, 3, along), torch.randn(2, 4, 5, 12)
    tokens = attention._tokens(x)
    assert tokens.data_ptr() == x.data_ptr()
    assert tokens.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert tokens.stride(-1) == 1


@pytest.mark.parametrize("kind", ["full", "pure-twin", "hybrid-twin"])
def test_a_layer_of_the_paper_has_a_norm_before_each_part_and_a_residual_around_it(kind):
    layer, x = PaperLayer(kind, 8, 2), torch.randn(2, 3, 4, 8)
    normed = F.layer_norm(x, (8,), layer.attention_norm.weight, layer.attention_norm.bias)
    if kind == "full":
        attended = x + plain_attention(layer.attention, normed.flatten(1, 2)).unflatten(1, (3, 4))
    else:
        attended = x + plain_rows(layer.attention[1], plain_columns(layer.attention[0], normed))
    normed = F.layer_norm(attended, (8,), layer.rest_norm.weight, layer.rest_norm.bias)
    if kind == "hybrid-twin":
        wanted = attended + plain_convolutions(layer.rest, normed)
    else:
        first, second = layer.rest.layers
        assert first.out_features == 32
        wanted = attended + second(first(normed).relu())
    torch.testing.assert_close(layer(x), wanted)


def test_embeddings_of_row_and_column_are_added_once_and_resized_to_the_map():
    transformer = PaperTransformer("pure-twin", 8, 2, 0, 10)
    level = torch.randn(2, 8, 10, 10)
    rows, columns = transformer.row_embedding, transformer.column_embedding
    torch.testing.assert_close(transformer(level), level + rows[:, :, None] + columns[:, None])
    level = torch.randn(2, 8, 5, 20)
    rows, columns = F.interpolate(rows[None], size=5, mode="linear"), F.interpolate(columns[None], size=20, mode="linear")
    torch.testing.assert_close(transformer(level), level + rows[..., None] + columns[:, :, None])


@pytest.mark.parametrize(("kind", "count"), [("full", 788_992), ("pure-twin", 1_051_392), ("hybrid-twin", 1_705_984)])
def test_layers_of_the_paper_have_the_parameters_of_their_parts(kind, count):
    assert sum(p.numel() for p in PaperLayer(kind, 256, 8).parameters()) == count
    embeddings = PaperTransformer(kind, 256, 8, 0, 40)
    assert sum(p.numel() for p in embeddings.parameters()) == 20_480
    assert embeddings.row_embedding.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["full", "pure-twin", "hybrid-twin"])
@pytest.mark.parametrize("size", [(40, 40), (25, 42)])
def test_every_kind_starts_sanely_and_gives_every_parameter_a_gradient(kind, size):
    torch.set_default_dtype(torch.float32)
    transformer = PaperTransformer(kind, 32, 4, 4, 40)
    found = transformer(torch.randn(1, 32, *size))
    assert 1 < found.std() < 2
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in transformer.parameters())


def test_bfloat16_is_near_float32():
    torch.set_default_dtype(torch.float32)
    transformer, level = opened(ReleasedTransformer(16, 2, 2)), torch.randn(1, 16, 6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        low = transformer(level)
    assert (low - transformer(level)).abs().mean() < 0.05 * transformer(level).abs().mean()
