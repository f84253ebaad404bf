"""The mask feature head at other sizes than the official one, which the parity tests of the systems cover."""

import pytest
import torch
import torch.nn.functional as F

from maskset.masks.heads.features import MaskFeatureHead, dynamic_conv, with_coordinates

STRIDES = (4, 8, 16, 32)


def levels(widths=(6, 5, 4, 7), size=(64, 96)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, wide, size[0] // s, size[1] // s) for wide, s in zip(widths, STRIDES, strict=True)]


@pytest.mark.parametrize(
    ("upsampling_steps", "stride", "blocks"),
    [((0, 1, 2, 3), 4, [1, 1, 2, 3]), ((1, 2, 3, 4), 2, [1, 2, 3, 4]), ((-1, 0, 1, 2), 8, [1, 1, 1, 2])],
)
def test_all_levels_meet_at_the_size_asked_for(upsampling_steps, stride, blocks):
    head = MaskFeatureHead((6, 5, 4, 7), upsampling_steps, 8, 10)
    features = head(levels())
    assert features.shape == (2, 10, 64 // stride, 96 // stride)
    assert [len(branch) for branch in head.branches] == blocks
    assert (features >= 0).all()
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_mask_features_are_the_sum_of_upsampled_levels():
    head = MaskFeatureHead((3, 4), (0, 1), 5, 6)
    fine, coarse = torch.randn(1, 3, 8, 12), torch.randn(1, 4, 4, 6)

    def block(x, module):
        x = F.conv2d(x, module.convolution.weight, padding=module.convolution.weight.shape[-1] // 2)
        return F.relu(F.group_norm(x, module.norm.num_groups, module.norm.weight, module.norm.bias))

    up = F.interpolate(block(coarse, head.branches[1][0]), (8, 12), mode="bilinear", align_corners=False)
    expected = block(block(fine, head.branches[0][0]) + up, head.output)
    torch.testing.assert_close(head([fine, coarse]), expected)


def test_as_many_levels_as_branches_are_needed():
    with pytest.raises(ValueError, match="zip"):
        MaskFeatureHead((6, 5, 4, 7), (0, 1, 2, 3), 8, 10)(levels()[:3])


def test_convolutions_start_near_zero_and_have_no_bias():
    head = MaskFeatureHead((256, 256), (0, 1), 128, 256)
    convolutions = [module for module in head.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(convolution.bias is None for convolution in convolutions)
    assert all(abs(convolution.weight.detach().std() - 0.01) < 3e-4 for convolution in convolutions)


def test_coordinates_reach_from_border_cell_to_border_cell():
    level = torch.full((2, 3, 5, 9), 7.0)
    result = with_coordinates(level)
    assert torch.equal(result[:, :3], level)
    assert torch.equal(result[1, 3], torch.linspace(-1, 1, 9).expand(5, 9))
    assert torch.equal(result[1, 4], torch.linspace(-1, 1, 5)[:, None].expand(5, 9))


def test_a_map_of_one_column_lies_at_the_left():
    assert with_coordinates(torch.zeros(1, 1, 1, 1))[0, 1:].flatten().tolist() == [-1, -1]


@pytest.mark.parametrize("count", [1, 5])
def test_dynamic_conv_is_a_1x1_convolution_with_the_kernels_as_weights(count):
    torch.manual_seed(0)
    features, kernels = torch.randn(8, 6, 9), torch.randn(count, 8)
    expected = F.conv2d(features[None], kernels[:, :, None, None])[0]
    assert dynamic_conv(features, kernels).shape == (count, 6, 9)
    torch.testing.assert_close(dynamic_conv(features, kernels), expected)


def test_no_kernel_draws_no_mask():
    assert dynamic_conv(torch.randn(8, 6, 9), torch.randn(0, 8)).shape == (0, 6, 9)


def test_gradients_are_those_of_the_convolution():
    torch.manual_seed(0)
    features, kernels = torch.randn(4, 3, 5, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    result = torch.autograd.grad(dynamic_conv(features, kernels).sigmoid().sum(), [features, kernels])
    expected = torch.autograd.grad(F.conv2d(features[None], kernels[:, :, None, None]).sigmoid().sum(), [features, kernels])
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)
