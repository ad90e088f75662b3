//! What the tensors of a decoder are called in the two file formats.

/// Names of one format. `{}` in the names of a layer stands for its number.
pub(super) struct Names {
    pub embed: &'static str,
    pub final_norm: &'static str,
    pub lm_head: &'static str,
    pub attn_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub attn_out: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub post_attn_norm: &'static str,
    pub ffn_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub post_ffn_norm: &'static str,
}

/// transformers' names, after the prefix of the decoder within the model. Without post-norms, the norm before the
/// feed-forward is called after the attention that it follows.
pub(super) fn hugging_face(post_norms: bool) -> Names {
    Names {
        embed: "embed_tokens",
        final_norm: "norm",
        lm_head: "lm_head",
        attn_norm: "layers.{}.input_layernorm",
        q: "layers.{}.self_attn.q_proj",
        k: "layers.{}.self_attn.k_proj",
        v: "layers.{}.self_attn.v_proj",
        attn_out: "layers.{}.self_attn.o_proj",
        q_norm: "layers.{}.self_attn.q_norm",
        k_norm: "layers.{}.self_attn.k_norm",
        post_attn_norm: "layers.{}.post_attention_layernorm",
        ffn_norm: if post_norms {
            "layers.{}.pre_feedforward_layernorm"
        } else {
            "layers.{}.post_attention_layernorm"
        },
        gate: "layers.{}.mlp.gate_proj",
        up: "layers.{}.mlp.up_proj",
        down: "layers.{}.mlp.down_proj",
        post_ffn_norm: "layers.{}.post_feedforward_layernorm",
    }
}

/// ggml's names.
pub(super) const GGUF: Names = Names {
    embed: "token_embd",
    final_norm: "output_norm",
    lm_head: "output",
    attn_norm: "blk.{}.attn_norm",
    q: "blk.{}.attn_q",
    k: "blk.{}.attn_k",
    v: "blk.{}.attn_v",
    attn_out: "blk.{}.attn_output",
    q_norm: "blk.{}.attn_q_norm",
    k_norm: "blk.{}.attn_k_norm",
    post_attn_norm: "blk.{}.post_attention_norm",
    ffn_norm: "blk.{}.ffn_norm",
    gate: "blk.{}.ffn_gate",
    up: "blk.{}.ffn_up",
    down: "blk.{}.ffn_down",
    post_ffn_norm: "blk.{}.post_ffw_norm",
};

/// Prefixes of the decoder (ending before [`Names`]) and of the head, as transformers has written them over time:
/// text models, and the text part of models that also see images.
pub(super) const HUGGING_FACE_PREFIXES: [(&str, &str); 4] =
    [("model.", ""), ("language_model.model.", "language_model."), ("model.language_model.", ""), ("", "")];
