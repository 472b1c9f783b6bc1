"""Things that go wrong while a real server merges, from a seed, and a look at what they leave behind."""

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
from safetensors import SafetensorError

from hosting.server import ComfyError, ComfyServer, Event, Interrupted, prepare_base_directory
from tiny_flux import block_linears, flux_lora, flux_state_dict

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
MEASURED = 2 * STEPS + 3 * STEPS  # calls of each layer: two LoRAs are surveyed, they and their combination measured
CALLS = MEASURED + 3 * 2 * STEPS  # and refined
POLISHED = 150  # at least so many more while the merge is polished for two steps: 3 cases, 33 points and 3 of each
LORAS = {
    "one.safetensors": lambda: flux_lora("kohya", rank=4, alpha=2.0, seed=1),
    "two.safetensors": lambda: flux_lora("generic", rank=2, seed=2),
}
LAYERS = [f"diffusion_model.{name}" for name in block_linears(128)]
NOTHING = "nothing was raised"
EXACT = ("hooks", "global hooks", "patches", "object backup", "injections", "training", "tensors", "bytes")
EXACT += ("log handlers", "grad", "threads")


def tiny_server(folder: Path, comfyui: Path) -> ComfyServer:
    """Not started: the pack, the nodes of the tests, the tiny Flux and two LoRAs, which are files of its own."""
    files = folder / "files"
    files.mkdir()
    safetensors.torch.save_file(flux_state_dict(), files / "tiny-flux.safetensors")
    packs = [ROOT / "tests" / "comfy" / "nodes_pack"]
    base = prepare_base_directory(
        folder / "base",
        pack_root=ROOT,
        models={"diffusion_models": [files / "tiny-flux.safetensors"], "loras": []},
        custom_nodes=packs,
    )
    for name, lora in LORAS.items():
        safetensors.torch.save_file(lora(), base / "models" / "loras" / name)
    return ComfyServer(comfyui, base)


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _sampled(model: str, name: str) -> dict[str, Any]:
    choice = {"sampler_name": "euler", "scheduler": "simple", "steps": 2, "cfg": 1.0, "denoise": 1.0, "seed": 5}
    prompts = {"positive": ["p0", 0], "negative": ["p0", 0], "latent_image": ["latent", 0]}
    return {
        f"sample {name}": node("KSampler", model=[model, 0], **prompts, **choice),
        f"save {name}": node("TestSaveTensor", latent=[f"sample {name}", 0], name=name),
    }


def _shared() -> dict[str, Any]:
    prompt = {"tokens": 8, "context_width": 32, "pooled_width": 16}
    return {
        "model": node("UNETLoader", unet_name="tiny-flux.safetensors", weight_dtype="default"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        **{f"p{i}": node("TestConditioning", seed=i, **prompt) for i in range(3)},
    }


def plain_graph(salt: int) -> dict[str, Any]:
    """The untouched model's image, and what is left on the model and in memory."""
    shared = {key: value for key, value in _shared().items() if key not in ("p1", "p2")}
    look = node("TestInspect", model=["model", 0], after=["sample plain", 0], salt=salt)
    return {**shared, **_sampled("model", "plain"), "look": look}


def merge_graph(
    seed: int, model: str = "model", steps: int = STEPS, save: str = "", refine: int = 1, polish: int = 0
) -> dict[str, Any]:
    """Collect both LoRAs and their combination, solve, polish, apply, sample; SSR Save LoRA to `save`, if any."""
    graph = _shared()
    for i, name in enumerate(LORAS):
        inputs = {"lora_name": name, "strength": 1.0, "calibration": [f"p{i}", 0]}
        graph[f"lora{i}"] = node("SSRAddLoRA", **inputs, **({"tasks": [f"lora{i - 1}", 0]} if i else {}))
    merged = ["polish" if polish else "solve", 0]
    graph |= {
        "both": node("SSRAddCombination", loras="all", calibration=["p2", 0], tasks=["lora1", 0]),
        "collect": node(
            "SSRCollectStats",
            **{"model": [model, 0], "tasks": ["both", 0], "latent": ["latent", 0], "seed": seed, "steps": steps},
            **{"sampler_name": "euler", "scheduler": "simple", "context": 16, "refine": refine},
        ),
        "solve": node("SSRSolve", stats=["collect", 0], ridge=0.01, rank=0, routing=1.0, strengths=""),
        "apply": node("SSRApply", model=["model", 0], lora=merged, strength=1.0),
    }
    if polish:
        inputs = {"model": [model, 0], "stats": ["collect", 0], "lora": ["solve", 0]}
        graph["polish"] = node("SSRPolish", **inputs, steps=polish, seed=0)
    if save:
        graph["file"] = node("SSRSaveLoRA", lora=merged, filename_prefix=save, dtype="float32")
    return graph | _sampled("apply", "merged")


@dataclass
class Trial:
    """A server, what it is like before anything goes wrong, and what differs after each fault."""

    server: ComfyServer
    salt: int = 0
    image: bytes = b""
    merged: bytes = b""
    unrefined: bytes = b""  # what a merge without refinement makes
    state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Everything once, so that what is made at first use is there."""
        self.server.run(merge_graph(0, refine=0))
        self.unrefined = self._latent("merged")
        self.server.run(merge_graph(0))
        self.merged = self._latent("merged")
        for _ in range(2):  # the second finds what stays
            self.look()
        self.state, self.image, self.files = self.look(), self._latent("plain"), self._listing()
        left = {key: self.state[key] for key in ("hooks", "patches", "injections") if self.state[key]}
        assert not left, f"a merge leaves {left}"

    def look(self) -> dict[str, Any]:
        self.salt += 1
        run = self.server.run(plain_graph(self.salt))
        return json.loads(run.outputs["look"]["text"][0])

    def differences(self) -> list[str]:
        """What is not as it was in the beginning; nothing, if all is well."""
        state = self.look()
        found = [f"{key}: {self.state[key]} -> {state[key]}" for key in EXACT if state[key] != self.state[key]]
        if self._latent("plain") != self.image:
            found.append("the untouched model makes another image")
        before, now = self.files.items(), self._listing().items()
        return found + [f"file {name}, {size} bytes" for name, size in before ^ now]

    def strike(self, kind: str, seed: int) -> list[str]:
        """Have `kind` of KINDS happen, and tell what it left behind."""
        self.salt += 1
        problem = KINDS[kind](self, random.Random(seed))
        return ([problem] if problem else []) + self.differences()

    def _latent(self, name: str) -> bytes:
        return numpy.load(self.server.base_directory / "output" / f"{name}.npy").tobytes()

    def _listing(self) -> dict[str, int]:
        """Files below the folders that nodes write to or read from, with their sizes."""
        base = self.server.base_directory
        paths = [path for name in ("output", "models", "temp", "input") for path in (base / name).rglob("*")]
        return {str(path.relative_to(base)): path.stat().st_size for path in paths if path.is_file()}


Strike = Callable[[Trial, random.Random], str]  # what went otherwise than it should, or nothing


def _in_a_layer(kind: str, error: type[ComfyError], message: str) -> Strike:
    def strike(trial: Trial, rng: random.Random) -> str:
        graph = merge_graph(0, "fault")
        # what comes out of a double block goes into layers that are measured, whatever the step
        where = {"layer": rng.choice([name for name in LAYERS if "double" in name or kind != "NaN"])}
        faulty = {"kind": kind, "call": rng.randrange(CALLS), "salt": trial.salt, **where}
        graph["fault"] = node("TestFault", model=["model", 0], **faulty)
        if faulty["call"] < MEASURED or error is Interrupted:
            return _expect(trial, graph, error, message)
        trial.server.run(graph)  # what was measured stands
        return "" if trial._latent("merged") == trial.unrefined else "what was measured before is lost"

    return strike


def _while_polishing(kind: str, error: type[ComfyError], message: str) -> Strike:
    def strike(trial: Trial, rng: random.Random) -> str:
        graph = merge_graph(0, "fault", polish=2)
        where = {"layer": rng.choice(LAYERS), "call": CALLS + rng.randrange(POLISHED)}
        graph["fault"] = node("TestFault", model=["model", 0], kind=kind, salt=trial.salt, **where)
        found = _expect(trial, graph, error, message)
        if kind != "NaN" or found != NOTHING:
            return found
        for chart in (trial.server.base_directory / "temp").glob("*.png"):
            chart.unlink()
        # where it was not among what is learnt from, or the best step was before it
        return "" if numpy.isfinite(numpy.frombuffer(trial._latent("merged"), numpy.float32)).all() else found

    return strike


def _expect(
    trial: Trial,
    graph: dict[str, Any],
    error: type[Exception],
    message: str,
    on_event: Callable[[Event], None] | None = None,
) -> str:
    try:
        trial.server.run(graph, on_event)
    except error as found:
        return "" if message in str(found) else f"another message: {found}"
    except ComfyError as found:
        return f"another error: {found}"
    return NOTHING


def _stop(trial: Trial, rng: random.Random) -> str:
    """An interrupt at any step of collecting, by the button."""
    left, done = [rng.randrange(20)], threading.Event()  # ComfyUI sends no more than ten a second

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.data.get("node") == "collect":
            left[0] -= 1
            if left[0] < 0 and not done.is_set():
                done.set()
                trial.server.interrupt()

    return _expect(trial, merge_graph(trial.salt, steps=400), Interrupted, "", on_event)


def _queue_again(trial: Trial, rng: random.Random) -> str:
    """Two at once; the first is cancelled, the second is what it always was."""
    first = trial.server.submit(merge_graph(trial.salt, steps=400))
    cancelling = threading.Timer(rng.random() * 0.3, trial.server.interrupt, [first])
    cancelling.start()
    trial.server.run(merge_graph(0))
    cancelling.join()
    return "" if trial._latent("merged") == trial.merged else "the second merge is another"


def _freed(trial: Trial, rng: random.Random) -> str:
    """All models are to be unloaded while a merge runs."""
    left = [rng.randrange(20)]

    def on_event(event: Event) -> None:
        left[0] -= 1
        if left[0] == 0:
            trial.server.free()

    trial.server.run(merge_graph(0), on_event)
    trial.server.free()
    return "" if trial._latent("merged") == trial.merged else "the merge is another"


def _replaced(trial: Trial, rng: random.Random) -> str:
    """A trainer writes over one of the files while it is used: it counts from the next run on, and whole."""
    path = trial.server.base_directory / "models" / "loras" / rng.choice(list(LORAS))
    kept = path.with_suffix(".kept")
    shutil.copy2(path, kept)
    other = safetensors.torch.save({k: 2 * v for k, v in safetensors.torch.load_file(path).items()})
    begun = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.data.get("node") == "collect" and not begun.is_set():
            begun.set()
            path.write_bytes(other)  # the same file, in place

    try:
        trial.server.run(merge_graph(0), on_event)
        during = trial._latent("merged")
        trial.server.run(merge_graph(0))
        after = trial._latent("merged")
    finally:
        path.write_bytes(kept.read_bytes())
        kept.unlink()
    trial.server.run(merge_graph(0))
    if begun.is_set() and during != trial.merged:
        return "a merge in progress changed with the file"
    if after == trial.merged:
        return "the new file was not read"
    return "" if trial._latent("merged") == trial.merged else "the file that is back was not read"


def _removed(trial: Trial, rng: random.Random) -> str:
    """A file is gone when it is needed."""
    name = rng.choice(list(LORAS))
    path = trial.server.base_directory / "models" / "loras" / name
    kept = trial.server.base_directory / name
    path.rename(kept)
    try:
        return _expect(trial, merge_graph(trial.salt), ComfyError, name)
    finally:
        kept.rename(path)


def _unwritable(trial: Trial, rng: random.Random) -> str:
    """The place to save to is taken by a file."""
    place = trial.server.base_directory / "output" / "loras" / f"taken{trial.salt}"
    place.parent.mkdir(exist_ok=True)
    place.touch()
    try:
        return _expect(trial, merge_graph(trial.salt, save=f"{place.name}/x"), ComfyError, place.name)
    finally:
        place.unlink()


KINDS: dict[str, Strike] = {
    "stopped by the button": _stop,
    "stopped in a layer": _in_a_layer("interrupt", Interrupted, ""),
    "an error in a layer": _in_a_layer("error", ComfyError, "a layer broke"),
    "out of memory in a layer": _in_a_layer("out of memory", ComfyError, "20.00 GiB"),
    "NaN in a layer": _in_a_layer("NaN", ComfyError, "NaN"),
    "stopped in a layer while polishing": _while_polishing("interrupt", Interrupted, ""),
    "an error in a layer while polishing": _while_polishing("error", ComfyError, "a layer broke"),
    "out of memory while polishing": _while_polishing("out of memory", ComfyError, "20.00 GiB"),
    "NaN in a layer while polishing": _while_polishing("NaN", ComfyError, "not finite"),
    "cancelled, next in the queue": _queue_again,
    "unloaded meanwhile": _freed,
    "LoRA file written over": _replaced,
    "LoRA file gone": _removed,
    "nowhere to save to": _unwritable,
}


def kill_while_saving(trial: Trial) -> list[str]:
    """The server dies in the middle of writing. Tells what is not whole after it is up again."""
    folder = trial.server.base_directory / "output" / "loras"
    folder.mkdir(exist_ok=True)
    big = {
        "big": node("TestBigLora", megabytes=256, salt=trial.salt),
        "file": node("SSRSaveLoRA", lora=["big", 0], filename_prefix="killed", dtype="float32"),
    }
    trial.server.submit(big)
    while not list(folder.glob("*.tmp")):
        trial.server.check_alive()
    process = trial.server._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    halves = [path for path in folder.glob("*.safetensors") if not _is_whole(path)]
    trial.server.start()
    return [f"{path.name} is half a file" for path in halves]


def _is_whole(path: Path) -> bool:
    try:
        return bool(safetensors.torch.load_file(path))
    except SafetensorError:
        return False
