"""Weights of the hub, from a cache without network and from a pretended hub."""

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from torch import Tensor

from deris_llm.checkpoints.fingerprints import base_fingerprints
from deris_llm.common import hub
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.deris import build_model
from deris_llm.models.pretrained import resolve_weights, weights_folder
from deris_llm.testing import tiny_config
from tests.models.published_weights import write_published, write_weights

OLD, NEW = "a" * 40, "b" * 40
BERT = ["cognition.backend=bert", "cognition.max_phrase_tokens=20", "cognition.lora.r=0"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("bert")
    overrides, _, tensors = write_published("bert", folder)
    return overrides, folder / "published", tensors


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("mask2former")
    overrides, _, tensors = write_published("mask2former", folder)
    return overrides, folder / "published", tensors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, name: str, source: Path, tensors: dict[str, Tensor], form: str = "3 safetensors") -> Path:
    """Two commits as `hf download` leaves them: of the newer, which is `v2`, all tensors are larger by one."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, revision, more in ((OLD, "main", 0), (NEW, "v2", 1)):
        folder = repository / "snapshots" / commit
        shutil.copytree(source, folder)
        write_weights(folder, {k: t + more if t.is_floating_point() else t for k, t in tensors.items()}, form)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    newer = repository / "snapshots" / NEW
    words = (newer / "vocab.txt").read_text().splitlines() if (newer / "vocab.txt").is_file() else []
    if words:
        words[-2:] = words[:-3:-1]
        (newer / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return repository


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("me/bert", ("me/bert", None)),
        ("me/bert@v2", ("me/bert", "v2")),
        ("me/bert@refs/pr/7", ("me/bert", "refs/pr/7")),
        ("me/bert.x-1@" + NEW, ("me/bert.x-1", NEW)),
        ("me/bert@", None),
        ("bert", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../b", None),
    ],
)
def test_names(name: str, parsed: tuple[str, str | None] | None):
    assert hub.HubName.parsed(name) == parsed


def test_a_name_that_is_none_is_refused_with_the_form():
    with pytest.raises(ValueError, match=r"owner/name or owner/name@revision"):
        resolve_weights("me/bert@")
    assert resolve_weights("me/bert@v2") == "me/bert@v2"


@pytest.mark.parametrize(
    ("pin", "commit", "more"), [("", OLD, 0), ("@v2", NEW, 1), (f"@{NEW}", NEW, 1), (f"@{OLD}", OLD, 0)]
)
def test_a_revision_pins_config_tokenizer_and_weights_alike(cache: Path, bert, pin: str, commit: str, more: int):
    overrides, source, tensors = bert
    repository = cached(cache, "me/bert", source, tensors)
    config = tiny_config(*overrides, *BERT, f"cognition.weights=me/bert{pin}")
    folder = repository / "snapshots" / commit
    assert weights_folder(config.cognition.weights) == folder
    backend: Any = resolve_backend("bert")
    state = backend.build(config.cognition, weights=True, dtype=torch.float32).model.state_dict()
    assert torch.equal(
        state["encoder.layer.1.output.dense.bias"], tensors["bert.encoder.layer.1.output.dense.bias"] + more
    )
    words = (folder / "vocab.txt").read_text().splitlines()
    processor: Any = build_processor(config)
    assert processor.phrases.tokenizer.convert_tokens_to_ids(words[-1]) == len(words) - 1
    recorded = base_fingerprints(config)["cognition"]
    assert (recorded["weights"], recorded["commit"]) == (f"me/bert{pin}", commit)
    assert sorted(recorded["files"]) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert "commit" not in base_fingerprints(config)["perception"]  # a folder


def test_what_a_cache_without_network_lacks_is_named(cache: Path, bert):
    overrides, source, tensors = bert
    with pytest.raises(
        ValueError, match=r"weights 'me/bert': expected a Hugging Face id .* was downloaded before, got "
    ):
        weights_folder("me/bert")
    repository = cached(cache, "me/bert", source, tensors)
    with pytest.raises(ValueError, match=r"weights 'me/bert@v3': expected a Hugging Face id \(and revision\)"):
        weights_folder("me/bert@v3")
    config = tiny_config(*overrides, *BERT, "cognition.weights=me/bert@v2")
    folder = repository / "snapshots" / NEW
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        ValueError,
        match=r"expected tokenizer.json or .* in .*bbbb.*`hf download me/bert --include .* --revision v2 --force",
    ):
        build_processor(config)
    part = folder / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:500])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00003.safetensors.*`hf download me/bert model-00002-of-00003"
    ):
        build_model(config)
    part.unlink()
    with pytest.raises(ValueError, match=r"weights 'me/bert@v2': .*offline"):
        build_model(config)


class PretendedHub:
    """Serves folders of a repository's commit, and notes what is asked for."""

    def __init__(self, repositories: dict[str, Path], cache: Path) -> None:
        self.repositories, self.cache, self.asked = repositories, cache, []

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: Sequence[str], cache_dir: Any
    ) -> str:
        if revision not in (None, "main", OLD):
            raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))  # type: ignore[arg-type]
        assert Path(cache_dir) == self.cache
        folder = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / OLD
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.repositories[repo].iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                self.asked.append(f"{repo}/{path.name}")
                shutil.copy(path, folder)
        return str(folder)

    def file_exists(self, repo: str, file: str, *, revision: str | None) -> bool:
        assert revision == OLD
        return (self.repositories[repo] / file).is_file()

    def parse_safetensors_file_metadata(self, repo: str, file: str, *, revision: str | None) -> Any:
        assert revision == OLD
        if not self.file_exists(repo, file, revision=revision):
            raise EntryNotFoundError(f"no {file}")
        self.asked.append(f"header of {repo}/{file}")
        with safe_open(self.repositories[repo] / file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
        return SimpleNamespace(tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})


@pytest.fixture
def pretended(cache: Path, bert, mask2former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedHub:
    """`me/bert` in three parts, `me/mask2former` whole."""
    for name, (_, source, tensors), form in (
        ("bert", bert, "3 safetensors"),
        ("mask2former", mask2former, "safetensors"),
    ):
        shutil.copytree(source, tmp_path / name)
        write_weights(tmp_path / name, tensors, form)
    served = PretendedHub({f"me/{name}": tmp_path / name for name in ("bert", "mask2former")}, cache)
    monkeypatch.setattr(hub, "snapshot_download", served.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", lambda: served)
    return served


def weights_in(asked: list[str]) -> list[str]:
    return [what for what in asked if not what.startswith("header of") and what.endswith((".safetensors", ".bin"))]


def config_of(mask2former, *more: str) -> Any:
    names = ("cognition.weights=me/bert", "perception.weights=me/mask2former")
    return tiny_config(*mask2former[0], *BERT, *names, *more)


def test_headers_of_both_parts_are_read_before_any_weights(pretended: PretendedHub, mask2former):
    model = build_model(config_of(mask2former))
    first = pretended.asked.index(weights_in(pretended.asked)[0])
    headers = [what for what in pretended.asked[:first] if what.startswith("header of")]
    assert headers == [
        *(f"header of me/bert/model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)),
        "header of me/mask2former/model.safetensors",
    ]
    assert sorted(weights_in(pretended.asked)) == [
        *(f"me/bert/model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)),
        "me/mask2former/model.safetensors",
    ]
    level_embed = mask2former[2]["model.transformer_module.level_embed.weight"]
    assert torch.equal(model.loopback.query_decoder.level_embed.weight, level_embed)


@pytest.mark.parametrize("fault", ["a tensor", "a shape", "a part", "the kind", "the revision"])
def test_a_fault_of_the_second_part_is_found_before_the_first_is_downloaded(
    pretended: PretendedHub, mask2former, tmp_path: Path, fault: str
):
    folder, tensors, more = tmp_path / "mask2former", dict(mask2former[2]), ""
    if fault == "a tensor":
        del tensors["model.transformer_module.level_embed.weight"]
        write_weights(folder, tensors, "safetensors")
        told = "1 missing: transformer_module.level_embed.weight"
    elif fault == "a shape":
        tensors["model.transformer_module.level_embed.weight"] = torch.zeros(3, 16)
        write_weights(folder, tensors, "safetensors")
        told = "1 of another shape: transformer_module.level_embed.weight"
    elif fault == "a part":
        (folder / "model.safetensors").unlink()
        write_weights(folder, tensors, "3 safetensors")[1].unlink()
        told = "model-00002-of-00003.safetensors of me/mask2former"
    elif fault == "the kind":
        (folder / "config.json").write_text(json.dumps({"model_type": "detr"}))
        told = "expected the weights of a Mask2Former, got a detr"
    else:
        more, told = "@v9", "weights 'me/mask2former@v9': .* got a repository without this revision"
    with pytest.raises(ValueError, match=told):
        build_model(config_of(mask2former, f"perception.weights=me/mask2former{more}"))
    assert weights_in(pretended.asked) == []


def test_bin_files_of_the_hub_are_checked_once_they_are_there(pretended: PretendedHub, mask2former, tmp_path: Path):
    (tmp_path / "mask2former" / "model.safetensors").unlink()
    tensors = dict(mask2former[2])
    write_weights(tmp_path / "mask2former", tensors, "bin")
    model = build_model(config_of(mask2former))
    level_embed = tensors.pop("model.transformer_module.level_embed.weight")
    assert torch.equal(model.loopback.query_decoder.level_embed.weight, level_embed)
    shutil.rmtree(pretended.cache)
    hub._small_files.cache_clear()
    write_weights(tmp_path / "mask2former", tensors, "bin")
    with pytest.raises(ValueError, match="1 missing: transformer_module.level_embed.weight"):
        build_model(config_of(mask2former))
