"""PEFT's adapter folder: save, load, read, write, inspect, verify, repair and push; and the table of file formats."""

from __future__ import annotations

from typing import NamedTuple

from jaxadapt.storage import location


class Row(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
        ends: ends of file names. The module is imported when the path, or a name in its folder, has one of them, or
            when the format is to be written. Without ends: another format finds it among its own files.
        folders: the styles of a folder that a user chooses in a conversion.
        files: those of a single file, whose name ends in .safetensors.
        exports: the styles that only an export for a program writes.
    """

    ends: tuple[str, ...]
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()


FORMATS: dict[str, Row] = {
    "peft_folder": Row(location.WEIGHTS, folders=("safetensors", "bin")),
    "tinker_files": Row(()),
    "mlx_files": Row((location.MLX_WEIGHTS,), exports=("mlx",)),
    "image_files": Row((".safetensors",), files=("kohya-ss", "diffusers")),
    "orbax_folder": Row(location.ORBAX_MARKERS, folders=("orbax",)),
}
"""{module of `formats`: its row}, in the order in which they are asked what a path holds. The command line reads it."""
FOLDERS = tuple(style for row in FORMATS.values() for style in row.folders)
FILES = tuple(style for row in FORMATS.values() for style in row.files)
"""The styles of a conversion's target: folders, and single files."""
