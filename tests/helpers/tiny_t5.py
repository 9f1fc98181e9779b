"""A random T5 encoder 16 wide with a word tokenizer, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    *(
        "a",
        "an",
        "at",
        "in",
        "on",
        "of",
        "the",
        "red",
        "green",
        "blue",
        "cyan",
        "circle",
        "square",
        "ring",
    ),
    *("top", "left", "right", "centre", "bottom", "portrait", "mode"),
)


def saved_t5(folder: Path, seed: int) -> Path:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    names = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(names), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
    ).save_pretrained(folder)
    return folder
