"""flowstream: FLOW's sample weights, online, for any data loader.

Weight each fine-tuning sample by w = exp(-f(θ*)/τ), f its loss under the frozen pre-trained model and τ the median of
those losses (Sanyal et al., ICML 2025, arXiv 2502.02797), while the data stream.
"""

from flowstream.checkpoint import load_state, save_state
from flowstream.digest import Digest
from flowstream.distributed.message import UnevenError
from flowstream.distributed.rank_error import RankError
from flowstream.elastic import merge_states
from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.guard import check_weights_used
from flowstream.linear_cross_entropy import weighted_linear_cross_entropy
from flowstream.losses import weighted_cross_entropy, weighted_lm_loss
from flowstream.policies import Flow, HardFirst, Permuted, Probability, Threshold, Uniform
from flowstream.samplers import Systematic, Thin
from flowstream.scoring import (
    CausalLMScorer,
    ClassifierScorer,
    FunctionScorer,
    Prescored,
    Scorer,
    Seq2SeqLMScorer,
)
from flowstream.sharding import split_by_rank, webdataset_splitters
from flowstream.sources import Source, register_source
from flowstream.stage import stage
from flowstream.stream import FlowStream
from flowstream.temperature import BatchMedian, FixedTemperature, RunningMedian, TargetESS, WindowMedian

__all__ = [
    "BatchMedian",
    "CausalLMScorer",
    "ClassifierScorer",
    "Digest",
    "ElasticDistributedSampler",
    "FixedTemperature",
    "Flow",
    "FlowStream",
    "FunctionScorer",
    "HardFirst",
    "Permuted",
    "Prescored",
    "Probability",
    "RankError",
    "RunningMedian",
    "Scorer",
    "Seq2SeqLMScorer",
    "Source",
    "Systematic",
    "TargetESS",
    "Thin",
    "Threshold",
    "UnevenError",
    "Uniform",
    "WindowMedian",
    "check_weights_used",
    "load_state",
    "merge_states",
    "register_source",
    "save_state",
    "split_by_rank",
    "stage",
    "webdataset_splitters",
    "weighted_cross_entropy",
    "weighted_linear_cross_entropy",
    "weighted_lm_loss",
]
