"""The demo's base model: a small Llama that learns the invented world's facts on the spot, in under a minute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from imsm_core.data.collate import IGNORED_LABEL, collate
from imsm_core.data.dataset import Example, epoch_order


def make_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 0.9 million parameters for the tokenizer's vocabulary and context."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )


def learn(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    epochs: int,
    batch_size: int = 32,
    peak_learning_rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Train every weight on prompts and answers alike, as a language model is pre-trained; leaves eval mode on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.01)
    per_epoch = len(examples) // batch_size
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="base model", unit="step") as bar:
        for step in range(steps):
            epoch, place = divmod(step, per_epoch)
            order = epoch_order(len(examples), seed, epoch)[place * batch_size : (place + 1) * batch_size]
            loss = _language_model_loss(model, [examples[index] for index in order])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _language_model_loss(model: LlamaForCausalLM, examples: Sequence[Example]) -> torch.Tensor:
    """Mean next-token cross-entropy, nats/token, over every token of the examples."""
    pad_token_id = model.config.pad_token_id
    assert pad_token_id is not None  # `make_base` sets it
    batch = collate(examples, pad_token_id)
    targets = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED_LABEL)[:, 1:]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
