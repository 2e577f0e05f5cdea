"""``blipq doctor``: what is right, what is not, and what to do."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from blipq.cli.terminal.output import JsonOption, out, reported
from blipq.ops.doctor import Finding, examine
from blipq.settings import Settings
from blipq.submission import checked

_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(
    canary: Annotated[bool, typer.Option(help="Run a real job on a live worker.")] = True,
    torch: Annotated[bool, typer.Option("--torch", help="Import torch to check CUDA.")] = False,
    create_bucket: Annotated[
        bool, typer.Option("--create-bucket", help="Make the inbox bucket if it is missing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything a job needs. Exit code 1 if anything is bad.

    Examples:
        blipq doctor
        blipq doctor --no-canary --json
    """
    findings: list[Finding] = []
    with reported(as_json):
        settings = checked(Settings)
        for finding in examine(settings, canary=canary, torch=torch, create_bucket=create_bucket):
            findings.append(finding)
            if not as_json:
                _show(finding)
    bad = any(finding.state == "bad" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not bad, "checks": [asdict(finding) for finding in findings]}))
    raise typer.Exit(1 if bad else 0)


def _show(finding: Finding) -> None:
    state = f"[{_STYLES[finding.state]}]{finding.state:<4}[/]"
    out.print(f"{state}  {escape(finding.check)}: {escape(finding.message)}")
    if finding.advice and finding.state != "ok":
        out.print(f"      → {escape(finding.advice)}")
