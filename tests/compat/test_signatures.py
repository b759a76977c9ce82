"""The names of flash_attn, with their arguments in order and their defaults."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from anyflash.compat import flash_attn
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import bert_padding, cute, flash_attn_interface, flash_attn_triton
from anyflash.compat.flash_attn.layers import rotary
from anyflash.compat.flash_attn.losses import cross_entropy
from anyflash.compat.flash_attn.modules import mha

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
TERMS = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
DS = "q_descale=None, k_descale=None, v_descale=None"
WINDOW3 = "window_size=(-1, -1), attention_chunk=0, softcap=0.0"
TAIL3 = (
    f"softmax_scale=None, causal=False, qv=None, {DS}, {WINDOW3}, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False"
)
MODS = "score_mod=None, score_mod_bwd=None, mask_mod=None"
MASK4 = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, "
    "num_splits=1, pack_gqa=None, deterministic=False"
)
CACHE = "rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None"
LAYER = "causal=False, softmax_scale=None, attention_dropout=0.0"
V1 = "dropout_p, softmax_scale=None, causal=False, return_attn_probs=False, deterministic=False"

SIGNATURES: list[tuple[ModuleType, str, str]] = [
    (flash_attn, "flash_attn_func", f"q, k, v, {TAIL}"),
    (flash_attn, "flash_attn_kvpacked_func", f"q, kv, {TAIL}"),
    (flash_attn, "flash_attn_qkvpacked_func", f"qkv, {TAIL}"),
    (flash_attn, "flash_attn_varlen_func", f"q, k, v, {CU}, {TAIL}, block_table=None"),
    (flash_attn, "flash_attn_varlen_kvpacked_func", f"q, kv, {CU}, {TAIL}"),
    (flash_attn, "flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {TAIL}"),
    (
        flash_attn,
        "flash_attn_with_kvcache",
        (
            f"q, k_cache, v_cache, k=None, v=None, {CACHE}, block_table=None, softmax_scale=None, "
            "causal=False, "
            "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
            "return_softmax_lse=False"
        ),
    ),
    (flash_attn_interface, "_flash_attn_forward", f"q, k, v, {TERMS}, return_softmax"),
    (
        flash_attn_interface,
        "_flash_attn_varlen_forward",
        (
            f"q, k, v, {CU}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
            "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, "
            "seqused_k=None, zero_tensors=False, num_splits=0"
        ),
    ),
    (
        flash_attn_interface,
        "_flash_attn_backward",
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {TERMS}, deterministic, rng_state=None",
    ),
    (
        flash_attn_interface,
        "_flash_attn_varlen_backward",
        (
            f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {CU}, {TERMS}, deterministic, rng_state=None, "
            "zero_tensors=False"
        ),
    ),
    (flash_attn_interface, "flash_attn_unpadded_func", f"q, k, v, {CU}, {V1}"),
    (flash_attn_interface, "flash_attn_unpadded_kvpacked_func", f"q, kv, {CU}, {V1}"),
    (flash_attn_interface, "flash_attn_unpadded_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {V1}"),
    (
        flash_attn_interface,
        "flash_attn_unpadded_qkvpacked_split_func",
        f"qkv, cu_seqlens, max_seqlen0, max_seqlen1, batch_size0, {V1}",
    ),
    (flash_attn_triton, "flash_attn_func", "q, k, v, bias=None, causal=False, softmax_scale=None"),
    (flash_attn_triton, "flash_attn_qkvpacked_func", "qkv, bias=None, causal=False, softmax_scale=None"),
    (flash_attn_triton, "flash_attn_kvpacked_func", "q, kv, bias=None, causal=False, softmax_scale=None"),
    (generation3, "flash_attn_func", f"q, k, v, {TAIL3}"),
    (generation3, "flash_attn_varlen_func", f"q, k, v, {CU}, seqused_q=None, seqused_k=None, {TAIL3}"),
    (
        generation3,
        "flash_attn_qkvpacked_func",
        (
            f"qkv, softmax_scale=None, causal=False, {DS}, {WINDOW3}, deterministic=False, num_heads_q=None, "
            "sm_margin=0, return_attn_probs=False"
        ),
    ),
    (generation3, "flash_attn_combine", "out_partial, lse_partial, out=None, out_dtype=None"),
    (
        generation3,
        "flash_attn_with_kvcache",
        (
            f"q, k_cache, v_cache, k=None, v=None, qv=None, {CACHE}, page_table=None, cu_seqlens_q=None, "
            f"cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, {DS}, softmax_scale=None, "
            "causal=False, "
            f"{WINDOW3}, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, "
            "sm_margin=0, "
            "return_softmax_lse=False"
        ),
    ),
    (
        cute,
        "flash_attn_func",
        (
            f"q, k, v, qv=None, gather_kv_indices=None, {MASK4}, {MODS}, aux_tensors=None, aux_scalars=None, "
            "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False"
        ),
    ),
    (
        cute,
        "flash_attn_varlen_func",
        (
            "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
            "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
            f"{MASK4}, {MODS}, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
            "return_lse=False, "
            "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False"
        ),
    ),
    (bert_padding, "index_first_axis", "input, indices"),
    (bert_padding, "index_put_first_axis", "values, indices, first_axis_dim"),
    (bert_padding, "unpad_input", "hidden_states, attention_mask, unused_mask=None"),
    (
        bert_padding,
        "unpad_input_for_concatenated_sequences",
        "hidden_states, attention_mask_in_length",
    ),
    (bert_padding, "pad_input", "hidden_states, indices, batch, seqlen"),
    (
        rotary,
        "apply_rotary_emb",
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None",
    ),
    (
        rotary,
        "apply_rotary_emb_qkv_",
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None",
    ),
    (rotary, "apply_rotary_emb_kv_", "kv, cos, sin, interleaved=False, seqlen_offsets=0"),
    (mha, "get_alibi_slopes", "nheads"),
    (
        mha,
        "FlashSelfAttention",
        f"{LAYER}, window_size=(-1, -1), alibi_slopes=None, deterministic=False",
    ),
    (
        mha,
        "FlashCrossAttention",
        f"{LAYER}, alibi_slopes=None, window_size=(-1, -1), deterministic=False",
    ),
    (
        mha,
        "MHA",
        (
            "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, "
            "out_proj_bias=True, "
            "dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, "
            "rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, "
            "use_alibi=False, "
            "window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, "
            "checkpointing=False, device=None, dtype=None"
        ),
    ),
    (
        cross_entropy,
        "CrossEntropyLoss",
        (
            "ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, "
            "lse_square_scale=0.0, "
            "inplace_backward=False, process_group=None, return_z_loss=False"
        ),
    ),
]


@pytest.mark.parametrize(
    ("module", "name", "arguments"), SIGNATURES, ids=lambda x: x.__name__ if inspect.ismodule(x) else x
)
def test_arguments(module: ModuleType, name: str, arguments: str) -> None:
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(found) == arguments
