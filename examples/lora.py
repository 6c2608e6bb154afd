"""Fine-tune a LoRA with FLOW weights: the base is the reference, and losses are kept on disk for the next run.

python examples/lora.py [--model NAME_OR_PATH] [--cache FOLDER]
Without --model: a small Llama of random weights, which shows how it is done, not what it brings.
"""

import argparse
import tempfile

import peft
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flowstream as fs


def texts(num_ids, num=256, length=48):
    """Counting in steps: 5, 8, 11, … A third of each text is the prompt, which is not to be predicted."""
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randint(num_ids, (2, num, 1), generator=generator)
    ids = (start + step % 7 * torch.arange(length)) % num_ids
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--cache", default=tempfile.mkdtemp())
arguments = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = AutoModelForCausalLM.from_pretrained(arguments.model) if arguments.model else LlamaForCausalLM(config)
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
head = base.get_output_embeddings()

loader = DataLoader(texts(base.config.vocab_size), batch_size=16)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
with fs.FlowStream(loader, fs.CausalLMScorer(model), cache=arguments.cache) as stream:
    for epoch in range(2):
        losses = []
        for batch in stream:
            labels, weight = batch.pop("labels"), batch.pop("flow_weight")
            hidden = base.base_model(**batch).last_hidden_state
            loss = fs.weighted_linear_cross_entropy(hidden, head, labels, weight)  # never [B, T, V] logits
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[0]:.3f} → {losses[-1]:.3f}")
    print(f"of all losses of the reference, {stream.metrics()['flow/cache_hit_rate']:.0%} came from {arguments.cache}")
