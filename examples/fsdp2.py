"""Train with FSDP2, sharded within groups of ranks and replicated over them; each rank's stream is in the checkpoint.

torchrun --nproc-per-node 4 examples/fsdp2.py [--model NAME_OR_PATH] [--shard-over 2] [--folder FOLDER] [--steps N]
The reference is a whole copy on every rank: it scores without a word to the others, ahead of the model. Run again, it
goes on from its checkpoint. Without --model: an untrained Llama over bytes, and flowstream says, rightly, that its
weights carry no information.
"""

import argparse
import os
import re
import sysconfig
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flowstream as fs

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--shard-over", type=int, default=int(os.environ["LOCAL_WORLD_SIZE"]))
parser.add_argument("--folder", type=Path, default=Path("fsdp2"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group(device_id=device if device.type == "cuda" else None)  # nccl on GPUs, else gloo
shape = (dist.get_world_size() // args.shard_over, args.shard_over)
mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))

files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
texts = [text for file in files for text in re.findall('"""(.{20,}?)"""', file.read_text("utf-8"), re.DOTALL)]
torch.manual_seed(0)  # all ranks, and later runs, must have the same reference
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    rows = AutoTokenizer.from_pretrained(args.model)(texts, truncation=True, max_length=128).input_ids
else:
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(device)
    rows = [list(text.encode()[:128]) for text in texts]


def collate(rows):
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


# Both dimensions of this mesh are data-parallel. Of one with more, give those that are: mesh["replicate", "shard"].
sampler = fs.ElasticDistributedSampler(rows, process_group=mesh)
loader = DataLoader(rows, batch_size=4, sampler=sampler, collate_fn=collate)
scorer = fs.CausalLMScorer(model)  # a frozen copy, taken while the model is whole
stream = fs.FlowStream(loader, scorer, include=("denominator",), process_group=mesh)
for layer in [*model.model.layers, model]:
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if args.model else 1e-3)
parts = {"step": 0, f"stream of rank {dist.get_rank()}": stream}
if finished := sorted(args.folder.glob("step-*/.metadata")):  # written when all ranks have saved theirs
    parts["model"], parts["optimizer"] = get_state_dict(model, optimizer)
    dcp.load(parts, checkpoint_id=finished[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])

for batch in islice(stream, args.steps):
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels, weight, denominator = (batch.pop(key) for key in ("labels", "flow_weight", "flow_denominator"))
    loss = fs.weighted_lm_loss(model(**batch).logits, labels, weight, denominator=denominator)
    loss.backward()  # FSDP's mean over ranks is then the gradient of one process with all their samples
    optimizer.step()
    optimizer.zero_grad()
    parts["step"] += 1
parts["model"], parts["optimizer"] = get_state_dict(model, optimizer)
dcp.save(parts, checkpoint_id=args.folder / f"step-{parts['step']:08d}")
if dist.get_rank() == 0:
    step, metrics = parts["step"], stream.metrics()
    print(f"step {step}: τ = {metrics['flow/tau']:.4f} nats, {metrics['flow/samples_seen']:.0f} samples scored")
stream.close()
dist.destroy_process_group()
