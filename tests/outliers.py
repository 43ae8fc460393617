"""Residual channels as large as those of released models, put into a model of transformers with random weights."""

import torch

__all__ = ["OFFSET_NORMS", "add_outliers", "raise_residual"]

# Their norms multiply by 1 + weight.
OFFSET_NORMS = ("gemma", "gemma2", "gemma3_text")
# Norms that stand behind attention and MLP, and write to the residual.
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
POST_NORM_TYPES = ("gemma2", "gemma3_text", "olmo2")
PROBE = torch.arange(5, 205)[None]


def add_outliers(model: torch.nn.Module, size: float) -> None:
    """Drive two residual channels to about ``size`` from the first layer on, as released models do.

    What adds to them gains a factor, and what reads them, a norm, loses one.
    """
    embedding = model.model.embed_tokens.weight
    scale = float(getattr(model.model.embed_tokens, "embed_scale", 1.0))
    offset = 1.0 if model.config.model_type in OFFSET_NORMS else 0.0
    for channel, sign in ((5, 1.0), (17, -1.0)):
        embedding[:, channel] = sign * size / scale * (1 + 0.1 * torch.randn(len(embedding)))
    behind = POST_NORMS if model.config.model_type in POST_NORM_TYPES else ()
    for name, parameter in model.model.named_parameters():
        norm = name.split(".")[-2]
        if name.endswith(("o_proj.weight", "self_attn.dense.weight")):
            parameter[5] *= 20
        elif name.endswith(("mlp.down_proj.weight", "mlp.fc2.weight", "experts.down_proj")):
            parameter[..., 17, :] *= 20
        elif "norm" in norm and norm not in behind and len(parameter) == model.config.hidden_size:
            # A soft cap would leave nothing of the logits that a tied head makes of its own outliers.
            factor = 1e-3 if behind and norm == "norm" else 0.05
            if name.endswith(".weight"):
                parameter[[5, 17]] = (parameter[[5, 17]] + offset) * factor - offset
    _raise_logits(model, offset)


def _raise_logits(model: torch.nn.Module, offset: float) -> None:
    """Bring logits that the outliers pressed down back to a deviation of one: nearly equal ones would hide errors."""
    deviation = model(torch.arange(5, 105)[None]).logits.std()
    norm = getattr(model.model, "norm", None) or model.model.final_layernorm
    if deviation < 0.5:
        norm.weight.copy_((norm.weight + offset) / deviation - offset)


def raise_residual(model: torch.nn.Module, size: float) -> None:
    """Let each attention add about ``size`` to one channel of a Gemma's residual, and each MLP as much, negative, to
    another; all other channels lie around ``size / 100``, and the norms that read them make up for it.

    As in released checkpoints the weights of the norms behind attention and MLP do it, where there are such, and the
    embedding and the projections elsewhere; and the large channels keep their sign from token to token, for what
    cancels there would leave the others to chance.
    """
    others, post_norms = size / 100, model.config.model_type in POST_NORM_TYPES
    embedding = model.model.embed_tokens.weight
    common = torch.randn(embedding.shape[1])  # of all tokens, or nothing that is made of them would have a sign
    embedding.copy_((embedding * embedding.shape[1] ** 0.5 + common) * others / model.model.embed_tokens.embed_scale)
    for index, layer in enumerate(model.model.layers):
        before = [layer.input_layernorm] if index else []  # the embedding has no large channel yet
        before.append(layer.pre_feedforward_layernorm if post_norms else layer.post_attention_layernorm)
        for norm in before:
            _turn_around(norm)
        behind = (layer.post_attention_layernorm, layer.post_feedforward_layernorm) if post_norms else (None, None)
        for channel, sign, linear, norm in (
            (5, 1.0, layer.self_attn.o_proj, behind[0]),
            (17, -1.0, layer.mlp.down_proj, behind[1]),
        ):
            deviation = _align(model, linear, channel, sign)
            if norm is not None:
                norm.weight.copy_((norm.weight + 1) * others - 1)
                norm.weight[channel] = size / 2
            else:
                linear.weight *= others / deviation
                linear.weight[channel] *= size / others / 2
    final = model.model.norm
    _turn_around(final)
    # A first guess, or a soft cap would leave no difference to go by.
    final.weight.copy_((final.weight + 1) / others - 1)
    final.weight.copy_((final.weight + 1) / model(PROBE).logits.std() - 1)


def _turn_around(norm: torch.nn.Module) -> None:
    """Make the large channels small and the others near one, which the norm of a row with two large ones doesn't."""
    large = 0.2 * (norm.weight[[5, 17]] + 1)
    norm.weight.copy_((norm.weight + 1) * 9 - 1)
    norm.weight[[5, 17]] = large - 1


def _align(model: torch.nn.Module, linear: torch.nn.Module, channel: int, sign: float) -> torch.Tensor:
    """Give row ``channel`` the direction that all tokens share, so that it makes about twice the deviation of the
    others, which is returned, and always of ``sign``."""
    inputs: list[torch.Tensor] = []
    with linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        model(PROBE)
    rows = inputs[0].flatten(0, -2)
    deviation, mean = (rows @ linear.weight.T).std(), rows.mean(0)
    linear.weight[channel] = sign * 2 * deviation * mean / (rows @ mean).mean()
    return deviation
