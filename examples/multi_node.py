"""Train on many nodes: DDP over webdataset shards of unequal size, one τ, equal steps, checkpoints to go on from.

torchrun --nproc-per-node 4 examples/multi_node.py [--shards 'PATH/part-{000..099}.tar'] [--folder FOLDER] [--steps N]
A sample is a .txt. On several nodes also --nnodes and --rdzv-endpoint, and a FOLDER that all of them see. Run again, it
goes on from its last checkpoint. So it does by itself under torchrun --max-restarts, which since torch 2.5 needs
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (else ranks look for those of the life before: pytorch issue 135712). The model is
untrained, so flowstream says, rightly, that its weights carry no information: put yours in its place.
"""

import argparse
import os
import re
import sysconfig
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset as wds
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import flowstream as fs


def write_shards(folder):
    """Docstrings of Python's own. Every fourth shard is small: of 4 ranks, the last one has far less to read."""
    source = "".join(file.read_text("utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py")))
    texts = iter(re.findall('"""(.{20,}?)"""', source, re.DOTALL))
    for number in range(8):
        with wds.TarWriter(f"{folder}/part-{number:03d}.tar") as writer:
            for row, text in enumerate(islice(texts, 3 if number % 4 == 3 else 30)):
                writer.write({"__key__": f"{number}-{row}", "txt": text})
    return f"{folder}/part-{{000..007}}.tar"


def collate(samples):
    rows = [torch.tensor(list(sample["txt"].encode()[:128])) for sample in samples]  # bytes as tokens
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


def save(step):
    fs.save_state(stream, args.folder / "streams", step=step)
    dist.barrier()  # so that where the model of a step is, the streams of all ranks are, whoever dies, and when
    if dist.get_rank() == 0:
        parts = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(parts, args.folder / "model.tmp")
        (args.folder / "model.tmp").rename(args.folder / f"model-{step:08d}.pt")
        for old in sorted(args.folder.glob("model-*.pt"))[:-2]:
            old.unlink()


parser = argparse.ArgumentParser()
parser.add_argument("--shards")
parser.add_argument("--folder", type=Path, default=Path("multi_node"))
parser.add_argument("--steps", type=int, default=10**9)
parser.add_argument("--save-every", type=int, default=20)
args = parser.parse_args()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
dist.init_process_group(device_id=device if device.type == "cuda" else None)  # nccl on GPUs, else gloo
args.folder.mkdir(parents=True, exist_ok=True)
shards = [args.shards or (write_shards(args.folder) if dist.get_rank() == 0 else "")]
dist.broadcast_object_list(shards)

torch.manual_seed(0)  # all ranks, and later runs, must have the same reference
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
model = LlamaForCausalLM(config).to(device)
order = {"shardshuffle": 100, "detshuffle": True, "seed": 0}  # found again where a run goes on
dataset = wds.WebDataset(shards[0], **order, **fs.webdataset_splitters()).decode().batched(4, collation_fn=collate)
loader = wds.WebLoader(dataset, batch_size=None, num_workers=1)
scorer = fs.CausalLMScorer(model)  # a frozen copy, taken before DDP wraps the model and a checkpoint is loaded
stream = fs.FlowStream(loader, scorer, include=("denominator",))
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
step = 0
if checkpoints := sorted(args.folder.glob("model-*.pt")):
    parts = torch.load(checkpoints[-1], map_location=device)
    step = fs.load_state(stream, args.folder / "streams", step=parts["step"])
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(parts["optimizer"])

for batch in islice(stream, args.steps - step):
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels, weight, denominator = (batch.pop(key) for key in ("labels", "flow_weight", "flow_denominator"))
    loss = fs.weighted_lm_loss(parallel(**batch).logits, labels, weight, denominator=denominator)
    loss.backward()  # DDP's mean over ranks is then the gradient of one process with all their samples
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if step % args.save_every == 0:
        save(step)
save(step)
if dist.get_rank() == 0:
    metrics = stream.metrics()
    print(f"step {step}: τ = {metrics['flow/tau']:.4f} nats, {metrics['flow/samples_seen']:.0f} samples scored")
stream.close()
dist.destroy_process_group()
