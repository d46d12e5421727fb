"""What an installed package is made of."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import deris_llm

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _all_requirements() -> list[str]:
    project = PROJECT["project"]
    return [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]


UPPER_BOUNDS = {
    "transformers": ",<6",  # its Trainer's private methods are used
    "mkdocs": ",<2",  # mkdocs-material does not work with mkdocs 2
}


def test_requirements_have_lower_bounds_and_upper_ones_only_by_name():
    for requirement in _all_requirements():
        name = re.split(r"[>\[]", requirement)[0]
        extra = r"(\[[a-z]+\])?"
        upper = "" if "[" in requirement else UPPER_BOUNDS.get(name, "")
        assert re.fullmatch(rf"{re.escape(name)}{extra}>=[0-9.]+{upper}", requirement), requirement


def test_every_import_of_the_package_is_declared():
    names = {"PIL": "pillow", "yaml": "pyyaml", "qwen_vl_utils": "qwen-vl-utils", "cv2": "opencv-python-headless"}
    brought = {"tokenizers", "huggingface_hub", "annotated_types"}  # parts of transformers, and of pydantic
    declared = {re.split(r"[>\[]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    demo = {re.split(r"[>\[]", requirement)[0] for requirement in PROJECT["project"]["optional-dependencies"]["demo"]}
    for path in (ROOT / "deris_llm").rglob("*.py"):
        of_extra = demo if path == ROOT / "deris_llm" / "serving" / "demo" / "page.py" else set()
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        imported += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        for module in (name.partition(".")[0] for name in imported):
            if module in sys.stdlib_module_names or module in brought | {"deris_llm", "__future__"}:
                continue
            assert names.get(module, module) in declared | of_extra, f"{path.relative_to(ROOT)} imports {module}"


def test_entry_point_and_version():
    installed = distribution("deris-llm")
    assert installed.version == deris_llm.__version__
    scripts = {entry.name: entry.value for entry in installed.entry_points if entry.group == "console_scripts"}
    assert scripts == {"deris-llm": "deris_llm.cli.main:main"}


def test_data_files_are_built_into_the_package(tmp_path):
    """Run configs, architectures and the shipped weights travel with it."""
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q"]
    egg_info, build = ["egg_info", "--egg-base", str(tmp_path)], ["build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run([*command, *egg_info, *build], cwd=ROOT, check=True, capture_output=True)
    wanted = [
        path
        for pattern in (
            "training/ds_configs/*.json",
            "config/**/*.yaml",
            "models/architectures/*.json",
            "builtin/**/*",
            "**/*.css",
            "**/*.py",
        )
        for path in (ROOT / "deris_llm").glob(pattern)
        if path.is_file()
    ]
    missing = [path for path in wanted if not (tmp_path / "built" / path.relative_to(ROOT)).is_file()]
    assert not missing
    assert {path.suffix for path in wanted} >= {".yaml", ".json", ".py"}


def test_shipped_weights_stay_small():
    """The backbones together, and the checkpoint that was fine-tuned from them."""
    builtin = ROOT / "deris_llm" / "builtin"
    sizes = {path: path.stat().st_size for path in builtin.rglob("*") if path.is_file()}
    checkpoint = sum(size for path, size in sizes.items() if builtin / "tiny" in path.parents)
    assert sum(sizes.values()) - checkpoint <= 20 * 2**20
    assert checkpoint <= 4e6


def test_no_path_of_a_machine_in_tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:  # an unpacked archive
        return
    pattern = re.compile(r"/(home|root|work|tmp)/[a-z]")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".sh", ".toml", ".yaml", ".json", ".md"}
            and path.is_file()
            and path.name != Path(__file__).name
        ):
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{name}: {found}"


def _paths_of_the_tree(tree: str) -> set[str]:
    """The paths in an indented list, two blanks a level; the name of a folder ends in a slash."""
    paths, parents = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.add("".join(parents))
    return paths


def test_the_design_page_lists_every_file_and_no_other():
    section = (ROOT / "docs" / "design.md").read_text().partition("## What is where")[2]
    listed = _paths_of_the_tree(section.split("```")[1].strip("\n"))
    wanted = set()
    for folder in ("deris_llm", "scripts", "eval", "ds_configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".sh", ".json", ".sbatch"} and not {"builtin", "architectures"} & set(path.parts):
                is_package = path.name == "__init__.py"
                wanted.add(f"{path.parent.relative_to(ROOT)}/" if is_package else str(path.relative_to(ROOT)))
    assert wanted - listed == set(), "missing in docs/design.md, 'What is where'"
    assert [path for path in sorted(listed) if not (ROOT / path).exists()] == [], "in docs/design.md, but no file"
