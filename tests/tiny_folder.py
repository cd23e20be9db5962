"""A Hugging Face folder of a few thousand random weights, with a tokenizer and a chat template."""

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

TEMPLATE = """{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>
{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TEXT = ["the cat sat on the mat and the dog sat on the log", '{"a": 1, "b": "two"}']
MAX_LEN = 256


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """Llama of 2 layers, 4 heads and 2 of keys and values; sees MAX_LEN tokens."""
    path.mkdir()
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=272,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(TEXT, trainer)
    words.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 272, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LEN, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "eos_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    stated = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(stated))
    draws = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draws) * 0.3 for name, shape in _shapes()}
    norms = {name: torch.ones(32) for name in tensors if "norm" in name}
    save_file(tensors | norms, path / "model.safetensors")
    return path


def _shapes():
    yield from (("model.embed_tokens.weight", (272, 32)), ("lm_head.weight", (272, 32)))
    yield "model.norm.weight", (32,)
    layer = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    for i in range(2):
        yield from ((f"model.layers.{i}.{name}.weight", shape) for name, shape in layer.items())
