"""Scorers: the losses of a stream's samples under a frozen reference."""

from flowstream.scoring.base import Scorer
from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.classifier import ClassifierScorer
from flowstream.scoring.function import FunctionScorer, Prescored
from flowstream.scoring.seq2seq import Seq2SeqLMScorer

__all__ = ["CausalLMScorer", "ClassifierScorer", "FunctionScorer", "Prescored", "Scorer", "Seq2SeqLMScorer"]
