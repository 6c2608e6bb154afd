"""flowstream: FLOW's sample weights, online, for any data loader.

Weight each fine-tuning sample by w = exp(-f(θ*)/τ), f its loss under the frozen pre-trained model and τ the median of
those losses (Sanyal et al., ICML 2025, arXiv 2502.02797), while the data stream.
"""

from flowstream.checkpoint import load_state, save_state
from flowstream.companions.dro import Dro
from flowstream.companions.half_fine_tuning import HalfMask, half_fine_tuning
from flowstream.companions.linear_probe import linear_probe, with_original_head
from flowstream.companions.mixup import mixup
from flowstream.companions.mofo import MoFO
from flowstream.companions.reference_distance import DistanceToReference
from flowstream.companions.wise_ft import interpolate, sweep_alphas
from flowstream.companions.wise_ft_files import interpolate_checkpoints
from flowstream.digest import Digest
from flowstream.distributed.message import UnevenError
from flowstream.distributed.rank_error import RankError
from flowstream.elastic import merge_states
from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.guard import check_weights_used
from flowstream.linear_cross_entropy import weighted_linear_cross_entropy
from flowstream.losses import weighted_cross_entropy, weighted_lm_loss
from flowstream.policies import Flow, HardFirst, Permuted, Probability, Threshold, Uniform
from flowstream.rehearsal import Rehearsal
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
    "DistanceToReference",
    "Dro",
    "ElasticDistributedSampler",
    "FixedTemperature",
    "Flow",
    "FlowStream",
    "FunctionScorer",
    "HalfMask",
    "HardFirst",
    "MoFO",
    "Permuted",
    "Prescored",
    "Probability",
    "RankError",
    "Rehearsal",
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
    "half_fine_tuning",
    "interpolate",
    "interpolate_checkpoints",
    "linear_probe",
    "load_state",
    "merge_states",
    "mixup",
    "register_source",
    "save_state",
    "split_by_rank",
    "stage",
    "sweep_alphas",
    "webdataset_splitters",
    "weighted_cross_entropy",
    "weighted_linear_cross_entropy",
    "weighted_lm_loss",
    "with_original_head",
]
