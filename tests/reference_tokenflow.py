"""A second TokenFlow tokenizer, slow and plain, on tensors in the released layout.

It shares no code with the package: what a converted model computes is compared with what stands here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


State = dict[str, torch.Tensor]


class Part:
    """The tensors under a prefix: `part["conv1.weight"]`, `part.at("mid.0")`."""

    def __init__(self, state: State, prefix: str = ""):
        self.state, self.prefix = state, prefix

    def at(self, name: str) -> Part:
        return Part(self.state, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[self.prefix + name]

    def has(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.state)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def conv(self, name: str, x: torch.Tensor, **how) -> torch.Tensor:
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"], **how)

    def layer_norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self[f"{name}.weight"] + self[f"{name}.bias"]

    def group_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(1, (min(32, x.shape[1]), -1)).flatten(2)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return groups.reshape(x.shape) * self[f"{name}.weight"][:, None, None] + self[f"{name}.bias"][:, None, None]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, D) each."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value))):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=-1)


# --- Pixel branch -------------------------------------------------------------------------------------------------


def residual_block(part: Part, x: torch.Tensor) -> torch.Tensor:
    h = part.conv("conv1", silu(part.group_norm("norm1", x)), padding=1)
    h = part.conv("conv2", silu(part.group_norm("norm2", h)), padding=1)
    return h + (part.conv("nin_shortcut", x) if part.has("nin_shortcut.") else x)


def attention_block(part: Part, x: torch.Tensor) -> torch.Tensor:
    h = part.group_norm("norm", x)
    query, key, value = (part.conv(name, h).flatten(2).transpose(1, 2) for name in "qkv")
    h = attend(query, key, value, heads=1).transpose(1, 2).reshape(x.shape)
    return x + part.conv("proj_out", h)


def levels(part: Part, x: torch.Tensor) -> torch.Tensor:
    level = 0
    while part.has(f"conv_blocks.{level}."):
        here, block = part.at(f"conv_blocks.{level}"), 0
        while here.has(f"res.{block}."):
            x = residual_block(here.at(f"res.{block}"), x)
            if here.has(f"attn.{block}."):
                x = attention_block(here.at(f"attn.{block}"), x)
            block += 1
        if here.has("downsample"):
            x = here.conv("downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if here.has("upsample"):
            x = here.conv("upsample.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), padding=1)
        level += 1
    return x


def middle(part: Part, x: torch.Tensor) -> torch.Tensor:
    x = attention_block(part.at("mid.1"), residual_block(part.at("mid.0"), x))
    return residual_block(part.at("mid.2"), x)


def pixel_features(state: State, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) → (B, C, H/16, W/16)."""
    part = Part(state).at("encoder")
    x = middle(part, levels(part, part.conv("conv_in", pixels, padding=1)))
    return Part(state).conv("quant_conv", part.conv("conv_out", silu(part.group_norm("norm_out", x)), padding=1))


def pixel_reconstruction(state: State, features: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → (B, 3, 16 h, 16 w)."""
    part = Part(state).at("decoder")
    x = part.conv("conv_in", Part(state).conv("post_quant_conv", features), padding=1)
    x = levels(part, middle(part, x))
    return part.conv("conv_out", silu(part.group_norm("norm_out", x)), padding=1)


# --- Semantic branch ----------------------------------------------------------------------------------------------


def interpolated(table: torch.Tensor, cells: int) -> torch.Tensor:
    """(1 + n*n, D) positions, the class token's first, for a grid of `cells` cells."""
    old, new = round((len(table) - 1) ** 0.5), round(cells**0.5)
    if old == new:
        return table
    grid = table[1:].view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(new + 0.1) / old, mode="bicubic")
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(cells, -1)])


def clip_features(state: State, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 3, H, W) → (B, L, D): all layers, closing norm, without the class token."""
    part, layer = Part(state).at("encoder_vqkd"), 0
    x = F.conv2d(pixels, part["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    positions = interpolated(part["positional_embedding"], x.shape[1])
    x = torch.cat([part["class_embedding"].expand(len(x), 1, -1), x], dim=1) + positions
    x = part.layer_norm("ln_pre", x, 1e-5)
    while part.has(f"transformer.resblocks.{layer}."):
        block = part.at(f"transformer.resblocks.{layer}")
        qkv = block.layer_norm("ln_1", x, 1e-5) @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
        x = x + block.linear("attn.out_proj", attend(*qkv.chunk(3, dim=-1), heads))
        h = block.linear("mlp.c_fc", block.layer_norm("ln_2", x, 1e-5))
        x = x + block.linear("mlp.c_proj", h * torch.sigmoid(1.702 * h))
        layer += 1
    return part.layer_norm("ln_post", x, 1e-5)[:, 1:]


def siglip_features(state: State, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 3, H, W) → (B, L, D): all layers but the last, no closing norm."""
    part, layer = Part(state).at("encoder_vqkd").at("vision_model"), 0
    x = part.conv("embeddings.patch_embedding", pixels, stride=14).flatten(2).transpose(1, 2)
    x = x + part["embeddings.position_embedding.weight"]
    while part.has(f"encoder.layers.{layer + 1}."):
        block = part.at(f"encoder.layers.{layer}")
        h = block.layer_norm("layer_norm1", x, 1e-6)
        query, key, value = (block.linear(f"self_attn.{name}_proj", h) for name in "qkv")
        x = x + block.linear("self_attn.out_proj", attend(query, key, value, heads))
        h = F.gelu(block.linear("mlp.fc1", block.layer_norm("layer_norm2", x, 1e-6)), approximate="tanh")
        x = x + block.linear("mlp.fc2", h)
        layer += 1
    return x


def task_layer(part: Part, x: torch.Tensor) -> torch.Tensor:
    return part.linear("2", torch.tanh(part.linear("0", x)))


def semantic_reconstruction(state: State, features: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, C, h, w) → (B, h * w, D)."""
    part, layer = Part(state).at("decoder_vqkd"), 0
    x = part.conv("patch_embed.proj", features).flatten(2).transpose(1, 2)
    positions = interpolated(part["pos_embed"][0], x.shape[1])
    x = torch.cat([part["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions
    while part.has(f"blocks.{layer}."):
        block = part.at(f"blocks.{layer}")
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]])
        qkv = block.layer_norm("norm1", x, 1e-6) @ block["attn.qkv.weight"].T + bias
        x = x + block.linear("attn.proj", attend(*qkv.chunk(3, dim=-1), heads))
        x = x + block.linear("mlp.fc2", F.gelu(block.linear("mlp.fc1", block.layer_norm("norm2", x, 1e-6))))
        layer += 1
    return task_layer(Part(state).at("decode_task_layer"), part.layer_norm("fc_norm", x[:, 1:], 1e-6))


# --- The whole ----------------------------------------------------------------------------------------------------


def semantic_features(state: State, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 3, H, W) → (B, C, h, w)."""
    tower = siglip_features if "encoder_vqkd.class_embedding" not in state else clip_features
    features = task_layer(Part(state).at("encode_task_layer"), tower(state, pixels, heads)).transpose(1, 2)
    side = round(features.shape[-1] ** 0.5)
    return features.unflatten(2, (side, side))


def released_layout(
    kind: str,
    tower: int = 16,
    layers: int = 2,
    intermediate: int = 24,
    positions: int = 196,
    channels: int = 4,
    multipliers: tuple[int, ...] = (1, 1, 1, 2, 2),
    encoder_blocks: int = 1,
    decoder_channels: int = 4,
    decoder_blocks: int = 2,
    latent: int = 8,
    codes: int = 64,
    code_dims: tuple[int, int] = (4, 4),
    depth: int = 2,
    target: int = 8,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file, written out; `kind` is "clipb" or "siglip"."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *weight: int, bias: bool = True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def residual(name: str, before: int, after: int):
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int):
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    def branch(name: str, widths: list[int], blocks: int, lowest: int, sampling: str):
        width = widths[0]
        for level, after in enumerate(widths):
            for block in range(blocks):
                residual(f"{name}.conv_blocks.{level}.res.{block}", width, after)
                width = after
                if level == lowest:
                    attention(f"{name}.conv_blocks.{level}.attn.{block}", width)
            if level < len(widths) - 1:
                add(f"{name}.conv_blocks.{level}.{sampling}.conv", width, width, 3, 3)
        widest = max(widths)
        residual(f"{name}.mid.0", widest, widest)
        attention(f"{name}.mid.1", widest)
        residual(f"{name}.mid.2", widest, widest)

    semantic_dim, pixel_dim = code_dims
    widths = [channels * multiplier for multiplier in multipliers]
    add("encoder.conv_in", channels, 3, 3, 3)
    branch("encoder", widths, encoder_blocks, len(widths) - 1, "downsample")
    add("encoder.norm_out", widths[-1])
    add("encoder.conv_out", latent, widths[-1], 3, 3)
    widths = [decoder_channels * multiplier for multiplier in multipliers][::-1]
    add("decoder.conv_in", widths[0], latent, 3, 3)
    branch("decoder", widths, decoder_blocks, 0, "upsample")
    add("decoder.norm_out", widths[-1])
    add("decoder.conv_out", 3, widths[-1], 3, 3)
    add("quant_conv", pixel_dim, latent, 1, 1)
    add("post_quant_conv", latent, pixel_dim, 1, 1)
    add("encode_task_layer.0", tower, tower)
    add("encode_task_layer.2", semantic_dim, tower)
    add("decode_task_layer.0", tower, tower)
    add("decode_task_layer.2", target, tower)
    add("quantize.embedding_vqkd", codes, semantic_dim, bias=False)
    add("quantize.embedding_vqgan", codes, pixel_dim, bias=False)
    shapes["quantize.codebook_used"] = (131072,)

    shapes["decoder_vqkd.cls_token"] = (1, 1, tower)
    shapes["decoder_vqkd.pos_embed"] = (1, 1 + positions, tower)
    add("decoder_vqkd.patch_embed.proj", tower, semantic_dim, 1, 1)
    add("decoder_vqkd.fc_norm", tower)
    for index in range(depth):
        block = f"decoder_vqkd.blocks.{index}"
        add(f"{block}.norm1", tower)
        add(f"{block}.norm2", tower)
        add(f"{block}.attn.qkv", 3 * tower, tower, bias=False)
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (tower,)
        add(f"{block}.attn.proj", tower, tower)
        add(f"{block}.mlp.fc1", 4 * tower, tower)
        add(f"{block}.mlp.fc2", tower, 4 * tower)
    if kind == "clipb":
        clip_layout(shapes, add, tower, layers, intermediate, positions)
    else:
        siglip_layout(shapes, add, tower, layers, intermediate, positions)
    return shapes


def clip_layout(shapes, add, tower: int, layers: int, intermediate: int, positions: int):
    shapes["encoder_vqkd.class_embedding"] = (tower,)
    shapes["encoder_vqkd.positional_embedding"] = (1 + positions, tower)
    add("encoder_vqkd.conv1", tower, 3, 16, 16, bias=False)
    add("encoder_vqkd.ln_pre", tower)
    add("encoder_vqkd.ln_post", tower)
    for index in range(layers):
        block = f"encoder_vqkd.transformer.resblocks.{index}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * tower, tower)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * tower,)
        add(f"{block}.attn.out_proj", tower, tower)
        add(f"{block}.ln_1", tower)
        add(f"{block}.ln_2", tower)
        add(f"{block}.mlp.c_fc", intermediate, tower)
        add(f"{block}.mlp.c_proj", tower, intermediate)


def siglip_layout(shapes, add, tower: int, layers: int, intermediate: int, positions: int):
    part = "encoder_vqkd.vision_model"
    shapes["scaling_layer.shift"] = shapes["scaling_layer.scale"] = (1, 3, 1, 1)
    add(f"{part}.embeddings.patch_embedding", tower, 3, 14, 14)
    add(f"{part}.embeddings.position_embedding", positions, tower, bias=False)
    for index in range(layers):
        block = f"{part}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{block}.self_attn.{name}", tower, tower)
        add(f"{block}.layer_norm1", tower)
        add(f"{block}.layer_norm2", tower)
        add(f"{block}.mlp.fc1", intermediate, tower)
        add(f"{block}.mlp.fc2", tower, intermediate)
    add(f"{part}.post_layernorm", tower)
    shapes[f"{part}.head.probe"] = (1, 1, tower)
    shapes[f"{part}.head.attention.in_proj_weight"] = (3 * tower, tower)
    shapes[f"{part}.head.attention.in_proj_bias"] = (3 * tower,)
    add(f"{part}.head.attention.out_proj", tower, tower)
    add(f"{part}.head.layernorm", tower)
    add(f"{part}.head.mlp.fc1", intermediate, tower)
    add(f"{part}.head.mlp.fc2", tower, intermediate)


def random_released(kind: str, seed: int = 0, **widths) -> State:
    """A random state in the released layout, its norms near one and its layers keeping the size of what passes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in released_layout(kind, **widths).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
        elif "embedding" not in name and "embed" not in name:
            value = value / (value[0].numel() ** 0.5)
        state[name] = value
    state["quantize.codebook_used"] = torch.rand(131072, generator=torch.Generator().manual_seed(7))
    state |= {name: torch.full_like(state[name], 0.5) for name in state if name.startswith("scaling_layer.")}
    return state
