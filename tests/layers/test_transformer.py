import pytest
import torch
from goldens import golden, notes

from maskset.layers.backbone import LevelProjection
from maskset.layers.blocks import Mlp, sine_positions
from maskset.layers.transformer import Proposals, cell_centers, flatten_levels, inverse_sigmoid, refine
from maskset.structures import ImageBatch

SIZES = {"a": [(192, 256)], "bc": [(160, 224), (192, 160)]}


def memory(name: str, width: int = 384, levels: int = 4):
    images = ImageBatch.from_images([torch.zeros(3, *size) for size in SIZES[name]])
    height, wide = images.pixels.shape[2:]
    shapes = [(-(-height // s), -(-wide // s)) for s in (8, 16, 32, 64)[:levels]]
    maps = [torch.zeros(len(images), width, *shape) for shape in shapes]
    paddings = [images.padding(shape) for shape in shapes]
    return flatten_levels(maps, paddings, torch.zeros(levels, width)), paddings


@pytest.mark.parametrize("name", ["a", "bc"])
def test_padding_and_valid_parts_are_the_official_ones(name):
    found, paddings = memory(name)
    for level, padding in enumerate(paddings):
        assert torch.equal((~padding).sum((1, 2)), golden("solq", f"{name}.mask{level}.valid"))
    if f"{name}.valid_ratios" in notes("solq")["arrays"]:
        torch.testing.assert_close(found.valid, golden("solq", f"{name}.valid_ratios"))


def test_sine_positions_are_the_official_ones():
    _, paddings = memory("a")
    found = [sine_positions(p, 384).transpose(1, 2).unflatten(2, p.shape[1:]) for p in paddings]
    torch.testing.assert_close(found[3], golden("solq", "a.pos.level3"), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0][:, ::48, :4, :4], golden("solq", "a.pos.level0.slice"), atol=1e-5, rtol=0)


def test_positions_know_only_the_valid_part():
    padding = torch.zeros(2, 5, 9, dtype=torch.bool)
    padding[0, 3:] = True
    padding[0, :, 4:] = True
    found = sine_positions(padding, 16).view(2, 5, 9, 16)
    alone = sine_positions(torch.zeros(1, 3, 4, dtype=torch.bool), 16).view(3, 4, 16)
    torch.testing.assert_close(found[0, :3, :4], alone)


def test_cell_centers_are_fractions_of_the_valid_part():
    found, paddings = memory("bc")
    centers = cell_centers(found)
    height, width = found.shapes[0]
    first = centers[1, : height * width].view(height, width, 2)
    rows, columns = (~paddings[0][1]).any(1).sum(), (~paddings[0][1]).any(0).sum()
    torch.testing.assert_close(first[0, 0], torch.tensor([0.5 / columns, 0.5 / rows]))
    torch.testing.assert_close(first[rows - 1, columns - 1], torch.tensor([(columns - 0.5) / columns, (rows - 0.5) / rows]))
    references = found.references(centers)
    torch.testing.assert_close(references[1, 0, 0], torch.tensor([0.5 / width, 0.5 / height]))


def test_refining_by_nothing_keeps_a_box_and_gives_a_point_half_the_image():
    boxes = torch.tensor([[[0.2, 0.7, 0.1, 0.9]]])
    torch.testing.assert_close(refine(torch.zeros(1, 1, 4), boxes), boxes)
    torch.testing.assert_close(refine(torch.zeros(1, 1, 4), boxes[..., :2]), torch.tensor([[[0.2, 0.7, 0.5, 0.5]]]))


def test_the_inverse_sigmoid_is_finite_at_both_ends():
    x = torch.tensor([-1.0, 0, 1e-9, 0.3, 1, 2], requires_grad=True)
    found = inverse_sigmoid(x)
    found.sum().backward()
    assert found.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(found[3].sigmoid(), x[3])


def test_extra_levels_come_from_the_last_map_and_then_from_each_other():
    project = LevelProjection([8, 16, 24], 32, 5)
    maps = [torch.rand(1, c, 32 // s, 48 // s) for c, s in ((8, 1), (16, 2), (24, 4))]
    levels = project(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 32, 48), (32, 16, 24), (32, 8, 12), (32, 4, 6), (32, 2, 3)]
    torch.testing.assert_close(levels[3], project.norms[3](project.convolutions[3](maps[2])))
    torch.testing.assert_close(levels[4], project.norms[4](project.convolutions[4](levels[3])))
    single = LevelProjection([8, 16, 24], 32, 1)
    torch.testing.assert_close(single(maps)[0], single.norms[0](single.convolutions[0](maps[2])))


def test_an_mlp_has_relu_between_its_layers_only():
    mlp = Mlp(3, 5, 2)
    x = torch.randn(7, 3)
    torch.testing.assert_close(mlp(x), mlp.layers[1](mlp.layers[0](x).relu()))
    assert mlp.last is mlp.layers[1]


def test_anchors_are_cell_centers_with_a_side_that_doubles_by_level():
    found, _ = memory("a", width=8, levels=2)
    _, anchors, allowed = Proposals(8).anchored(found)
    height, width = found.shapes[0]
    boxes = anchors.sigmoid()
    assert allowed[0, : height * width].view(height, width)[1:-1, 1:-1].all()
    cell = (height // 2) * width + width // 2
    expected = torch.tensor([(width // 2 + 0.5) / width, (height // 2 + 0.5) / height, 0.05, 0.05])
    torch.testing.assert_close(boxes[0, cell], expected)
    torch.testing.assert_close(boxes[0, height * width :][allowed[0, height * width :]][0, 2:], torch.tensor([0.1, 0.1]))
    assert (boxes[~allowed] == 1).all()
