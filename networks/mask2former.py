"""Mask2Former, GenEval's detector: the network is transformers', what surrounds it is here.

GenEval's numbers are those of mmdetection 2.x, so this is its test pipeline: the resize without
antialias, the padding to multiples of 32, and instances as pairs of a query and a class.
"""

import os

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from machinery.errors import UserError, explain


CLASSES = tuple("""
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,
fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,
bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,
sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,
wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,
hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,
computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
""".replace("\n", "").split(","))                               # COCO's 80, in its order
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
MEAN = [123.675, 116.28, 103.53]              # of pixels in [0, 255]
STD = [58.395, 57.12, 57.375]


class Box(tuple):
    """(x1, y1, x2, y2) in pixels; mask: None, or which pixels (H, W) are the object."""

    mask = None


def instances(z_class, z_mask, padded, resized, size, best=100):
    """Logits of a Mask2Former's queries, (Q, 81) and (Q, h, w) -> {class: [(Box, score), ...]}.

    padded, resized, size: (H, W) of the network's input, of the image in its upper left corner, and
    of the image. A score is the class's probability times the mean probability of the mask's
    pixels. One query may be in several of the `best` pairs (query, class).
    """
    p = z_class.softmax(-1)[:, :-1]                       # (Q, 80): the last class is "nothing"
    p, pair = p.flatten().topk(min(best, p.numel()))
    query, label = pair // len(CLASSES), pair % len(CLASSES)
    z = F.interpolate(z_mask[None], padded, mode="bilinear")
    z = z[..., : resized[0], : resized[1]]
    z = F.interpolate(z, size, mode="bilinear")[0]        # (Q, H, W)
    mask = z > 0
    area = mask.sum((1, 2)) + 1e-6
    sure = (z.sigmoid() * mask).sum((1, 2)) / area
    score = p * sure[query]
    pixels = mask.byte().cpu().numpy()
    found = {}
    pairs = zip(score.tolist(), query.tolist(), label.tolist())
    for s, q, c in pairs:
        corners = Image.fromarray(pixels[q]).getbbox()
        box = Box(corners or (0, 0, 0, 0))                # None: an empty mask
        box.mask = mask[q]
        found.setdefault(CLASSES[c], []).append((box, s))
    return found


def mask2former(net, device="cpu"):
    """A detector from transformers' Mask2Former: PIL picture -> {class: [(Box, score), ...]}."""
    @torch.no_grad()
    def detector(image):
        W, H = image.size
        scale = min(800 / min(W, H), 1333 / max(W, H))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        img = TF.pil_to_tensor(image)[None].to(device).float()    # (1, 3, H, W), 0 to 255
        img = F.interpolate(img, (h, w), mode="bilinear").round()     # OpenCV's: no antialias
        img = TF.normalize(img, MEAN, STD)
        img = F.pad(img, (0, -w % 32, 0, -h % 32))
        out = net(pixel_values=img)
        z_class, z_mask = out.class_queries_logits[0], out.masks_queries_logits[0]
        return instances(z_class, z_mask, img.shape[2:], (h, w), (H, W))

    return detector


def load_mask2former(path=None, random_weights=False, device="cpu"):
    """The Mask2Former of COCO's 80 classes, from a folder or the hub; or a tiny random one."""
    with explain("--detector mask2former is transformers' Mask2Former: pip install transformers",
                 ImportError):
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    if path or not random_weights:
        net = from_pretrained(Mask2FormerForUniversalSegmentation, path)
    else:
        swin = SwinConfig(
            embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_indices=[1, 2, 3, 4])
        config = Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
            num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32,
            encoder_layers=1, decoder_layers=2, num_queries=10, num_labels=80)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Mask2FormerForUniversalSegmentation(config)
    return net.to(device).eval()


def from_pretrained(Net, path):
    hint = "expected a folder with config.json and model.safetensors, of COCO instances"
    if path and not os.path.isdir(path):
        raise UserError(f"--detector_weights {path}: no such folder; {hint}")
    path = path or MASK2FORMER
    # Exception: no network, another architecture, a file cut short
    with explain(f"cannot load the detector {path} ({{}}); {hint}, named by "
                 "--detector_weights PATH", Exception):
        net, said = Net.from_pretrained(path, output_loading_info=True)
    lost = sorted(dict(net.named_parameters()).keys() & said["missing_keys"])
    if lost:
        raise UserError(f"the detector {path} lacks {', '.join(lost[:3])}; {hint}")
    if net.config.num_labels != len(CLASSES):
        raise UserError(f"the detector {path} has {net.config.num_labels} classes, not 80; {hint}")
    return net
