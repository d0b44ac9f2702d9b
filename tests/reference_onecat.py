"""OneCAT the slow way: plain torch on released names, one sequence read anew for each scale, token by token experts."""

import math

import torch
import torch.nn.functional as F


def schedule_positions(schedule, origin):
    """Row and column of every slot of every scale."""
    final_height, final_width = schedule.final_grid
    scales = []
    for height, width in schedule.grids:
        rows = [float(torch.tensor(i, dtype=torch.float32) * (final_height / height)) for i in range(height)]
        columns = [float(torch.tensor(j, dtype=torch.float32) * (final_width / width)) for j in range(width)]
        scales.append([(origin + round(row), origin + round(column)) for row in rows for column in columns])
    return scales


def vectors(bits, grid):
    """Bits (h*w, bits) as (1, bits, h, w)."""
    return ((2.0 * bits - 1) / math.sqrt(bits.shape[1])).T.reshape(1, -1, *grid)


def features(state, schedule, bits, scale):
    """What the slots (h*w, bits) of a scale read, from the bits of the scales before."""
    if scale == 0:
        return state["sos_embedding.weight"]
    total = 0
    for own, grid in zip(bits[:scale], schedule.grids):
        up = vectors(own, grid)
        total = total + F.interpolate(up[:, :, None], (1, *schedule.final_grid), mode="trilinear")[:, :, 0]
    down = F.interpolate(total[:, :, None], (1, *schedule.grids[scale]), mode="trilinear")[0, :, 0]
    return down.flatten(1).T


def mlp(state, layer, kind, x, scale, rank):
    prefix = f"patch_language_model.model.layers.{layer}."

    def linear(name, value):
        if kind != "ge":
            return value @ state[f"{prefix}mlp_{kind}.{name}_proj.weight"].T
        base = f"{prefix}mlp_ge.{name}_proj."
        own = slice(rank * scale, rank * (scale + 1))
        a, b = state[base + "lora_A.default.weight"][own], state[base + "lora_B.default.weight"][:, own]
        return value @ state[base + "base_layer.weight"].T + 2.0 * (value @ a.T) @ b.T

    return linear("down", F.silu(linear("gate", x)) * linear("up", x))


def norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotated(x, positions, theta):
    """Heads (L, H, d) turned by their row and column."""
    length, d = len(x), x.shape[-1]
    angles = torch.empty(length, d // 2)
    for j in range(d // 2):
        axis = 0 if (j // 2) % 2 == 0 else 1
        angles[:, j] = torch.tensor([float(position[axis]) for position in positions]) * theta ** (-2 * j / d)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def backbone(state, config, x, positions, kinds, blocks):
    """Hidden states (L, D) of one sequence; `kinds` are te, ue or (ge, scale), equal `blocks` from 0 see each other."""
    text, length = config.text_config, len(x)
    heads, groups, d = text.num_attention_heads, text.num_key_value_heads, config.head_dim
    seen = torch.tensor([[j <= i or (blocks[i] == blocks[j] >= 0) for j in range(length)] for i in range(length)])
    theta = text.rope_parameters["rope_theta"]
    for layer in range(text.num_hidden_layers):
        prefix = f"patch_language_model.model.layers.{layer}."
        y = norm(x, state[prefix + "input_layernorm.weight"], text.rms_norm_eps)
        q, k, v = (
            y @ state[f"{prefix}self_attn.{n}_proj.weight"].T + state[f"{prefix}self_attn.{n}_proj.bias"] for n in "qkv"
        )
        q = rotated(q.view(length, heads, d), positions, theta)
        k = rotated(k.view(length, groups, d), positions, theta).repeat_interleave(heads // groups, 1)
        v = v.view(length, groups, d).repeat_interleave(heads // groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ state[prefix + "self_attn.o_proj.weight"].T
        y = norm(x, state[prefix + "post_attention_layernorm.weight"], text.rms_norm_eps)
        out = []
        for row, kind in zip(y, kinds):
            name, scale = kind if isinstance(kind, tuple) else (kind, None)
            out.append(mlp(state, layer, name, row[None], scale, config.adapter_rank)[0])
        x = x + torch.stack(out)
    return norm(x, state["patch_language_model.model.norm.weight"], text.rms_norm_eps)


def read_patches(state, config, pixels):
    """Features of an image (3, H, W)."""
    w = state["patch_vision_model.embeddings.patch_embedding.weight"]
    patches = F.conv2d(pixels[None], w, state["patch_vision_model.embeddings.patch_embedding.bias"], stride=w.shape[-1])
    table = state["patch_vision_model.embeddings.position_embedding"][0, 1:]
    side = math.isqrt(len(table))
    table = table.T.reshape(1, -1, side, side)
    patches = (patches + F.interpolate(table, patches.shape[-2:], mode="bicubic"))[0]
    rows = []
    for i in range(0, patches.shape[1], 2):
        for j in range(0, patches.shape[2], 2):
            rows.append(torch.cat([patches[:, i + a, j + b] for a in (0, 1) for b in (0, 1)]))
    x = F.layer_norm(torch.stack(rows), (len(rows[0]),), state["mlp.0.weight"], state["mlp.0.bias"])
    x = F.gelu(F.linear(x, state["mlp.1.weight"], state["mlp.1.bias"]))
    return F.linear(x, state["mlp.3.weight"], state["mlp.3.bias"])


def prompt(state, config, ids, images):
    """Embeddings, kinds and blocks of a prompt with images."""
    x = state["patch_language_model.model.embed_tokens.weight"][ids].clone()
    read = [i for i, token in enumerate(ids) if token in (config.image_token_id, config.reference_token_id)]
    if read:
        x[read] = torch.cat([read_patches(state, config, image) for image in images])
    return x, ["ue" if i in read else "te" for i in range(len(ids))], [0 if i in read else -1 for i in range(len(ids))]


def bit_logits(state, config, ids, schedule, bits, scale, images=()):
    """Logits (h*w, bits, 2) of a scale behind a prompt, from the bits of the scales before."""
    x, kinds, blocks = prompt(state, config, ids, images)
    positions = [(t, t) for t in range(len(ids))]
    for k, places in enumerate(schedule_positions(schedule, len(ids))[: scale + 1]):
        y = features(state, schedule, bits, k)
        for n in (0, 2, 4):
            y = F.linear(y, state[f"image_gen_projector.mlp.{n}.weight"], state[f"image_gen_projector.mlp.{n}.bias"])
            y = F.gelu(y) if n < 4 else y
        x = torch.cat([x, y + state["lvl_embed.weight"][k]])
        positions, kinds, blocks = positions + places, kinds + [("ge", k)] * len(y), blocks + [k + 1] * len(y)
    hidden = backbone(state, config, x, positions, kinds, blocks)[-len(y) :]
    hidden = F.gelu(F.linear(hidden, *(state[f"image_gen_out_projector.mlp.0.{p}"] for p in ("weight", "bias"))))
    out = F.linear(hidden, *(state[f"image_gen_out_projector.mlp.2.{p}"] for p in ("weight", "bias")))
    return out.view(len(out), -1, 2)


def drawing(state, config, prompts, schedule, guide, images=()):
    """The likeliest bits of each scale; `guide` makes one of the logits of all prompts, the first with the images."""
    bits, logits = [], []
    for scale in range(schedule.num_scales):
        passes = [
            bit_logits(state, config, ids, schedule, bits, scale, () if n else images) for n, ids in enumerate(prompts)
        ]
        logits.append(guide(*passes))
        bits.append(logits[-1].argmax(-1))
    return bits, logits


def text_logits(state, config, ids, images=()):
    """Logits (L, V) of a chat."""
    x, kinds, blocks = prompt(state, config, ids, images)
    hidden = backbone(state, config, x, [(t, t) for t in range(len(ids))], kinds, blocks)
    return hidden @ state["patch_language_model.lm_head.weight"].T
