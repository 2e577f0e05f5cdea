"""None of our names is on a package index, where a stranger could register it.

So no way of installing that the README names may look for one there. The index here has the names
as a stranger would upload them, and a stub of every other distribution.
"""

import io
import re
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from conftest import ROOT
from installs.conftest import Environment, run

pytestmark = [pytest.mark.installs, pytest.mark.timeout(300)]

OURS = ("blipq", "blipq-api", "blipq-worker", "blipq-datasets")
POISON = "poisoned.py"


def needed() -> list[Requirement]:
    """All that the distributions need, their extras included."""
    client, *others = (
        tomllib.loads((ROOT / name / "pyproject.toml").read_text())
        for name in ("producer", "api", "worker", "datasets")
    )
    extras = client["project"]["optional-dependencies"].values()
    texts = [*client["project"]["dependencies"], *(each for extra in extras for each in extra)]
    for each in others:
        texts += each["tool"]["hatch"]["metadata"]["hooks"]["custom"]["dependencies"]
        for extra in each["project"].get("optional-dependencies", {}).values():
            texts += extra
    return [Requirement(text) for text in texts]


def stub_versions() -> dict[str, str]:
    """A version of each that suits all who need it: the highest that is pinned, or the least."""
    found: dict[str, list[Version]] = {}
    for each in needed():
        named = [part.version for part in each.specifier if part.operator in ("==", ">=")]
        found.setdefault(canonicalize_name(each.name), []).extend(map(Version, named))
    return {name: str(max(versions)) for name, versions in found.items()}


def wheel(name: str, version: str, *, content: str = "") -> bytes:
    """A wheel of one empty module, or with a file ``poisoned.py`` that has this content."""
    folded = name.replace("-", "_")
    module = POISON if content else f"{folded}.py"
    about = f"{folded}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        module: content,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": tags,
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{about}/RECORD"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path, text in {**files, f"{about}/RECORD": record}.items():
            archive.writestr(path, text)
    return stream.getvalue()


class Index:
    """A package index on this machine; ``asked`` are the names that were looked for."""

    def __init__(self) -> None:
        import blipq

        self.asked: list[str] = []
        self._versions = {name: [version] for name, version in stub_versions().items()}
        self._versions |= {name: [blipq.__version__, "99.0"] for name in OURS}
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = index.answer(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple/"

    def answer(self, path: str) -> bytes | None:
        kind, name = path.strip("/").split("/")
        if kind == "files":
            name, version, *_ = name.split("-")
            name = canonicalize_name(name)
            return wheel(name, version, content="STOLEN = True\n" if name in OURS else "")
        self.asked.append(name)
        if name not in self._versions:
            return None
        folded = name.replace("-", "_")
        files = [f"{folded}-{version}-py3-none-any.whl" for version in self._versions[name]]
        return "".join(f'<a href="/files/{file}">{file}</a>' for file in files).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    yield index
    index.close()


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What builds the distributions, in a folder: the index here has none of it."""
    folder = tmp_path_factory.mktemp("backend")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    run([*pip, "hatchling>=1.27", "editables"])
    return folder


Install = Callable[..., None]


@pytest.fixture
def environment(new_environment: Callable[[], Environment]) -> Environment:
    return new_environment()


@pytest.fixture
def install(environment: Environment, index: Index, backend: Path) -> Install:
    """Installs from the index here alone, whatever this machine's pip is configured to do."""

    def install(*arguments: str) -> None:
        options = ("--quiet", "--no-build-isolation", "--no-cache-dir", "--index-url", index.url)
        variables = {
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_FIND_LINKS": "",
            "PYTHONPATH": str(backend),
        }
        environment.pip("install", *options, *arguments, **variables)

    return install


#: What the README says, and what commands say where a part is missing.
WAYS = {
    "a clone": [["."]],
    "a clone for indexes": [[".[search,local]"]],
    "a clone with a worker": [[".[worker]"]],
    "a clone with a door": [[".[api]"]],
    "a clone to work on": [["-e", ".[worker,local,api]"]],
    "the client": [["./producer"]],
    "the client, then what a command asks for": [["./producer"], ["blipq[search,local]"]],
    "client and worker": [["./producer", "./worker"]],
    "client and door": [["./producer", "./api"]],
    "all three": [["./producer", "./api", "./worker"]],
    "client with parts and worker": [["./producer[local]", "./worker"]],
    "wheels of client and worker": [["{producer}", "{worker}"]],
    "wheels of client and door": [["{producer}", "{api}"]],
    "a clone for datasets": [[".[datasets]"]],
    "client and datasets": [["./producer", "./datasets"]],
    "wheels of client and datasets": [["{producer}", "{datasets}"]],
    "a clone, then a part": [["."], ["blipq[worker,local,api]"]],
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_installing_looks_for_our_names_on_an_index(
    way: str, environment: Environment, index: Index, install: Install, wheels: dict[str, Path]
) -> None:
    for arguments in WAYS[way]:
        install(*(each.format(**wheels) for each in arguments))
    assert set(index.asked).isdisjoint(OURS)
    assert "celery" in index.asked, "the index was used"
    assert not list(environment.python.parents[1].rglob(POISON))
    assert "blipq" in environment.pip("list")


@pytest.mark.parametrize("program", ["./worker", "./api"])
def test_the_index_would_give_a_strangers_code_to_who_asks_it(
    program: str, environment: Environment, index: Index, install: Install
) -> None:
    """A program without its client beside it: why the README names both together."""
    install(program)
    assert "blipq" in index.asked
    assert list(environment.python.parents[1].rglob(POISON))


def test_no_extra_names_one_of_ours() -> None:
    named = {canonicalize_name(each.name) for each in needed()}
    assert named.isdisjoint(OURS)


def test_the_readme_names_no_other_way() -> None:
    """Files and folders alone, never a name that pip would look up."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"pip install ([^`\n]*)", page.read_text()):
            for word in line.split():
                name = re.match(r"'?([\w-]+)", word)
                named = name is not None and canonicalize_name(name[1]) in OURS
                assert not named or word.endswith(".whl"), line
