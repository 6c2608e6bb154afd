"""FLOW in Lightning: the loss is weighted, and a run that is started again goes on from its last checkpoint.

python examples/lightning_module.py [--model NAME_OR_PATH] [--checkpoints FOLDER] [--steps N]
Without --model: an untrained Llama over bytes, and flowstream says, rightly, that its weights carry no information.
"""

import argparse
import re
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flowstream as fs
from flowstream.integrations.lightning import FlowCallback, FlowModule

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
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


def make_stream():  # called once Lightning has started its ranks, of which each gets its part of the rows
    loader = DataLoader(rows, batch_size=4, sampler=fs.ElasticDistributedSampler(rows), collate_fn=collate)
    return fs.FlowStream(loader, fs.CausalLMScorer(model), accumulate=4, include=("denominator",))


flow = FlowCallback(make_stream)
keep = ModelCheckpoint(args.checkpoints, save_last=True, every_n_train_steps=5)
trainer = pl.Trainer(max_steps=args.steps, accumulate_grad_batches=4, callbacks=[flow, keep], logger=False)
module = FlowModule(model, lr=1e-5 if args.model else 1e-3)
trainer.fit(module, flow.loader, ckpt_path=args.checkpoints / "last.ckpt" if args.checkpoints.exists() else None)
loss = trainer.callback_metrics["train_loss"]
print(f"{flow.stream.metrics()['flow/samples_emitted']:.0f} samples, {trainer.global_step} steps, loss {loss:.3f}")
