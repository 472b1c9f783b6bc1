"""LoRA and statistics files as strangers may send them: cut, flipped, lying, hostile. All follow from a seed."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

Damage = Callable[[random.Random, bytes, Path], bytes]  # of a sound file; the path is what hostile code would write to


def unpack(content: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with any header, and any length told of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Explosion:
    """Unpickled with code allowed, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return open, (str(self.canary), "w")


# --- bytes ---


def truncated(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return sound[: rng.randrange(len(sound))]


def bits_of_the_header(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return _flipped(rng, sound, 8, 8 + struct.unpack("<Q", sound[:8])[0], rng.randint(1, 6))


def bits_of_the_data(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return _flipped(rng, sound, 8 + struct.unpack("<Q", sound[:8])[0], len(sound), rng.randint(1, 64))


def bits_anywhere(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return _flipped(rng, sound, 0, len(sound), rng.randint(1, 200))


def length_of_the_header(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    header, data = unpack(sound)
    return pack(header, data, rng.choice([0, 1, 7, 99_999_999, 100_000_001, 2**31, 2**62, 2**64 - 1]))


def noise(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return rng.randbytes(rng.randrange(1, 4096))


def _flipped(rng: random.Random, sound: bytes, start: int, stop: int, count: int) -> bytes:
    content = bytearray(sound)
    for _ in range(count):
        content[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(content)


# --- headers ---


def lying_header(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """One entry tells another dtype, shape or place than its data have."""
    header, data = unpack(sound)
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    lie = rng.randrange(4)
    if lie == 0:
        entry["dtype"] = rng.choice(["F64", "F16", "I8", "BOOL", "C64", "F8_E4M3", "F4", "U64", "F8_E8M0", "X", ""])
    elif lie == 1:
        entry["shape"] = rng.choice([[], [0], [1_000_000, 1_000_000], [2**63, 2], [-1, 4], [2**40, 0], [1] * 100])
    elif lie == 2:
        entry["data_offsets"] = rng.choice([[0, 0], [0, 2**62], [4, 0], [-4, 4], [len(data), len(data) + 4]])
    else:
        entry.pop(rng.choice(list(entry)))
    return pack(header, data)


def key_given_twice(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    header, data = unpack(sound)
    key = rng.choice([key for key in header if key != "__metadata__"])
    again = json.dumps({key: header[rng.choice([key for key in header if key != "__metadata__"])]})
    return pack((json.dumps(header)[:-1] + "," + again[1:]).encode(), data)


def odd_metadata(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    header, data = unpack(sound)
    header["__metadata__"] = rng.choice([1, [], "x", {"a": 1}, {"a": {"b": "c"}}, {"a": None}, {"ssr.format": "9"}])
    return pack(header, data)


# --- other formats ---


def hostile_pickle(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return pickle.dumps({"x": Explosion(canary)}, protocol=rng.randrange(6))


def hostile_checkpoint(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    return _saved(rng.choice([Explosion(canary), {"state_dict": {"a": Explosion(canary)}}]))


def odd_checkpoint(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """What torch.load takes for harmless, and which is no state dict of plain tensors."""
    key = "diffusion_model.double_blocks.0.img_attn.proj"
    name = f"{key}.lora_A.weight"
    down, up = torch.ones(4, 128), torch.ones(128, 4)
    whole = {name: down, f"{key}.lora_B.weight": up}
    huge = torch.ones(1).expand(1_000_000, 1_000_000)
    return _saved(
        rng.choice(
            [
                *(5, "text", [], [1, 2], down, {}, {"state_dict": 3}, {1: down}, {name: 3}, {name: "x"}, {"a": whole}),
                {**whole, name: down.to_sparse()},
                {**whole, name: huge},
                {**whole, name: torch.empty(4, 128, device="meta")},
                {**whole, name: torch.quantize_per_tensor(down, 0.1, 0, torch.qint8)},
                {**whole, name: torch.ones(4, 128, dtype=torch.complex64)},
                {**whole, f"{key}.lora_B.weight": None},
                {**whole, f"{key}.alpha": 4.0},
            ]
        )
    )


def inflated_checkpoint(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Zeros, compressed: small on disk and large in memory."""
    zeros = torch.zeros(2**22)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved({"x": zeros}))) as plain, zipfile.ZipFile(packed, "w") as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BYTES: dict[str, Damage] = {
    "truncated": truncated,
    "bits of the header": bits_of_the_header,
    "bits of the data": bits_of_the_data,
    "bits anywhere": bits_anywhere,
    "length of the header": length_of_the_header,
    "noise": noise,
    "lying header": lying_header,
    "key given twice": key_given_twice,
    "odd metadata": odd_metadata,
    "hostile pickle": hostile_pickle,
}

# by the ending that the file then has
CHECKPOINTS: dict[str, Damage] = {
    "hostile pickle": hostile_pickle,
    "hostile checkpoint": hostile_checkpoint,
    "odd checkpoint": odd_checkpoint,
    "inflated checkpoint": inflated_checkpoint,
}


# --- LoRAs ---


def values(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """NaN, infinite, huge and tiny values."""
    return _changed(rng, sound, lambda tensor: _with(rng, tensor, rng.choice([torch.nan, torch.inf, -torch.inf, 3e38])))


def dtypes(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    kinds = ["int8", "uint8", "int32", "int64", "bool", "complex64", "float64", "float16", "float8_e4m3fn"]
    kinds += ["float8_e5m2", "uint16", "uint64"]
    wanted = getattr(torch, rng.choice(kinds))
    return _changed(rng, sound, lambda tensor: (tensor * 10).to(wanted))


def shapes(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    def other(tensor: Tensor) -> Tensor:
        return rng.choice(
            [
                *((tensor[:0], tensor[..., :0], tensor[:1]) if tensor.ndim else (torch.zeros(0),)),
                tensor.flatten(),
                tensor[None],
                tensor[None, None, None, None],
                tensor.mT.contiguous() if tensor.ndim > 1 else tensor,
                torch.tensor(1.0),
                torch.zeros(2**40, 0),
                torch.cat([tensor, tensor]) if tensor.ndim else tensor,
            ]
        )

    return _changed(rng, sound, other)


def alphas(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Beside the factors of each layer, an alpha that is none."""
    tensors = safetensors.torch.load(sound)
    bad = [
        torch.tensor(torch.nan),
        torch.tensor(-torch.inf),
        torch.ones(2),
        torch.zeros(0),
        torch.tensor(1e300).double(),
    ]
    bad += [torch.tensor(1e300, dtype=torch.float64), torch.tensor(1 + 1j), torch.tensor(True), torch.tensor(2**62)]
    alpha = rng.choice(bad)
    names = {key.rpartition(".lora_")[0] or key.rpartition(".")[0] for key in tensors if not key.endswith(".alpha")}
    return safetensors.torch.save(tensors | {f"{name}.alpha": alpha.clone() for name in names})


def keys(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Names that lead out of folders, end strings, or are very long."""
    tensors = safetensors.torch.load(sound)
    names = ["../../etc/passwd", "a\0b", "x" * 10_000, "", ".", "..", "/", "\n", "%s%n", "__class__", "\U0001f600", "."]
    names += ["." * 900_000, "a.b" * 300, ".hada_" * 150]
    names += ["diffusion_model.__init__.__globals__", "lora_unet_", "diffusion_model.", "text_encoders.a", "lora_te_x"]
    key = rng.choice(list(tensors))
    value, ending = tensors.pop(key), rng.choice([".lora_A.weight", ".alpha", ".diff", ".set_weight", ""])
    return safetensors.torch.save({**tensors, rng.choice(names) + ending: value})


def halves(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    tensors = safetensors.torch.load(sound)
    for key in rng.sample(sorted(tensors), rng.randint(1, len(tensors) - 1)):
        del tensors[key]
    return safetensors.torch.save(tensors)


def dialects(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Keys by which ComfyUI knows a trainer's spelling, without those that it then expects."""
    uso = ("single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2")
    marks = rng.choice(
        [
            ["img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"],
            ["lora_unet__blocks_0_cross_attn_k.lora_down.weight"],
            [f"{name}.up.weight" for name in uso],
        ]
    )
    made = {mark: torch.ones(rng.choice([(4,), (4, 4), ()])) for mark in marks}
    return safetensors.torch.save(safetensors.torch.load(sound) | made)


def inflated_adapter(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Small factors of an update that no memory holds."""
    name, side = "diffusion_model.double_blocks.0.img_attn.proj", 50_000
    thin, flat = torch.ones(side, 12), torch.ones(12, side)
    parts = rng.choice(
        [
            {"hada_w1_a": thin, "hada_w1_b": flat, "hada_w2_a": thin.clone(), "hada_w2_b": flat.clone()},
            {"lokr_w1": torch.ones(500, 500), "lokr_w2": torch.ones(500, 500)},
            {
                **{"lokr_w1_a": thin, "lokr_w1_b": flat, "lokr_w2_a": thin.clone(), "lokr_w2_b": flat.clone()},
            },
            {"lora_down.weight": thin, "lora_up.weight": flat},
            {
                **{"lora_down.weight": torch.ones(1, side, 1, 1), "lora_up.weight": torch.ones(side, 1, 1, 1)},
                "lora_mid.weight": torch.ones(1, 1, 400, 400),
            },
            {"a1.weight": thin, "a2.weight": flat, "b1.weight": thin.clone(), "b2.weight": flat.clone()},
            {"oft_blocks": torch.ones(2, 1000, 1000)},
            {"diff": torch.ones(1).expand(3000, 3000).contiguous()},
        ]
    )
    return safetensors.torch.save({f"{name}.{end}": value for end, value in parts.items()})


def _changed(rng: random.Random, sound: bytes, change: Callable[[Tensor], Tensor]) -> bytes:
    tensors = safetensors.torch.load(sound)
    for key in rng.sample(sorted(tensors), rng.randint(1, max(1, len(tensors) // 3))):
        tensors[key] = change(tensors[key]).contiguous().clone()
    return safetensors.torch.save(tensors)


def _with(rng: random.Random, tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone().flatten()
    changed[rng.randrange(len(changed))] = value
    return changed.reshape(tensor.shape)


LORAS = BYTES | {
    "values": values,
    "dtypes": dtypes,
    "shapes": shapes,
    "alphas": alphas,
    "keys": keys,
    "halves": halves,
    "dialects": dialects,
    "inflated adapter": inflated_adapter,
}


# --- statistics ---


def sites(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """One fact about one site is something else."""

    def change(entries: list) -> object:
        entry = rng.choice(entries)
        field = rng.choice(list(entry))
        if field == "site" and rng.random() < 0.7:
            entry[field][rng.randrange(4)] = _odd(rng)
        elif isinstance(entry[field], list) and entry[field] and rng.random() < 0.7:
            entry[field][rng.randrange(len(entry[field]))] = _odd(rng)
        elif rng.random() < 0.2:
            del entry[field]
        else:
            entry[field] = _odd(rng)
        return entries

    return _with_json(rng, sound, "ssr.sites", change)


def list_of_sites(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    def change(entries: list) -> object:
        return rng.choice([_odd(rng), entries[1:], entries * 2, entries[::-1], [*entries, _odd(rng)]])

    return _with_json(rng, sound, rng.choice(["ssr.sites", "ssr.loras"]), change)


def deep_json(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    header, data = unpack(sound)
    header["__metadata__"][rng.choice(["ssr.sites", "ssr.loras"])] = rng.choice(
        ["[" * 200_000, '{"a":' * 99_999, "", "{"]
    )
    return pack(header, data)


def huge_numbers(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Digits that take long to read as a number."""
    header, data = unpack(sound)
    text = header["__metadata__"]["ssr.sites"]
    start = text.index('"tokens": [') + len('"tokens": [')
    header["__metadata__"]["ssr.sites"] = text[:start] + "9" * rng.choice([30, 4000, 200_000]) + ", " + text[start:]
    return pack(header, data)


def other_tensors(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    header, _ = unpack(sound)
    changed = rng.choice([values, dtypes, shapes, halves])(rng, sound, canary)
    tensors = safetensors.torch.load(changed)
    return safetensors.torch.save(tensors, header["__metadata__"])


def indefinite(rng: random.Random, sound: bytes, canary: Path) -> bytes:
    """Sums of squares that are negative."""
    header, _ = unpack(sound)
    tensors = safetensors.torch.load(sound)
    name = rng.choice([key for key in tensors if "gram" in key])
    tensors[name] = -tensors[name]
    return safetensors.torch.save(tensors, header["__metadata__"])


def _with_json(rng: random.Random, sound: bytes, field: str, change: Callable[[list], object]) -> bytes:
    header, data = unpack(sound)
    header["__metadata__"][field] = json.dumps(change(json.loads(header["__metadata__"][field])))
    return pack(header, data)


def _odd(rng: random.Random) -> object:
    numbers = [-1, 0, 2**31, 2**63, 10**30, -(10**9), 1.5, float("inf"), float("nan"), 1e308, True]
    return rng.choice([*numbers, None, "x", "../..", "1", [], {}, [[]], ["a"], "\0"])


STATISTICS = BYTES | {
    "sites": sites,
    "list of sites": list_of_sites,
    "deep JSON": deep_json,
    "huge numbers": huge_numbers,
    "other tensors": other_tensors,
    "indefinite": indefinite,
}
