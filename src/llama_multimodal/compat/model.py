"""The original's model: its call, its loss and its `generate`, over `VisionLanguageModel` and `generate`.

Shapes: B rows · T tokens · N pictures of all rows · S their side in pixels
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import nearest
from ..errors import CheckpointError, ImageError, PromptError
from ..generate import generate
from ..inputs import ImageLayout, ModelInputs, batch_inputs, visible_images
from ..models import VisionLanguageModel
from ..sampling import SamplingParams
from ..train.recompute import recompute_blocks
from .config import MLLAMAConfig

IGNORED = -100  # label of a token that is not learnt


@dataclass(frozen=True, eq=False)
class MllamaOutput(Mapping[str, Any]):
    """logits: [B, T, vocab], zeros at padding. loss: the mean over the labels that count; None without labels."""

    logits: Tensor
    loss: Tensor | None = None

    def __getitem__(self, key: str) -> Any:
        if key in self.__dict__:
            return self.__dict__[key]
        raise KeyError(f"{key}{nearest(key, self.__dict__)}")

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))


class MllamaForConditionalGeneration(nn.Module):
    """A SigLIP encoder, a projector and a Llama decoder with gated cross-attention, with fresh weights.

    Fresh gates are closed: until they are trained, pictures change nothing.

    Attributes:
        config: `config.use_cuda_kernels = False` runs this model on a GPU in plain torch
        model: the library's own model, for `llama_multimodal.generate`, `save`, `adapters` and the rest
    """

    def __init__(self, config: MLLAMAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = VisionLanguageModel(config.model)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MllamaOutput:
        """input_ids: [B, T], each picture of a row as equally many image tokens; labels: the same, -100 for what is not
        learnt; they are moved by one token here, and image tokens and padding never count
        pixel_values: [N, 3, S, S], the pictures in the order of their tokens
        attention_mask: [B, T], 0 for padding, which lies at either end of a row

        Raises:
            PromptError: tokens, pictures, mask or labels that do not go together.
            ImageError: pictures of another shape than the encoder's.
        """
        inputs, kept = self._inputs(input_ids, pixel_values, attention_mask)
        with self._backend():
            logits = self.model(inputs).logits
        if not kept.all():  # back from rows that begin with their first token
            kept = kept.to(logits.device)
            real = torch.arange(logits.shape[1]) < torch.tensor(inputs.lengths)[:, None]
            placed = logits.new_zeros(*kept.shape, logits.shape[2])
            placed[kept] = logits[real.to(logits.device)]
            logits = placed
        return MllamaOutput(logits, None if labels is None else self._loss(logits, labels, kept))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        do_sample: bool | None = None,
        top_p: float | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue every row; arguments as those of a call.

        do_sample: False takes the likeliest token each time; None samples where a temperature above 0 or a top_p is
            given

        Returns:
            [B, T + new]: `input_ids`, and the new tokens behind them; after a row's end token, padding.

        Raises:
            PromptError: as a call, or a setting out of its range.
        """
        if do_sample is None:
            do_sample = temperature != 0 and (temperature is not None or top_p is not None)
        if do_sample and temperature == 0:
            raise PromptError("a temperature of 0 does not sample; leave do_sample out, or raise the temperature")
        params = SamplingParams(max_new_tokens)
        if do_sample:
            heat, share = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
            params = SamplingParams(max_new_tokens, temperature=heat, top_p=share)
        inputs, _ = self._inputs(input_ids, pixel_values, attention_mask)
        with self._backend():
            answers = generate(self.model, inputs, params).token_ids
        new = torch.full(
            (len(answers), max(map(len, answers))), self.config.text_config.pad_token_id, dtype=torch.int64
        )
        for row, answer in zip(new, answers):
            row[: len(answer)] = torch.tensor(answer)
        return torch.cat((input_ids, new.to(input_ids)), dim=1)

    def gradient_checkpointing_enable(self) -> None:
        """Compute every block's inner values again in the backward pass, rather than keep them."""
        recompute_blocks(self.model)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but that weights of which none is this model's are refused, strict or not.

        Raises:
            CheckpointError: no name is known, a shape is another, or a name is missing or unknown where strict.
        """
        known = self.state_dict().keys()
        if state_dict and not known & state_dict.keys():
            theirs, ours = next(iter(state_dict)), next(iter(known))
            raise CheckpointError(
                f'none of these weights is of this model: they have names like "{theirs}", here they are like "{ours}";'
                " llama_multimodal.load reads checkpoints of Hugging Face, Meta and GGUF"
            )
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise CheckpointError(" ".join(str(error).split())[:500]) from error

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        """Plain torch where the configuration asks for it; on a CPU there are no CUDA kernels to leave out."""
        if self.config.use_cuda_kernels or not _on_gpu(self.model):
            yield
            return
        with ops.use_backend("torch"):
            yield

    def _inputs(
        self, input_ids: Tensor, pixel_values: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[ModelInputs, Tensor]:
        """What the library's model reads, and which of `input_ids` it holds: bool [B, T], on the CPU."""
        if input_ids.ndim != 2 or input_ids.dtype.is_floating_point or not input_ids.numel():
            raise PromptError(
                f"input_ids must be whole numbers [batch, seq], not {input_ids.dtype} {list(input_ids.shape)}"
            )
        ids = input_ids.cpu()
        kept = _real_tokens(ids, attention_mask)
        token, vocabulary = self.config.model.image_token_id, self.config.text_config.vocab_size
        wrong = ids[kept & ((ids < 0) | (ids >= vocabulary)) & (ids != token)]
        if len(wrong):
            most = f"the vocabulary ends at {vocabulary - 1}, and an image is {token}"
            raise PromptError(f"token id {int(wrong[0])} is not the model's: {most} (MLLAMAConfig has image_token_id)")
        rows = [row[real].tolist() for row, real in zip(ids, kept)]
        pixels, layouts, each = self._pictures(pixel_values, [row.count(token) for row in rows])
        pad = self.config.text_config.pad_token_id
        inputs = batch_inputs(rows, pixels, layouts, image_token_id=token, pad_token_id=pad, spliced=True)
        for b, row in enumerate(rows):  # a picture is seen from the first of its tokens on
            visible = torch.tensor(visible_images(row, token))
            if (visible[:, 0] % each).any():
                raise PromptError(f"row {b}: a picture's {each} image tokens must lie side by side")
            inputs.visible[b, : len(row), 0] = visible[:, 0] // each
            inputs.visible[b, : len(row), 1] = (visible[:, 1] + each - 1) // each
        return inputs, kept

    def _pictures(self, pixels: Tensor | None, counts: list[int]) -> tuple[Tensor, list[ImageLayout], int]:
        """The pictures, where each belongs by the rows' numbers of image tokens, and how many tokens stand for one."""
        vision = self.config.vision_config
        side = vision.image_size
        if pixels is None:
            return torch.empty(0, vision.num_channels, side, side), [], 1
        if pixels.ndim != 4 or pixels.shape[1] != vision.num_channels:
            raise ImageError(
                f"pixel_values must be [pictures, {vision.num_channels}, height, width], not {list(pixels.shape)}"
            )
        number, tokens = len(pixels), sum(counts)
        each = tokens // max(number, 1)
        if each * number != tokens or not tokens or any(count % each for count in counts):
            raise PromptError(
                f"{number} pictures and rows of {counts} image tokens (id {self.config.model.image_token_id}) do not go"
                " together; each picture must have equally many"
            )
        layouts = [
            ImageLayout(1, 1, row=b, num_tokens=each) for b, count in enumerate(counts) for _ in range(count // each)
        ]
        return pixels, layouts, each

    def _loss(self, logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        """Cross-entropy of each token's logits and the next token's label."""
        if labels.shape != kept.shape:
            raise PromptError(f"labels must be {list(kept.shape)}, as input_ids are, not {list(labels.shape)}")
        kept, labels = kept.to(logits.device), labels.to(logits.device)
        learnt = (labels != IGNORED) & (labels != self.config.model.image_token_id) & kept
        learnt = learnt[:, 1:] & kept[:, :-1]
        wanted = labels[:, 1:][learnt]
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < logits.shape[2]:
            raise PromptError(f"labels must be {IGNORED} or ids under {logits.shape[2]}")
        # The mean over no label at all is 0, as `ops.linear_cross_entropy` has it.
        return F.cross_entropy(logits[:, :-1][learnt].float(), wanted, reduction="sum") / max(len(wanted), 1)


def _on_gpu(model: VisionLanguageModel) -> bool:
    return model.device.type == "cuda"


def _real_tokens(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which tokens are no padding: bool, the shape of ids, one run in each row."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    kept = attention_mask.cpu().bool()
    if kept.shape != ids.shape:
        raise PromptError(f"attention_mask must be {list(ids.shape)}, as input_ids are, not {list(kept.shape)}")
    begins = kept & ~F.pad(kept, (1, 0))[:, :-1]
    if (begins.sum(1) != 1).any():
        row = int((begins.sum(1) != 1).nonzero()[0])
        raise PromptError(f"attention_mask: row {row} has no token, or padding between its tokens; pad at the ends")
    return kept
