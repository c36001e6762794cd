"""The network that published FIDs and Inception Scores are taken with: Inception of 2015-12-05, in plain torch.

FID is a distance of this network's features, so everything before them is part of the number: which of three resizes
brought an image to 299 px, how pixels became [-1, 1], whether COCO's crop came first. The resize is inside the network
here, and both published files of its weights load: features agree with either's own to rounding.
"""

import functools
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from machinery.errors import UserError
from networks.weights import download, load_state, read_weights


RESIZES = ("legacy_tensorflow", "clean", "legacy_pytorch")       # clean-fid's names; ADM's ImageNet has the first


def clean_resize(img, size=299):
    """clean-fid's mode "clean": a picture, or (H, W, 3) in [0, 255] -> float32 (size, size, 3), not rounded."""
    channels = np.moveaxis(np.asarray(img, dtype=np.float32), 2, 0)
    resized = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in channels]   # each of mode F
    return np.stack(resized, 2).clip(0, 255)


def coco_crop(img, size=256):
    """A picture as COCO's FID and CLIP score see it, real or generated: uint8 (size, size, 3) (GigaGAN, DMD2)."""
    (W, H), side = img.size, min(img.size)
    left, top = round((W - side) / 2), round((H - side) / 2)     # halves to the even neighbor, as in torchvision
    img = img.convert("RGB").crop((left, top, left + side, top + side))
    return np.array(img.resize((size, size), Image.Resampling.LANCZOS))


def resize(img, mode="legacy_tensorflow", size=299):
    """Images (B, 3, H, W) in [0, 255] -> (B, 3, size, size), float32, by one of RESIZES. No two of them agree.

    legacy_tensorflow is TF1's bilinear: source coordinate i H / size without half pixels, neighbors floor, floor + 1.
    legacy_pytorch has half pixels. Neither antialiases; clean, a bicubic, does.
    """
    if mode == "clean":
        with ThreadPoolExecutor() as pool:            # Pillow works outside the GIL
            small = list(pool.map(lambda i: clean_resize(i, size), img.permute(0, 2, 3, 1).cpu().numpy()))
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(img.device)
    if mode == "legacy_pytorch":
        return F.interpolate(img, (size, size), mode="bilinear")
    for axis in (3, 2):                               # along a row first, as TF1 does
        n = img.shape[axis]
        at = torch.arange(size, dtype=torch.float32, device=img.device) * (n / size)
        low = at.long()
        a, b = (img.index_select(axis, i) for i in (low, (low + 1).clamp(max=n - 1)))
        img = torch.lerp(a, b, (at - low).view(-1, *[1] * (3 - axis)))
    return img


class ConvNorm(nn.Module):
    """relu(norm(conv)). kernel: "3" or "1x7" keep the size; "3v", valid, is not padded; "3s" neither, with stride 2."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        k = kernel.rstrip("sv").split("x")
        k = int(k[0]), int(k[-1])
        pad = 0 if kernel[-1] in "sv" else (k[0] // 2, k[1] // 2)
        self.conv = nn.Conv2d(c_in, c_out, k, 1 + kernel.endswith("s"), pad, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.bn.track_running_stats, self.bn.num_batches_tracked = False, None    # a count that some files lack

    def forward(self, h):
        return F.relu(self.bn(self.conv(h)))


POOLS = {"avg": functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "max": functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
         "down": functools.partial(F.max_pool2d, kernel_size=3, stride=2)}


class Mixed(nn.Module):
    """Branches from one input, concatenated. `plan`: | parts them; each is a chain of POOLS and of name:width:kernel,
    where a+b stand side by side again."""

    def __init__(self, c_in, plan):
        super().__init__()
        self.branches = []
        for branch in plan.split("|"):
            width, chain = c_in, []
            for step in branch.split():
                convs = [] if step in POOLS else [conv.split(":") for conv in step.split("+")]
                for name, c_out, kernel in convs:
                    self.add_module(f"branch{name}", ConvNorm(width, int(c_out), kernel))
                width = sum(int(c_out) for _, c_out, _ in convs) or width
                chain.append([f"branch{name}" for name, *_ in convs] or step)
            self.branches.append(chain)

    def forward(self, h):
        out = []
        for chain in self.branches:
            y = h
            for step in chain:
                y = POOLS[step](y) if isinstance(step, str) else torch.cat([getattr(self, name)(y) for name in step], 1)
            out.append(y)
        return torch.cat(out, 1)


def inception_layers():
    """Images (B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048, 1, 1), under the published names."""
    A = "1x1:64:1 | 5x5_1:48:1 5x5_2:64:5 | 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3 | avg _pool:{}:1"
    B = "3x3:384:3s | 3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3s | down"
    C = ("1x1:192:1 | 7x7_1:{0}:1 7x7_2:{0}:1x7 7x7_3:192:7x1 | 7x7dbl_1:{0}:1 7x7dbl_2:{0}:7x1 7x7dbl_3:{0}:1x7 "
         "7x7dbl_4:{0}:7x1 7x7dbl_5:192:1x7 | avg _pool:192:1")
    D = "3x3_1:192:1 3x3_2:320:3s | 7x7x3_1:192:1 7x7x3_2:192:1x7 7x7x3_3:192:7x1 7x7x3_4:192:3s | down"
    E = ("1x1:320:1 | 3x3_1:384:1 3x3_2a:384:1x3+3x3_2b:384:3x1 | "
         "3x3dbl_1:448:1 3x3dbl_2:384:3 3x3dbl_3a:384:1x3+3x3dbl_3b:384:3x1 | {} _pool:192:1")
    return nn.Sequential(OrderedDict(
        Conv2d_1a_3x3=ConvNorm(3, 32, "3s"), Conv2d_2a_3x3=ConvNorm(32, 32, "3v"), Conv2d_2b_3x3=ConvNorm(32, 64, "3"),
        pool1=nn.MaxPool2d(3, 2), Conv2d_3b_1x1=ConvNorm(64, 80, "1"), Conv2d_4a_3x3=ConvNorm(80, 192, "3v"),
        pool2=nn.MaxPool2d(3, 2),                                                             # (B, 192, 35, 35)
        Mixed_5b=Mixed(192, A.format(32)), Mixed_5c=Mixed(256, A.format(64)), Mixed_5d=Mixed(288, A.format(64)),
        Mixed_6a=Mixed(288, B), Mixed_6b=Mixed(768, C.format(128)), Mixed_6c=Mixed(768, C.format(160)),
        Mixed_6d=Mixed(768, C.format(160)), Mixed_6e=Mixed(768, C.format(192)),               # (B, 768, 17, 17)
        Mixed_7a=Mixed(768, D), Mixed_7b=Mixed(1280, E.format("avg")), Mixed_7c=Mixed(2048, E.format("max")),
        pool3=nn.AdaptiveAvgPool2d(1)))


class Inception(nn.Module):
    """The network behind published FIDs, of 2015-12-05: images of any size -> features (B, 2048), logits (B, 1008).

    Input (B, 3 or 1, H, W) in [0, 1], or a list of (C, H, W) of unequal sizes. The logits leave the classifier's bias
    out, as Inception Scores do. resize is one of RESIZES; crop: `coco_crop` comes first. Only for eval mode.
    """

    dim, classes = 2048, 1008
    published_names = [("^(?=Conv2d|Mixed)", "layers.")]
    published_extras = r".*num_batches_tracked"

    def __init__(self, resize=RESIZES[0], crop=False):
        super().__init__()
        self.resize, self.crop = resize, crop
        self.layers, self.fc = inception_layers(), nn.Linear(2048, 1008)

    def scaled(self, img):
        """(B, C, H, W) in [0, 1] -> (B, 3, 299, 299) in [-1, 1]: times 255 gives back whole bytes, exactly."""
        img = (img * 255).expand(-1, 3, -1, -1)
        if self.crop:
            pictures = [Image.fromarray(p) for p in img.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]
            img = torch.from_numpy(np.stack([coco_crop(p) for p in pictures])).permute(0, 3, 1, 2).to(img)
        img = resize(img, self.resize)
        return 2 * (img / 255) - 1 if self.resize == "legacy_pytorch" else (img - 128) / 128

    def forward(self, img):
        x = torch.cat([self.scaled(i[None]) for i in img]) if isinstance(img, list) else self.scaled(img)
        features = self.layers(x).flatten(1)                                                  # (B, 2048), not negative
        return features, F.linear(features, self.fc.weight)


INCEPTION = {       # published files, and how their SHA-256 begins: plain weights, and NVIDIA's TorchScript of the same
    "plain": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
              "pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    "torchscript": ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                    "inception-2015-12-05.pt", None)}


def load_inception(path="plain", resize=RESIZES[0], crop=False, device="cpu", random_weights=False):
    """Inception from a file of plain weights, from the TorchScript file, or from one of INCEPTION, fetched.

    torch.jit.load reads TorchScript's own tensors and code, no Python. Its `layers` and `output` take the place of
    ours, and the resize stays ours: features are the same but for rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Inception(resize, crop)
    path = download(*INCEPTION[path], "--inception") if path in INCEPTION and not random_weights else path
    if random_weights:
        pass
    elif zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")       # torch calls TorchScript deprecated
                script = torch.jit.load(path, map_location="cpu")
            net.layers = script.layers
            net.fc.load_state_dict(script.output.state_dict())
        except (RuntimeError, AttributeError) as err:
            raise UserError(f"--inception {path}: a TorchScript file, but not inception-2015-12-05.pt, with `layers` "
                            f"and an `output` of 1008 classes ({' '.join(str(err).split())[:200]})")
    else:
        load_state(net, read_weights(path), f"--inception {path}")
    return net.to(device).eval().requires_grad_(False)
