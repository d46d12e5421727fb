"""One reader per source format, for `deris-llm data prepare`.

Readers are imported when a source is opened, so that the command line lists their names without waiting for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from deris_llm.data.errors import DataError

if TYPE_CHECKING:
    from deris_llm.data.formats.base import PrepareOptions, SourceReader

FORMATS = {
    "refer": "refer:ReferReader",
    "seqtr": "seqtr:SeqtrReader",
    "hf": "huggingface:HuggingFaceReader",
    "coco": "coco:CocoReader",
    "labelme": "labelme:LabelmeReader",
    "refsegrs": "refsegrs:RefSegRSReader",
    "cvat": "cvat:CvatReader",
    "jsonl": "jsonl:JsonlReader",
    "mevis": "mevis:MevisReader",
    "ref-ytvos": "ref_ytvos:RefYtvosReader",
    "ref-davis": "ref_davis:RefDavisReader",
}
"""Format name -> module of this package and class in it."""

VIDEO_FORMATS = ("mevis", "ref-ytvos", "ref-davis")
"""Formats whose images are frames of videos."""


def open_source(options: PrepareOptions) -> SourceReader:
    """Opens a source.

    Raises:
        DataError: an unknown format, or a source that is not of this format.
    """
    if options.format not in FORMATS:
        raise DataError(f"--format {options.format}: expected one of {', '.join(FORMATS)}. Choose the format of --source")
    module, _, reader = FORMATS[options.format].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), reader)(options)
