"""Mask2Former, a detector."""

import os

import numpy as np
import torch
import torch.nn.functional as F

from machinery.errors import UserError


CLASSES = tuple("""person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,
cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,
bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(","))   # COCO's order
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"


class Box(tuple):
    """(x1, y1, x2, y2) in pixels; `mask`, a bool tensor (H, W), or None, is what of it belongs to the object."""

    mask = None


def instances(z_class, z_mask, padded, resized, size, best=100):
    """Logits of a Mask2Former's queries, (Q, 81) and (Q, h, w) -> {class: [(Box, score), ...]} (mmdetection 2.x).

    padded, resized, size: (H, W) of the network's input, of the image in its upper left corner, and of the image.
    A score is the class's probability times the mean probability of the mask's pixels. One query may be in several
    of the `best` pairs (query, class).
    """
    p, pair = z_class.softmax(-1)[:, :-1].flatten().topk(min(best, z_class[:, :-1].numel()))  # the last is "nothing"
    query, label = pair // (z_class.shape[1] - 1), pair % (z_class.shape[1] - 1)
    z = F.interpolate(z_mask[None], padded, mode="bilinear")[..., : resized[0], : resized[1]]
    z = F.interpolate(z, size, mode="bilinear")[0]                                            # (Q, H, W)
    mask = z > 0
    sure = (z.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)
    down, across = (mask.any(axis).cpu().numpy() for axis in (2, 1))                          # (Q, H), (Q, W)
    found = {}
    for s, q, c in zip((p * sure[query]).tolist(), query.tolist(), label.tolist()):
        y, x = (np.flatnonzero(line[q]).tolist() or [0, -1] for line in (down, across))       # an empty mask: 0, 0, 0, 0
        box = Box((x[0], y[0], x[-1] + 1, y[-1] + 1))
        box.mask = mask[q]
        found.setdefault(CLASSES[c], []).append((box, s))
    return found


def mask2former(net, device="cpu"):
    """A detector from transformers' Mask2Former: PIL picture -> {class: [(Box, score), ...]}."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], device=device).view(2, 3, 1, 1)

    @torch.no_grad()
    def detector(image):
        W, H = image.size
        scale = min(800 / min(W, H), 1333 / max(W, H))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        img = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()     # (1, 3, H, W), 0 to 255
        img = F.interpolate(img, (h, w), mode="bilinear").round()                             # OpenCV's: no antialias
        img = F.pad((img - mean) / std, (0, -w % 32, 0, -h % 32))
        out = net(pixel_values=img)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], img.shape[2:], (h, w), (H, W))
    return detector


def load_mask2former(path=None, random_weights=False, device="cpu"):
    """transformers' Mask2Former with the 80 classes of COCO, from a folder or the hub; or a tiny random one."""
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    except ImportError:
        raise UserError("--detector mask2former is transformers' Mask2Former: pip install transformers")
    if random_weights and not path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stages = ["stage1", "stage2", "stage3", "stage4"]
            swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
            return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
                backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
                dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_queries=10,
                num_labels=80)).to(device).eval()
    hint = "expected a folder with config.json and model.safetensors, of COCO instances"
    if path and not os.path.isdir(path):
        raise UserError(f"--detector_weights {path}: no such folder; {hint}")
    try:
        net, said = Mask2FormerForUniversalSegmentation.from_pretrained(path or MASK2FORMER, output_loading_info=True)
    except Exception as err:                          # no network, another architecture, a file cut short
        raise UserError(f"cannot load the detector {path or MASK2FORMER} ({type(err).__name__}: "
                        f"{(str(err).splitlines() or [''])[0][:200]}); {hint}, named by --detector_weights PATH")
    missing = {*said["missing_keys"], *(k for k, *_ in said["mismatched_keys"])} & {k for k, _ in net.named_parameters()}
    if missing or net.config.num_labels != len(CLASSES):
        what = f"lacks {', '.join(sorted(missing)[:3])}" if missing else f"has {net.config.num_labels} classes, not 80"
        raise UserError(f"the detector {path or MASK2FORMER} {what}; {hint}")
    return net.to(device).eval()
