"""A Hugging Face GPT-2's tensors under this project's names, and the other way round."""

import torch
from torch import Tensor

# Hugging Face's names for our parameters: outside the blocks, and inside block N behind `h.N.`
HUGGINGFACE_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
QKV = ("W_query", "W_key", "W_value")
HUGGINGFACE_MATRICES = {"attn.c_proj": "att.out_proj", "mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
HUGGINGFACE_BLOCK_NAMES = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in HUGGINGFACE_MATRICES.items()
    for kind in ("weight", "bias")
}
for _n in (1, 2):
    HUGGINGFACE_BLOCK_NAMES |= {f"ln_{_n}.weight": f"norm{_n}.scale", f"ln_{_n}.bias": f"norm{_n}.shift"}


def from_huggingface(tensors: dict[str, Tensor], *, qkv_bias: bool) -> dict[str, Tensor]:
    """Rename a Hugging Face GPT-2's tensors; a name that is not known stays, for the caller to refuse.

    OpenAI's own files leave off the prefix `transformer.`. A block's matrices are stored (in, out), ours
    (out, in), with Q, K and V side by side in one. `attn.bias` and `attn.masked_bias` are masks, not weights.
    """
    ours: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("transformer.")
        if not name.startswith("h.") or name.count(".") < 2:
            ours[HUGGINGFACE_NAMES.get(name, full_name)] = tensor
            continue
        _, layer, part = name.split(".", 2)
        if part in ("attn.bias", "attn.masked_bias"):
            continue
        tensor = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        if part in ("attn.c_attn.weight", "attn.c_attn.bias"):
            kind = part.removeprefix("attn.c_attn.")
            if kind == "weight" or qkv_bias or tensor.any():  # zero biases say what no biases say
                for target, piece in zip(QKV, tensor.chunk(3), strict=True):
                    ours[f"trf_blocks.{layer}.att.{target}.{kind}"] = piece
        elif part in HUGGINGFACE_BLOCK_NAMES:
            ours[f"trf_blocks.{layer}.{HUGGINGFACE_BLOCK_NAMES[part]}"] = tensor
        else:
            ours[full_name] = tensor
    return ours


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_huggingface` for `GPTModel.tensors()`, with Hugging Face's own prefix `transformer.`.

    Q, K and V without biases get biases of zero; a tied model's head, not among its tensors, stays left out.
    """
    outside = {ours: theirs for theirs, ours in HUGGINGFACE_NAMES.items()}
    inside = {ours: theirs for theirs, ours in HUGGINGFACE_BLOCK_NAMES.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outside:
            prefix = "" if name == "out_head.weight" else "transformer."
            theirs[prefix + outside[name]] = tensor
            continue
        _, layer, part = name.split(".", 2)
        block = f"transformer.h.{layer}."
        if part in inside:
            theirs[block + inside[part]] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        elif part == "att.W_query.weight":
            stem = name.removesuffix("W_query.weight")
            weights = [tensors[f"{stem}{which}.weight"] for which in QKV]
            no_bias = tensor.new_zeros(len(tensor))
            biases = [tensors.get(f"{stem}{which}.bias", no_bias) for which in QKV]
            theirs[f"{block}attn.c_attn.weight"] = torch.cat(weights).T.contiguous()
            theirs[f"{block}attn.c_attn.bias"] = torch.cat(biases)
    return theirs
