"""CLIP as a judge: the cosine of two towers' features says how well a picture fits its prompt.

Three of the four rewards are open_clip's own CLIP under different weights (CLIP, HPSv2, PickScore),
and so are the two that only measure. Preprocessing is part of each score, and gradients must pass
through it: it is made of torchvision's differentiable operations.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from machinery.errors import explain
from networks.text import clip_ids
from networks.weights import renames


# ------------------------------------------------------------------------------------ preprocessing
BICUBIC = TF.InterpolationMode.BICUBIC

MEAN = 0.48145466, 0.4578275, 0.40821073        # of the pixels that all four were trained on
STD = 0.26862954, 0.26130258, 0.27577711


@functools.lru_cache(maxsize=8)
def moments(dtype, device):
    """MEAN and STD, (3, 1, 1) each. Sent once: a copy from the host would wait for the device."""
    both = torch.tensor([MEAN, STD], dtype=dtype)[..., None, None]
    return tuple(both.to(device))


def normalize(img):
    """Pixels (..., 3, h, w) in [0, 1] -> what the rewards were trained on."""
    mean, std = moments(img.dtype, img.device)
    return (img - mean) / std


def resize(img, size):
    """Bicubic and antialiased, in float32 at least; not clamped, though it overshoots a bit.

    size: (h, w), or the shorter side; then the longer one is truncated.
    """
    img = img.to(torch.promote_types(img.dtype, torch.float32))
    return TF.resize(img.expand(-1, 3, -1, -1), size, BICUBIC)                # gray: (B, 1, H, W)


def preprocess(img, size=224):
    """Images (B, 3 or 1, H, W) in [0, 1] -> (B, 3, size, size): the same for all rewards."""
    return normalize(TF.center_crop(resize(img, size), size))     # halves are rounded to even


def preprocess_longest(img, size=224):
    """As HPSv2's own benchmark has it: the longer side is `size`, the rest is padded with black."""
    H, W = img.shape[2:]
    h, w = round(H * size / max(H, W)), round(W * size / max(H, W))
    top, left = (size - h) // 2, (size - w) // 2
    page = F.pad(resize(img, (h, w)), (left, size - w - left, top, size - h - top))
    return normalize(page)


def preprocess_pil(img, size=224):
    """As open_clip evaluates: a PIL picture -> (3, size, size), rounded to bytes and clamped."""
    img = TF.center_crop(TF.resize(img, size, BICUBIC), size).convert("RGB")
    return normalize(TF.pil_to_tensor(img) / 255)


# --------------------------------------------------------------------------------------- the towers
# Sizes, as open_clip calls them.
CLIP_H = "ViT-H-14"                             # of the rewards
CLIP_G = "ViT-g-14"                             # these two measure and never teach: CLIP score's,
CLIP_L = "ViT-L-14-quickgelu"                   # and GenEval's judge of colors


class ClipReward(nn.Module):
    """The cosine of two towers' features: open_clip's own CLIP, of any size and weights.

    config: arguments of open_clip's class, or its name for them.
    kind: "clip" and "pickscore" multiply by the learned scale s, "hps" does not.
    """

    def __init__(self, config=CLIP_H, kind="clip"):
        super().__init__()
        with explain(f"the reward {kind} is a CLIP by open_clip: pip install open_clip_torch",
                     ImportError):
            from open_clip import get_model_config
            from open_clip.model import CLIP
        if isinstance(config, str):
            config = get_model_config(config)
        self.clip = CLIP(**config)
        self.size = config["vision_cfg"]["image_size"]
        self.scaled = kind != "hps"

    def tokenize(self, prompts):
        """Prompts -> ids (n, context), as they are: no template."""
        return clip_ids(prompts, self.clip.context_length, self.clip.vocab_size)

    def image_features(self, pixels):
        return self.normalized(self.clip.encode_image(pixels))                # (B, embed)

    def text_features(self, ids):
        # In no file: a model built on "meta" has none.
        self.clip.attn_mask = nn.Transformer.generate_square_subsequent_mask(
            ids.shape[1], ids.device)
        return self.normalized(self.clip.encode_text(ids))                    # (B, embed)

    def normalized(self, features):
        """Length 1, in the precision of the scale: float32 also where the matrices are bf16."""
        return F.normalize(features.to(self.clip.logit_scale.dtype), dim=-1)

    def forward(self, pixels, ids):
        """Pixels (B, 3, size, size) and ids (B, context) -> scores (B,) of the pairs (i, i)."""
        cosine = (self.image_features(pixels) * self.text_features(ids)).sum(-1)
        return cosine * self.clip.logit_scale.exp() if self.scaled else cosine

    published_names = renames("""
        text_model.embeddings.token_embedding.             token_embedding.
        text_model.embeddings.position_embedding.weight    positional_embedding
        text_model.encoder.layers.                         transformer.resblocks.
        text_model.final_layer_norm.                       ln_final.
        text_projection.weight                             text_projection^T
        vision_model.embeddings.class_embedding            visual.class_embedding
        vision_model.embeddings.patch_embedding.           visual.conv1.
        vision_model.embeddings.position_embedding.weight  visual.positional_embedding
        vision_model.pre_layrnorm.                         visual.ln_pre.
        vision_model.post_layernorm.                       visual.ln_post.
        vision_model.encoder.layers.                       visual.transformer.resblocks.
        visual_projection.weight                           visual.proj^T
        .layer_norm1.       .ln_1.                         .layer_norm2.         .ln_2.
        .mlp.fc1.           .mlp.c_fc.                     .mlp.fc2.             .mlp.c_proj.
        .self_attn.q_proj.  .attn.in_proj_#0               .self_attn.k_proj.    .attn.in_proj_#1
        .self_attn.v_proj.  .attn.in_proj_#2               .self_attn.out_proj.  .attn.out_proj.
    """) + [(r"^(?!clip\.)", "clip.")]          # transformers' names to open_clip's, those to ours
    published_extras = (r"(text_model|vision_model)\.embeddings\.position_ids$"
                        r"|(attn_mask|input_resolution|context_length|vocab_size)$")
