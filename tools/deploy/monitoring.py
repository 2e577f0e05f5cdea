"""Writes the dashboards, the alerts with their tests, and the page of runbooks.

    python -m tools.deploy.monitoring

It writes ``deploy/grafana/*.json``, ``deploy/prometheus/blipq-alerts*.yml`` and ``docs/alerts.md``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tools.deploy.alerts import ALERTS, Alert
from tools.deploy.panels import DASHBOARDS, Panel

ROOT = Path(__file__).parents[2]
NOTE = "# Written by `python -m tools.deploy.monitoring`. Change tools/deploy, not this file.\n"
SOURCE = {"type": "prometheus", "uid": "${source}"}
PAGE = """\
# Alerts

<!-- Written by `python -m tools.deploy.monitoring`. Change tools/deploy, not this page. -->

`deploy/prometheus/blipq-alerts.yml` has these rules, and `deploy/grafana/` two dashboards: of the
fleet and of its workers. `promtool test rules deploy/prometheus/blipq-alerts-test.yml` fires each
rule. `tests/deploy/test_alerts.py` brings about the fault that each is for, on a real Prometheus
that scrapes a real stack, with shorter times. `page` is for whoever is on call, `warn` for the next
working day.

Prometheus scrapes the exporter, every worker and every sender ([Metrics](production.md#metrics)).
"""


def panel_json(panel: Panel, place: int) -> dict[str, Any]:
    """A time series, two in a line."""
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (place % 2), "y": 8 * (place // 2)},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(65 + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for index, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def dashboard_json(uid: str, title: str, panels: Sequence[Panel]) -> str:
    """A dashboard as Grafana imports it, with the data source to be picked there."""
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    dashboard = {
        "uid": uid,
        "title": title,
        "tags": ["blipq"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [panel_json(panel, place) for place, panel in enumerate(panels)],
    }
    return json.dumps(dashboard, indent=2) + "\n"


def rule(alert: Alert) -> dict[str, Any]:
    """An alerting rule."""
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": f"{alert.minutes}m",
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "runbook": f"docs/alerts.md#{alert.name.lower()}",
        },
    }


def rule_test(alert: Alert) -> dict[str, Any]:
    """A test that the rule fires; that others do not is theirs to say."""
    series = [{"series": name, "values": values} for name, values in alert.series.items()]
    labels = {"severity": alert.severity, **alert.labels}
    expression = f'count(ALERTS{{alertname="{alert.name}", alertstate="firing"}})'
    return {
        "name": alert.name,
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": f"{alert.at}m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            },
            {
                "expr": f'ALERTS{{alertname="{alert.name}", alertstate="firing"}}',
                "eval_time": f"{alert.at}m",
                "exp_samples": [{"labels": _selector(alert.name, labels), "value": 1}],
            },
        ],
    }


def _selector(name: str, labels: dict[str, str]) -> str:
    every = {"alertname": name, "alertstate": "firing", **labels}
    return "ALERTS{" + ", ".join(f'{key}="{value}"' for key, value in every.items()) + "}"


def written() -> dict[Path, str]:
    """What is to be in each file."""
    rules = {"groups": [{"name": "blipq", "rules": [rule(alert) for alert in ALERTS]}]}
    tests = {
        "rule_files": ["blipq-alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [rule_test(alert) for alert in ALERTS],
    }
    pages = {
        ROOT / f"deploy/grafana/{uid}.json": dashboard_json(uid, title, panels)
        for uid, (title, panels) in DASHBOARDS.items()
    }
    return pages | {
        ROOT / "deploy/prometheus/blipq-alerts.yml": NOTE + _yaml(rules),
        ROOT / "deploy/prometheus/blipq-alerts-test.yml": NOTE + _yaml(tests),
        ROOT / "docs/alerts.md": PAGE + "".join(map(_section, ALERTS)),
    }


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=1000)


def _section(alert: Alert) -> str:
    held = f" for {alert.minutes} minutes" if alert.minutes else ""
    return (
        f"\n## {alert.name}\n\n`{alert.severity}`{held}: `{alert.expr}`\n\n"
        f"{alert.meaning}\n\n{alert.action}\n"
    )


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
