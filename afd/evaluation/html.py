"""The report as one HTML file: styles and pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from afd.evaluation.advice import advised
from afd.evaluation.plots import NORM_SIGNS
from afd.evaluation.tables import Results, Table, percent

STYLE = """
:root { --ink: #1d2530; --soft: #5b6675; --line: #dde2e8; --paper: #ffffff; --good: #1a7f4b; --warn: #9a6700;
  --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
.verdict { border-left: .4rem solid; padding: .7rem 1rem; margin: 1.2rem 0; background: #f6f8fa; }
.verdict strong { font-size: 1.05rem; }
.pass { color: var(--good); } .warn { color: var(--warn); } .fail { color: var(--bad); }
.skipped { color: var(--soft); }
.verdict.pass, .verdict.warn, .verdict.fail { border-color: currentColor; }
.verdict p, .verdict li { color: var(--ink); } .verdict ul { margin: .2rem 0; padding-left: 1.2rem; }
.verdict li { margin: .3rem 0; } .verdict code { white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.figure { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1.1rem; min-width: 9rem; }
.figure b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid var(--soft); white-space: nowrap; }
tr.ours { background: #eef4fb; font-weight: 600; }
.short { white-space: nowrap; }
img { max-width: 100%; height: auto; display: block; } code { font-size: .88em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""

VERDICTS = {
    "pass": "Every check that could be made passed.",
    "warn": "Some checks warn: read them before quoting a figure.",
    "fail": "Checks failed: these figures are not evidence of robustness.",
    "skipped": "No check was made.",
}


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def report(results: Results, folder: Path, tables: Sequence[Table]) -> str:
    """The report of one evaluation, with the pictures that lie in `folder`."""
    subject, data, protocol = results["subject"], results["data"], results["protocol"]
    norm, eps = protocol["norm"], protocol["reference"]["text"]
    sign = NORM_SIGNS[norm]
    title = f"{subject['name']} on {data['name']}"
    worst = results["worst_case"].get(norm, {}).get(eps)
    figures = [("clean accuracy", percent(results["clean"]) + "%")]
    if worst is not None:
        figures.append((f"worst case, {sign}, ε = {eps}", percent(worst) + "%"))
    figures.append((f"{data['split']} images", f"{data['count']:,}"))
    return page(
        f"{title}: robustness",
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">Protocol “{escape(protocol["name"])}”, judged at {sign} ε = {escape(eps)}: exactly '
            f"{protocol['reference']['fraction']}, as a float {protocol['reference']['float']!r}.</p>",
            verdict(results),
            '<div class="figures">'
            + "".join(f'<div class="figure"><b>{b}</b>{a}</div>' for a, b in figures)
            + "</div>",
            "<h2>Accuracy under attack</h2>",
            attacks(results, ("score", "transfer")),
            worst_cases(results),
            "<h2>Accuracy against ε</h2>",
            picture(folder / "curves.png", "accuracy against ε, one panel an attack"),
            "<h2>Adversarial images</h2>",
            picture(folder / "examples.png", "clean images, attacked images and their amplified differences"),
            "<h2>Checks for self-deception</h2>",
            checks(results),
            *(f"<h2>{escape(found.title)}</h2>\n{table(found)}" for found in tables),
            *features(results, folder),
            "<h2>Probes</h2>",
            '<p class="soft">Attacks on the first images whose only purpose is the checks above; '
            "they do not count in the worst case.</p>",
            attacks(results, ("probe",)),
            "<h2>How it was measured</h2>",
            provenance(results),
        ],
    )


def comparison(results: Sequence[Results], folder: Path, tables: Sequence[Table]) -> str:
    """Several evaluations side by side."""
    names = ", ".join(one["subject"]["name"] for one in results)
    return page(
        f"{names}: compared",
        [
            f"<h1>{escape(names)}</h1>",
            f'<p class="soft">On {escape(results[0]["data"]["name"])}; published figures are those of '
            "Bashivan et al. 2021 (arXiv 2006.04621).</p>",
            *(verdict(one, named=True) for one in results),
            *(f"<h2>{escape(found.title)}</h2>\n{table(found)}" for found in tables),
            "<h2>Accuracy against ε</h2>",
            picture(folder / "curves.png", "accuracy against ε, one panel an attack, one line a model"),
        ],
    )


def verdict(results: Results, *, named: bool = False) -> str:
    """The overall verdict, with the checks that did not pass and what to do about each."""
    kind = results["verdict"]
    who = f"{results['subject']['name']}: " if named else ""
    found = [
        f"<li><b class='{verdict}'>{escape(name)}</b> {code(words)}</li>"
        for name, verdict, words in advised(results["checks"], results["protocol"]["name"])
    ]
    todo = f"<p>What to do next:</p><ul>{''.join(found)}</ul>" if found else ""
    return f'<div class="verdict {kind}"><strong>{escape(who)}{VERDICTS[kind]}</strong>{todo}</div>'


def code(text: str) -> str:
    """Plain text in which `backquotes` stand around code."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def attacks(results: Results, roles: tuple[str, ...]) -> str:
    """One row for each attack and radius."""
    rows = []
    for attack in results["attacks"]:
        if attack["role"] not in roles:
            continue
        settings = ", ".join(f"{name} {plain(value)}" for name, value in attack["settings"].items())
        curve = " · ".join(f"{point['text']}: <b>{percent(point['accuracy'])}</b>" for point in attack["accuracies"])
        rows.append(
            f"<tr><td class='short'>{escape(attack['name'])}</td><td class='text'>{NORM_SIGNS[attack['norm']]}</td>"
            f"<td class='text'>{curve}</td><td>{attack['area']:.3f}</td><td class='text short'>{escape(settings)}</td>"
            f"<td class='text'>{escape(attack['library'])}</td><td>{attack['seconds']:,.1f}</td></tr>"
        )
    head = (
        "<tr><th>attack</th><th class='text'>norm</th><th class='text'>accuracy (%) at each ε</th>"
        "<th>area</th><th class='text'>settings</th><th class='text'>by</th><th>seconds</th></tr>"
    )
    cascade = any(attack["scope"] == "remaining" for attack in results["attacks"])
    note = (
        '<p class="soft">Each attack met only what those above it had left.</p>' if cascade and "score" in roles else ""
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def plain(setting: Any) -> str:
    """A setting of an attack as text."""
    return f"{setting:.6g}" if isinstance(setting, int | float) else str(setting)


def worst_cases(results: Results) -> str:
    """Accuracy against all attacks of a norm together."""
    lines = [
        f"<p>Worst case per image over all {NORM_SIGNS[norm]} attacks: "
        + " · ".join(f"{escape(eps)}: <b>{percent(accuracy)}%</b>" for eps, accuracy in curve.items())
        + "</p>"
        for norm, curve in results["worst_case"].items()
    ]
    return "\n".join(lines)


def checks(results: Results) -> str:
    """Every check with its number."""
    rows = []
    for check in results["checks"]:
        number = "-" if check["number"] is None else f"{check['number']:.4g} {escape(check['unit'])}"
        said = check["meaning"] if check["verdict"] != "pass" else f"at most {check['allowed']:.4g} allowed"
        rows.append(
            f"<tr><td>{escape(check['name'])}</td><td class='text {check['verdict']}'><b>{check['verdict']}</b></td>"
            f"<td class='text'>{number}</td><td class='text'>{escape(said)}</td></tr>"
        )
    head = (
        "<tr><th>check</th><th class='text'>verdict</th><th class='text'>number</th><th class='text'>meaning</th></tr>"
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def features(results: Results, folder: Path) -> list[str]:
    """Dimension of the features, and the domains' distance."""
    parts: list[str] = []
    if (found := results["features"]) is not None:
        parts.append(
            f"<h2>Features</h2>\n<p>{found['components']} principal components hold {100 * found['explained']:g}% of "
            f"the variance of {found['count']} features on the clean images; {found['never_zero']} features are never "
            f"zero, {found['always_zero']} always are.</p>"
        )
    if results["divergence"]:
        curves: dict[str, list[str]] = {}
        for one in results["divergence"]:
            curves.setdefault(one["attack"], []).append(f"{one['eps']}: {one['distance']:.2f} ({one['gap']:.2f})")
        rows = tuple((attack, " · ".join(points)) for attack, points in curves.items())
        parts += [
            "<h2>Attacked features, as the discriminator sees them</h2>",
            picture(folder / "divergence.png", "HΔH distance against the error gap, a point an attack and radius"),
            table(Table("", ("attack", "HΔH distance (error gap) at each ε"), rows)),
        ]
    return parts


def provenance(results: Results) -> str:
    """Where the figures come from."""
    subject, settings, machine = results["subject"], results["settings"], results["machine"]
    facts: dict[str, Any] = {
        "model": f"{subject['source']} ({subject['architecture']}, {subject['parameters']:,} parameters)",
        "weights (SHA-256)": subject["sha256"],
        "transfer from": None if results["surrogate"] is None else results["surrogate"]["source"],
        "images": f"{results['data']['images']} of the {results['data']['split']} set of {results['data']['name']}",
        "seed": settings.get("seed"),
        "batch size": settings.get("batch_size"),
        "processes": settings.get("processes"),
        "device": machine["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    return f"<dl>{items}</dl>"


def table(found: Table) -> str:
    """A table; our own rows stand out from published ones."""
    wordy = [any(": " in row[column] for row in found.rows) for column in range(len(found.head))]
    kinds = [" class=text" if words else "" for words in wordy]
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(found.head, kinds, strict=True))
    rows = []
    for number, row in enumerate(found.rows):
        mark = ' class="ours"' if found.ours and number < found.ours and len(found.rows) > found.ours else ""
        cells = (f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    note = f'<p class="soft">{escape(found.note)}</p>' if found.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def picture(path: Path, text: str) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
