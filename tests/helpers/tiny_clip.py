"""A random CLIP of 16 pixels with a word tokenizer, saved as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from helpers.tiny_t5 import WORDS

SIZE, MAX_TOKENS = 16, 8


def saved_clip(folder: Path, seed: int = 0) -> Path:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    names = ["<pad>", "<start>", "<unk>", *WORDS, "<end>"]
    end = len(names) - 1
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", end)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unk>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    layers = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **layers, "vocab_size": len(names), "max_position_embeddings": MAX_TOKENS,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end,
            },
            vision_config={**layers, "image_size": SIZE, "patch_size": 8},
            projection_dim=6,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1:  # at their usual size all images look alike
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True, "do_resize": True,
            "do_normalize": True, "resample": 3, "size": {"shortest_edge": SIZE},
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
        })
    )  # fmt: skip
    return folder
