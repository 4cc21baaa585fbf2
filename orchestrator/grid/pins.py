"""What ties a run to the bytes it is trained from: absolute paths, content digests, and the run's id.

A path means something on one machine only, content means the same everywhere. So the id of a run is a hash
in which each local dataset, model or script counts by its content, and not by where it lies.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import Command, RunSpec
from trainer.model_files import content_digest
from trainer.rundir import Options, cache_folder
from trainer.spec_inputs import EACH, PLACES, Place, blocks, inputs_of, is_path

from .own_command import absolute_command, by_content, files_among

_FILE_URL = "file://"


def absolute_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the blocks of a spec with paths that are relative to ``folder`` made absolute.

    ``base.model`` may be a hub id: it is a path if it says so (``./``, ``~``, ``/``) or if it exists. Words
    of ``evaluate.command`` are paths if they are files.
    """
    data = {key: dict(block) if isinstance(block, dict) else block for key, block in data.items()}
    for place in PLACES:
        if place.block[0] == "command":
            continue
        if EACH in place.block:  # a list inside a block is the caller's own too
            outer, each = place.block[:2]
            if isinstance(data.get(outer), dict) and isinstance(data[outer].get(each), list):
                data[outer][each] = [dict(e) if isinstance(e, dict) else e for e in data[outer][each]]
        for _, block in blocks(data, place.block):
            path = block.get(place.path_key)
            if isinstance(path, str) and _means_path(path, place, folder):
                block[place.path_key] = _absolute(path, folder)
    if isinstance(data.get("evaluate"), dict) and isinstance(data["evaluate"].get("command"), list):
        data["evaluate"]["command"] = [
            _absolute(word, folder) if isinstance(word, str) and _is_file(folder / word) else word
            for word in data["evaluate"]["command"]
        ]
    if isinstance(own := data.get("command"), dict):
        data["command"] = absolute_command(own, folder)
    return data


def absolute_url(url: str) -> str:
    """Return a store's url with a folder, which is relative to the working directory, made absolute."""
    path = url[len(_FILE_URL) :] if url.lower().startswith(_FILE_URL) else url
    if "://" in path:
        return url
    return _FILE_URL + _absolute(path, Path.cwd())


def pins_of(specs: Iterable[RunSpec], folder: Path) -> dict[str, str]:
    """Return the sha256 of each local thing that the specs name, by its absolute path.

    What is not there is left out. Of a command, only files in ``folder`` count: programs are the node's own.
    """
    memory = cache_folder(Options()) / "digests"
    wanted: dict[str, Callable[[Path], str]] = {}
    for spec in specs:
        for named in inputs_of(spec):
            if named.is_path:
                wanted[named.path] = lambda path, named=named: named.content(path, memory).digest  # type: ignore[misc]
        if spec.command:
            wanted |= dict.fromkeys(files_among(spec.command, folder), content_digest)
        if spec.evaluate:
            scripts = [word for word in spec.evaluate.command if Path(word).is_relative_to(folder)]
            wanted |= dict.fromkeys(scripts, content_digest)
    pins: dict[str, str] = {}
    for name, digest in wanted.items():
        if _exists(Path(name)):
            with contextlib.suppress(OSError):  # unreadable: preflight says so
                pins[name] = digest(Path(name))
    return pins


def identity(spec: RunSpec, pins: Mapping[str, str], *, defaults: bool = False) -> dict[str, Any]:
    """Return all that decides a run's result, as JSON values, with local inputs named by their content.

    Args:
        defaults: Also what is left at its default. Without, keys that a later version adds change no id.
    """
    data = spec.model_dump(mode="json", exclude_defaults=not defaults)
    if spec.command:
        return {"command": _command_identity(spec.command, data["command"], pins)}
    for named in inputs_of(spec):
        if named.digest and named.what != "base model":
            next(block for at, block in blocks(data, named.place.block) if at == named.at).pop(
                named.place.path_key
            )
    if spec.dataset.digest:  # where on the hub the content came from is not what it is
        for key in ("revision", "split", "image_column", "caption_column"):
            data["dataset"].pop(key, None)
    base = data["base"]
    base["model"] = base.pop("digest", None) or pins.get(spec.base.model, spec.base.model)
    # How many images a step sees decides the result; in how many passes, only its last bits.
    base["train_batch_size"] = spec.base.samples_per_step
    base.pop("gradient_accumulation_steps", None)
    if spec.evaluate:
        data["evaluate"]["command"] = [pins.get(word, word) for word in spec.evaluate.command]
    return data


def _command_identity(command: Command, data: dict[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
    """What decides what a command makes: not how it is watched."""
    ours = ("complete", "quiet_s", "progress")
    kept: dict[str, Any] = {key: value for key, value in data.items() if key not in ours}
    for key in ("words", "resume"):
        if key in kept:
            kept[key] = by_content(kept[key], pins)
    if command.inputs:
        kept["inputs"] = {name: given.digest or given.path for name, given in command.inputs.items()}
    return kept


def run_id(sweep: str, index: int, spec: RunSpec, pins: Mapping[str, str]) -> str:
    """Return ``<sweep>-<index>-<hash>``: the same for the same result, wherever its inputs lie."""
    canonical = json.dumps(identity(spec, pins), sort_keys=True, separators=(",", ":"))
    return f"{sweep}-{index:03d}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def _means_path(text: str, place: Place, folder: Path) -> bool:
    if place.kind == "model":
        return is_path(text) or _exists(folder / text)
    return bool(text) and "://" not in text


def _absolute(path: str, folder: Path) -> str:
    # Not Path.resolve: a link to today's dataset keeps its name in messages.
    return os.path.normpath(folder / os.path.expanduser(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()
