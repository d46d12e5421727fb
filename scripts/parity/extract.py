#!/usr/bin/env python
"""Makes tests/golden/parity, the extract of the parity fixtures that a plain clone tests with.

    python scripts/parity/extract.py --fixtures ../shared/parity

Of the model's arrays it keeps every fourth stored number (field ``every``), of the other fixtures everything.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

EVERY = 4
MODEL = "B_refcoco"
WHOLE = ("losses.npz", "metrics.json", "nsc_similarity.json", "clean_string.json", "preproc.npz")
MINIFIED = ("losses.json", f"keys_{MODEL}.json")


def main() -> None:
    """Writes the extract."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, required=True, metavar="DIR", help="folder of the whole fixtures")
    parser.add_argument("--out", type=Path, default=Path("tests/golden/parity"), metavar="DIR")
    arguments = parser.parse_args()
    source, out = arguments.fixtures, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in WHOLE:
        shutil.copyfile(source / name, out / name)
        (out / name).chmod(0o644)
    for name in MINIFIED:
        _write(out / name, json.loads((source / name).read_text()))
    described = json.loads((source / f"parity_{MODEL}.json").read_text())
    kept = {}
    with np.load(source / f"parity_{MODEL}.npz") as stored:
        for name, entry in described["entries"].items():
            kept[name] = stored[name].ravel()[::EVERY]
            entry["every"] = EVERY
    np.savez_compressed(out / f"parity_{MODEL}.npz", **kept)
    _write(out / f"parity_{MODEL}.json", described)
    with np.load(source / f"inputs_{MODEL}.npz") as stored:
        np.savez_compressed(out / f"inputs_{MODEL}.npz", **{n: a for n, a in stored.items() if "sample" not in n})
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size:,} bytes in {len(list(out.iterdir()))} files")


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
