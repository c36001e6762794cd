"""The network that published FIDs and Inception Scores are taken with: Inception of 2015-12-05.

FID is a distance of this network's features, so everything before them is part of the number: which
of three resizes brought an image to 299 px, how pixels became [-1, 1], whether COCO's crop came
first. The resize is inside the network here, and both published files of its weights load: features
agree with either's own to rounding. The layers are torchvision's, the pooling is not (`repool`).
"""

import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.models import Inception3

from machinery.errors import explain
from networks.weights import download, load_state, read_weights

# Published files, and how their SHA-256 begins: plain weights; NVIDIA's TorchScript of the same.
INCEPTION = {
    "plain": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
              "pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    "torchscript": ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                    "inception-2015-12-05.pt", None),
}


# ------------------------------------------------------------------------- from pixels to 299 x 299
SIZE = 299
RESIZES = ("legacy_tensorflow", "clean", "legacy_pytorch")   # clean-fid's names; ADM's is the first


def clean_resize(img):
    """clean-fid's "clean": a picture, or (H, W, 3) in [0, 255] -> float32 (299, 299, 3)."""
    channels = np.moveaxis(np.asarray(img, dtype=np.float32), 2, 0)
    resized = [
        Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for channel in channels]                      # in Pillow's mode F, which keeps fractions
    return np.stack(resized, 2).clip(0, 255)


def coco_crop(img, size=256):
    """A picture as COCO's FID and CLIP score see it, real or generated: uint8 (size, size, 3).

    GigaGAN and DMD2 do so.
    """
    square = TF.center_crop(img.convert("RGB"), min(img.size))    # halves are rounded to even
    return np.array(TF.resize(square, [size, size], TF.InterpolationMode.LANCZOS))


def each(function, img):
    """function((H, W, 3)) of every image of (B, 3, H, W), in parallel."""
    with ThreadPoolExecutor() as pool:                # Pillow works outside the GIL
        out = list(pool.map(function, img.permute(0, 2, 3, 1).cpu().numpy()))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(img)


def tensorflow_resize(img):
    """TF1's bilinear, along the last axis: source coordinate i W / 299 without half pixels."""
    W = img.shape[-1]
    at = torch.arange(SIZE, dtype=torch.float32, device=img.device) * (W / SIZE)
    left = at.long()
    right = (left + 1).clamp(max=W - 1)
    return torch.lerp(img[..., left], img[..., right], at - left)


def resize(img, mode="legacy_tensorflow"):
    """Images (B, 3, H, W) in [0, 255] -> (B, 3, 299, 299), float32, by one of RESIZES, all
    different.

    legacy_tensorflow and legacy_pytorch (which has half pixels) do not antialias; clean does, and
    it is bicubic.
    """
    if mode == "clean":
        return each(clean_resize, img)
    if mode == "legacy_pytorch":
        return F.interpolate(img, (SIZE, SIZE), mode="bilinear")
    return tensorflow_resize(tensorflow_resize(img).mT).mT      # along a row first, as TF1 does


# -------------------------------------------------------------------------------------- the network
def repool(block, inputs, out):
    """After one of torchvision's blocks: its last branch anew, pooled as in FID's network."""
    pooled = block.branch_pool(block.pool(*inputs))
    return torch.cat([out[:, : -pooled.shape[1]], pooled], 1)


def fid_inception():
    """torchvision's Inception v3 with the pooling and the 1008 classes of FID's network.

    There, averages do not count the padding, and the last block pools by maximum.
    """
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if hasattr(module, "branch_pool"):
            module.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
            module.register_forward_hook(repool)
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.num_batches_tracked = None                     # some files lack it
    net.Mixed_7c.pool = nn.MaxPool2d(3, 1, padding=1)
    return net


class Inception(nn.Module):
    """Images of any size -> features (B, 2048) and logits (B, 1008), in eval mode only.

    Input (B, 3 or 1, H, W) in [0, 1], or a list of (C, H, W) of unequal sizes. The logits leave the
    classifier's bias out, as Inception Scores do. resize is one of RESIZES; crop: `coco_crop` comes
    first.
    """

    dim, classes = 2048, 1008
    published_names = [("^(?=Conv2d|Mixed)", "layers.")]
    published_extras = r".*num_batches_tracked"

    def __init__(self, resize=RESIZES[0], crop=False):
        super().__init__()
        self.resize, self.crop = resize, crop
        *layers, _, (_, fc) = fid_inception().named_children()      # and no dropout
        self.layers = nn.Sequential(OrderedDict(layers))            # -> (B, 2048, 1, 1)
        self.fc = fc

    def scaled(self, img):
        """(B, C, H, W) in [0, 1] -> (B, 3, 299, 299) in [-1, 1]. Times 255: bytes, exactly."""
        img = (img * 255).expand(-1, 3, -1, -1)
        if self.crop:
            img = each(lambda p: coco_crop(Image.fromarray(p.astype(np.uint8))), img)
        img = resize(img, self.resize)
        if self.resize == "legacy_pytorch":
            return 2 * (img / 255) - 1
        return (img - 128) / 128

    def forward(self, img):
        if isinstance(img, list):
            x = torch.cat([self.scaled(one[None]) for one in img])
        else:
            x = self.scaled(img)
        features = self.layers(x).flatten(1)                      # (B, 2048), not negative
        return features, F.linear(features, self.fc.weight)


# -------------------------------------------------------------------------------------- its weights
def load_inception(path="plain", resize=RESIZES[0], crop=False, device="cpu", random_weights=False):
    """Inception from a file of plain weights or of TorchScript, or one of INCEPTION, fetched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Inception(resize, crop)
    if not random_weights:
        load_file(net, path)
    return net.to(device).eval().requires_grad_(False)


def load_file(net, path):
    if path in INCEPTION:
        path = download(*INCEPTION[path], "--inception")
    files = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if not any("/code/" in name for name in files):
        load_state(net, read_weights(path), f"--inception {path}")
        return
    # torch.jit.load reads TorchScript's own tensors and code, no Python. Its `layers` take the
    # place of ours, and the resize stays ours: features are the same but for rounding.
    with warnings.catch_warnings(), explain(
            f"--inception {path}: a TorchScript file, but not inception-2015-12-05.pt, with "
            "`layers` and an `output` of 1008 classes ({})", RuntimeError, AttributeError):
        warnings.simplefilter("ignore")                         # torch calls TorchScript deprecated
        script = torch.jit.load(path, map_location="cpu")
        net.layers = script.layers
        net.fc.load_state_dict(script.output.state_dict())
