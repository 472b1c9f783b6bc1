"""Where files of statistics lie: ssr_stats in ComfyUI's output and input folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...ssr_core import StatisticsError

FOLDER = "ssr_stats"


def listed() -> dict[str, Path]:
    """All files by the name that people choose them by, newest first."""
    files = [
        (f"{path.relative_to(folder).as_posix()} [{kind}]", path)
        for kind, folder in _folders().items()
        for path in folder.rglob("*.safetensors")
    ]
    return dict(sorted(files, key=lambda named: -named[1].stat().st_mtime))


def name_of(path: Path) -> str:
    """By which `listed` has a file in the output folder."""
    return f"{path.relative_to(_folders()['output']).as_posix()} [output]"


def find(name: str) -> Path:
    """Only what is listed is ever opened, whatever the name says.

    Raises:
        StatisticsError: there is no such file.
    """
    path = listed().get(name)
    if path is None:
        raise StatisticsError(
            f"There is no file of statistics {name!r} in the folder {FOLDER} of ComfyUI's output or input folder."
        )
    return path


def _folders() -> dict[str, Path]:
    outer = {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}
    return {kind: Path(folder) / FOLDER for kind, folder in outer.items()}
