"""What is ours in the networks that judge: Inception's pooling, boxes around masks, CLIP's crop.

Their golden numbers are with what uses them: Inception's in test_evaluate.py, CLIP's and
ImageReward's in test_reward.py, Mask2Former's in test_benchmarks.py.

    pytest tests/test_judges.py
"""

import pytest
import torch
import torch.nn.functional as F

from networks import clip, inception, mask2former
from tests.common import normal


# ---------------------------------------------------------------------------------------- Inception
@pytest.fixture(scope="module")
def layers():
    return inception.load_inception(random_weights=True).layers


@pytest.mark.parametrize("name, c_in", [("Mixed_5b", 192), ("Mixed_6e", 768), ("Mixed_7b", 1280)])
def test_averages_in_inception_do_not_count_the_padding(layers, name, c_in):
    block, ones = layers.get_submodule(name), torch.ones(1, c_in, 4, 4)
    assert torch.equal(block.pool(ones), ones)                # torchvision's has 4/9 in the corners
    pooled = block.branch_pool(ones)
    assert torch.equal(block(ones)[:, -pooled.shape[1]:], pooled)


def test_the_last_block_of_inception_pools_by_maximum(layers):
    x = normal(0, 1, 2048, 4, 4)
    pooled = layers.Mixed_7c.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
    assert torch.equal(layers.Mixed_7c(x)[:, -pooled.shape[1]:], pooled)


def test_all_else_in_a_block_is_torchvisions(layers):
    block, x = layers.Mixed_5c, normal(1, 1, 256, 6, 6)
    theirs = block.forward(x)                                 # without the hook that pools anew
    assert torch.equal(block(x)[:, :-64], theirs[:, :-64])
    inner = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(block(x)[inner], theirs[inner], atol=1e-6)
    assert not torch.allclose(block(x), theirs, atol=1e-6)


# -------------------------------------------------------------------------------------- Mask2Former
def test_a_box_ends_after_its_last_pixel_and_an_empty_mask_has_none():
    z_class = torch.full((2, 81), -9.0)
    z_class[0, 3] = z_class[1, 5] = 9.0
    z_mask = torch.full((2, 8, 8), -9.0)
    z_mask[0, 2:5, 1:7] = 9.0
    found = mask2former.instances(z_class, z_mask, (8, 8), (8, 8), (8, 8), best=2)
    (box, score), = found[mask2former.CLASSES[3]]
    assert box == (1, 2, 7, 5)
    assert torch.equal(box.mask, z_mask[0] > 0)
    assert score > 0.99
    assert found[mask2former.CLASSES[5]] == [((0, 0, 0, 0), 0.0)]


# --------------------------------------------------------------------------------------------- CLIP
@pytest.mark.parametrize("longer", [57, 59, 61, 63, 80])
def test_clips_crop_is_the_same_for_tall_images_as_for_wide_ones(longer):
    wide = normal(2, 1, 3, 56, longer)
    assert torch.allclose(clip.preprocess(wide.mT, 56), clip.preprocess(wide, 56).mT, atol=1e-5)
