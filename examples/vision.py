"""Fine-tune an image classifier on classes of its own in the paper's three stages, and see what it keeps of the old.

python examples/vision.py
Images: scikit-learn's handwritten digits. Pre-trained on 0 to 4, fine-tuned on 5 to 9. One run tells little: a smaller
learning rate forgets less, too; `flowstream vision` does this with any model, data set and method.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flowstream as fs


def small_cnn(num_classes):
    layers = []
    for inputs, outputs in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, num_classes))


def train(model, stream, epochs, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for x, y, weight in stream:
            fs.weighted_cross_entropy(model(x), y, weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def accuracy(model, dataset):
    x, y = dataset[1::2]  # what training leaves out
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images, old = images.float().view(-1, 1, 8, 8) / 16, labels < 5
old_digits, new_digits = TensorDataset(images[old], labels[old]), TensorDataset(images[~old], labels[~old] - 5)
old_loader, loader = (
    DataLoader(TensorDataset(*dataset[::2]), batch_size=32, shuffle=True) for dataset in (old_digits, new_digits)
)
model = small_cnn(num_classes=5)
unweighted = fs.FlowStream(old_loader, fs.ClassifierScorer(model), policy=fs.Uniform())  # nothing is scored
original = train(model, unweighted, epochs=3, lr=0.05)
probe = fs.linear_probe(original, 5, loader, steps=30, learning_rate=0.01)  # 1: a new head on the frozen body
print(f"{'probe':8} new digits {accuracy(probe, new_digits):.3f}  old ones {accuracy(original, old_digits):.3f}")
for name, policy in (("plain", fs.Uniform()), ("FLOW", fs.Flow())):
    stream = fs.FlowStream(loader, fs.ClassifierScorer(probe), policy=policy)
    tuned = train(copy.deepcopy(probe), stream, epochs=4, lr=0.1)  # 2: body and head, with weights from the probe
    tuned = fs.linear_probe(tuned, None, loader, steps=50, learning_rate=0.01)  # 3: the head alone
    kept = accuracy(fs.with_original_head(tuned, original), old_digits)
    print(f"{name:8} new digits {accuracy(tuned, new_digits):.3f}  old ones {kept:.3f}")
