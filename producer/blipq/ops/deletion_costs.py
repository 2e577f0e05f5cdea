"""In Kubernetes: has a fleet that shrinks lose its idle pods first.

A ReplicaSet that must delete pods takes those with the lowest ``pod-deletion-cost``. The exporter
writes that of all workers, as it reads no pictures. Workers, which do, may not change pods.
"""

import json
import logging
import os
import ssl
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import redis

from blipq.errors import InvalidRequest
from blipq.ledger import keys

if TYPE_CHECKING:
    from http.client import HTTPResponse

log = logging.getLogger(__name__)

#: Between two looks at the workers: each change costs the API server a write.
PAUSE_S = 15.0
ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: A pod's name is its host name, up to here.
_LONGEST_HOST = 63
_TIMEOUT_S = 10.0


class Pods:
    """The pods of a label selector in this pod's own namespace.

    account: the folder of its service account. Raises InvalidRequest where there is none.
    """

    def __init__(self, selector: str, account: Path = ACCOUNT, url: str | None = None) -> None:
        self._account = account
        try:
            namespace = (account / "namespace").read_text().strip()
            authority = account / "ca.crt"
            self._tls = ssl.create_default_context(cafile=authority) if url is None else None
        except OSError as error:
            raise InvalidRequest(f"--deletion-costs: no service account here: {error}") from None
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = os.environ.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
        base = url or f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self._url = f"{base}/api/v1/namespaces/{namespace}/pods"
        self._selector = selector

    def costs(self) -> Iterator[tuple[str, str | None]]:
        """Each pod's name and its present cost. Raises OSError."""
        more = {"labelSelector": self._selector, "limit": "500"}
        while True:
            found = self._call("GET", f"?{urllib.parse.urlencode(more)}")
            for pod in found["items"]:
                about = pod["metadata"]
                yield about["name"], (about.get("annotations") or {}).get(ANNOTATION)
            left = found.get("metadata", {}).get("continue")
            if not left:
                return
            more["continue"] = left

    def write(self, name: str, cost: str) -> None:
        """Sets a pod's cost. Raises OSError."""
        self._call("PATCH", f"/{name}", {"metadata": {"annotations": {ANNOTATION: cost}}})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(  # noqa: S310
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                # Read each time: it is replaced within the hour.
                "Authorization": f"Bearer {(self._account / 'token').read_text().strip()}",
                "Content-Type": "application/merge-patch+json",
            },
        )
        opened = urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._tls)  # noqa: S310
        with cast("HTTPResponse", opened) as answer:
            return json.load(answer)


class DeletionCosts:
    """Writes the cost of each worker's pod: 0 where it is idle, and more the more jobs it holds."""

    def __init__(self, client: "redis.Redis", pods: Pods) -> None:
        self._redis = client
        self._pods = pods

    def tick(self) -> None:
        """One look. An API server or a Redis that is away is tried again at the next one."""
        try:
            held = self._held()
            for name, present in self._pods.costs():
                jobs = held.get(name[:_LONGEST_HOST])
                # A pod that is no live worker may be loading its model: that is left to Kubernetes.
                cost = None if jobs is None else str(jobs.bit_length())
                if cost not in (None, present):
                    self._pods.write(name, cost)
        except (OSError, ValueError, redis.RedisError) as error:
            log.warning("deletion costs: %s", error)

    def _held(self) -> dict[str, int]:
        """How many jobs each live worker holds, by the host that its name begins with."""
        models = cast("list[str]", self._redis.zrange(keys.MODELS, 0, -1))
        with self._redis.pipeline(transaction=False) as pipe:
            for model in models:
                pipe.zrange(keys.serving(model), 0, -1)
            names = sorted({name for found in pipe.execute() for name in found})
        texts = self._redis.mget([keys.worker(name) for name in names]) if names else []
        return {
            name.rsplit("-", 2)[0]: int(json.loads(text)["active"])
            for name, text in zip(names, cast("list[str | None]", texts), strict=True)
            if text is not None
        }
