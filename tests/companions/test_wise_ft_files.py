"""WiSE-FT of checkpoints: what from_pretrained loads, in one pass, with little memory, whole or not there at all."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from allocations import peak_of
from companions.loops import llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from flowstream.companions import wise_ft_files
from flowstream.companions.wise_ft import interpolate
from flowstream.companions.wise_ft_files import interpolate_checkpoints

peft = pytest.importorskip("peft")


def tuned_llama(**config: Any) -> Any:
    model = llama(**config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(model: Any, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [("1GB", "1GB"), ("20KB", "12KB"), ("1GB", "12KB"), ("20KB", "1GB")])
def test_what_loads_is_the_interpolated_model_however_the_two_are_cut(tmp_path: Path, sizes: Any, tied: bool) -> None:
    reference, tuned = llama(tie_word_embeddings=tied), tuned_llama(tie_word_embeddings=tied)
    start = saved(reference, tmp_path / "base", max_shard_size=sizes[0])
    end = saved(tuned, tmp_path / "tuned", max_shard_size=sizes[1])
    (end / "tokenizer.json").write_text("{}")
    (end / "optimizer.bin").write_bytes(b"large")
    (end / "trainer_state.json").write_text("{}")
    folders = interpolate_checkpoints(start, end, tmp_path / "wise", [0.0, 0.25, 1.0])
    assert [folder.name for folder in folders.values()] == ["alpha-0.00", "alpha-0.25", "alpha-1.00"]
    assert sorted(path.name for path in (tmp_path / "wise").iterdir()) == ["alpha-0.00", "alpha-0.25", "alpha-1.00"]
    for alpha, folder in folders.items():
        kept = {path.name for path in end.iterdir()} - {"optimizer.bin", "trainer_state.json"}
        assert {path.name for path in folder.iterdir()} == kept
        loaded, wanted = AutoModelForCausalLM.from_pretrained(folder), interpolate(reference, tuned, alpha)
        for (name, p), q in zip(loaded.named_parameters(), wanted.named_parameters(), strict=True):
            assert p.equal(q[1]), name
    for path in end.glob("*.safetensors"):
        assert (folders[1.0] / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_one_number_gives_the_folder_itself_and_odd_numbers_names_of_their_own(tmp_path: Path, base: Path) -> None:
    end = saved(tuned_llama(), tmp_path / "tuned")
    (tmp_path / "one").mkdir()  # empty: taken
    assert interpolate_checkpoints(base, end, tmp_path / "one", 0.5) == {0.5: tmp_path / "one"}
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), LlamaForCausalLM)
    folders = interpolate_checkpoints(base, end, tmp_path / "deep" / "wise", [0.125, 0.1])
    assert [folder.name for folder in folders.values()] == ["alpha-0.125", "alpha-0.10"]


def test_files_scalars_empty_tensors_and_dtypes(tmp_path: Path) -> None:
    start = {
        "half": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float16), "scalar": torch.tensor(1.0),
        "count": torch.tensor([1, 2]), "none": torch.zeros(0, 3), "wide": torch.tensor([1.0], dtype=torch.float64),
        "flags": torch.tensor([True]),
    }  # fmt: skip
    end = {
        "half": torch.tensor([3.0, 2.0, 1.0], dtype=torch.bfloat16), "scalar": torch.tensor(2.0),
        "count": torch.tensor([7, 8]), "none": torch.zeros(0, 3), "flags": torch.tensor([False]),
        "wide": torch.tensor([1 + 1e-12], dtype=torch.float64),
    }  # fmt: skip
    safetensors.torch.save_file(start, tmp_path / "a.safetensors")
    safetensors.torch.save_file(end, tmp_path / "b.safetensors", {"format": "pt", "note": "kept"})
    interpolate_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out", 0.5)
    found = safetensors.torch.load_file(tmp_path / "out" / "b.safetensors")
    assert found["half"].equal(torch.tensor([2.0, 2.0, 2.5], dtype=torch.bfloat16))
    assert (found["scalar"].item(), found["scalar"].shape) == (1.5, ())
    assert found["count"].tolist() == [7, 8]
    assert found["none"].shape == (0, 3)
    assert 1 < found["wide"].item() < 1 + 1e-12
    assert found["flags"].tolist() == [False]
    with safetensors.safe_open(tmp_path / "out" / "b.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


def test_every_tensor_is_read_once_for_all_alphas(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = saved(tuned_llama(), tmp_path / "tuned", max_shard_size="12KB")
    read: Counter[str] = Counter()

    class Counting(io.FileIO):
        """A file that counts the bytes of weights that are read of it."""

        def readinto(self, buffer: Any) -> int:
            read[Path(str(self.name)).parent.name] += len(buffer)
            return super().readinto(buffer)

    monkeypatch.setattr(wise_ft_files, "open", Counting, raising=False)
    monkeypatch.setattr(wise_ft_files, "_PIECE", 100)
    interpolate_checkpoints(base, end, tmp_path / "wise", [0.1, 0.5, 0.7, 1.0])
    size = sum(4 * tensor.numel() for tensor in llama().state_dict().values())
    assert read == {"base": size, "tuned": size}


def test_memory_is_a_few_pieces_whatever_the_model_and_the_alphas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2**20
    for name, value in (("a", 0.0), ("b", 1.0)):
        tensors = {str(number): torch.full((1024, size // 1024), value) for number in range(3)}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    piece = 2**14
    monkeypatch.setattr(wise_ft_files, "_PIECE", piece)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tracemalloc.start()  # what is read lies in Python's memory, what is computed in torch's
    try:
        peak = peak_of(lambda: interpolate_checkpoints(*paths, tmp_path / "out", [0.1, 0.5, 0.9]))
        peak += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 16 * 4 * piece == size  # a quarter of one tensor, of which there are six


def test_a_crash_leaves_nothing_that_loads(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = saved(tuned_llama(), tmp_path / "tuned", max_shard_size="12KB")
    last = sorted(end.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    shutil_copy = wise_ft_files.shutil.copy2

    def full(*args: Any) -> Any:
        if Path(args[0]).name == "model.safetensors.index.json":
            raise OSError(28, "No space left on device")
        return shutil_copy(*args)

    monkeypatch.setattr(wise_ft_files.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        interpolate_checkpoints(base, end, tmp_path / "wise", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    last.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{last.name} has .* bytes, and its head says .*: it was cut off"):
        interpolate_checkpoints(base, end, tmp_path / "wise", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_errors_name_the_tensor_and_the_file(tmp_path: Path, base: Path) -> None:
    def refused(
        end: Path, match: str, kind: type[Exception] = ValueError, alphas: Any = 0.5, start: Path = base
    ) -> None:
        with pytest.raises(kind, match=match):
            interpolate_checkpoints(start, end, tmp_path / "wise", alphas)
        assert not (tmp_path / "wise").exists()

    larger = tuned_llama()
    larger.resize_token_embeddings(99)
    refused(
        saved(larger, tmp_path / "larger"),
        r"'lm_head.weight' has shape \[99, 32\] in .*larger/model.safetensors and \[97, 32\] in .*base/model",
    )
    tied = saved(tuned_llama(tie_word_embeddings=True), tmp_path / "tied")
    refused(tied, r"'lm_head.weight' is in .*base/model.safetensors and not in .*tied.*tie_word_embeddings")
    refused(base, r"'lm_head.weight' is in .*base/model.safetensors and not in .*tied", start=tied)
    adapter = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(saved(adapter, tmp_path / "adapter"), r"adapter holds adapters only.*merge_and_unload")
    refused(tmp_path / "absent", "there is no file or folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has neither model.safetensors nor", FileNotFoundError)
    for alphas, match in (
        (1.5, "alpha is 1.5"), (-0.1, "alpha is -0.1"), ([0.5, 0.5], "given twice"), ([], "no alpha"),
        (True, "alpha is True"),
    ):  # fmt: skip
        refused(base, match, alphas=alphas)
    (tmp_path / "damaged.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00abcde")
    refused(tmp_path / "damaged.safetensors", "damaged.safetensors is no safetensors file")
    quantised = saved(tuned_llama(), tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    refused(quantised, r"quantised/config.json says that the weights are quantised")
    eighth = nn.Linear(4, 4).weight.detach().to(torch.float8_e4m3fn)
    safetensors.torch.save_file({"weight": eighth}, tmp_path / "eighth.safetensors")
    refused(tmp_path / "eighth.safetensors", "'weight' is F8_E4M3 in", start=tmp_path / "eighth.safetensors")
    cut = saved(tuned_llama(), tmp_path / "cut", max_shard_size="12KB")
    sorted(cut.glob("*.safetensors"))[0].unlink()
    refused(cut, r"index.json names model-00001-of-\d+.safetensors, which is not there", FileNotFoundError)


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, base: Path) -> None:
    for target in (base, base / "config.json"):
        with pytest.raises(FileExistsError, match="is there and not empty"):
            interpolate_checkpoints(base, base, target, 0.5)


def test_an_index_that_an_older_save_has_left_does_not_count(tmp_path: Path, base: Path) -> None:
    end = saved(tuned_llama(), tmp_path / "tuned", max_shard_size="12KB")
    newer = tuned_llama()
    newer.lm_head.weight.data += 1
    safetensors.torch.save_file(dict(newer.state_dict()), end / "model.safetensors", metadata={"format": "pt"})
    (folder,) = interpolate_checkpoints(base, end, tmp_path / "wise", torch.tensor([1.0])).values()
    for path in (end, folder):
        found = LlamaForCausalLM.from_pretrained(path)
        torch.testing.assert_close(found.lm_head.weight, newer.lm_head.weight, rtol=0, atol=0)
