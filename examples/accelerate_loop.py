"""FLOW weights in a loop under accelerate, on any number of GPUs or none. Run it again: it goes on from its checkpoint.

python examples/accelerate_loop.py [--model NAME_OR_PATH] [--checkpoint FOLDER] [--steps N]
accelerate launch examples/accelerate_loop.py …
Without --model: a small Llama of random weights, which shows how it is done, not what it brings.
"""

import argparse
from itertools import chain, repeat
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flowstream as fs
from flowstream.integrations.accelerate import prepare

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()
torch.manual_seed(0)  # a later run must find the same reference
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else LlamaForCausalLM(config)
start, step = torch.randint(model.config.vocab_size, (2, 250, 1))  # counting in steps: 5, 8, 11, …
rows = [{"input_ids": row, "labels": row} for row in (start + step % 7 * torch.arange(32)) % model.config.vocab_size]


def loss_of(batch, model):
    labels, weight, denominator = (batch.pop(key) for key in ("labels", "flow_weight", "flow_denominator"))
    return fs.weighted_lm_loss(model(**batch).logits, labels, weight, denominator=denominator)


shuffling = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0, even_batches=False)  # no sample twice
accelerator = Accelerator(gradient_accumulation_steps=4, dataloader_config=shuffling)
scorer = fs.CausalLMScorer(model.to(accelerator.device))  # a frozen copy, taken before the checkpoint is loaded
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if args.model else 3e-3)
model, optimizer = accelerator.prepare(model, optimizer)
loader = prepare(accelerator, DataLoader(rows, batch_size=4, shuffle=True), scorer, include=("denominator",))
if args.checkpoint.exists():
    accelerator.load_state(args.checkpoint)
steps, parts = [], []
for batch in chain.from_iterable(repeat(loader)):
    if not steps + parts:
        fs.check_weights_used(lambda batch: loss_of(batch, accelerator.unwrap_model(model)), batch)
    with accelerator.accumulate(model):
        parts.append(loss_of(batch, model))  # a part of the step's loss, and backward divides by their number: multiply
        accelerator.backward(parts[-1] * accelerator.gradient_accumulation_steps)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        steps, parts = [*steps, accelerator.reduce(sum(parts).detach(), "mean").item()], []
    if len(steps) == args.steps:
        break
accelerator.save_state(args.checkpoint)
accelerator.print(f"{len(steps)} steps, loss {steps[0]:.3f} → {steps[-1]:.3f}")
