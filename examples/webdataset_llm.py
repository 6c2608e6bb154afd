"""Fine-tune a language model on prompts and answers in webdataset shards, FLOW weights being a stage of the pipeline.

python examples/webdataset_llm.py [--shards 'PATH/part-{000..002}.tar']
A sample is a .json with "prompt" and "answer"; without --shards, they are written from Python's and torch's docstrings.
The model is untrained, so flowstream says, rightly, that its weights carry no information: put yours in its place.
"""

import argparse
import builtins
import inspect
import tempfile

import torch
import webdataset as wds
from transformers import LlamaConfig, LlamaForCausalLM

import flowstream as fs


def write_shards(folder):
    """The names of a few modules' members, and the first lines of their docstrings."""
    with wds.ShardWriter(f"{folder}/part-%03d.tar", maxcount=130, verbose=0) as writer:
        for module in (builtins, inspect, torch.nn):
            for name, member in inspect.getmembers(module, callable):
                if not name.startswith("_") and inspect.getdoc(member):
                    sample = {"prompt": f"{module.__name__}.{name}: ", "answer": inspect.getdoc(member).splitlines()[0]}
                    writer.write({"__key__": f"{module.__name__}/{name}".replace(".", "_"), "json": sample})
        return [f"{folder}/part-{number:03d}.tar" for number in range(writer.shard)]


def tokenize(sample):
    prompt, answer = (list(sample["json"][key].encode()[:64]) for key in ("prompt", "answer"))  # bytes as tokens
    return torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)


def collate(rows):
    columns = zip(*rows, strict=True)
    ids, labels = (torch.nn.utils.rnn.pad_sequence(column, True, padding_value=-100) for column in columns)
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": labels}


parser = argparse.ArgumentParser()
parser.add_argument("--shards")
shards = parser.parse_args().shards or write_shards(tempfile.mkdtemp())
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
stage = fs.stage(fs.CausalLMScorer(model))
dataset = wds.WebDataset(shards, shardshuffle=100).decode().map(tokenize).shuffle(200).batched(8, collation_fn=collate)
loader = wds.WebLoader(dataset, batch_size=None, num_workers=1).compose(stage)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(2):
    losses = []
    for batch in loader:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        losses.append(fs.weighted_lm_loss(model(**batch).logits, labels, weight))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
print(*(f"{name} {value:.3g}" for name, value in stage.stream.metrics().items()), sep="\n")
