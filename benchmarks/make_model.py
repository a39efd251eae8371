"""Write a Llama-shaped model with random weights, for timing without downloads.

Speed and memory depend on shapes and not on what the weights say. The two larger shapes are SmolLM2's.

    python make_model.py 135M OUT_DIR --tokenizer DIR

The weights are stored in bfloat16, as published checkpoints are, so that runs in 32 and in 16 bits begin with the very
same numbers. The vocabulary is the tokenizer's; SmolLM2's has 49,152 entries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
# layers, width, heads, key-value heads, width of the MLP; the names count parameters with 49,152 tied embeddings
SHAPES = {
    "5M": (4, 96, 3, 1, 256),
    "30M": (7, 384, 6, 2, 1024),
    "135M": (30, 576, 9, 3, 1536),
    "360M": (32, 960, 15, 5, 2560),
}


def main() -> None:
    """Write one model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "../shared/tokenizers/smollm2-instruct")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    folder = args.tokenizer if args.tokenizer.is_dir() else ROOT / "src/formtune/demo/base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers, width, heads, kv_heads, mlp = SHAPES[args.size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, tokenizer of {folder.name}")


if __name__ == "__main__":
    main()
