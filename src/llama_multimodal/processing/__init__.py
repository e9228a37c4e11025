"""Pictures and conversations in, `ModelInputs` out; and tokens back to text."""

from .images import open_image
from .processor import Processor
from .tokenizer import Tokenizer

__all__ = ["Processor", "Tokenizer", "open_image"]
