"""A fleet that shrinks loses idle pods first: workers in a real ledger, pods of a stand-in API."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import redis
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from blipq import Client, InvalidRequest, Settings
from blipq.ledger.connection import connect
from blipq.ops.deletion_costs import ANNOTATION, DeletionCosts, Pods
from conftest import ledger_of

PODS = "/api/v1/namespaces/gpu/pods"


class Api:
    """Pods by name with their costs, two to a page, as an API server has them."""

    def __init__(self, server: HTTPServer, *names: str) -> None:
        self.costs: dict[str, str | None] = dict.fromkeys(names)
        self.written: list[str] = []
        server.expect_request(PODS, method="GET").respond_with_handler(self._list)
        for name in names:
            server.expect_request(f"{PODS}/{name}", method="PATCH").respond_with_handler(
                self._patch
            )

    def _list(self, request: Request) -> Response:
        assert request.headers["Authorization"] == "Bearer t0ken"
        assert request.args["labelSelector"] == "blipq.part=worker"
        start = int(request.args.get("continue", 0))
        some = list(self.costs.items())[start : start + 2]
        items = [
            {"metadata": {"name": name} | ({} if cost is None else self._annotated(cost))}
            for name, cost in some
        ]
        left = str(start + 2) if start + 2 < len(self.costs) else ""
        return Response(json.dumps({"items": items, "metadata": {"continue": left}}))

    def _patch(self, request: Request) -> Response:
        assert request.headers["Content-Type"] == "application/merge-patch+json"
        name = request.path.rpartition("/")[2]
        self.costs[name] = request.get_json(force=True)["metadata"]["annotations"][ANNOTATION]
        self.written.append(name)
        return Response("{}")

    @staticmethod
    def _annotated(cost: str) -> dict[str, Any]:
        return {"annotations": {ANNOTATION: cost}}


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "namespace").write_text("gpu")
    (tmp_path / "token").write_text("t0ken\n")
    return tmp_path


def test_busy_pods_cost_more_than_idle_ones_and_only_changes_are_written(
    apart: Settings, account: Path, httpserver: HTTPServer
) -> None:
    api = Api(httpserver, "w-busy-1", "w-idle-2", "w-loading-3")
    with Client(apart) as client, connect(apart) as raw:
        ledger = ledger_of(client)

        def hold(pod: str, jobs: int) -> None:
            name, info = f"{pod}-7-abcdef", json.dumps({"active": jobs})
            ledger.register(name, ["default"], ttl_s=30, spare=False, info=info)

        hold("w-busy-1", 9)
        hold("w-idle-2", 0)
        costs = DeletionCosts(raw, Pods("blipq.part=worker", account, httpserver.url_for("")[:-1]))
        costs.tick()
        assert api.costs == {"w-busy-1": "4", "w-idle-2": "0", "w-loading-3": None}
        costs.tick()
        assert api.written == ["w-busy-1", "w-idle-2"]
        hold("w-busy-1", 0)
        hold("w-idle-2", 1)
        costs.tick()
        assert api.costs == {"w-busy-1": "0", "w-idle-2": "1", "w-loading-3": None}
    httpserver.check_assertions()


def test_an_api_server_that_refuses_or_a_redis_that_is_away_ends_nothing(
    account: Path, httpserver: HTTPServer, apart: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    httpserver.expect_request(PODS).respond_with_data("forbidden", status=403)
    pods = Pods("blipq.part=worker", account, httpserver.url_for("")[:-1])
    with caplog.at_level(logging.WARNING), connect(apart) as raw:
        DeletionCosts(raw, pods).tick()
        DeletionCosts(redis.Redis(port=1), pods).tick()
    assert "403" in caplog.text
    assert "Connection refused" in caplog.text


def test_outside_of_kubernetes_the_option_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no service account"):
        Pods("blipq.part=worker", tmp_path)
