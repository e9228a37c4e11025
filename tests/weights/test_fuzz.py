"""500 corrupted checkpoints: each is an error that says so or a model, soon, and in little memory."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import random_model
from safetensors.torch import load_file, save_file

from llama_multimodal import load
from llama_multimodal.errors import CheckpointError, ConfigError
from llama_multimodal.weights.save import save_checkpoint

CASES = 500
SECONDS = 5.0
MEMORY = 1 << 30  # bytes above what the process had

Corruption = Callable[[Path, random.Random], None]


def weights_of(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")]))


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip_start(folder: Path, rng: random.Random) -> None:
    """Bytes of the header, or of the pickle that stands in its place."""
    flip(weights_of(folder, rng), rng, lambda size: rng.randrange(min(size, 3000)))


def flip_end(folder: Path, rng: random.Random) -> None:
    """Bytes of an archive's directory."""
    flip(weights_of(folder, rng), rng, lambda size: size - 1 - rng.randrange(min(size, 3000)))


def flip_anywhere(folder: Path, rng: random.Random) -> None:
    flip(rng.choice(sorted(folder.iterdir())), rng, lambda size: rng.randrange(size))


def flip(path: Path, rng: random.Random, place: Callable[[int], int]) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[place(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def extend(folder: Path, rng: random.Random) -> None:
    with open(weights_of(folder, rng), "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 5000)))


def header_length(folder: Path, rng: random.Random) -> None:
    path = weights_of(folder, rng)
    length = rng.choice([0, 1, 8, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, rng.getrandbits(64)])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def header_entry(folder: Path, rng: random.Random) -> None:
    """A header that is valid JSON and says something absurd."""
    path = weights_of(folder, rng)
    data = path.read_bytes()
    if path.suffix == ".pth":
        return flip_end(folder, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    odd = [None, -1, 1 << 62, 1 << 100, "x", [], {}, 1.5, True, [1] * 100, [[1]], [-1], [1 << 40, 1 << 40], "F64", "I8"]
    entry[rng.choice(["shape", "data_offsets", "dtype", "more"])] = rng.choice(odd)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_tensors(folder: Path, rng: random.Random) -> None:
    """A whole file with other tensors: missing, misshaped, of another kind, of another name."""
    path = weights_of(folder, rng)
    archive = path.suffix == ".pth"
    tensors = torch.load(path, weights_only=True) if archive else load_file(path)
    for _ in range(rng.choice([1, 1, 3])):
        name = rng.choice(sorted(tensors))
        kind = rng.randrange(6)
        value = tensors.pop(name)
        if kind == 1:
            tensors[rng.choice([name + "x", "", "x" * 1000, "vision_model", "ü\n"])] = value
        elif kind == 2:
            shape = rng.choice([(), (0,), (3,), (2, 2), (1, 1, 1, 1), (*value.shape, 1), tuple(value.shape)[1:]])
            tensors[name] = torch.zeros(shape)
        elif kind == 3:
            tensors[name] = value.to(rng.choice([torch.int8, torch.float64, torch.float16, torch.bool]))
        elif kind == 4 and archive:
            turned = value.mT if value.ndim > 1 else value
            endless = torch.zeros(1).expand(1 << 30)
            nowhere = torch.empty(value.shape, device="meta")
            tensors[name] = rng.choice([turned, endless, nowhere, value.to_sparse(), [value], 3])
        elif kind == 5:
            tensors[name] = value.flatten()
    if archive:
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def pickles(folder: Path, rng: random.Random) -> None:
    path = weights_of(folder, rng)
    value = rng.choice([{"a": torch.zeros(3)}, [1, 2], random.Random, {"a": "b"}, "x" * 100_000])
    if rng.random() < 0.5:
        path.write_bytes(pickle.dumps(value, protocol=rng.randrange(6)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.5)


def index_tricks(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return change_json(folder, rng)
    raw = json.loads(path.read_text())
    name = rng.choice(sorted(raw["weight_map"]))
    other = rng.choice(sorted(set(raw["weight_map"].values())))
    tricks = [
        "../model.safetensors", "/etc/passwd", "/dev/zero", "/dev/stdin", "..", ".", "", "a/../b.safetensors", None, 7,
        [], {}, "x" * 5000, "\0", "model-99999.safetensors", other, "config.json", "file:///etc/passwd",
    ]  # fmt: skip
    raw["weight_map"][name] = rng.choice(tricks)
    path.write_text(json.dumps(raw))


def change_json(folder: Path, rng: random.Random) -> None:
    """A configuration with one value replaced, or no JSON at all."""
    path = rng.choice(sorted(folder.glob("*.json")))
    raw = json.loads(path.read_text())
    if rng.random() < 0.2:
        path.write_text(
            rng.choice(["", "null", "[]", "{", "[" * 50_000, '{"a":' * 50_000, "NaN", "\udcff"]), errors="ignore"
        )
        return
    table = raw
    while True:
        key = rng.choice(sorted(table) or ["x"])
        if isinstance(table.get(key), dict) and table[key] and rng.random() < 0.8:
            table = table[key]
            continue
        break
    odd = [None, 0, -1, 1, 3, 7, 1 << 31, 10**12, 1 << 70, 0.5, -0.0, 1e308, "x", "", True, [], {}, [1], [0, 0], ["a"],
           [[1, 2]], {"a": 1}, [10**12], list(range(1000))]  # fmt: skip
    if rng.random() < 0.15:
        table.pop(key, None)
    elif rng.random() < 0.15:
        table[str(key) + "s"] = rng.choice(odd)
    else:
        table[key] = rng.choice(odd)
    path.write_text(json.dumps(raw))


def files(folder: Path, rng: random.Random) -> None:
    """A file that is missing, empty, a folder, or a link to nowhere or to something endless."""
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    kind = rng.randrange(5)
    if kind == 1:
        path.touch()
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(rng.choice(["/dev/zero", "/nowhere", path.name, "."]))
    elif kind == 4:
        path.write_bytes(rng.randbytes(rng.randrange(20_000)))


CORRUPTIONS: list[Corruption] = [
    truncate, flip_start, flip_end, flip_anywhere, extend, header_length, header_entry, change_tensors, pickles,
    index_tricks, change_json, change_json, files,
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sound")
    save_checkpoint(random_model(), folder / "single")
    save_checkpoint(random_model(dtype=torch.bfloat16), folder / "sharded", max_shard_size=100_000)
    save_checkpoint(random_model(), folder / "meta", "meta")
    golden = Path(__file__).parent.parent / "golden" / "mllama_mp2"
    (folder / "mp2").mkdir()
    for name in ("params.json", "consolidated.00.pth", "consolidated.01.pth"):
        shutil.copy(golden / name, folder / "mp2")
    return [folder / name for name in ("single", "sharded", "meta", "mp2")]


def address_space_limit(extra: int) -> None:
    """Any allocation of more than `extra` bytes fails from now on, so that one which nobody touches shows too."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


def test_corrupted_checkpoints(sound: list[Path], tmp_path: Path) -> None:
    for folder in sound:
        load(folder)  # whatever is imported on first use is now
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    address_space_limit(MEMORY)
    try:
        for case in range(CASES):
            rng = random.Random(case)
            folder = tmp_path / str(case)
            shutil.copytree(rng.choice(sound), folder)
            corruption = CORRUPTIONS[case % len(CORRUPTIONS)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                corruption(folder, rng)
            outcomes[attempt(folder, f"case {case}: {corruption.__name__}")] += 1
            shutil.rmtree(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    assert outcomes["refused"] > 300 and outcomes["loaded"] > 30, outcomes


def attempt(folder: Path, case: str) -> str:
    start = time.perf_counter()
    try:
        model, _ = load(folder)
    except (CheckpointError, ConfigError) as error:
        assert str(error), case
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{case} raised {type(error).__name__}: {error}") from error
    else:
        assert all(not value.is_meta for value in model.parameters()), case
        return "loaded"
    finally:
        assert time.perf_counter() - start < SECONDS, case


def test_every_corruption_is_seen(sound: list[Path], tmp_path: Path) -> None:
    """Each kind of corruption can be refused: none of them leaves the checkpoint as it was."""
    for corruption in dict.fromkeys(CORRUPTIONS):
        for seed in range(50):
            rng: Any = random.Random(1000 + seed)
            folder = tmp_path / f"{corruption.__name__}-{seed}"
            shutil.copytree(rng.choice(sound), folder)
            corruption(folder, rng)
            if attempt(folder, corruption.__name__) == "refused":
                break
        else:
            raise AssertionError(f"{corruption.__name__} was never refused")
