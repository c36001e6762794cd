"""The names and shapes in the published files, as functions of the sizes: {name: shape}.

Defaults are the published sizes: at these, tests compare names and shapes with fingerprints of the
published files. At small sizes `seeded` of tests/common.py fills them with weights, and the
networks load those as if they had been downloaded.
"""

import re


# ------------------------------------------------------------------------------ building blocks
def linear(name, c_in, c_out):
    return {f"{name}.weight": [c_out, c_in], f"{name}.bias": [c_out]}


def norm(name, c):
    return {f"{name}.weight": [c], f"{name}.bias": [c]}


def conv(name, c_in, c_out, k, bias=True):
    shapes = {f"{name}.weight": [c_out, c_in, k, k]}
    if bias:
        shapes[f"{name}.bias"] = [c_out]
    return shapes


def attention(name, d):
    """torch's own multi-head attention."""
    shapes = {f"{name}.in_proj_weight": [3 * d, d], f"{name}.in_proj_bias": [3 * d]}
    return shapes | linear(f"{name}.out_proj", d, d)


# -------------------------------------------------------------------------------------- MaskBit
def generator_file(bits=14, grid=16, width=1024, depth=24, mlp=4096, classes=1000):
    group_bits, d = bits // 2, width
    shapes = {
        "pos_emb": [1, grid**2 + 1, d],
        "bits_to_indices": [group_bits],
        "class_emb.weight": [classes + 1, d],
    }
    shapes |= linear("input_proj", bits, d)
    shapes |= norm("first_layer.0", d)
    for i in range(depth):
        attn, net = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        shapes |= attention(f"{attn}.mha", d)
        shapes |= norm(f"{attn}.norm", d)
        shapes |= linear(f"{net}.net.0", d, mlp)
        shapes |= linear(f"{net}.net.2", mlp, d)
        shapes |= norm(f"{net}.norm", d)
    shapes |= linear("last_layer.0", d, d)
    shapes |= norm("last_layer.2", d)
    return shapes | linear("prediction_layer", d, 2 * 2**group_bits)


def bit_res_blocks(name, c_in, c_out):
    """Two residual blocks of MaskBit's tokenizer."""
    shapes = {}
    for j, (a, b) in enumerate([(c_in, c_out), (c_out, c_out)]):
        block = f"{name}.res_blocks.{j}"
        shapes |= norm(f"{block}.norm1", a)
        shapes |= conv(f"{block}.conv1", a, b, 3, bias=False)
        shapes |= norm(f"{block}.norm2", b)
        shapes |= conv(f"{block}.conv2", b, b, 3, bias=False)
        if a != b:
            shapes |= conv(f"{block}.nin_shortcut", b, b, 1, bias=False)
    return shapes


def tokenizer_file(bits=14, hidden=128, mult=(1, 1, 2, 2, 4)):
    widths = [hidden * m for m in mult]
    first, last = widths[0], widths[-1]
    shapes = conv("encoder.conv_in", 3, hidden, 3, bias=False)
    shapes |= conv("decoder.conv_in", bits, last, 3)
    for i, (a, b) in enumerate(zip([first, *widths], widths)):
        shapes |= bit_res_blocks(f"encoder.down.{i}", a, b)
        if i < len(mult) - 1:
            shapes |= conv(f"encoder.down.{i}.down_conv", b, b, 3)
    coarse_first = widths[::-1]
    for i, (a, b) in enumerate(zip([last, *coarse_first], coarse_first)):
        shapes |= bit_res_blocks(f"decoder.up.{i}", a, b)
        if i < len(mult) - 1:
            shapes |= conv(f"decoder.up.{i}.upsample_conv", b, b, 3)
    shapes |= bit_res_blocks("encoder.mid", last, last)
    shapes |= bit_res_blocks("decoder.mid", last, last)
    shapes |= norm("encoder.norm_out", last)
    shapes |= conv("encoder.conv_out", last, bits, 1)
    shapes |= norm("decoder.norm_out", hidden)
    shapes |= conv("decoder.conv_out", hidden, 3, 3)
    return shapes | {"quantize.bits_to_indices": [bits], "quantize.codebook": [2**bits, bits]}


# -------------------------------------------------------------------------------------- MaskGit
def maskgit_file(V=1024, grid=16, width=768, depth=24, mlp=3072, classes=1000):
    d, entries = width, V + 1 + classes + 1
    shapes = {
        "pos_emb": [1, grid**2 + 1, d],
        "bias": [grid**2 + 1, entries],
        "tok_emb.weight": [entries, d],
    }
    for name in ("first_layer", "last_layer"):
        shapes |= norm(f"{name}.0", d)
        shapes |= linear(f"{name}.2", d, d)
        shapes |= norm(f"{name}.4", d)
    shapes |= linear("first_layer.6", d, d)
    for i in range(depth):
        attn, net = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        shapes |= norm(f"{attn}.norm", d)
        shapes |= attention(f"{attn}.fn.mha", d)
        shapes |= norm(f"{net}.norm", d)
        shapes |= linear(f"{net}.fn.net.0", d, mlp)
        shapes |= linear(f"{net}.fn.net.3", mlp, d)
    return shapes


# ------------------------------------- the autoencoder of VQGAN (MaskGit) and VQ-VAE (Meissonic)
def vq_block(name, a, b):
    shapes = norm(f"{name}.norm1", a)
    shapes |= conv(f"{name}.conv1", a, b, 3)
    shapes |= norm(f"{name}.norm2", b)
    shapes |= conv(f"{name}.conv2", b, b, 3)
    if a != b:
        shapes |= conv(f"{name}.nin_shortcut", a, b, 1)
    return shapes


def vq_attention(name, c):
    shapes = norm(f"{name}.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{part}", c, c, 1)
    return shapes


def vqgan_file(widths=(128, 128, 256, 256, 512), latent=256, embed=256, V=1024, attn=True):
    """Level 0 is the finest, of the encoder and of the decoder."""
    fine, coarse, last = widths[0], widths[-1], len(widths) - 1
    shapes = {}
    for side, start, end, c_in, c_out in (
        ("encoder", fine, coarse, 3, latent),
        ("decoder", coarse, fine, latent, 3),
    ):
        shapes |= conv(f"{side}.conv_in", c_in, start, 3)
        shapes |= conv(f"{side}.conv_out", end, c_out, 3)
        shapes |= norm(f"{side}.norm_out", end)
        shapes |= vq_block(f"{side}.mid.block_1", coarse, coarse)
        shapes |= vq_block(f"{side}.mid.block_2", coarse, coarse)
    for i, w in enumerate(widths):
        finer, coarser = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        for side, before, blocks in (("encoder.down", finer, 2), ("decoder.up", coarser, 3)):
            shapes |= vq_block(f"{side}.{i}.block.0", before, w)
            for j in range(1, blocks):
                shapes |= vq_block(f"{side}.{i}.block.{j}", w, w)
        if i < last:
            shapes |= conv(f"encoder.down.{i}.downsample.conv", w, w, 3)
        if i > 0:
            shapes |= conv(f"decoder.up.{i}.upsample.conv", w, w, 3)
    if attn:                                                        # at the coarsest level alone
        names = ["encoder.mid.attn_1", "decoder.mid.attn_1"]
        names += [f"encoder.down.{last}.attn.{j}" for j in range(2)]
        names += [f"decoder.up.{last}.attn.{j}" for j in range(3)]
        for name in names:
            shapes |= vq_attention(name, coarse)
    shapes |= conv("quant_conv", latent, embed, 1)
    shapes |= conv("post_quant_conv", embed, latent, 1)
    return shapes | {"quantize.embedding.weight": [V, embed]}


VQVAE_NAMES = (
    (".mid.block_1", ".mid_block.resnets.0"),
    (".mid.block_2", ".mid_block.resnets.1"),
    (".down.", ".down_blocks."),
    (".block.", ".resnets."),
    ("nin_shortcut", "conv_shortcut"),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    ("norm_out", "conv_norm_out"),
)


def vqvae_file(widths=(128, 256, 256, 512, 768), latent=64, embed=64, V=8192):
    """The same without attention, in the diffusers library's names: its decoders begin coarse."""
    def coarse_first(match):
        return f"decoder.up_blocks.{len(widths) - 1 - int(match[1])}"

    shapes = {}
    for key, shape in vqgan_file(widths, latent, embed, V, attn=False).items():
        key = re.sub(r"decoder\.up\.(\d)", coarse_first, key)
        for ours, theirs in VQVAE_NAMES:
            key = key.replace(ours, theirs)
        shapes[key] = shape
    return shapes


# ------------------------------------------------------------------------- Meissonic and MaskGen
def joint_block(name, d, head=None, last=False):
    """A joint block of image and text, in the diffusers library's names.

    head is the width of the norms of queries and keys, if there are any; after the last block
    nothing reads the text, so it has no way out there.
    """
    shapes = linear(f"{name}.norm1.linear", d, 6 * d)
    shapes |= linear(f"{name}.norm1_context.linear", d, 2 * d if last else 6 * d)
    parts = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]
    mlps = ["ff"]
    if not last:
        parts.append("to_add_out")
        mlps.append("ff_context")
    for part in parts:
        shapes |= linear(f"{name}.attn.{part}", d, d)
    if head:
        for part in ("q", "k", "added_q", "added_k"):
            shapes[f"{name}.attn.norm_{part}.weight"] = [head]
    for mlp in mlps:
        shapes |= linear(f"{name}.{mlp}.net.0.proj", d, 4 * d)
        shapes |= linear(f"{name}.{mlp}.net.2", 4 * d, d)
    return shapes


def single_block(name, d, head):
    """A block on the joined sequence; head is the width of the norms of queries and keys."""
    shapes = linear(f"{name}.norm.linear", d, 3 * d)
    shapes |= linear(f"{name}.proj_mlp", d, 4 * d)
    shapes |= linear(f"{name}.proj_out", 5 * d, d)
    for part in "qkv":
        shapes |= linear(f"{name}.attn.to_{part}", d, d)
    return shapes | {f"{name}.attn.norm_q.weight": [head], f"{name}.attn.norm_k.weight": [head]}


def meissonic_file(V=8192, table=8256, heads=8, head_width=128, joint=14, single=28,
                   text_width=1024):
    d = heads * head_width
    shapes = {}
    for name in ("embed.layer_norm", "project_to_hidden_norm", "encoder_proj_layer_norm",
                 "project_from_hidden_norm", "mlm_layer.layer_norm", "down_block.downsample.norm",
                 "up_block.upsample.norm"):
        shapes[f"{name}.weight"] = [d]
    for name in ("project_to_hidden", "project_from_hidden", "cond_embed.linear_2"):
        shapes[f"{name}.weight"] = [d, d]
    shapes["cond_embed.linear_1.weight"] = [d, d + 5 * 256]
    shapes["embed.embeddings.weight"] = [table, d]
    shapes |= conv("embed.conv", d, d, 1, bias=False)
    shapes |= conv("mlm_layer.conv1", d, d, 1, bias=False)
    shapes |= conv("mlm_layer.conv2", d, V, 1, bias=False)
    shapes |= conv("down_block.downsample.conv", d, d, 2, bias=False)
    shapes |= conv("up_block.upsample.conv", d, d, 2, bias=False)
    shapes |= linear("context_embedder", text_width, d)
    for name, c_in in (("timestep_embedder", 256), ("text_embedder", d)):
        shapes |= linear(f"time_text_embed.{name}.linear_1", c_in, d)
        shapes |= linear(f"time_text_embed.{name}.linear_2", d, d)
    for i in range(joint):
        shapes |= joint_block(f"transformer_blocks.{i}", d, head_width)
    for i in range(single):
        shapes |= single_block(f"single_transformer_blocks.{i}", d, head_width)
    return shapes


def maskgen_file(V=8192, L=128, width=1024, depth=16, text_width=768, micro=256, spare=1001):
    d = width
    shapes = {"pos_embed": [1, L, d], "embeddings.weight": [V + 1 + spare, d]}
    shapes |= linear("text_embed_proj", text_width, d)
    shapes |= linear("norm.linear", d, 2 * d)
    shapes |= linear("cond_pooled_proj", text_width + micro, d)
    for i in range(depth):
        shapes |= joint_block(f"blocks.{i}", d, last=i == depth - 1)
    return shapes


# ---------------------------------------------------------- CLIP's towers, and TA-TiTok's like them
def clip_block(name, d):
    """A block of CLIP as OpenAI, open_clip and TA-TiTok name its parts."""
    shapes = norm(f"{name}.ln_1", d)
    shapes |= attention(f"{name}.attn", d)
    shapes |= norm(f"{name}.ln_2", d)
    shapes |= linear(f"{name}.mlp.c_fc", d, 4 * d)
    return shapes | linear(f"{name}.mlp.c_proj", 4 * d, d)


def titok_file(V=8192, L=128, size=256, patch=16, embed=64, enc=(768, 12), dec=(1024, 24), text=77,
               text_width=768):
    """enc and dec begin with (width, depth); TATiTok's further sizes do not show in the file."""
    places = (size // patch) ** 2
    d_enc, d_dec = enc[0], dec[0]
    shapes = {"latent_tokens": [L, d_enc], "quantize.embedding.weight": [V, embed]}
    for side, (d, depth, *_) in (("encoder", enc), ("decoder", dec)):
        shapes[f"{side}.class_embedding"] = [1, d]
        shapes[f"{side}.positional_embedding"] = [places + 1, d]
        shapes[f"{side}.latent_token_positional_embedding"] = [L, d]
        shapes |= norm(f"{side}.ln_pre", d)
        shapes |= norm(f"{side}.ln_post", d)
        for i in range(depth):
            shapes |= clip_block(f"{side}.transformer.{i}", d)
    shapes |= conv("encoder.patch_embed", 3, d_enc, patch)
    shapes |= conv("encoder.conv_out", d_enc, embed, 1)
    shapes["decoder.mask_token"] = [1, 1, d_dec]
    shapes["decoder.text_guidance_positional_embedding"] = [text, d_dec]
    shapes |= linear("decoder.text_guidance_proj", text_width, d_dec)
    shapes |= linear("decoder.decoder_embed", embed, d_dec)
    shapes |= conv("decoder.ffn.0", d_dec, 3 * patch**2, 1)
    return shapes | conv("decoder.conv_out", 3, 3, 3)


def transformers_layers(tower, d, depth):
    """The layers of a CLIP tower as the transformers library names them."""
    shapes = {}
    for i in range(depth):
        layer = f"{tower}.encoder.layers.{i}"
        shapes |= norm(f"{layer}.layer_norm1", d)
        shapes |= norm(f"{layer}.layer_norm2", d)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", d, d)
        shapes |= linear(f"{layer}.mlp.fc1", d, 4 * d)
        shapes |= linear(f"{layer}.mlp.fc2", 4 * d, d)
    return shapes


def clip_file(width=1024, depth=24, out=1024, vocab=49408, context=77):
    """A text tower as the transformers library writes it."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": [vocab, width],
        "text_model.embeddings.position_embedding.weight": [context, width],
        "text_projection.weight": [out, width],
    }
    shapes |= transformers_layers("text_model", width, depth)
    return shapes | norm("text_model.final_layer_norm", width)


def open_clip_file(width=768, depth=12, out=768, vocab=49408, context=77):
    """A text tower as open_clip writes it."""
    shapes = {
        "positional_embedding": [context, width],
        "text_projection": [width, out],
        "logit_scale": [],
        "token_embedding.weight": [vocab, width],
    }
    shapes |= norm("ln_final", width)
    for i in range(depth):
        shapes |= clip_block(f"transformer.resblocks.{i}", width)
    return shapes


# ---------------------------------------------------------------------------------- the rewards
def clip_reward_file(vision=1280, layers=32, patch=14, size=224, out=1024, text=(1024, 24),
                     vocab=49408, context=77):
    """A CLIP as open_clip writes it: ViT-H-14, the names of laion's and HPS v2's weights."""
    shapes = {
        "visual.class_embedding": [vision],
        "visual.positional_embedding": [(size // patch) ** 2 + 1, vision],
        "visual.proj": [vision, out],
    }
    shapes |= conv("visual.conv1", 3, vision, patch, bias=False)
    shapes |= norm("visual.ln_pre", vision)
    shapes |= norm("visual.ln_post", vision)
    for i in range(layers):
        shapes |= clip_block(f"visual.transformer.resblocks.{i}", vision)
    return shapes | open_clip_file(*text, out, vocab, context)


def pickscore_file(vision=1280, layers=32, patch=14, size=224, out=1024, text=(1024, 24),
                   vocab=49408, context=77):
    """The same as the transformers library writes it, without the position_ids."""
    places = (size // patch) ** 2 + 1
    shapes = clip_file(*text, out, vocab, context)
    shapes["logit_scale"] = []
    shapes["visual_projection.weight"] = [out, vision]
    shapes["vision_model.embeddings.class_embedding"] = [vision]
    shapes["vision_model.embeddings.position_embedding.weight"] = [places, vision]
    shapes |= transformers_layers("vision_model", vision, layers)
    shapes |= conv("vision_model.embeddings.patch_embedding", 3, vision, patch, bias=False)
    shapes |= norm("vision_model.pre_layrnorm", vision)                         # spelled like this
    return shapes | norm("vision_model.post_layernorm", vision)


def vit_block(name, d):
    """A block of BLIP's vision transformer."""
    shapes = norm(f"{name}.norm1", d)
    shapes |= norm(f"{name}.norm2", d)
    shapes |= linear(f"{name}.attn.qkv", d, 3 * d)
    shapes |= linear(f"{name}.attn.proj", d, d)
    shapes |= linear(f"{name}.mlp.fc1", d, 4 * d)
    return shapes | linear(f"{name}.mlp.fc2", 4 * d, d)


def bert_layer(name, d, d_image, mlp):
    """A layer of BLIP's text encoder, which reads the image by cross-attention."""
    shapes = {}
    for part, source in (("attention", d), ("crossattention", d_image)):
        shapes |= linear(f"{name}.{part}.self.query", d, d)
        shapes |= linear(f"{name}.{part}.self.key", source, d)
        shapes |= linear(f"{name}.{part}.self.value", source, d)
        shapes |= linear(f"{name}.{part}.output.dense", d, d)
        shapes |= norm(f"{name}.{part}.output.LayerNorm", d)
    shapes |= linear(f"{name}.intermediate.dense", d, mlp)
    shapes |= linear(f"{name}.output.dense", mlp, d)
    return shapes | norm(f"{name}.output.LayerNorm", d)


def imagereward_file(vision=(1024, 24), size=224, patch=16, text=(768, 12), mlp=3072, vocab=30524,
                     positions=512):
    """vision and text are (width, depth)."""
    d_image, depth = vision
    d, layers = text
    visual, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{visual}.cls_token": [1, 1, d_image],
        f"{visual}.pos_embed": [1, (size // patch) ** 2 + 1, d_image],
    }
    shapes |= conv(f"{visual}.patch_embed.proj", 3, d_image, patch)
    shapes |= norm(f"{visual}.norm", d_image)
    for i in range(depth):
        shapes |= vit_block(f"{visual}.blocks.{i}", d_image)
    shapes[f"{bert}.embeddings.word_embeddings.weight"] = [vocab, d]
    shapes[f"{bert}.embeddings.position_ids"] = [1, positions]
    shapes[f"{bert}.embeddings.position_embeddings.weight"] = [positions, d]
    shapes |= norm(f"{bert}.embeddings.LayerNorm", d)
    for i in range(layers):
        shapes |= bert_layer(f"{bert}.encoder.layer.{i}", d, d_image, mlp)
    shapes |= linear("blip.vision_proj", d_image, 256)
    shapes |= linear("blip.text_proj", d, 256)
    shapes |= linear("mlp.layers.0", d, 1024)
    shapes |= linear("mlp.layers.2", 1024, 128)
    shapes |= linear("mlp.layers.4", 128, 64)
    shapes |= linear("mlp.layers.6", 64, 16)
    return shapes | linear("mlp.layers.7", 16, 1)
