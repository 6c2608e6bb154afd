"""What the six methods feed to the training loop."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import flowstream as fs
from flowstream.compare.feeds import uniform_subset
from flowstream.demo.feeds import METHODS, Feeds
from flowstream.demo.offline import score_offline
from flowstream.demo.problems import Problem
from flowstream.demo.shards import Encoder, open_shards, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open


@pytest.fixture
def feeds(model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem], tmp_path: Path) -> Feeds:
    shards = tuple(write_shards(problems, tmp_path, num_shards=2))
    return Feeds(
        shards=shards,
        encoder=encoder,
        lengths=[len(encoder.encode(problem.question, problem.worked).ids) for problem in problems],
        batch=8,
        seed=3,
        scorer=fs.CausalLMScorer(model),
        window=2,
        warmup_samples=48,
        offline=score_offline(model, open_shards(shards, encoder, batch=8, seed=0), len(problems)),
    )


def test_offline_scoring_is_every_sample_alone_and_the_median_of_all(
    feeds: Feeds, model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]
) -> None:
    with torch.no_grad():
        encoded = [encoder.encode(problem.question, problem.worked) for problem in problems]
        alone = torch.stack(
            [model(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss for e in encoded]
        )
    torch.testing.assert_close(feeds.offline.loss, alone, rtol=1e-4, atol=1e-4)
    assert feeds.offline.tau == pytest.approx(float(alone.median()), rel=1e-4)
    torch.testing.assert_close(feeds.offline.weight, torch.exp(-alone / alone.median()), rtol=1e-3, atol=1e-4)


def test_offline_scoring_refuses_a_loader_that_leaves_problems_out(
    feeds: Feeds, model: LlamaForCausalLM, encoder: Encoder
) -> None:
    with pytest.raises(ValueError, match="read all shards"):
        score_offline(model, open_shards(feeds.shards[:1], encoder, batch=8, seed=0), len(feeds.lengths))


def test_weighted_methods_see_the_batches_of_standard_in_its_order(feeds: Feeds) -> None:
    orders = {}
    for method in ("standard", "exact", "weighted", "permuted"):
        with feeds.open(method) as feed:
            orders[method] = [batch["sample"].tolist() for batch in feed.take(10)]
    assert all(order == orders["standard"] for order in orders.values())


def test_streamed_weights_are_the_offline_weights_once_the_stream_has_seen_everything(feeds: Feeds) -> None:
    with feeds.open("exact") as exact, feeds.open("weighted") as weighted:
        for expected, batch in zip(exact.take(6), weighted.take(6), strict=True):
            torch.testing.assert_close(batch["flow_weight"], expected["flow_weight"], rtol=2e-2, atol=2e-3)
        assert weighted.metrics()["flow/tau"] == pytest.approx(feeds.offline.tau, rel=0.02)
        assert exact.score_tokens() == weighted.score_tokens() == sum(feeds.lengths)


def test_permuted_weights_are_the_same_weights_elsewhere(feeds: Feeds) -> None:
    with feeds.open("weighted") as weighted, feeds.open("permuted") as permuted:
        one = torch.cat([batch["flow_weight"] for batch in weighted.take(6)])
        other = torch.cat([batch["flow_weight"] for batch in permuted.take(6)])
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.sort().values, other.sort().values)


def test_resampled_batches_carry_no_weight_and_leave_samples_out(feeds: Feeds) -> None:
    with feeds.open("resampled") as feed:
        batches = list(feed.take(6))
        assert [len(batch["sample"]) for batch in batches[:2]] == [8, 8]  # an epoch's last may be smaller
        assert all("flow_weight" not in batch for batch in batches)
        assert 0.2 < feed.metrics()["flow/acceptance"] < 0.6


@pytest.mark.parametrize("method", ["standard", "subsampled"])
def test_plain_methods_cost_no_scoring(feeds: Feeds, method: str) -> None:
    subset = uniform_subset(48, 16, seed=0) if method == "subsampled" else None
    with feeds.open(method, subset) as feed:
        seen = {number for batch in feed.take(6) for number in batch["sample"].tolist()}
        assert feed.score_tokens() == 0
        assert feed.metrics() == {}
    assert seen == (subset or set(range(48)))


def test_a_uniform_subset_has_its_size_and_is_replayed_by_its_seed() -> None:
    assert len(uniform_subset(100, 37, seed=1)) == 37
    assert uniform_subset(100, 37, seed=1) == uniform_subset(100, 37, seed=1) != uniform_subset(100, 37, seed=2)


def test_an_unknown_method_is_refused_with_the_known_ones(feeds: Feeds) -> None:
    with pytest.raises(ValueError, match="weighted, resampled"):
        feeds.open("best")
    assert len(METHODS) == 6
