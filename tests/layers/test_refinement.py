import math

import torch

from maskset.layers.refinement import DynamicAttention, RegionAttention, Tower, apply_deltas, image_feature, reset_stage


def test_a_correction_moves_the_center_by_half_sides_and_scales_the_sides():
    boxes = torch.tensor([[[10.0, 20, 30, 60]]])
    moved = apply_deltas(boxes, torch.tensor([[[1.0, -1.0, math.log(2), math.log(0.5)]]]))
    torch.testing.assert_close(moved, torch.tensor([[[10.0, 10, 50, 30]]]))
    torch.testing.assert_close(apply_deltas(boxes, torch.zeros(1, 1, 4)), boxes)


def test_a_side_grows_6250_times_at_most():
    (moved,) = apply_deltas(torch.tensor([[[0.0, 0, 1, 1]]]), torch.full((1, 1, 4), 100.0))[0]
    torch.testing.assert_close(moved[2:] - moved[:2], torch.full((2,), 6250.0))


def test_dynamic_attention_is_two_layers_whose_weights_come_from_the_object():
    torch.manual_seed(0)
    attention = DynamicAttention(8, 4, 3)
    objects, regions = torch.randn(5, 8), torch.randn(5, 8, 3, 3)
    found = attention(objects, regions)
    weights = attention.weights(objects)
    for i in range(5):
        first, second = weights[i, :32].view(8, 4), weights[i, 32:].view(4, 8)
        cells = [regions[i, :, row, column] for row in range(3) for column in range(3)]
        hidden = [torch.nn.functional.elu(attention.hidden_norm(cell @ first)) for cell in cells]
        rows = [torch.nn.functional.elu(attention.cell_norm(one @ second)) for one in hidden]
        expected = torch.nn.functional.elu(attention.output_norm(attention.output(torch.cat(rows))))
        torch.testing.assert_close(found[i], expected)


def test_region_attention_does_not_care_in_which_order_the_cells_are():
    torch.manual_seed(0)
    attention, objects, regions = RegionAttention(8, 2), torch.randn(5, 8), torch.randn(5, 8, 3, 3)
    assert attention(objects, regions).shape == (5, 8)
    torch.testing.assert_close(attention(objects, regions), attention(objects, regions.flip(2, 3)))


def test_the_image_feature_is_the_sum_of_what_each_level_has():
    levels = [torch.full((2, 3, 4, 4), 1.0), torch.full((2, 3, 2, 2), 10.0)]
    assert image_feature(levels, "mean").tolist() == [[11.0] * 3] * 2
    levels[0][0, 1, 2, 3] = 7.0
    assert image_feature(levels, "max")[0].tolist() == [11.0, 17.0, 11.0]


def test_the_image_feature_may_leave_out_padding():
    level, padding = torch.ones(1, 2, 2, 4), torch.zeros(1, 2, 4, dtype=torch.bool)
    padding[:, :, 2:] = True
    level[:, :, :, 2:] = 99.0
    assert image_feature([level], "mean", [padding]).tolist() == [[1.0, 1.0]]
    assert image_feature([level], "max", [padding]).tolist() == [[1.0, 1.0]]
    assert image_feature([level], "mean").tolist() == [[50.0, 50.0]]


def test_only_the_class_bias_starts_low_even_where_other_tensors_are_as_long():
    tower, class_head = Tower(16), torch.nn.Linear(16, 16)
    reset_stage(tower, class_head)
    torch.testing.assert_close(class_head.bias, torch.full((16,), -math.log(99)))
    assert (tower.norms[0].weight == 1).all()
    assert tower.layers[0].weight.abs().max() <= math.sqrt(6 / 32)
