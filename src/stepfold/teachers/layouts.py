"""The names of the original checkpoints: of a network's tensors in diffusers, what its authors call them, by family."""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from stepfold.errors import UserError

Table = dict[str, str]
"""diffusers' name of a layer or a tensor -> the original name. `*` is the number of a block. `[1]`: the second of the
tensors that the original has in one, row after row; `[1,0]`: its two halves are there the other way round."""


Rows = dict[int, tuple[str, slice]]
"""Piece of an original tensor -> the layer that has it, and which of the layer's rows."""


def table(text: str) -> Table:
    """Two words a line."""
    return dict(line.split() for line in text.strip().splitlines())


FLUX = table("""
    x_embedder                                        img_in
    context_embedder                                  txt_in
    time_text_embed.timestep_embedder.linear_1        time_in.in_layer
    time_text_embed.timestep_embedder.linear_2        time_in.out_layer
    time_text_embed.text_embedder.linear_1            vector_in.in_layer
    time_text_embed.text_embedder.linear_2            vector_in.out_layer
    time_text_embed.guidance_embedder.linear_1        guidance_in.in_layer
    time_text_embed.guidance_embedder.linear_2        guidance_in.out_layer
    transformer_blocks.*.norm1.linear                 double_blocks.*.img_mod.lin
    transformer_blocks.*.norm1_context.linear         double_blocks.*.txt_mod.lin
    transformer_blocks.*.attn.to_q                    double_blocks.*.img_attn.qkv[0]
    transformer_blocks.*.attn.to_k                    double_blocks.*.img_attn.qkv[1]
    transformer_blocks.*.attn.to_v                    double_blocks.*.img_attn.qkv[2]
    transformer_blocks.*.attn.to_out.0                double_blocks.*.img_attn.proj
    transformer_blocks.*.attn.add_q_proj              double_blocks.*.txt_attn.qkv[0]
    transformer_blocks.*.attn.add_k_proj              double_blocks.*.txt_attn.qkv[1]
    transformer_blocks.*.attn.add_v_proj              double_blocks.*.txt_attn.qkv[2]
    transformer_blocks.*.attn.to_add_out              double_blocks.*.txt_attn.proj
    transformer_blocks.*.attn.norm_q.weight           double_blocks.*.img_attn.norm.query_norm.scale
    transformer_blocks.*.attn.norm_k.weight           double_blocks.*.img_attn.norm.key_norm.scale
    transformer_blocks.*.attn.norm_added_q.weight     double_blocks.*.txt_attn.norm.query_norm.scale
    transformer_blocks.*.attn.norm_added_k.weight     double_blocks.*.txt_attn.norm.key_norm.scale
    transformer_blocks.*.ff.net.0.proj                double_blocks.*.img_mlp.0
    transformer_blocks.*.ff.net.2                     double_blocks.*.img_mlp.2
    transformer_blocks.*.ff_context.net.0.proj        double_blocks.*.txt_mlp.0
    transformer_blocks.*.ff_context.net.2             double_blocks.*.txt_mlp.2
    single_transformer_blocks.*.norm.linear           single_blocks.*.modulation.lin
    single_transformer_blocks.*.attn.to_q             single_blocks.*.linear1[0]
    single_transformer_blocks.*.attn.to_k             single_blocks.*.linear1[1]
    single_transformer_blocks.*.attn.to_v             single_blocks.*.linear1[2]
    single_transformer_blocks.*.proj_mlp              single_blocks.*.linear1[3]
    single_transformer_blocks.*.attn.norm_q.weight    single_blocks.*.norm.query_norm.scale
    single_transformer_blocks.*.attn.norm_k.weight    single_blocks.*.norm.key_norm.scale
    single_transformer_blocks.*.proj_out              single_blocks.*.linear2
    norm_out.linear                                   final_layer.adaLN_modulation.1[1,0]
    proj_out                                          final_layer.linear
""")

CHROMA = FLUX | table("""
    distilled_guidance_layer.in_proj                  distilled_guidance_layer.in_proj
    distilled_guidance_layer.out_proj                 distilled_guidance_layer.out_proj
    distilled_guidance_layer.layers.*.linear_1        distilled_guidance_layer.layers.*.in_layer
    distilled_guidance_layer.layers.*.linear_2        distilled_guidance_layer.layers.*.out_layer
    distilled_guidance_layer.norms.*.weight           distilled_guidance_layer.norms.*.scale
""")

FLUX2 = table("""
    x_embedder                                        img_in
    context_embedder                                  txt_in
    time_guidance_embed.timestep_embedder.linear_1    time_in.in_layer
    time_guidance_embed.timestep_embedder.linear_2    time_in.out_layer
    time_guidance_embed.guidance_embedder.linear_1    guidance_in.in_layer
    time_guidance_embed.guidance_embedder.linear_2    guidance_in.out_layer
    double_stream_modulation_img.linear               double_stream_modulation_img.lin
    double_stream_modulation_txt.linear               double_stream_modulation_txt.lin
    single_stream_modulation.linear                   single_stream_modulation.lin
    transformer_blocks.*.ff.linear_in                 double_blocks.*.img_mlp.0
    transformer_blocks.*.ff.linear_out                double_blocks.*.img_mlp.2
    transformer_blocks.*.ff_context.linear_in         double_blocks.*.txt_mlp.0
    transformer_blocks.*.ff_context.linear_out        double_blocks.*.txt_mlp.2
    single_transformer_blocks.*.attn.to_qkv_mlp_proj  single_blocks.*.linear1
    single_transformer_blocks.*.attn.to_out           single_blocks.*.linear2
    single_transformer_blocks.*.attn.norm_q.weight    single_blocks.*.norm.query_norm.scale
    single_transformer_blocks.*.attn.norm_k.weight    single_blocks.*.norm.key_norm.scale
    norm_out.linear                                   final_layer.adaLN_modulation.1[1,0]
    proj_out                                          final_layer.linear
""") | {name: FLUX[name] for name in FLUX if name.startswith("transformer_blocks.*.attn.")}

SD3 = table("""
    pos_embed.pos_embed                               pos_embed
    pos_embed.proj                                    x_embedder.proj
    context_embedder                                  context_embedder
    time_text_embed.timestep_embedder.linear_1        t_embedder.mlp.0
    time_text_embed.timestep_embedder.linear_2        t_embedder.mlp.2
    time_text_embed.text_embedder.linear_1            y_embedder.mlp.0
    time_text_embed.text_embedder.linear_2            y_embedder.mlp.2
    transformer_blocks.*.norm1.linear                 joint_blocks.*.x_block.adaLN_modulation.1
    transformer_blocks.*.norm1_context.linear         joint_blocks.*.context_block.adaLN_modulation.1
    transformer_blocks.*.attn.to_q                    joint_blocks.*.x_block.attn.qkv[0]
    transformer_blocks.*.attn.to_k                    joint_blocks.*.x_block.attn.qkv[1]
    transformer_blocks.*.attn.to_v                    joint_blocks.*.x_block.attn.qkv[2]
    transformer_blocks.*.attn.norm_q                  joint_blocks.*.x_block.attn.ln_q
    transformer_blocks.*.attn.norm_k                  joint_blocks.*.x_block.attn.ln_k
    transformer_blocks.*.attn.to_out.0                joint_blocks.*.x_block.attn.proj
    transformer_blocks.*.attn.add_q_proj              joint_blocks.*.context_block.attn.qkv[0]
    transformer_blocks.*.attn.add_k_proj              joint_blocks.*.context_block.attn.qkv[1]
    transformer_blocks.*.attn.add_v_proj              joint_blocks.*.context_block.attn.qkv[2]
    transformer_blocks.*.attn.norm_added_q            joint_blocks.*.context_block.attn.ln_q
    transformer_blocks.*.attn.norm_added_k            joint_blocks.*.context_block.attn.ln_k
    transformer_blocks.*.attn.to_add_out              joint_blocks.*.context_block.attn.proj
    transformer_blocks.*.attn2.to_q                   joint_blocks.*.x_block.attn2.qkv[0]
    transformer_blocks.*.attn2.to_k                   joint_blocks.*.x_block.attn2.qkv[1]
    transformer_blocks.*.attn2.to_v                   joint_blocks.*.x_block.attn2.qkv[2]
    transformer_blocks.*.attn2.norm_q                 joint_blocks.*.x_block.attn2.ln_q
    transformer_blocks.*.attn2.norm_k                 joint_blocks.*.x_block.attn2.ln_k
    transformer_blocks.*.attn2.to_out.0               joint_blocks.*.x_block.attn2.proj
    transformer_blocks.*.ff.net.0.proj                joint_blocks.*.x_block.mlp.fc1
    transformer_blocks.*.ff.net.2                     joint_blocks.*.x_block.mlp.fc2
    transformer_blocks.*.ff_context.net.0.proj        joint_blocks.*.context_block.mlp.fc1
    transformer_blocks.*.ff_context.net.2             joint_blocks.*.context_block.mlp.fc2
    norm_out.linear                                   final_layer.adaLN_modulation.1[1,0]
    proj_out                                          final_layer.linear
""")

PIXART = table("""
    pos_embed.proj                                    x_embedder.proj
    adaln_single.emb.timestep_embedder.linear_1       t_embedder.mlp.0
    adaln_single.emb.timestep_embedder.linear_2       t_embedder.mlp.2
    adaln_single.linear                               t_block.1
    caption_projection.linear_1                       y_embedder.y_proj.fc1
    caption_projection.linear_2                       y_embedder.y_proj.fc2
    transformer_blocks.*.scale_shift_table            blocks.*.scale_shift_table
    transformer_blocks.*.attn1.to_q                   blocks.*.attn.qkv[0]
    transformer_blocks.*.attn1.to_k                   blocks.*.attn.qkv[1]
    transformer_blocks.*.attn1.to_v                   blocks.*.attn.qkv[2]
    transformer_blocks.*.attn1.to_out.0               blocks.*.attn.proj
    transformer_blocks.*.attn2.to_q                   blocks.*.cross_attn.q_linear
    transformer_blocks.*.attn2.to_k                   blocks.*.cross_attn.kv_linear[0]
    transformer_blocks.*.attn2.to_v                   blocks.*.cross_attn.kv_linear[1]
    transformer_blocks.*.attn2.to_out.0               blocks.*.cross_attn.proj
    transformer_blocks.*.ff.net.0.proj                blocks.*.mlp.fc1
    transformer_blocks.*.ff.net.2                     blocks.*.mlp.fc2
    scale_shift_table                                 final_layer.scale_shift_table
    proj_out                                          final_layer.linear
""")

SANA = PIXART | table("""
    patch_embed.proj                                  x_embedder.proj
    time_embed.emb.timestep_embedder.linear_1         t_embedder.mlp.0
    time_embed.emb.timestep_embedder.linear_2         t_embedder.mlp.2
    time_embed.timestep_embedder.linear_1             t_embedder.mlp.0
    time_embed.timestep_embedder.linear_2             t_embedder.mlp.2
    time_embed.guidance_embedder.linear_1             cfg_embedder.mlp.0
    time_embed.guidance_embedder.linear_2             cfg_embedder.mlp.2
    time_embed.linear                                 t_block.1
    caption_norm                                      attention_y_norm
    transformer_blocks.*.attn1.norm_q                 blocks.*.attn.q_norm
    transformer_blocks.*.attn1.norm_k                 blocks.*.attn.k_norm
    transformer_blocks.*.attn2.norm_q                 blocks.*.cross_attn.q_norm
    transformer_blocks.*.attn2.norm_k                 blocks.*.cross_attn.k_norm
    transformer_blocks.*.ff.conv_inverted             blocks.*.mlp.inverted_conv.conv
    transformer_blocks.*.ff.conv_depth                blocks.*.mlp.depth_conv.conv
    transformer_blocks.*.ff.conv_point                blocks.*.mlp.point_conv.conv
""")

LUMINA = table("""
    x_embedder                                        x_embedder
    time_caption_embed.timestep_embedder.linear_1     t_embedder.mlp.0
    time_caption_embed.timestep_embedder.linear_2     t_embedder.mlp.2
    time_caption_embed.caption_embedder.0             cap_embedder.0
    time_caption_embed.caption_embedder.1             cap_embedder.1
    context_refiner.*.norm1                           context_refiner.*.attention_norm1
    norm_out.linear_1                                 final_layer.adaLN_modulation.1
    norm_out.linear_2                                 final_layer.linear
""") | {
    f"{blocks}.*.{name}": f"{blocks}.*.{original}"
    for blocks in ("noise_refiner", "context_refiner", "layers")
    for name, original in table("""
        attn.to_q                attention.qkv[0]
        attn.to_k                attention.qkv[1]
        attn.to_v                attention.qkv[2]
        attn.norm_q              attention.q_norm
        attn.norm_k              attention.k_norm
        attn.to_out.0            attention.out
        feed_forward.linear_1    feed_forward.w1
        feed_forward.linear_2    feed_forward.w2
        feed_forward.linear_3    feed_forward.w3
        norm1.linear             adaLN_modulation.1
        norm1.norm               attention_norm1
        norm2                    attention_norm2
        ffn_norm1                ffn_norm1
        ffn_norm2                ffn_norm2
    """).items()
}  # fmt: skip

Z_IMAGE = table("""
    all_x_embedder.2-1                                x_embedder
    all_final_layer.2-1.adaLN_modulation.1            final_layer.adaLN_modulation.1
    all_final_layer.2-1.linear                        final_layer.linear
""") | {
    name: name
    for name in (
        "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1", "x_pad_token", "cap_pad_token",
    )
} | {
    f"{blocks}.*.{name}": f"{blocks}.*.{original}"
    for blocks in ("noise_refiner", "context_refiner", "layers")
    for name, original in {
        **{f"attention.to_{part}": f"attention.qkv[{i}]" for i, part in enumerate("qkv")},
        "attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm",
        "attention.to_out.0": "attention.out", "adaLN_modulation.0": "adaLN_modulation.0",
        **{f"{name}{i}": f"{name}{i}" for name in ("attention_norm", "ffn_norm", "feed_forward.w") for i in (1, 2, 3)},
    }.items()
}  # fmt: skip

WAN = table("""
    patch_embedding                                   patch_embedding
    condition_embedder.time_embedder.linear_1         time_embedding.0
    condition_embedder.time_embedder.linear_2         time_embedding.2
    condition_embedder.time_proj                      time_projection.1
    condition_embedder.text_embedder.linear_1         text_embedding.0
    condition_embedder.text_embedder.linear_2         text_embedding.2
    blocks.*.scale_shift_table                        blocks.*.modulation
    blocks.*.attn1.to_q                               blocks.*.self_attn.q
    blocks.*.attn1.to_k                               blocks.*.self_attn.k
    blocks.*.attn1.to_v                               blocks.*.self_attn.v
    blocks.*.attn1.norm_q                             blocks.*.self_attn.norm_q
    blocks.*.attn1.norm_k                             blocks.*.self_attn.norm_k
    blocks.*.attn1.to_out.0                           blocks.*.self_attn.o
    blocks.*.attn2.to_q                               blocks.*.cross_attn.q
    blocks.*.attn2.to_k                               blocks.*.cross_attn.k
    blocks.*.attn2.to_v                               blocks.*.cross_attn.v
    blocks.*.attn2.norm_q                             blocks.*.cross_attn.norm_q
    blocks.*.attn2.norm_k                             blocks.*.cross_attn.norm_k
    blocks.*.attn2.to_out.0                           blocks.*.cross_attn.o
    blocks.*.attn2.add_k_proj                         blocks.*.cross_attn.k_img
    blocks.*.attn2.add_v_proj                         blocks.*.cross_attn.v_img
    blocks.*.attn2.norm_added_k                       blocks.*.cross_attn.norm_k_img
    blocks.*.norm2                                    blocks.*.norm3
    blocks.*.ffn.net.0.proj                           blocks.*.ffn.0
    blocks.*.ffn.net.2                                blocks.*.ffn.2
    scale_shift_table                                 head.modulation
    proj_out                                          head.head
""")

UNET = table("""
    conv_in                                           input_blocks.0.0
    time_embedding.linear_1                           time_embed.0
    time_embedding.linear_2                           time_embed.2
    add_embedding.linear_1                            label_emb.0.0
    add_embedding.linear_2                            label_emb.0.2
    conv_norm_out                                     out.0
    conv_out                                          out.2
""")

RESNET = table("""
    norm1           in_layers.0
    conv1           in_layers.2
    time_emb_proj   emb_layers.1
    norm2           out_layers.0
    conv2           out_layers.3
    conv_shortcut   skip_connection
""")


def from_table(name: str, names: Table) -> str | None:
    """A tensor's original name; None where the table has none."""
    starred = re.sub(r"\.\d+\.", ".*.", name, count=1)
    number = "".join(re.findall(r"\.(\d+)\.", name)[:1])
    for known in (name, starred):
        layer, _, leaf = known.rpartition(".")
        if known in names:
            return names[known].replace("*", number)
        if layer in names:
            return f"{names[layer]}.{leaf}".replace("*", number)
    return None


def pieces_of(original: str) -> tuple[str, list[int]]:
    """The original tensor of a table's entry, and which of its pieces: `a.qkv[1].weight` -> `a.qkv.weight`, [1]."""
    order = re.search(r"\[([\d,]+)\]", original)
    return (original.replace(order[0], ""), [int(place) for place in order[1].split(",")]) if order else (original, [0])


def from_unet(name: str, layers: int, attends: list[bool]) -> str | None:
    """The same for a UNet, whose original counts all blocks of a way in one row.

    Args:
        name: diffusers' name of a tensor.
        layers: of residual blocks on each level of the way down; the way up has one more.
        attends: of each level of the way up, whether it has attention.
    """
    found = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    if not found:
        return from_table(name, UNET)
    way, kind, i, rest = found[1], found[3], int(found[4]), found[5]
    level, row = int(found[2] or 0), layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{row * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{row * level + layers}.{1 + attends[level]}.{rest}"
    if kind == "resnets":
        rest = from_table(rest, RESNET)
    place = int(kind == "attentions")
    blocks = {
        "down": f"input_blocks.{1 + row * level + i}.{place}",
        "mid": f"middle_block.{2 * i + place}",
        "up": f"output_blocks.{row * level + i}.{place}",
    }
    return rest and f"{blocks[way]}.{rest}"


def layout(network: Any) -> Callable[[str], str | None]:
    """From diffusers' names of a network's tensors to the original ones.

    Raises:
        UserError: no layout is known for this class of networks.
    """
    config, kind = network.config, type(network).__name__
    if kind == "SD3Transformer2DModel":  # the last block's text stream ends in a norm like the final layer's
        last = f"{config.num_layers - 1}"
        norm = "transformer_blocks.*.norm1_context.linear"
        return partial(from_table, names=SD3 | {norm.replace("*", last): SD3[norm].replace("*", last) + "[1,0]"})
    if kind in SAME:
        return str
    if kind in NAMES:
        return partial(from_table, names=NAMES[kind])
    if kind == "UNet2DConditionModel" and isinstance(config.layers_per_block, int):
        attends = ["CrossAttn" in block for block in config.up_block_types]
        return partial(from_unet, layers=config.layers_per_block, attends=attends)
    raise UserError(f"no single-file layout of a {kind} is known; use --to pipeline")


def original_layers(network: Any) -> dict[str, Rows]:
    """The original layers with weights, each with all its pieces; its tensors may be on the meta device.

    Raises:
        UserError: as of `layout`.
    """
    name_of, found = layout(network), defaultdict[str, Rows](dict)
    for name, tensor in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and (original := name_of(name)) is not None:
            whole, places = pieces_of(original)
            for i, place in enumerate(places):
                part = slice(i * len(tensor) // len(places), (i + 1) * len(tensor) // len(places))
                found[whole.removesuffix(".weight")][place] = (layer, part)
    return dict(found)


SAME = ("ErnieImageTransformer2DModel", "QwenImageTransformer2DModel")
"""Classes of networks whose authors' names diffusers has kept."""
NAMES = {
    "ChromaTransformer2DModel": CHROMA,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "Lumina2Transformer2DModel": LUMINA,
    "PixArtTransformer2DModel": PIXART,
    "SanaTransformer2DModel": SANA,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
"""The tables that hold for a class of networks as they stand."""
