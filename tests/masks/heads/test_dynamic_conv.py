import pytest
import torch
import torch.nn.functional as F

from maskset.masks.heads.dynamic_conv import dynamic_conv


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
