"""The report of an evaluation: the paper's tables for our own models, and the page as HTML, from templates."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd.attacks.ball import NORMS
from afd.evaluation.checks import VERDICTS
from afd.evaluation.confirm import confirmed_in_words
from afd.installation import needed_by
from afd.metrics import spanned
from afd.training.alarms import Alarm, alarm_lines

TABLE_1_COLUMNS = ("clean", "PGD WB", "C&W WB", "PGD BB", "C&W BB")
TABLE_1: dict[str, dict[str, tuple[float | None, ...]]] = {
    "mnist": {
        "NT": (98.84, 0, 62.43, 50.82, 96.48),
        "AT": (99.35, 95.66, 92.78, 98.92, 98.95),
        "TRADES": (99.14, 94.81, 90.08, 98.5, 98.57),
        "AFD-DCGAN": (99.24, 95.72, 93.78, 98.65, 98.49),
        "AFD-WGAN": (99.14, 97.68, 97.68, 98.59, 98.71),
    },
    "cifar10": {
        "NT": (94.89, 0.55, 0.31, 17.93, None),
        "AT": (85.92, 40.07, 40.27, 85.14, 85.84),
        "TRADES": (81.94, 53.3, 40.24, 80.82, 81.74),
        "AFD-DCGAN": (86.82, 44.35, 50.93, 85.73, 86.68),
        "AFD-WGAN": (85.95, 59.38, 62.43, 84.74, 85.79),
    },
    "cifar100": {
        "AT": (56.49, 18.54, 17.71, 56.07, 56.42),
        "TRADES": (60.32, 25.11, 20.52, 59.62, 60.29),
        "AFD-DCGAN": (60.95, 18.06, 21.47, 60.31, 60.86),
        "AFD-WGAN": (58.87, 22.35, 25.33, 58.15, 58.75),
    },
}

TABLE_2_COLUMNS = ("pgd-linf", "pgd-l2", "pgd-l1", "fgsm", "mim", "ddn", "deepfool", "cw")
TABLE_2_HEADS = ("PGD∞", "PGD2", "PGD1", "FGSM", "MIM", "DDN", "DeepFool", "C&W")
TABLE_2: dict[str, dict[str, tuple[float | None, ...]]] = {
    "mnist": {
        "NT": (0.16, 0.06, 0.07, 0.3, 0.19, 0.09, 0.21, 0.57),
        "AT": (0.74, 0.29, 0.19, 0.83, 0.95, 0.49, 0.55, 0.87),
        "TRADES": (0.71, 0.26, 0.15, 0.79, 0.88, 0.42, 0.47, 0.86),
        "AFD-DCGAN": (0.77, 0.33, 0.3, 0.78, 0.91, 0.51, 0.49, 0.9),
        "AFD-WGAN": (0.92, 0.54, 0.55, 0.9, 0.98, 0.68, 0.63, 0.94),
    },
    "cifar10": {
        "NT": (0.05, 0.1, 0.17, 0.19, 0.05, 0.1, 0.16, 0.1),
        "AT": (0.28, 0.2, 0.44, 0.33, 0.31, 0.26, 0.29, 0.31),
        "TRADES": (0.32, 0.22, 0.5, 0.24, 0.32, 0.33, 0.18, 0.28),
        "AFD-DCGAN": (0.34, 0.54, 0.43, 0.4, 0.31, 0.4, 0.43, 0.47),
        "AFD-WGAN": (0.56, 0.54, 0.66, 0.59, 0.56, 0.4, 0.52, 0.62),
    },
}

PGD_RADIUS = {"mnist": "0.3", "cifar10": "0.031", "cifar100": "0.031"}  # as the paper prints them


Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Attributes:
        title: says what the figures are.
        head: of the columns.
        rows: as wide as the head.
        ours: how many rows, from the first, are measured and not published.
        note: to be printed below.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ours: int = 0
    note: str = ""

    def markdown(self) -> str:
        """The table as README would hold it."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


def table_1(results: Sequence[Results]) -> Table:
    """Accuracies (%): clean, PGD and C&W, white-box and transferred, as far as they were measured."""
    data = results[0]["data"]["name"]
    wanted = (("pgd-linf", None), ("cw", "1"), ("pgd-linf-transfer", None), ("cw-transfer", "1"))
    ours = [
        (name_of(one), percent(one["clean"]), *(percent(accuracy(one, name, eps)) for name, eps in wanted))
        for one in results
    ]
    paper = [(f"{method} (published)", *map(plain, figures)) for method, figures in TABLE_1.get(data, {}).items()]
    eps = results[0]["protocol"]["reference"]["text"]
    printed = PGD_RADIUS.get(data, eps)
    theirs = f" (published: {printed})" if printed != eps else ""
    title = f"Table 1: accuracy (%) on {data}, PGD-L∞ at ε = {eps}{theirs}, C&W-L2 at ε = 1"
    return Table(title, ("method", *TABLE_1_COLUMNS), (*ours, *paper), len(ours), note(results))


def table_2(results: Sequence[Results]) -> Table:
    """Normalised areas under accuracy against ε of the paper's eight attacks."""
    data = results[0]["data"]["name"]
    ours = []
    for one in results:
        areas = {attack["name"]: attack["area"] for attack in one["attacks"]}
        figures = (f"{areas[name]:.2f}" if name in areas else "-" for name in TABLE_2_COLUMNS)
        ours.append((name_of(one), *figures))
    paper = [(f"{method} (published)", *map(plain, figures)) for method, figures in TABLE_2.get(data, {}).items()]
    title = f"Table 2: normalised area under accuracy against ε on {data}"
    return Table(title, ("method", *TABLE_2_HEADS), (*ours, *paper), len(ours), note(results))


def robustbench(results: Results) -> Table | None:
    """The row that RobustBench's leaderboard would show; None unless AutoAttack was run."""
    if results["protocol"]["name"] not in ("autoattack", "reference"):
        return None
    norm, eps = results["protocol"]["norm"], results["protocol"]["reference"]["text"]
    robust = results["worst_case"][norm][eps]
    head = (
        "Method", "Standard accuracy", "AutoAttack robust accuracy", "AA eval. potentially unreliable", "Extra data",
        "Architecture",
    )  # fmt: skip
    extra = "no" if results["subject"]["metadata"] else "?"  # a function does not say what its model learned from
    unreliable = {"fail": "yes", "warn": "perhaps", "pass": "no"}.get(results["verdict"], "-")
    row = (
        results["subject"]["name"], percent(results["clean"]) + "%", percent(robust) + "%", unreliable, extra,
        results["subject"]["architecture"],
    )  # fmt: skip
    data = results["data"]
    return Table(f"{data['name']}, {norm}, ε = {eps}, {data['images']} {data['split']} images", head, (row,), 1)


def union_table(results: Sequence[Results]) -> Table | None:
    """Accuracies (%): clean, in each ball of a union, and in all of them; None where none was evaluated so."""
    unions = [one for one in results if one.get("union")]
    if not unions:
        return None
    balls = dict.fromkeys(ball_name(ball) for one in unions for ball in one["union"]["balls"])
    rows = []
    for one in unions:
        found = {ball_name(ball): ball["accuracy"] for ball in one["union"]["balls"]}
        alone = (percent(found.get(ball)) for ball in balls)
        rows.append((name_of(one), percent(one["clean"]), *alone, percent(one["union"]["accuracy"])))
    protocols = ", ".join(dict.fromkeys(one["protocol"]["name"] for one in unions))
    title = f"Union of balls: accuracy (%) on {unions[0]['data']['name']}, protocol {protocols}"
    return Table(title, ("method", "clean", *balls, "union"), tuple(rows), len(rows), note(unions))


def ball_name(ball: Mapping[str, Any]) -> str:
    """What a table calls a ball of a union."""
    return f"{NORMS[ball['norm']].sign} ε = {ball['text']}"


def tables_of(results: Results) -> list[Table]:
    """The tables that belong to a protocol."""
    if results["protocol"]["name"] == "paper":
        return [table_1([results]), table_2([results])]
    return [table for table in (union_table([results]), robustbench(results)) if table is not None]


def accuracy(results: Results, attack: str, eps: str | None) -> float | None:
    """Accuracy under an attack at a radius (as printed; None for the protocol's own), or None if not measured."""
    eps = results["protocol"]["reference"]["text"] if eps is None else eps
    for found in results["attacks"]:
        if found["name"] == attack:
            return next((point["accuracy"] for point in found["accuracies"] if point["text"] == eps), None)
    return None


def name_of(results: Results) -> str:
    """What a table calls a model: its name, with a dagger if it failed a check."""
    return f"{results['subject']['name']}{' †' if results['verdict'] == 'fail' else ''}"


def note(results: Sequence[Results]) -> str:
    """What the dagger means, if there is one."""
    failed = any(one["verdict"] == "fail" for one in results)
    return (
        "† Checks for self-deception failed: the figures of this row are not evidence of robustness." if failed else ""
    )


def percent(share: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "-" if share is None else f"{100 * share:.2f}"


def plain(figure: float | None) -> str:
    """A published figure as it was printed, or a dash."""
    return "-" if figure is None else f"{figure:g}"


# --- The page -------------------------------------------------------------------------------------------------------


with needed_by("the report of an evaluation"):
    from jinja2 import Environment, PackageLoader, StrictUndefined

# --- Advice: what to do about a check that failed or warned, one sentence each, for terminal and report alike ---------

LARGER = "accuracy at ε = "  # how the name of the check at the largest radius begins

ADVICE = {
    "outputs not finite": "Find the layer whose outputs overflow (half precision, a division, a logarithm of zero) "
    "and evaluate again: images with NaN count as wrong, and attacks cannot aim at what is infinite.",
    "random outputs": "Switch off what draws random numbers in evaluation mode, or attack the average over many draws "
    "(expectation over transformation); a single draw is not what an attacker has to beat.",
    "batch dependence": "Give BatchNorm its running statistics (`model.eval()`, `track_running_stats=True`), so that "
    "an image's class does not depend on its neighbours.",
    "training mode": "Return the model from its function in evaluation mode (`model.eval()`), and let its `train()` "
    "reach every module.",
    "probabilities instead of logits": "Let the model return what enters its last softmax; the loss takes a softmax "
    "itself.",
    "zero gradients at start": "Gradients are masked here: look for saturated outputs (divide the logits by a "
    "constant), rounding or other steps without a slope in the model, and quote {strong}.",
    "inputs outside [0, 1]": "Scale the images to [0, 1] and move their normalisation into the model, for ε is stated "
    "in these units.",
    LARGER: "No attack that works leaves so much at this radius: attack with {more} and mend what the other checks "
    "name before quoting a figure at any radius.",
    "one step beats many": "Attack with smaller steps and restarts, and quote {strong}: the iterative attacks above "
    "are misled, so their figures are too high.",
    "attack raises accuracy": "Do not quote FGSM, which the model has learned to recognise (label leaking); train "
    "against a random start or more steps, and quote {strong}.",
    "doubling the steps": "Attack with more steps and restarts until twice as many change nothing, and quote {strong}.",
    "random noise beats the attacks": "Gradients are masked: attack with {more}, and quote no figure of a gradient "
    "attack before noise breaks nothing that it leaves.",
    "Square beats white-box": "Gradients are masked: instead of PGD's figure quote {strong}, for Square needs no "
    "gradient, and try {more} to see whether gradients can be brought to find what Square finds.",
    "transfer beats white-box": "Gradients are masked: count the transferred images (the worst case above does), and "
    "quote {strong}.",
    "attacked images out of bounds": "Clip what that attack returns to its ball and to [0, 1], or use another version "
    "of its library; these images were not counted, so its accuracy is too high.",
    "robust to a blind attack": "Take the images without a gradient for unattacked, not for robust: quote {strong}, "
    "and look for saturation (cross-entropy of exactly zero) or steps without a slope in the model.",
    "not finite under attack": "Evaluate in float32 and find where the model overflows on attacked images: from there "
    "on an attack climbs nothing.",
    "float32 beats bfloat16": "Evaluate again with `--precision fp32`, and quote that figure.",
    "re-verification": "Make the model answer alike at every batch size and in every call (random layers, batch "
    "statistics, half precision), and evaluate again.",
}

STRONG = "what `--protocol autoattack` leaves"
STRONGEST = "the worst case over all of AutoAttack, and no single attack's figure"
MORE = "more steps and restarts"


def advice(name: str, protocol: str) -> str:
    """What to do about a check.

    Args:
        name: of the check.
        protocol: that it was made in; one that is AutoAttack already does not send the reader there.
    """
    done = protocol in ("autoattack", "reference")
    words = ADVICE[LARGER] if name.startswith(LARGER) else ADVICE.get(name, "")
    return words.format(strong=STRONGEST if done else STRONG, more=MORE)


def advised(checks: Iterable[Mapping[str, Any]], protocol: str) -> list[tuple[str, str, str]]:
    """(name, verdict, advice) of each check of a report that failed or warned, failures first."""
    bad = [check for check in checks if check["verdict"] in ("fail", "warn")]
    bad.sort(key=lambda check: check["verdict"] != "fail")
    return [(check["name"], check["verdict"], advice(check["name"], protocol)) for check in bad]


# --- HTML -------------------------------------------------------------------------------------------------------------


def report(results: Results, folder: Path, tables: Sequence[Table]) -> str:
    """The report of one evaluation, with the pictures that lie in `folder`."""
    curves: dict[str, list[str]] = {}
    for one in results["divergence"]:
        curves.setdefault(one["attack"], []).append(f"{one['eps']}: {one['distance']:.2f} ({one['gap']:.2f})")
    rows = tuple((attack, " · ".join(points)) for attack, points in curves.items())
    distances = Table("", ("attack", "HΔH distance (error gap) at each ε"), rows)
    return _filled("report.html", folder, results=results, tables=tables, distances=distances, facts=_facts(results))


def comparison(results: Sequence[Results], folder: Path, tables: Sequence[Table]) -> str:
    """Several evaluations side by side."""
    names = ", ".join(one["subject"]["name"] for one in results)
    return _filled("comparison.html", folder, results=results, tables=tables, names=names)


def _filled(template: str, folder: Path, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(png=lambda name: data_url(folder / name), **values)


def data_url(path: Path) -> str:
    """A PNG, to be held by the page itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _facts(results: Results) -> dict[str, Any]:
    """Where the figures come from."""
    model, settings, machine = results["subject"], results["settings"], results["machine"]
    facts = {
        "model": f"{model['source']} ({model['architecture']}, {model['parameters']:,} parameters)",
        "weights (SHA-256)": model["sha256"],
        "transfer from": None if results["surrogate"] is None else results["surrogate"]["source"],
        "images": f"{results['data']['images']} of the {results['data']['split']} set of {results['data']['name']}",
        "seed": settings.get("seed"),
        "batch size": settings.get("batch_size"),
        "precision": _precision(results.get("precision")),
        "processes": settings.get("processes"),
        "device": machine["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _precision(found: Mapping[str, Any] | None) -> str | None:
    """That attacks ran in; None where an earlier version did not say."""
    if found is None:
        return None
    return found["attacks"] if found["asked"] == found["attacks"] else f"{found['asked']} (attacks: {found['attacks']})"


def alarms_of(metadata: Mapping[str, Any]) -> list[str] | None:
    """What went wrong while a checkpoint was trained, a line each; None where nobody looked, and nothing is known."""
    rollbacks = metadata.get("rollbacks", [])
    found = [alarm for entry in (*rollbacks, *metadata.get("history", [])) for alarm in entry.get("alarms", ())]
    if metadata.get("watch") is None and not found:
        return None
    return alarm_lines(sorted((Alarm(**one) for one in found), key=lambda alarm: alarm.epoch), rollbacks)


def looked_for(metadata: Mapping[str, Any]) -> str:
    """What was looked for while a checkpoint was trained, and not found."""
    watch = metadata.get("watch") or {}
    found = ["accuracy at chance", "exploding gradients"]
    if any(entry.get("one_step") is not None for entry in metadata.get("history", [])):
        found.append("catastrophic overfitting")
    tested = sum(int(probe[0]) for probe in watch.get("found", []))
    found.append(f"masked gradients (the latest probes, of {tested} images)" if tested else "")
    told = ", ".join(filter(None, found))
    return told if tested else f"{told}; not for masked gradients, for want of time or of a ball"


def setting(value: Any) -> str:
    """A setting of an attack as text."""
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def wordy(table: Table) -> list[bool]:
    """Whether each column of a table holds words, to be set flush left, rather than figures."""
    return [any(": " in row[column] for row in table.rows) for column in range(len(table.head))]


TEMPLATES = Environment(
    loader=PackageLoader("afd.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
TEMPLATES.filters |= {"ball": ball_name, "percent": percent, "setting": setting, "spanned": spanned, "wordy": wordy}
TEMPLATES.globals |= {"NORMS": NORMS, "VERDICTS": VERDICTS}
TEMPLATES.globals |= {
    "confirmed_in_words": confirmed_in_words,
    "advised": advised,
    "alarms_of": alarms_of,
    "looked_for": looked_for,
}
