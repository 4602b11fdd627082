"""Finished steps of a long run, as folders: a run that was killed goes on after the last one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ipex_sq.checkpoint.disk import RESUME, disk_errors, make_durable
from ipex_sq.checkpoint.shards import write_safetensors
from ipex_sq.errors import CheckpointError, ConfigError

IDENTITY = "identity.json"
UNFINISHED = ".unfinished"


class Journal:
    """The folder in which a run keeps what its steps have found.

    A step is written into a folder of another name, made durable and renamed: it is there as a
    whole or not at all.

    Attributes:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def at_work(self, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Inside, this process alone works; it starts, or goes on with what is the same work.

        Args:
            identity: What decides on the result, as JSON; values are compared.
            resume: Go on where a run has left off.

        Raises:
            ConfigError: Another process is at work; or there is an unfinished run and `resume` is
                False, or it was of other work: names what has changed.
            ResourceError: The disk is full.
        """
        lock = FileLock(f"{self.folder}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(f"another process is at work in {self.folder}") from None
        try:
            self._begin(identity, resume=resume)
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def _begin(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        wanted = json.loads(json.dumps(identity))
        written = self.folder / IDENTITY
        if written.is_file():
            if not resume:
                raise ConfigError(
                    f"{self.folder} holds an unfinished run: go on with --resume, or remove it"
                )
            self._compare(json.loads(written.read_text(encoding="utf-8")), wanted)
        else:
            with disk_errors(self.folder, RESUME):
                shutil.rmtree(self.folder, ignore_errors=True)  # killed before it had begun
                self.folder.mkdir(parents=True)
                scratch = self.folder / f"{IDENTITY}{UNFINISHED}"
                scratch.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
                make_durable(scratch)
                os.replace(scratch, written)
        for left in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)

    def has(self, step: str) -> bool:
        """Whether `step` is finished."""
        return (self.folder / step).is_dir()

    @contextmanager
    def step(self, name: str) -> Iterator[Path]:
        """Inside, the folder to write the step into; after it the step is finished.

        Raises:
            ResourceError: The disk is full.
        """
        scratch = self.folder / f"{name}{UNFINISHED}"
        with disk_errors(self.folder, RESUME):
            scratch.mkdir()
            yield scratch
            for path in scratch.iterdir():
                make_durable(path)
            make_durable(scratch)
            os.replace(scratch, self.folder / name)
            make_durable(self.folder)

    def tensors(self, step: str, file: str) -> dict[str, Tensor]:
        """What `write_tensors` has written in a step.

        Raises:
            CheckpointError: Missing or damaged.
        """
        path = self.folder / step / f"{file}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error

    def facts(self, step: str, file: str) -> Any:
        """What `write_facts` has written in a step.

        Raises:
            CheckpointError: Missing or damaged.
        """
        path = self.folder / step / f"{file}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def forget(self, step: str, pattern: str) -> None:
        """Remove files of a finished step that no other step will read."""
        for path in (self.folder / step).glob(pattern):
            path.unlink()

    def end(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder)

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = _differences(before, now)
        if changed:
            raise ConfigError(
                f"{self.folder} is an unfinished run of other work: {', '.join(changed[:3])} "
                "changed. Restore it, or remove the folder to start again"
            )


def write_tensors(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into the folder of a step."""
    write_safetensors(tensors, folder / f"{file}.safetensors")


def write_facts(folder: Path, file: str, facts: Any) -> None:
    """Write plain data into the folder of a step."""
    (folder / f"{file}.json").write_text(json.dumps(facts), encoding="utf-8")


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(before.keys() | now.keys())
            for found in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == now else [path]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}): remove {path.parent}, then --resume")
