"""CLIP score, and the two lists of 30,000 captions that are drawn for it and for FID.

CLIP score is the mean cosine, not times 100, of CLIP ViT-g-14's features of an image and of its
caption.

COCO-30k: a fixed list of 30,000 captions (DMD2's captions_coco14_test.txt), one image each. FID
compares with *all* 40,504 images of val2014, and both sides go through `coco_crop` to 256 px, then
`clean_resize` to Inception's 299 (networks/inception.py). MJHQ-30k: its 30,000 prompts against its
30,000 images, by `clean_resize` alone; the paper mentions no crop. `evaluate.py --benchmark clip
--save_images` writes the generated side of either.
"""

import torch

from networks.text import byte_pairs


def clip_score_tokens(captions):
    """Token ids (n, 77) of "A photo depicts" and the caption (as in DMD2's coco_evaluator.py).

    The caption alone is cut to 77 ids. Then the three words are pushed in behind its start, and
    what now stands last becomes an end. (Unless that is a "!" amid punctuation: its id, 0, passes
    for padding. Published scores were computed with this flaw, so it stays.)
    """
    ids = byte_pairs()(captions, 77)                     # start, byte pairs, end, then zeros
    words = torch.tensor([320, 1125, 29340]).expand(len(ids), 3)
    ids = torch.cat([ids[:, :1], words, ids[:, 1:]], 1)[:, :77]
    ids[:, 76].masked_fill_(ids[:, 76] > 0, 49407)
    return ids
