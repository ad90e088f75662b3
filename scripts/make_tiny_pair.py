#!/usr/bin/env python3
"""Writes tests/fixtures/pair: two tiny random models with different tokenizers, as Hugging Face folders.

    pip install numpy safetensors tokenizers
    python scripts/make_tiny_pair.py

The receiver is a Qwen3 of 4 layers in f16, the sharer a Llama of 3 layers in f32. Weights are random: answers are
noise, but the same noise on every machine, and each part of the road (templates, alignment, fusion) does real work.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = Path(__file__).parent.parent / "tests/fixtures/pair"

RECEIVER_TEXT = [
    "Why is the sky blue? Because air scatters blue light more than red light.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "You are a helpful assistant. Answer the question in one sentence.",
]
SHARER_TEXT = [
    "def main(): return 42  # the answer to the question of life",
    "the other weather report there says rain, and then thunder in the north",
    "北京是中国的首都。北京是一座城市。",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tokenizer(texts, vocab, specials, pre_tokenizer):
    """Byte-level BPE with at most `vocab` tokens, and `specials` after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def write(name, config, tokenizer, tokenizer_config, dtype, seed):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1, ensure_ascii=False) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    random = np.random.default_rng(seed)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {}

    def matrix(name, rows, columns, scale=1.0):
        tensors[name] = random.normal(0, scale / columns**0.5, (rows, columns)).astype(dtype)

    def norm(name, size):
        tensors[name] = random.uniform(0.8, 1.2, size).astype(dtype)

    # Small beside what the layers add, or every token would predict itself.
    matrix("model.embed_tokens.weight", config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        norm(at + "input_layernorm.weight", hidden)
        norm(at + "post_attention_layernorm.weight", hidden)
        matrix(at + "self_attn.q_proj.weight", q, hidden, 2.0)
        matrix(at + "self_attn.k_proj.weight", kv, hidden, 2.0)
        matrix(at + "self_attn.v_proj.weight", kv, hidden)
        matrix(at + "self_attn.o_proj.weight", hidden, q)
        if config["model_type"] == "qwen3":
            norm(at + "self_attn.q_norm.weight", head)
            norm(at + "self_attn.k_norm.weight", head)
        matrix(at + "mlp.gate_proj.weight", inner, hidden)
        matrix(at + "mlp.up_proj.weight", inner, hidden)
        matrix(at + "mlp.down_proj.weight", hidden, inner)
    norm("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], hidden, 4.0)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def main():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    receiver = tokenizer(RECEIVER_TEXT, 380, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], byte_level)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    llama_specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    sharer = tokenizer(SHARER_TEXT, 320, llama_specials, digits)

    write(
        "receiver",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": receiver.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "torch_dtype": "float16",
            "eos_token_id": receiver.token_to_id("<|im_end|>"),
        },
        receiver,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
        np.float16,
        1,
    )
    write(
        "sharer",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": sharer.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "torch_dtype": "float32",
            "bos_token_id": sharer.token_to_id("<|begin_of_text|>"),
            "eos_token_id": sharer.token_to_id("<|eot_id|>"),
        },
        sharer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|end_of_text|>",
            "chat_template": LLAMA,
        },
        np.float32,
        2,
    )


if __name__ == "__main__":
    main()
