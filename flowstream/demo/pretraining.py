"""From text to a checkpoint: a byte-level BPE tokenizer and a small Llama, trained and saved as Hugging Face files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowstream.compare.training import learning_rate_at

BEGIN, END, PAD = "<s>", "</s>", "<pad>"

_LEARNING_RATE = 4e-3
_WARMUP = 0.05
_MAX_TOKENS = 512
_TOKENIZER_CHARS = 1_500_000
"""Text that the merges are learnt from; more does not change the first thousand much and takes longer."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The shape of the model and the length of its pre-training."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 128
    """Tokens in a chunk of pre-training text."""
    batch: int = 8
    steps: int = 1000
    max_threads: int = 64
    """More threads than a model this small can use make it slower, on busy cores much slower."""


def train_tokenizer(blocks: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` entries; any text can be written in it, none is lost."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _head(blocks, _TOKENIZER_CHARS), vocabulary, special_tokens=[BEGIN, END, PAD], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def chunk(blocks: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """Blocks as one stream of tokens, cut into [num_chunks, length]; the rest is dropped."""
    rows = tokenizer([block + "\n\n" for block in blocks], add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in row])
    return tokens[: len(tokens) // length * length].view(-1, length)


def pretrain(
    chunks: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    size: ModelSize,
    folder: Path,
    on_step: Callable[[int, float], None],
) -> Path:
    """Train on chunks `[num_chunks, length]` and save model and tokenizer to `folder`, ready for `from_pretrained`."""
    torch.manual_seed(0)
    torch.set_num_threads(min(torch.get_num_threads(), size.max_threads))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=_MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batches = _forever(chunks, size.batch)
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, size.steps, _LEARNING_RATE, warmup=_WARMUP)
        ids = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _forever(chunks: Tensor, batch: int) -> Iterator[Tensor]:
    """Batches of chunks in an order drawn anew for each pass."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(chunks), generator=generator).split(batch):
            yield chunks[rows]


def _head(blocks: Sequence[str], max_chars: int) -> Iterator[str]:
    num_chars = 0
    for block in blocks:
        num_chars += len(block)
        if num_chars > max_chars:
            return
        yield block
