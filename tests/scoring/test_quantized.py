"""References that transformers quantises as it loads them (`quantization_config`), against their own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import flowstream as fs

pytest.importorskip("bitsandbytes")

CONFIGS = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_reference_scores_as_it_says_itself(tiny: Any, tmp_path: Any, name: str) -> None:
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    plain = fs.CausalLMScorer.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    scorer = fs.CausalLMScorer.from_pretrained(str(tmp_path), dtype=torch.bfloat16, quantization_config=CONFIGS[name])
    assert scorer.fingerprint() != plain.fingerprint()
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    (scores,) = scorer.begin([{"input_ids": ids, "labels": ids}], level="sample").finish()
    model = scorer._reference.model
    assert "bitsandbytes" in type(model.model.layers[0].mlp.up_proj).__module__
    with torch.no_grad():
        alone = [F.cross_entropy(model(row[None], use_cache=False).logits[0, :-1].float(), row[1:]) for row in ids]
    torch.testing.assert_close(scores.loss, torch.stack(alone), rtol=0.02, atol=0.02)
    scorer.check()


def test_a_quantised_base_with_adapters_scores_as_without_them(tiny: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=CONFIGS["4 bit"])
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    (expected,) = fs.CausalLMScorer(base, copy=False).begin([batch], level="sample").finish()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    scorer = fs.CausalLMScorer(model)
    with torch.no_grad():  # as training would; on a CPU, bitsandbytes has no backward once its layers were in eval mode
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    (scores,) = scorer.begin([batch], level="sample").finish()
    torch.testing.assert_close(scores.loss, expected.loss, rtol=0, atol=0)
    with torch.no_grad():
        trained = model.eval()(ids).logits
        with model.disable_adapter():
            assert not torch.equal(trained, model(ids).logits)
