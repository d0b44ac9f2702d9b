"""TokenFlow-t2i the slow way: one sequence, no cache, no transformers; every formula written out once more."""

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, positions, theta):
    """(heads, L, d) turned by positions (L,): channel i goes with channel i + d/2."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def layer_outputs(weights, config, prefix, x, positions, allowed):
    """X (L, D) through one layer: x + norm(attn(x)), then x + norm(mlp(x))."""
    text, length = config.text_config, len(x)
    heads, groups = text.num_attention_heads, text.num_attention_heads // text.num_key_value_heads

    def project(name, norm=None):
        y = (x @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).view(length, -1, text.head_dim)
        if norm is not None:
            y = rms_norm(y, weights[f"{prefix}.self_attn.{norm}.weight"], config.qk_norm_eps)
        return y.transpose(0, 1)

    theta = text.rope_parameters["rope_theta"]
    query = rotate(project("q", "q_norm"), positions, theta)
    key = rotate(project("k", "k_norm"), positions, theta)
    value = project("v")
    attended = []
    for head in range(heads):
        scores = query[head] @ key[head // groups].T / text.head_dim**0.5
        attended.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[head // groups])
    attended = torch.cat(attended, dim=-1) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
    x = x + rms_norm(attended, weights[f"{prefix}.input_layernorm.weight"], text.rms_norm_eps)
    gate, up, down = (weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    outputs = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return x + rms_norm(outputs, weights[f"{prefix}.post_attention_layernorm.weight"], text.rms_norm_eps)


def scale_features(model, grids, codes, own):
    """What the slots of scales 2 … k read, a list of (h*w, C): the chain of sums, each at its own scale.

    With `own` the last of them hold the scale's own codes too.
    """
    semantic, pixel = model.vq_model.quantizer.semantic_codebook, model.vq_model.quantizer.pixel_codebook
    table = torch.cat([F.normalize(semantic.weight, dim=-1), F.normalize(pixel.weight, dim=-1)], dim=-1)
    features, total, start = [], 0.0, 0
    for k, (height, width) in enumerate(grids):
        if k > 0:
            total = F.interpolate(total, (height, width), mode="bicubic")
            features.append(total)
        if start < len(codes):
            total = total + table[codes[start : start + height * width]].T.reshape(1, -1, height, width)
            start += height * width
    if own:
        features[-1] = total
    return [feature[0].flatten(1).T for feature in features]


@torch.no_grad()
def reference_logits(model, prompt, codes, num_scales, own=False, first_position=0):
    """Logits (h*w, V) of the slots of scale `num_scales` after a prompt (a list) and the codes of the scales before."""
    config, weights = model.config, model.state_dict()
    grids = config.schedule.grids[:num_scales]
    embeds = weights["language_model.embed_tokens.weight"][prompt] + weights["scale_embedding.weight"][0]
    embeds[-1] += weights["position_embedding"][0]
    rows, scales = [embeds], [0] * len(prompt)
    place = 1
    for k, features in enumerate(scale_features(model, grids, codes, own), start=2):
        hidden = F.gelu(features @ weights["connector.0.weight"].T + weights["connector.0.bias"])
        hidden = hidden @ weights["connector.2.weight"].T + weights["connector.2.bias"]
        positions = weights["position_embedding"][place : place + len(features)]
        rows.append(hidden + weights["scale_embedding.weight"][k] + positions)
        scales += [k] * len(features)
        place += len(features)
    x, scales = torch.cat(rows), torch.tensor(scales)
    index = torch.arange(len(x))
    allowed = (index[None] <= index[:, None]) | ((scales[:, None] == scales[None]) & (scales[None] > 0))
    for layer in range(config.text_config.num_hidden_layers):
        x = layer_outputs(weights, config, f"language_model.layers.{layer}", x, index + first_position, allowed)
    x = rms_norm(x, weights["language_model.norm.weight"], config.text_config.rms_norm_eps)
    height, width = grids[-1]
    return x[-height * width :] @ weights["lm_head.weight"].T


def reference_drawing(model, prompt, negative, cfg, rounds):
    """Likeliest codes of an image, read anew from the start in each step; `rounds` counts the drawings of a scale.

    Returns codes, and the guided logits of each scale's last round.
    """
    config, codes, logits = model.config, [], []
    first, count = config.image_token_start, len(config.schedule.grids)
    for k in range(count):
        for index in range(rounds if k > 0 else 1):
            t = cfg * k / (count - 1)
            halves = [reference_logits(model, row, codes, k + 1, own=index > 0) for row in (prompt, negative)]
            guided = (1 + t) * halves[0] - t * halves[1]
            guided = guided[:, first : first + config.vq_config.codebook_size]
            codes = codes[: config.schedule.offsets[k]] + guided.argmax(-1).tolist()
        logits.append(guided)
    return codes, logits
