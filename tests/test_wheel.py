"""The wheel holds real folders where the tree has links, and works beside a user's folders of the same names."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import clplat

ROOT = Path(clplat.__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uv = ROOT / ".uv" / "bin" / "uv"
    command = [str(uv) if uv.is_file() else "uv", "build", "--wheel", "--out-dir"]
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([*command, str(folder), str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a pure Python wheel
        archive.extractall(target)
    return target


def test_it_holds_every_source_file_once(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []
    assert len(names) == len(set(names))
    for group in ("strategies", "streams"):
        files = {f"clplat/{group}/{f.name}" for f in (ROOT / group).glob("*.py")}
        assert len(files) > 1
        assert files <= set(names)
    yaml = {f"clplat/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / "experiments").glob("*/*.yaml")}
    assert yaml
    assert yaml <= set(names)
    assert "clplat/py.typed" in names  # else type checkers of those who install it see nothing
    assert {n.partition("/")[0].split("-")[0] for n in names} == {"clplat"}
    assert not [n for n in names if "__pycache__" in n or n.startswith("mlflow/")]


def test_it_works_beside_folders_of_the_same_names(installed: Path, tmp_path: Path):
    for folder in ("strategies", "streams", "mlflow", "experiments"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('the user has a folder of this name')\n")

    def clplat_says(*argv: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [
            sys.executable,
            "-c",
            "import clplat, sys, clplat.cli as c; print(clplat.__file__); sys.exit(c.main())",
        ]
        done = subprocess.run(
            [*command, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        where, _, text = done.stdout.partition("\n")
        assert where == str(installed / "clplat" / "__init__.py")
        return text

    assert "arXiv:1902.10486" in clplat_says("list", "strategies")
    assert "digits" in clplat_says("list", "streams")
    assert "demo/digits" in clplat_says("list", "experiments")
    assert "no faults" in clplat_says("validate", "demo/digits")
    clplat_says("cp", "demo/digits", str(tmp_path))
    assert (tmp_path / "digits.yaml").is_file()
