"""FLOW weights in a plain PyTorch loop, with gradient accumulation. Run it again, and it goes on from its checkpoint.

python examples/plain_pytorch.py [--model NAME_OR_PATH] [--checkpoint FILE] [--steps N]
Without --model: an untrained Llama over bytes, and flowstream says, rightly, that its weights carry no information.
"""

import argparse
import re
import sysconfig
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flowstream as fs

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()
files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
texts = [text for file in files for text in re.findall('"""(.{20,}?)"""', file.read_text("utf-8"), re.DOTALL)]
torch.manual_seed(0)  # a later run must find the same reference
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = AutoTokenizer.from_pretrained(args.model)(texts, truncation=True, max_length=128).input_ids
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    rows = [list(text.encode()[:128]) for text in texts]


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


# The order, too, must be found again: this sampler's depends on nothing but its seed and the epoch.
loader = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, 1, 0), collate_fn=collate)
scorer = fs.CausalLMScorer(model)  # a frozen copy, taken before the checkpoint is loaded
stream = fs.FlowStream(loader, scorer, accumulate=4, include=("denominator",))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if args.model else 1e-3)
parts = {"model": model, "optimizer": optimizer, "stream": stream}
if args.checkpoint.exists():
    for name, state in torch.load(args.checkpoint).items():
        parts[name].load_state_dict(state)
losses = []
for number, batch in enumerate(islice(stream, 4 * args.steps), start=1):
    labels, weight, denominator = (batch.pop(key) for key in ("labels", "flow_weight", "flow_denominator"))
    losses.append(fs.weighted_lm_loss(model(**batch).logits, labels, weight, denominator=denominator))
    losses[-1].backward()
    if number % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
first, last = (sum(some).item() / 5 for some in (losses[:20], losses[-20:]))
print(f"{stream.metrics()['flow/samples_emitted']:.0f} samples, loss {first:.3f} → {last:.3f}")
