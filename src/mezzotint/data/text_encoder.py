"""T5 text encoders.

The encoder reads each distinct caption once and by itself, so that an embedding depends on no other
caption. The cache is keyed by the encoder's weights, its tokenizer and the captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mezzotint.core.files import expand_user, read_json
from mezzotint.core.hub import Pretrained, find_pretrained, hash_tokenizer, quiet_transformers
from mezzotint.core.tensor_files import sha256_of_module

MAX_TOKENS = 128  # the usual length since Imagen; longer captions are cut and counted
XXL = "google/t5-v1_1-xxl"  # the paper's encoder, 4096 wide
FILES = ("*.json", "*.safetensors", "*.model")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # of the states that networks read
KIND = Pretrained(kind="text encoder", shelf="text", files=FILES, example=f"the paper's is {XXL}")


@final
class TextEncoder:
    """A T5 encoder with its tokenizer, in eval mode.

    name: as given to `open_text_encoder`; a folder as an absolute path. width: of an embedding.
    max_tokens: longer captions are cut. hash: of the weights. tokenizer_hash: of its files.
    dtype_name: of the states that a network reads.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        tokenizer_hash: str,
        max_tokens: int,
        dtype_name: str = "float16",
    ):
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}; at least 1, e.g. {MAX_TOKENS}")
        if dtype_name not in DTYPES:
            raise ValueError(f"states in {dtype_name}; choose from {', '.join(DTYPES)}")
        self.dtype_name = dtype_name
        self.name, self.model, self.tokenizer, self.max_tokens = name, model, tokenizer, max_tokens
        self.tokenizer_hash = tokenizer_hash
        self.width = int(model.config.d_model)
        self._hash: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the weights, computed on first use."""
        if self._hash is None:
            self._hash = sha256_of_module(self.model)
        return self._hash

    def tokens(self, caption: str) -> tuple[list[int], bool]:
        """Return token ids with the end token, cut to max_tokens, and whether they were cut."""
        ids = self._ids(caption)
        if len(ids) <= self.max_tokens:
            return ids, False
        return [*ids[: self.max_tokens - 1], ids[-1]], True  # keep the end token

    def count_tokens(self, caption: str) -> int:
        """Return the number of tokens of a caption with the end token, none cut."""
        return len(self._ids(caption))

    def _ids(self, caption: str) -> list[int]:
        # Not verbose: the tokenizer would warn of its own length, which does not matter here.
        return self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def encode(self, caption: str) -> Float[Tensor, "t d"]:
        """Return one state per token, float32 on the CPU; none for an empty caption."""
        if not caption.strip():
            return torch.zeros(0, self.width)
        ids = torch.tensor([self.tokens(caption)[0]], device=self.model.device)
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return output.last_hidden_state[0].float().cpu()

    def states(self, caption: str) -> Float[Tensor, "t d"]:
        """Return `encode`'s states as a network reads them, in training as in sampling.

        Errors: ValueError for a state that `dtype_name` cannot hold.
        """
        states = self.encode(caption).to(DTYPES[self.dtype_name])
        if not states.isfinite().all():
            raise ValueError(
                f"text encoder {self.name} gives NaN or infinity in {self.dtype_name} for the "
                f"caption {caption[:80]!r}; bfloat16 holds larger numbers: data.text_dtype=bfloat16"
            )
        return states

    def conditions(
        self, captions: Sequence[str]
    ) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return the embeddings of `states`, padded to max_tokens, and their mask."""
        dtype = DTYPES[self.dtype_name]
        text = torch.zeros(len(captions), self.max_tokens, self.width, dtype=dtype)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            states = self.states(caption)
            text[row, : len(states)], mask[row, : len(states)] = states, True
        return text, mask


def open_text_encoder(
    name: str,
    device: torch.device | str = "cpu",
    max_tokens: int = MAX_TOKENS,
    dtype_name: str = "float16",
) -> TextEncoder:
    """Open a T5 encoder.

    Args:
        name: a folder with a saved T5 (or T5 encoder) and its tokenizer, or OWNER/NAME on the hub:
            google/t5-v1_1-xxl as in the paper, google-t5/t5-small, ...
        device: where it computes.
        max_tokens: longer captions are cut.
        dtype_name: of the states that a network reads, see `DTYPES`.

    Errors: ValueError for a folder without encoder, and for an encoder that cannot be downloaded,
    with
        what to download and where to put it.
    """
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise ValueError("text needs transformers: pip install 'mezzotint[text]'") from error
    folder = find_text_encoder(name)
    try:
        kind = read_json(folder / "config.json")["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no encoder: {error!r}; give a folder that transformers saved"
        ) from None
    if kind not in ("t5", "mt5", "umt5"):
        raise ValueError(
            f"{folder} holds a {kind!r} model; text encoders are T5's, e.g. google-t5/t5-small"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            model = T5EncoderModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # transformers, tokenizers and safetensors raise their own
        raise ValueError(
            f"the encoder in {folder} cannot be read ({str(error).splitlines()[0]}); it needs "
            "config.json, weights in safetensors, and tokenizer.json (a spiece.model alone needs: "
            "pip install sentencepiece)"
        ) from error
    full_name = str(folder) if expand_user(name).is_dir() else name
    model: Any = model.eval().requires_grad_(False)
    model.to(torch.device(device))
    tokenizer_hash = hash_tokenizer(folder)
    return TextEncoder(full_name, model, tokenizer, tokenizer_hash, max_tokens, dtype_name)


def find_text_encoder(name: str, fetch: bool = True) -> Path:
    """Return the folder of an encoder: `name` itself, in our cache or the hub's, or downloaded.

    Args:
        fetch: whether it may be downloaded.

    Errors: ValueError as `open_text_encoder`.
    """
    return find_pretrained(KIND, name, fetch)
