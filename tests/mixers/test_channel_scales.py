"""The factors of each channel are those of least squares."""

import torch

from supra.mixers.channel_scales import channel_scales


def test_channel_scales_are_the_best_of_all():
    torch.manual_seed(0)
    blocks, target = torch.randn(60, 3, 2, 5), torch.randn(60, 3, 5)
    scale = channel_scales(blocks, target).double().requires_grad_()
    error = (target - (scale * blocks).sum(2)).square().sum()
    ridge = 1e-3 * blocks.square().sum(0).mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad(error + (ridge * scale.square()).sum(), scale)
    assert gradient.abs().max() < 1e-3
    alone = channel_scales(blocks[:, :, :1], target)
    expected = (blocks[:, :, 0] * target).sum(0) / blocks[:, :, 0].square().sum(0)
    torch.testing.assert_close(alone[:, 0], expected)


def test_blocks_that_are_alike_share_the_factor():
    torch.manual_seed(0)
    block = torch.randn(60, 3, 5)
    scale = channel_scales(torch.stack([block, block], 2), 4 * block)
    torch.testing.assert_close(scale, torch.full_like(scale, 2.0), rtol=1e-3, atol=0)
