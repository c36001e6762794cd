"""CLIP score."""

import torch

from networks.text import byte_pairs


def clip_score_tokens(captions):
    """Token ids (n, 77) of "A photo depicts" and the caption, for CLIP score (DMD2's coco_evaluator.py).

    The caption alone is cut to 77, then the words are slid in behind its start, and what now stands last is an end.
    (Unless that is a "!" amid punctuation: its id, 0, passes for padding. Kept: published scores have it so.)
    """
    ids = byte_pairs()(list(captions), 77)              # start, byte pairs, end, then zeros
    words = torch.tensor([320, 1125, 29340]).expand(len(ids), 3)
    ids = torch.cat([ids[:, :1], words, ids[:, 1:]], dim=1)[:, :77]
    ids[:, 76].masked_fill_(ids[:, 76] > 0, 49407)
    return ids
