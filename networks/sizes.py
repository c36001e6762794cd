"""Sizes of networks: arguments of their classes, where they are not the defaults.

The defaults are the published networks. The tiny ones are the same classes, small enough for a
laptop's CPU: maskbit-tiny and its tokenizer draw the fashion world, meissonic-tiny, its tokenizer,
text tower and rewards the shapes world; the others have no weights, and let you try the code.
"""

# ------------------------------------------------------------------------------------ published
MEISSONIC_TOKENIZER = dict(
    widths=(128, 256, 256, 512, 768), latent=64, embed=64,
    V=8192, attention=(), signed=False,
)
MASKGEN_TEXT = dict(
    width=768, heads=12, depth=12,
    out=768, quick_gelu=True,
)

# ----------------------------------------------------------------------------------------- tiny
MASKBIT_TINY = dict(
    bits=10, grid=8, width=128,
    depth=4, heads=4, mlp=512,
    classes=10,
)
MASKBIT_TINY_TOKENIZER = dict(
    channels=1, hidden=32, mult=(1, 2, 2),
    blocks=1, bits=10, norm_groups=8,
)

MASKGIT_TINY = dict(
    V=64, grid=8, width=64,
    depth=4, heads=4, mlp=128,
    classes=10,
)
MASKGIT_TINY_TOKENIZER = dict(
    widths=(16, 32, 32), blocks=1, latent=8,
    embed=8, V=64, norm_groups=8,
    attention=(2,),
)

MEISSONIC_TINY = dict(
    V=512, table=520, grid=(8, 8),
    heads=4, head_width=32, joint=2,
    single=3, text_width=64, axes=(8, 12, 12),
    micro=(32, 32, 0, 0, 6.0),
)
MEISSONIC_TINY_TOKENIZER = dict(
    widths=(32, 64, 64), blocks=1, latent=16,
    embed=16, V=512, norm_groups=8,
    attention=(), signed=False,
)
MEISSONIC_TINY_TEXT = dict(
    width=64, heads=2, depth=3,
    out=128, vocab=341, context=16,
    pads_with_bang=True,
)

MASKGEN_TINY = dict(
    V=64, L=16, width=64,
    depth=3, heads=4, text_width=32,
    micro=16, spare=11,
)
MASKGEN_TINY_TOKENIZER = dict(
    V=64, L=16, size=32,
    patch=8, embed=8, enc=(32, 2, 2),
    dec=(48, 2, 4), text=16, text_width=32,
)
MASKGEN_TINY_TEXT = dict(
    width=32, heads=2, depth=2,
    context=16, out=32, quick_gelu=True,
)

# The rewards of the shapes world: for open_clip, and for ImageReward.
SHAPES_CLIP = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=32, patch_size=4, width=96, layers=3, head_width=32),
    text_cfg=dict(context_length=16, vocab_size=341, width=64, heads=2, layers=3),
)
SHAPES_REWARD = dict(
    size=32, patch=4, vision=(64, 4, 2),
    text=(64, 2, 2), mlp=256, vocab=33,
    positions=16, head=(32, 16),
)
