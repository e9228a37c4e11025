"""A checkpoint folder: which layout it has, what it holds, whether that fits a model, and reading it into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import AnyModelConfig, LanguageModelConfig, ModelConfig, SiglipConfig, config_from_hf
from ..errors import CheckpointError, ConfigError, DeviceError, UserError
from ..models import LanguageModel, build_model
from ..ops import PackedWeight
from ..ops.huge_pages import empty_parameter
from ..quant.nf4 import put_nf4
from ..quant.pack import (
    LM_HEAD,
    Packing,
    layers_to_pack,
    pack_layer,
    packable_layers,
    put_packed,
    use_fp8_activations,
)
from .families import hf_rules, meta_rules
from .gguf import GGUFFile, gguf_rules, read_gguf_config
from .io import SafetensorsFile, TensorInfo, read_json
from .meta_params import config_from_meta
from .meta_pth import MetaShards, shard_paths
from .nf4 import StoredNf4, compute_dtype, find_nf4
from .packed import StoredPacked, asks_for_fp8_activations, check_config, find_packed, side_by_side
from .rules import Held, Rule, Source

Layout = Literal["hf", "meta", "gguf"]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_TILES = 64  # an aspect-ratio table grows with its square
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids", "embeddings.mask_token")
"""Tables of numbers in older files, and what stood for hidden patches in DINOv2's training."""
_LISTED = 20  # tensors named in one error


class Store(Protocol):
    """Stored tensors by name."""

    entries: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor: ...

    def copy_into(self, name: str, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Stored:
    """One tensor of a store: a `rules.Source`."""

    store: Store
    name: str

    def copy_into(self, out: Tensor) -> None:
        self.store.copy_into(self.name, out)

    def tensor(self) -> Tensor:
        return self.store.tensor(self.name)


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder whose tensors fit its configuration."""

    folder: Path
    layout: Layout
    config: AnyModelConfig
    rules: tuple[Rule, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of our parameters
    store: Store
    packed: Mapping[str, StoredPacked | StoredNf4]  # of our parameters, those that are not stored as plain numbers
    quantization: Mapping[str, Any] = field(default_factory=dict)  # `quantization_config`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the plain weights have."""
        sizes: dict[torch.dtype, int] = {}
        for name in (name for rule in self.rules if rule.ours not in self.packed for name in rule.theirs):
            info = self.store.entries[name]
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def dtype_of(self, rule: Rule) -> torch.dtype:
        return self.store.entries[rule.theirs[0]].dtype

    def sources(self, rule: Rule) -> list[Stored]:
        return [Stored(self.store, name) for name in rule.theirs]


# --- opening ---------------------------------------------------------------------------------------------------------


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Find the layout of a folder, read configuration and headers, and check every name, shape and dtype. Reads no
    weights. A GGUF file may be given itself.

    Raises:
        CheckpointError: no checkpoint, damaged files, or tensors that are missing, unknown or misshaped (one error
            lists them all).
        ConfigError: the configuration is damaged or asks for something unknown.
    """
    folder = Path(folder)
    if folder.is_file() or (files := _gguf_files(folder)):
        return _open_gguf(folder if folder.is_file() else files[0])
    layout = find_layout(folder)
    if layout is None and find_layout(folder / "original") is not None:
        folder = folder / "original"  # where Meta's layout lies in the hub's repositories
        layout = find_layout(folder)
    if layout is None:
        raise CheckpointError(_no_checkpoint(folder))
    store: Store = SafetensorsShards(folder) if layout == "hf" else MetaShards(shard_paths(folder))
    config = _read_config(folder, layout, store)
    if config.text.tie_word_embeddings:
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            store.entries.pop(name, None)  # some files hold the embedding twice
    shapes = parameter_shapes(config)
    rules = hf_rules(config, shapes, store.entries) if layout == "hf" else meta_rules(config)
    packed: dict[str, StoredPacked | StoredNf4] = {}
    if layout == "hf":
        packed = {**find_packed(store.entries, rules, shapes), **find_nf4(store.entries, rules, shapes)}
    check_tensors(folder, store.entries, rules, shapes, packed)
    quantization = (read_json(folder / "config.json").get("quantization_config") or {}) if packed else {}
    return Checkpoint(folder, layout, config, tuple(rules), shapes, store, packed, quantization)


def _gguf_files(folder: Path) -> list[Path]:
    """The one GGUF file of a folder that holds no other checkpoint.

    Raises:
        CheckpointError: there are several.
    """
    files = sorted(folder.glob("*.gguf")) if find_layout(folder) is None else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files ({names}); give the file, not the folder")
    return files


def _open_gguf(path: Path) -> Checkpoint:
    store = GGUFFile(path)
    config = _read_config(path, "gguf", store)
    assert isinstance(config, LanguageModelConfig)
    rules, shapes = gguf_rules(config), parameter_shapes(config)
    check_tensors(path, store.entries, rules, shapes, {})
    return Checkpoint(path, "gguf", config, tuple(rules), shapes, store, {})


def find_layout(folder: Path) -> Layout | None:
    """The layout of a folder that has both a configuration and weights."""
    if (folder / "config.json").exists() and ((folder / INDEX).exists() or (folder / SINGLE).exists()):
        return "hf"
    return "meta" if (folder / "params.json").exists() and shard_paths(folder) else None


def _no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    wanted = f"config.json with {SINGLE} or {INDEX}, or params.json with consolidated.*.pth, or a .gguf file"
    if any(folder.glob("pytorch_model*.bin")):
        return f"{folder} has its weights in pytorch_model*.bin, which is not read; save it as safetensors first"
    present = sorted(path.name for path in folder.iterdir())[:8]
    return f"{folder} holds no checkpoint; wanted {wanted}; it has {', '.join(present) or 'nothing'}"


class SafetensorsShards:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names, as one set of tensors."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, TensorInfo] = {}
        self._files: dict[str, SafetensorsFile] = {}
        for path in self._paths(folder):
            file = SafetensorsFile(path)
            for name, info in file.entries.items():
                if name in self._files:
                    raise CheckpointError(f"{name!r} is in both {self._files[name].path.name} and {path.name}")
                if not name.endswith(_NOT_WEIGHTS):
                    self.entries[name], self._files[name] = info, file

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        index = folder / INDEX
        if not index.exists():
            return [folder / SINGLE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        names = set()
        for name in weight_map.values():
            plain = isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name
            if not plain or "\\" in name or "\0" in name or len(name) > 200:
                raise CheckpointError(f"{index} names {str(name)[:80]!r}, no file of its own folder; refused")
            names.add(name)
        missing = sorted(name for name in names if not (folder / name).exists())
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"{folder} lacks the shard {', '.join(missing[:3])}{more}; download it again")
        return [folder / name for name in sorted(names)]

    def tensor(self, name: str) -> Tensor:
        return self._files[name].tensor(name)

    def copy_into(self, name: str, out: Tensor) -> None:
        self._files[name].copy_into(name, out)


def _read_config(folder: Path, layout: Layout, store: Store) -> AnyModelConfig:
    path = folder if layout == "gguf" else folder / ("config.json" if layout == "hf" else "params.json")
    raw = {} if layout == "gguf" else read_json(path)
    config: AnyModelConfig
    try:
        if isinstance(store, GGUFFile):
            config = read_gguf_config(store)
        elif layout == "meta":
            config = config_from_meta(raw, {name: info.shape for name, info in store.entries.items()})
        else:
            vision = raw.get("vision_config")
            tiles = vision.get("max_num_tiles") if isinstance(vision, dict) else None
            if isinstance(tiles, int) and not 1 <= tiles <= _MAX_TILES:
                raise ConfigError(f"vision_config: max_num_tiles must lie between 1 and {_MAX_TILES}, not {tiles}")
            generation = folder / "generation_config.json"
            check_config(raw)
            plain = {key: value for key, value in raw.items() if key != "quantization_config"}
            config = config_from_hf(plain, read_json(generation) if generation.exists() else None)
            if config.text.pad_token_id >= config.text.vocab_size:  # never read, but it must have an embedding
                config = replace(config, text=replace(config.text, pad_token_id=0))
            if isinstance(config, ModelConfig):
                config = _with_pooling_head(config, store)
    except UserError as error:
        said = str(error).removeprefix(f"{path.name}: ")  # most know the file's name, none its folder
        raise type(error)(f"{path}: {said}") from error
    except Exception as error:  # a value of an unforeseen type
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    layers = config.text.num_hidden_layers
    if isinstance(config, ModelConfig):
        counts = (getattr(config.vision, name, 0) for name in ("num_hidden_layers", "num_global_layers"))
        layers += sum(counts)
    if layers > len(store.entries):
        raise CheckpointError(f"{path} asks for {layers} layers, but there are only {len(store.entries)} tensors")
    return config


def _with_pooling_head(config: ModelConfig, store: Store) -> ModelConfig:
    """Whether SigLIP's pooling head, which no language model needs, is among the tensors is seen there only."""
    if not isinstance(config.vision, SiglipConfig):
        return config
    head = any(".head.probe" in name for name in store.entries)
    return replace(config, vision=replace(config.vision, pooling_head=head))


def build_on_meta(config: AnyModelConfig) -> LanguageModel:
    """The model without memory for its weights.

    Raises:
        ConfigError: sizes that no tensor can have.
    """
    with on_meta("a model"):
        return build_model(config)


@contextmanager
def on_meta(what: str) -> Iterator[None]:
    """What is built inside has no memory for its weights; `what` it is, for the error.

    Raises:
        ConfigError: sizes that no tensor can have.
    """
    try:
        with torch.device("meta"), _NoInitialValues():
            yield
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ConfigError(f"{what} of these sizes cannot be built: {str(error).splitlines()[0]}") from error


class _NoInitialValues(TorchFunctionMode):
    """Leave out the arithmetic of initial values. On the meta device it computes nothing, and yet its first use makes
    torch import 800 modules: 1.4 s and 70 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "mul", "__mul__", "__rmul__"):
            return next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor))
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def parameter_shapes(config: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of our model."""
    return {name: tuple(value.shape) for name, value in build_on_meta(config).named_parameters()}


def check_tensors(
    folder: Path,
    found: Mapping[str, TensorInfo],
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, StoredPacked | StoredNf4],
) -> None:
    """Hold what is found against what the rules want for our parameters' shapes.

    Raises:
        CheckpointError: tensors that are missing, unknown, misshaped or of another kind; one error lists them all.
    """
    parts = {name: info for stored in packed.values() for name, info in stored.infos().items()}
    wanted = {name: info.shape for name, info in parts.items()}
    for rule in rules:
        if rule.ours not in packed:
            wanted |= dict(zip(rule.theirs, rule.shapes(shapes[rule.ours]), strict=True))
    problems = [f"missing {name}: {list(shape)} expected" for name, shape in wanted.items() if name not in found]
    problems += [f"unknown {name}: {list(info.shape)}" for name, info in found.items() if name not in wanted]
    for name, shape in wanted.items():
        info = found.get(name)
        if info is None:
            continue
        if info.shape != shape and not (info.num_bytes == info.dtype.itemsize and shape == (1,)):
            problems.append(f"misshaped {name}: {list(info.shape)} found, {list(shape)} expected")
        elif name in parts and not _is_plain(parts[name].dtype):
            if info.dtype != parts[name].dtype:
                problems.append(f"wrong dtype {name}: {info.dtype} found, {parts[name].dtype} expected")
        elif not _is_plain(info.dtype):
            problems.append(f"quantized {name}: {info.dtype} found, a floating-point dtype expected")
    if problems:
        rest = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        lines = "\n  ".join([*problems[:_LISTED], *rest])
        raise CheckpointError(f"{folder} does not fit its configuration ({len(problems)} tensors):\n  {lines}")


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether a tensor of it needs nothing besides to be a weight."""
    return dtype.is_floating_point and dtype.itemsize > 1


# --- reading weights -------------------------------------------------------------------------------------------------


def read_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    packing: Packing | None = None,
) -> LanguageModel:
    """Build the model without memory, then give it one parameter at a time, straight in its dtype and on its device.

    packing: pack each of the decoder's linear layers as soon as it is there; its plain weight is freed

    Raises:
        DeviceError: the device has not enough memory.
        ConfigError: weights that cannot be packed, or are packed already.
        CheckpointError: layers that run as one product are packed in different ways.
    """
    if packing is not None and checkpoint.packed:
        raise ConfigError(f"the weights in {checkpoint.folder} are packed already; load them without `pack`")
    model = build_on_meta(checkpoint.config)
    layers = packable_layers(model)
    waiting = {path: set(layers[path]) for path in layers_to_pack(model, packing)} if packing is not None else {}
    owner = {name: path for path, names in layers.items() for name in names}
    nf4 = {name: stored for name, stored in checkpoint.packed.items() if isinstance(stored, StoredNf4)}
    stored_packed = {owner[name] for name in checkpoint.packed.keys() - nf4.keys() if name in owner}
    total = sum(dtype.itemsize * _numel(shape) for shape in checkpoint.shapes.values())
    done = 0
    for rule in checkpoint.rules:
        path = owner.get(rule.ours, "")
        if rule.ours in nf4:
            sources = _sources(checkpoint.store, nf4[rule.ours], device)
            with _allocating(device, dtype, total):
                weight = nf4[rule.ours].read(sources).to(device)
            put_nf4(model, rule.ours.removesuffix(".weight"), weight, compute_dtype(checkpoint.quantization))
        elif path not in stored_packed:
            with _allocating(device, dtype, total):
                value = empty_parameter(checkpoint.shapes[rule.ours], dtype, device)
            if device.type != "meta":
                rule.read(checkpoint.sources(rule), value)
            set_parameter(model, rule.ours, value)
            if model.config.text.tie_word_embeddings and rule.ours == "decoder.embedding.weight":
                model.decoder.tie_lm_head()
                if packing is not None and LM_HEAD in waiting:
                    pack_layer(model, LM_HEAD, packing)
        elif rule.ours == layers[path][0]:  # the first of its layer brings the others
            packed = _read_packed(checkpoint, layers[path], device)
            with _allocating(device, dtype, total):
                put_packed(model, path, packed.to(device))
        if packing is not None and path in waiting:
            waiting[path].discard(rule.ours)
            if not waiting[path]:
                pack_layer(model, path, packing)
        done += dtype.itemsize * _numel(checkpoint.shapes[rule.ours])
        if progress is not None:
            progress(done, total)
    return use_fp8_activations(model) if asks_for_fp8_activations(checkpoint.quantization) else model


def read_parameters(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and whole values, on the CPU, one at a time: for models that hold parts of them.

    Raises:
        ConfigError: weights that are packed.
    """
    if checkpoint.packed:
        raise ConfigError(f"the weights in {checkpoint.folder} are packed and cannot be cut; take the plain checkpoint")
    for rule in checkpoint.rules:
        value = torch.empty(checkpoint.shapes[rule.ours], dtype=dtype)
        rule.read(checkpoint.sources(rule), value)
        yield rule.ours, value


@contextmanager
def _allocating(device: torch.device, dtype: torch.dtype, total: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            f"{device} has not enough memory for this model's {total / 2**30:.1f} GiB in {dtype}; use a smaller"
            " dtype, another device or a smaller model"
        ) from error


def _read_packed(checkpoint: Checkpoint, names: Sequence[str], device: torch.device) -> PackedWeight:
    """The weights of one layer of the model, side by side, on the CPU; without values for the meta device."""
    weights = []
    for stored in (checkpoint.packed.get(name) for name in names):
        if stored is not None and not isinstance(stored, StoredNf4):
            weights.append(stored.read(_sources(checkpoint.store, stored, device)))
    if len(weights) < len(names) or len({(one.format, one.group, one.zeros is None) for one in weights}) > 1:
        raise CheckpointError(f"{', '.join(names)} run as one product and must be packed alike; they are not")
    return side_by_side(weights)


def _sources(store: Store, stored: StoredPacked | StoredNf4, device: torch.device) -> dict[str, Source]:
    """The stored tensors of a weight by their names; without values for the meta device."""
    if device.type != "meta":
        return {name: Stored(store, name) for name in stored.infos()}
    infos = stored.infos().items()
    return {name: Held(torch.empty(info.shape, dtype=info.dtype, device=device)) for name, info in infos}


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by its dotted name, keeping whether it is trained."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    trained = module.get_parameter(leaf).requires_grad
    setattr(module, leaf, nn.Parameter(value, requires_grad=trained))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
