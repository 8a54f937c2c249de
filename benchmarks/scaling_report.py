"""A scaling run's results as a table. Knows the names in the JSON; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TARGETS = {"cfg2": 1.95, "u2": 1.88, "r2": 1.85, "vae shared": 1.7}


def as_markdown(results: Mapping[str, Any]) -> str:
    """Tables of steps, decodes, links and failures."""
    machine = results.get("machine", {})
    lines = ["# Scaling, measured", "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += [
        "| section | s | first call, s | speed-up | target | error | to float32 | peak GiB | sent, MB | "
        "hidden |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    lines += [_row(name, found) for name, found in results.items() if "seconds" in found]
    rows = results.get("links", {}).get("rows", [])
    if rows:
        lines += ["", "| exchange | bytes a rank sends | ms | GB/s in one direction |", "|---|---|---|---|"]
        for row in rows:
            lines.append(
                f"| {row['kind']} | {row['bytes']} | {row['seconds'] * 1e3:.3f} | "
                f"{row['gigabytes_per_second']:.1f} |"
            )
    for name, found in results.items():
        for word in ("failed", "skipped"):
            if word in found:
                lines += ["", f"{name} {word}: {found[word]}"]
    if "ranks" in results.get("fault", {}):
        fault = results["fault"]
        lines += ["", f"A rank that raised: {fault['ranks']}; groups made again: {fault['groups_again']}."]
    return "\n".join(lines) + "\n"


def _row(name: str, found: Mapping[str, Any]) -> str:
    target = next(
        (value for word, value in TARGETS.items() if name.endswith(word) and "diffusers" not in name), None
    )
    error = next((found[key] for key in ("error_to_alone", "error_to_ours_alone") if key in found), None)
    peak, sent = max(found.get("peak_bytes", [0])) / 2**30, sum(found.get("bytes_sent", {}).values()) / 1e6
    cells = [f"{found['seconds']:.4f}", f"{found['first']:.3f}", _shown(found.get("speedup"), "{:.3f}x")]
    cells += [
        _shown(target, ">= {:.2f}x"),
        _shown(error, "{:.1e}"),
        _shown(found.get("error_to_float32"), "{:.1e}"),
    ]
    cells += [_shown(peak or None, "{:.1f}"), _shown(sent or None, "{:.1f}")]
    cells.append(_shown(found.get("trace", {}).get("hidden_share"), "{:.0%}"))
    return f"| {name} | {' | '.join(cells)} |"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
