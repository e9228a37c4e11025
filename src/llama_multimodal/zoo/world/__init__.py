"""The small world of the embedded model: drawn pictures, questions about them and exact answers."""

from llama_multimodal.zoo.world.sample import corpus, sample
from llama_multimodal.zoo.world.types import CHARS, COLORS, KINDS, SHAPES, Mark, Sample, Turn

__all__ = ["CHARS", "COLORS", "KINDS", "SHAPES", "Mark", "Sample", "Turn", "corpus", "sample"]
