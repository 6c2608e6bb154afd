"""Resampling is a drop-in: the same training loop over a loader, and over its stream, which leaves out what is hard.

python examples/resampling.py
A small Llama, its tokens bytes, is pre-trained on Python's own source code and fine-tuned on its docstrings.
"""

import copy
import re
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import flowstream as fs


def train(model, batches):
    """An epoch of a loop that knows nothing of flowstream; the mean loss of its last ten steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{len(losses):4} steps, loss {losses[0]:.3f} → {sum(losses[-10:]) / 10:.3f}")


def collate(texts):
    rows = [torch.tensor(list(text.encode()[:64])) for text in texts]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


torch.manual_seed(0)
source = "".join(file.read_text("utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py")))
documents = re.findall('"""(.{20,}?)"""', source, re.DOTALL)
code = [block for block in re.split("\n\n+", source) if len(block) > 20 and '"""' not in block]
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
print("pre-training:", end=" ")
train(model, DataLoader(code[:480], batch_size=8, shuffle=True, collate_fn=collate))

loader = DataLoader(documents, batch_size=8, shuffle=True, collate_fn=collate)
print("the loader:  ", end=" ")
train(copy.deepcopy(model), loader)
stream = fs.FlowStream(loader, fs.CausalLMScorer(model), mode="resample")
print("the stream:  ", end=" ")
train(copy.deepcopy(model), stream)
acceptance = stream.metrics()["flow/acceptance"]
print(f"{acceptance:.0%} of the samples were kept: an epoch is shorter by as much, so count steps to compare runs")
