"""One reader per source format, for `deris-llm data prepare`."""

from __future__ import annotations

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import SourceOptions, SourceReader
from deris_llm.data.formats.coco import CocoReader
from deris_llm.data.formats.cvat import CvatReader
from deris_llm.data.formats.huggingface import HuggingFaceReader
from deris_llm.data.formats.jsonl import JsonlReader
from deris_llm.data.formats.labelme import LabelmeReader
from deris_llm.data.formats.refer import ReferReader
from deris_llm.data.formats.seqtr import SeqtrReader

FORMATS = {
    "refer": ReferReader,
    "seqtr": SeqtrReader,
    "hf": HuggingFaceReader,
    "coco": CocoReader,
    "labelme": LabelmeReader,
    "cvat": CvatReader,
    "jsonl": JsonlReader,
}
"""Format name -> its reader."""


def open_source(format_name: str, options: SourceOptions) -> SourceReader:
    """Opens a source.

    Raises:
        DataError: an unknown format, or a source that is not of the format.
    """
    if format_name not in FORMATS:
        raise DataError(
            f"--format {format_name}: expected one of {', '.join(FORMATS)}, got another. Choose the format of --source"
        )
    return FORMATS[format_name](options)
