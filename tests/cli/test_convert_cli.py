"""`deris-llm convert`: the account on the screen, errors as exit status 2 before anything is written."""

import pickle
from pathlib import Path

import pytest
import torch

from deris_llm.cli.main import build_parser, main
from deris_llm.interop import beit3
from deris_llm.interop.conversion import new_folder
from deris_llm.models.cognition.beit3 import TOKENIZER_FILE, Beit3Model
from deris_llm.models.pretrained import architecture_of
from deris_llm.testing import tiny_config
from tests.models.tiny_backends import tiny_beit3


@pytest.mark.parametrize("what", ["mask2former", "beit3", "deris"])
def test_help_has_an_example_that_parses(what: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as status:
        main(["convert", what, "--help"])
    assert status.value.code == 0
    example = next(
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  deris-llm convert")
    )
    arguments = build_parser().parse_args(example[1:])
    assert callable(arguments.run)
    assert arguments.allow_half is False


def test_beit3_is_converted_and_the_account_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = Path(tiny_config(*tiny_beit3(tmp_path / "made")).cognition.weights)
    config = architecture_of(str(folder))
    size = (config.hidden_size, config.num_hidden_layers)
    monkeypatch.setitem(beit3._SIZES, size, ("tiny", config.num_attention_heads))
    monkeypatch.setenv("COLUMNS", "150")
    state = Beit3Model.from_pretrained(folder).state_dict()
    file = {"model": {f"beit3.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    file["model"]["mlm_head.weight"] = torch.ones(2)
    torch.save(file, tmp_path / "beit3.zip")

    command = ["convert", "beit3", str(tmp_path / "beit3.zip"), "--out", str(tmp_path / "out")]
    assert main(command) == 2  # no tokenizer
    assert "get beit3.spm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    command += ["--tokenizer", str(folder / TOKENIZER_FILE)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for text in (
        "BEiT-3 tiny",
        "layers",
        "loaded",
        "mlm_head.weight",
        "a head that predicts hidden words",
        "no weights",
    ):
        assert text in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", TOKENIZER_FILE, "conversion.json",
    }  # fmt: skip
    assert main(command) == 2
    assert "expected a new folder, got one that is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["mask2former", "beit3", "deris"])
def test_a_hostile_file_is_refused_by_every_command(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Touch:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'canary')!r}, 'w')",))

    (tmp_path / "file.pth").write_bytes(pickle.dumps({"model": Touch()}))
    command = ["convert", what, str(tmp_path / "file.pth"), "--out", str(tmp_path / "out")]
    if what == "beit3":
        folder = Path(tiny_config(*tiny_beit3(tmp_path / "made")).cognition.weights)
        command += ["--tokenizer", str(folder / TOKENIZER_FILE)]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "builtins.exec" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "canary").exists()


def test_a_folder_that_cannot_be_written_or_is_not_finished_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")

    def write(out: Path) -> None:
        with new_folder(out) as folder:
            (folder / "half").write_text("done")
            raise RuntimeError

    with pytest.raises(ValueError, match="--out .*: expected to write a folder there, got"):
        write(tmp_path / "file" / "out")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
