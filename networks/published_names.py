"""The teachers' published files: where they are, and how their names become ours.

Each table of names has a line per part of a network: their name, our name. A rule is applied to
what the rules above it left. "*" is a number. A name that begins with "." matches anywhere in a
key, others match its beginning. "qkv#1" is the second of three matrices that we keep as one, and
"^T" says that the file holds the transpose. networks/weights.py applies the rules, and is strict:
every tensor must find its place.

Names of the tokenizers and of the rewards stand with their networks.
"""

import json
import os

from machinery.errors import UserError
from networks.weights import renames


# --------------------------------------------------------------------------- where they are
# {role: (repository of the Hugging Face hub, file)}
MASKBIT_FILES = {
    "net": ("markweber/maskbit_generator_14bit", "maskbit_generator_14bit.bin"),
    "tokenizer": ("markweber/maskbit_tokenizer_14bit", "maskbit_tokenizer_14bit.bin"),
}
MASKGIT_FILES = {
    "net": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth"),
    "tokenizer": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt"),
}
MASKGIT_512_FILES = {
    "net": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_512.pth"),
    "tokenizer": MASKGIT_FILES["tokenizer"],
}
MEISSONIC_FILES = {
    "net": ("MeissonFlow/Meissonic", "transformer/diffusion_pytorch_model.safetensors"),
    "tokenizer": ("MeissonFlow/Meissonic", "vqvae/diffusion_pytorch_model.safetensors"),
    "text": ("MeissonFlow/Meissonic", "text_encoder/model.safetensors"),
}
MASKGEN_FILES = {
    "net": ("turkeyju/generator_maskgen_vq_l", "model.safetensors"),
    "tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors"),
    "text": ("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors"),
}
MASKGEN_XL_FILES = {
    "net": ("turkeyju/generator_maskgen_vq_xl", "model.safetensors"),
    "tokenizer": MASKGEN_FILES["tokenizer"],
    "text": MASKGEN_FILES["text"],
}


# ----------------------------------------------------------------- class-to-image transformers
# token_emb is what an older file calls input_proj.
MASKBIT = renames("""
    transformer.layers.       blocks.
    token_emb.                input_proj.
    blocks.*.0.mha.in_proj_   blocks.*.attn.qkv.
    blocks.*.0.mha.out_proj.  blocks.*.attn.out.
    blocks.*.0.norm.          blocks.*.norm1.
    blocks.*.1.norm.          blocks.*.norm2.
    blocks.*.1.net.           blocks.*.mlp.
    first_layer.0.            norm_in.
    last_layer.               head.
    prediction_layer.         to_logits.
""")

MASKGIT = renames("""
    transformer.layers.          blocks.
    first_layer.                 first.
    last_layer.                  last.
    blocks.*.1.fn.net.           blocks.*.mlp.
    blocks.*.0.norm.             blocks.*.norm1.
    blocks.*.0.fn.mha.in_proj_   blocks.*.attn.qkv.
    blocks.*.1.norm.             blocks.*.norm2.
    blocks.*.0.fn.mha.out_proj.  blocks.*.attn.out.
""")


# ------------------------------------------------------------------ text-to-image transformers
# As the diffusers library calls the parts of MM-DiT's blocks.
JOINT_BLOCKS = renames("""
    transformer_blocks.              blocks.
    blocks.*.norm1.linear.           blocks.*.image.mod.
    blocks.*.norm1_context.linear.   blocks.*.text.mod.
    blocks.*.attn.to_q.              blocks.*.image.qkv#0.
    blocks.*.attn.add_q_proj.        blocks.*.text.qkv#0.
    blocks.*.attn.to_k.              blocks.*.image.qkv#1.
    blocks.*.attn.add_k_proj.        blocks.*.text.qkv#1.
    blocks.*.attn.to_v.              blocks.*.image.qkv#2.
    blocks.*.attn.add_v_proj.        blocks.*.text.qkv#2.
    blocks.*.attn.norm_q.            blocks.*.image.q_norm.
    blocks.*.attn.norm_added_q.      blocks.*.text.q_norm.
    blocks.*.attn.norm_k.            blocks.*.image.k_norm.
    blocks.*.attn.norm_added_k.      blocks.*.text.k_norm.
    blocks.*.attn.to_out.0.          blocks.*.image.out.
    blocks.*.attn.to_add_out.        blocks.*.text.out.
    blocks.*.ff.net.0.proj.          blocks.*.image.mlp.0.
    blocks.*.ff_context.net.0.proj.  blocks.*.text.mlp.0.
    blocks.*.ff.net.2.               blocks.*.image.mlp.2.
    blocks.*.ff_context.net.2.       blocks.*.text.mlp.2.
""")

MEISSONIC = JOINT_BLOCKS + renames("""
    single_transformer_blocks.                   single.
    single.*.norm.linear.                        single.*.mod.
    single.*.attn.to_q.                          single.*.qkv#0.
    single.*.attn.to_k.                          single.*.qkv#1.
    single.*.attn.to_v.                          single.*.qkv#2.
    single.*.attn.norm_q.                        single.*.q_norm.
    single.*.attn.norm_k.                        single.*.k_norm.
    embed.embeddings.                            tok_emb.
    embed.layer_norm.                            norm_in.
    embed.conv.                                  proj_in.
    down_block.downsample.norm.                  norm_down.
    down_block.downsample.conv.                  down.
    project_to_hidden_norm.                      norm_tokens.
    project_to_hidden.                           proj_tokens.
    context_embedder.                            proj_text.
    encoder_proj_layer_norm.                     norm_text.
    project_from_hidden_norm.                    norm_out.
    project_from_hidden.                         proj_out.
    up_block.upsample.norm.                      norm_up.
    up_block.upsample.conv.                      up.
    mlm_layer.conv1.                             head.
    mlm_layer.layer_norm.                        norm_head.
    mlm_layer.conv2.                             to_logits.
    cond_embed.linear_1.                         embed_cond.0.
    cond_embed.linear_2.                         embed_cond.2.
    time_text_embed.text_embedder.linear_1.      embed_text.0.
    time_text_embed.text_embedder.linear_2.      embed_text.2.
    time_text_embed.timestep_embedder.linear_1.  embed_time.0.
    time_text_embed.timestep_embedder.linear_2.  embed_time.2.
""")

# embeddings and lm_head are one tensor under two names.
MASKGEN = JOINT_BLOCKS + renames("""
    embeddings.        tok_emb.
    lm_head.           tok_emb.
    pos_embed          pos_emb
    norm.linear.       mod_out.
    text_embed_proj.   proj_text.
    cond_pooled_proj.  proj_cond.
""")

# MaskGen's config.json beside the weights, as constructor arguments. Head counts are in no weights.
MASKGEN_SIZES = {
    "codebook_size": "V",
    "num_latent_tokens": "L",
    "text_embed_dim": "text_width",
    "decoder_embed_dim": "width",
    "decoder_depth": "depth",
    "decoder_num_heads": "heads",
    "micro_condition_embed_dim": "micro",
    "sample_aesthetic_score": "score",
}


def leaves(tree):
    """(key, value) of all that is not a dict in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield key, value


def stated_sizes(module, path):
    """What the config.json beside published weights states, as arguments of a class of modules.

    {} where there is none, or the class has no table `published_config` of names to look for.
    """
    names = getattr(module, "published_config", {})
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config = os.path.join(folder, "config.json")
    if not names or not os.path.isfile(config):
        return {}
    try:
        with open(config) as f:
            return {names[key]: value for key, value in leaves(json.load(f)) if key in names}
    except (ValueError, AttributeError) as err:
        raise UserError(
            f"cannot read {config} beside the weights ({err}): fetch it again, or remove it"
        )


# ---------------------------------------------------------------------------------- text tower
# The transformers library's names are made open_clip's first, and those become ours.
TEXT_TOWER = renames("""
    text_model.embeddings.token_embedding.           token_embedding.
    text_model.embeddings.position_embedding.weight  positional_embedding
    text_model.encoder.layers.*.layer_norm1.         transformer.resblocks.*.ln_1.
    text_model.encoder.layers.*.layer_norm2.         transformer.resblocks.*.ln_2.
    text_model.encoder.layers.*.self_attn.q_proj.    transformer.resblocks.*.attn.in_proj_#0
    text_model.encoder.layers.*.self_attn.k_proj.    transformer.resblocks.*.attn.in_proj_#1
    text_model.encoder.layers.*.self_attn.v_proj.    transformer.resblocks.*.attn.in_proj_#2
    text_model.encoder.layers.*.self_attn.out_proj.  transformer.resblocks.*.attn.out_proj.
    text_model.encoder.layers.*.mlp.fc1.             transformer.resblocks.*.mlp.c_fc.
    text_model.encoder.layers.*.mlp.fc2.             transformer.resblocks.*.mlp.c_proj.
    text_model.final_layer_norm.                     ln_final.
    text_projection.weight                           text_projection^T
    token_embedding.                                 tower.token_embedding.
    positional_embedding                             tower.positional_embedding
    transformer.                                     tower.transformer.
    text_projection                                  tower.text_projection
    ln_final.                                        tower.ln_final.
""")

# What a whole CLIP has besides, and a text tower does not need.
TEXT_TOWER_EXTRAS = "|".join([
    "visual|vision_model",
    "logit_scale$|logit_bias$",
    "input_resolution$|context_length$|vocab_size$",
    r"attn_mask$|text_model\.embeddings\.position_ids$",
])
