"""The demo's base model: a small Llama that learns the invented world's facts on the spot, in under a minute."""

from __future__ import annotations

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from imsm_core.data import Example, collate, epoch_order


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of about a million parameters."""
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
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )


def learn_facts(
    model: LlamaForCausalLM, examples: list[Example], epochs: int, batch_size: int = 32, peak: float = 3e-3, seed: int = 0
) -> None:
    """Train every weight on prompts and answers alike, as a language model is pre-trained; one-cycle learning rate."""
    steps = epochs * len(examples) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    pad = model.config.pad_token_id
    order: list[int] = []
    epoch = 0
    model.train()
    with tqdm(total=steps, desc="base model", unit="step") as bar:
        for _ in range(steps):
            while len(order) < batch_size:
                order += epoch_order(len(examples), seed, epoch)
                epoch += 1
            batch = collate([examples[index] for index in order[:batch_size]], pad)
            order = order[batch_size:]
            targets = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
