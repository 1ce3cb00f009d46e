"""Writes README's tables of measurements from the JSON in benchmarks/results: ``python benchmarks/readme.py``.

A table of a benchmark stands between ``<!-- bench: FILE ... -->`` and ``<!-- /bench -->``; the files lie in
benchmarks/results and are of one benchmark; ``<!-- passes: FILE ... -->`` shows the costs that one of methods counted.
Evaluations stand between ``<!-- table 1: FILE ... -->`` (``table 2``,
``autoattack``) and ``<!-- /table -->``, comparisons of methods between ``<!-- compare: FILE -->`` and
``<!-- /compare -->``. What is between the markers is replaced, whatever it was; nothing else is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from afd.bench.results import Candidate, Column, Document, DocumentError, Figure, duration, mebibytes, read
from afd.errors import AfdError
from afd.evaluation.outcome import read_results as read_evaluation
from afd.evaluation.report import Table, robustbench, table_1, table_2
from afd.experiments.comparison.record import read_finished
from afd.experiments.comparison.report import brief_table, made_otherwise, told

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
BLOCK = re.compile(r"(<!-- (?:bench|passes): (.+?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
EVALUATED = re.compile(r"(<!-- (table 1|table 2|autoattack): (.+?) -->\n).*?(<!-- /table -->)", re.DOTALL)
COMPARED = re.compile(r"(<!-- compare: (\S+) -->\n).*?(<!-- /compare -->)", re.DOTALL)

Rows = Iterator[tuple[str, ...]]  # the first holds the headings


def by_candidate(
    documents: list[Document], headings: tuple[str, ...], work: str, columns: Mapping[str, str | Callable[[float], str]]
) -> Rows:
    """A row for each candidate, under the case's `work`: its figures of these names, written so."""
    yield headings
    for document in documents:
        for name, case in document.cases.items():
            told = work.format(name=sign(name), **{**document.settings, **case.settings})
            for candidate, found in case.candidates.items():
                yield told, candidate, *(shown(found.figures.get(key), form) for key, form in columns.items())
                told = ""


def attacks(documents: list[Document]) -> Rows:
    """Every candidate: its rate, how many times as fast afd is, and what its speed is bought with."""
    headings = ("attack", "by", "image-steps/s", "time over the floor", "afd faster", '`precision="auto"` faster',
                "of matmul rate", "peak MiB", "host reads", "accuracy left")  # fmt: skip
    columns = {"image_steps_per_second": "{:,.0f}", "over_floor": "{:.2f}x", "over_afd": "{:.2f}x",
               "over_auto": "{:.2f}x", "matmul_share": "{:.0%}", "peak_bytes": mebibytes, "host_reads": "{}",
               "accuracy_left": "{:.1%}"}  # fmt: skip
    return by_candidate(documents, headings, "{name}, {model}", columns)


def agreement(documents: list[Document]) -> Rows:
    """What each library leaves standing, and breaks alone."""
    headings = ("APGD-CE", "by", "accuracy left", "images broken by it alone")
    columns = {"accuracy_left": "{:.1%}", "broken_alone": "{}"}
    return by_candidate(documents, headings, "{name}, ε = {eps:g}, {steps} steps", columns)


def against_pyautoattack(documents: list[Document]) -> Rows:
    """AutoAttack of either library, whole and each part alone, over the model's own passes."""
    headings = ("AutoAttack on", "by", "seconds", "over the floor", "afd faster", '`precision="auto"` faster',
                "forwards an image", "gradients an image", "accuracy left")  # fmt: skip
    columns = {"over_floor": "{:.2f}x", "over_afd": "{:.2f}x", "over_auto": "{:.2f}x", "forwards": "{:,.0f}",
               "gradients": "{:,.0f}", "accuracy_left": "{:.1%}"}  # fmt: skip
    yield headings
    for document in documents:
        for case in document.cases.values():
            told = "{model}, {images} images: {part}".format(**{**document.settings, **case.settings})
            for candidate, found in case.candidates.items():
                figures = (shown(found.figures.get(key), form) for key, form in columns.items())
                yield told, candidate, f"{found.median:.3g}", *figures
                told = ""


def steps(documents: list[Document]) -> Rows:
    """Each step of ours beside the released one."""
    yield "network and batch", "step", "times as fast as released", "outside the attack", "its share of the time"
    for document in documents:
        whole, outside = (document.cases[part].candidates for part in ("whole", "outside the attack"))
        network = "{case}, {batch}, APGD-{steps}".format(**document.settings)
        for name, found in whole.items():
            speeds = (shown(part[name].figures["speedup"], "{:.2f}x") for part in (whole, outside))
            yield network, name, *speeds, shown(found.figures["share"], "{:.0%}")
            network = ""


def methods(documents: list[Document]) -> Rows:
    """Each method of ours beside its released flow."""
    headings = ("method, BatchNorm in the attack", "by", "passes: forward", "to input", "to weights", "cost",
                "ms an image", "images/s", "times as fast as released", "peak MiB")  # fmt: skip
    columns = {"forwards": "{:g}", "input_backwards": "{:g}", "weight_backwards": "{:g}", "cost": "{:g}",
               "ms_per_image": "{:.2f}", "images_per_second": "{:,.0f}", "speedup": "{:.2f}x",
               "peak_bytes": mebibytes}  # fmt: skip
    return by_candidate(documents, headings, "{name}, {batchnorm}, {case}, {batch}", columns)


PUBLISHED = {  # passes of a step by a list of released code: as released, and the fewest; a forward is 1
    "at": ("35", 23), "trades": ("39", 27), "mart": ("26", 26), "alp": ("28", 27), "at+awp": ("38", 26),
    "trades+awp": ("48", 33), "llr": ("33", 30), "fgsm-rs": ("6", 5), "free": ("3 a replay", 12), "gat": ("12", 9),
    "nuat": ("12", 9), "norm-penalty": ("at + 3", 26),
}  # fmt: skip


def passes(documents: list[Document]) -> Rows:
    """What a step costs: as a list of released code has it, as released, and ours, both counted."""
    yield "method", "published: released", "fewest", "counted: released", "ours"
    for name, others in cases(documents):
        published, fewest = PUBLISHED.get(name, ("–", None))
        ours = next(one for one in others if one != "released")
        counted = (figure(others, one, "cost", "{:g}") for one in ("released", ours))
        yield f"`{name}`", published, "–" if fewest is None else str(fewest), *counted


def kernels(documents: list[Document]) -> Rows:
    """The kernels alone: their time, on a GPU the device's and the host's, and how many times as fast they are."""
    on_gpu = documents[0].device_type == "cuda"
    beside = ("host time", "of the copy's rate") if on_gpu else ("of the floor's rate",)
    yield "op", "device time" if on_gpu else "time", *beside, "over eager PyTorch", "over torch.compile"
    for name, others in cases(documents):
        op, rest = name.split(" ", 1)
        share = figure(others, "native", "share_of_copy" if on_gpu else "share_of_floor", "{:.0%}")
        faster = (figure(others, key, "over_native", "{:.2g}x") for key in ("eager", "compiled"))
        yield f"`{op}` {sign(rest)}", *times(others["native"]), share, *faster


def discriminator(documents: list[Document]) -> Rows:
    """Ours beside torch's layers with and without spectral norm; on a GPU with the step of SGD."""
    on_gpu = documents[0].device_type == "cuda"
    work = f"width 512, {'forward, backward and SGD' if on_gpu else 'forward and backward'}"
    time = ("device time", "host time") if on_gpu else ("time",)
    yield work, *time, "of plain layers' time", "faster than torch's parametrisation", "than torch.compile's"
    for name, others in cases(documents):
        slower = (figure(others, key, "over_afd", "{:.2f}x") for key in ("parametrized", "compiled"))
        yield name, *times(others["afd"]), figure(others, "afd", "over_plain", "{:.2f}"), *slower


def learning(documents: list[Document]) -> Rows:
    """What every method reaches on digits, with its best and its last weights."""
    yield "command", "clean", "PGD-40", "last: clean", "PGD-40", "time", "alarms while it trained"
    for document in documents:
        for case in document.cases.values():
            accuracies = (
                shown(case.candidates[name].figures[key], "{:.1%}")
                for name in ("best", "last")
                for key in ("natural", "robust")
            )
            told = case.settings.get("alarms", "–") or "none"  # which older runs did not look for
            taken = shown(case.measured["seconds"], "{:.0f} s")
            yield f"`{case.settings['command']}`", *accuracies, taken, str(told)


def loading(documents: list[Document]) -> Rows:
    """Who reads images from files how fast, and what training loses by it."""
    headings = ("work", "by", "images/s", "of Pillow's", "seconds an epoch", "of the time from memory",
                "peak MiB: trainer", "worker")  # fmt: skip
    columns = {"images_per_second": "{:,.0f}", "of_pillow": "{:.2f}x", "epoch_seconds": "{:.1f}",
               "of_memory": "{:.2f}x", "own": mebibytes, "worker": mebibytes}  # fmt: skip
    yield headings
    works = {"reading": "reading {files:,} JPEG files of {images}", "memory": "memory while reading",
             "training": "an epoch of {files:,} images, {network}"}  # fmt: skip
    for document in documents:
        for name, case in document.cases.items():
            told = works[name].format(**case.settings)
            for candidate, found in case.candidates.items():
                yield told, candidate, *(shown(found.figures.get(key), form) for key, form in columns.items())
                told = ""


TABLES = {"attacks": attacks, "kernels": kernels, "step": steps, "methods": methods, "discriminator": discriminator,
          "agreement": agreement, "autoattack": against_pyautoattack, "learning": learning,
          "passes": passes, "loading": loading}  # fmt: skip


def cases(documents: list[Document]) -> Iterator[tuple[str, Mapping[str, Candidate]]]:
    """The candidates of every case, by its name."""
    return ((name, case.candidates) for document in documents for name, case in document.cases.items())


def times(candidate: Candidate) -> tuple[str, ...]:
    """The middle call's time; on a GPU the device's, and the host's after it."""
    host = candidate.figures.get("host_us")
    if not isinstance(host, float):
        return (duration(candidate.median),)
    return duration(candidate.median) + by_events(candidate), duration(host * 1e-6)


def figure(candidates: Mapping[str, Candidate], name: str, key: str, form: str) -> str:
    """A figure of a candidate, or a dash where there is none, or no such candidate."""
    found = candidates.get(name)
    if found is None or found.figures.get(key) is None:
        return "–"
    return shown(found.figures[key], form) + by_events(found)


def by_events(candidate: Candidate) -> str:
    """Says so where a GPU's time is that of eager calls, which may have waited for the host."""
    return " (no graph)" if candidate.figures.get("timed") == "events" else ""


def sign(name: str) -> str:
    """Norms as README writes them."""
    return name.replace("Linf", "L∞")


def shown(value: Figure, form: str | Callable[[float], str]) -> str:
    """A figure, or a dash where there is none, as in older documents."""
    return Column("", "", form).cell(value) or "–"


def rendered(files: list[str], results: Path, table: str | None = None) -> str:
    """Table, without columns that say nothing, and caption of the documents in these files.

    Args:
        files: their names.
        results: the folder that they lie in.
        table: one of `TABLES`; by default, that of their benchmark.
    """
    documents = [read(results / name) for name in files]
    for name, document in zip(files, documents, strict=True):
        if not document.finished:
            held = f"it holds {len(document.cases)} cases of a run that was cut off"
            raise DocumentError(f"{results / name} is not finished: {held}, and README's tables are of whole runs")
    kinds = {(document.benchmark, document.device_type) for document in documents}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{benchmark} on {device}" for benchmark, device in kinds))
        raise DocumentError(f"{' '.join(files)} are of {found}; a table is of one benchmark on one kind of device")
    ((kind, _),) = kinds
    columns = [column for column in zip(*TABLES[table or kind](documents), strict=True) if set(column[1:]) != {"–"}]
    headings, *rows = zip(*columns, strict=True)
    lines = [headings, ("---",) * len(headings), *rows]
    drawn = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"\n{drawn}\n\n{caption(dict(zip(files, documents, strict=True)))}\n\n"


def evaluated(kind: str, files: list[str], results: Path) -> str:
    """A table of the evaluations in these files."""
    found = [read_evaluation(results / name) for name in files]
    table = autoattack(found) if kind == "autoattack" else {"table 1": table_1, "table 2": table_2}[kind](found)
    return f"\n{table.title}:\n\n{table.markdown()}\n\n"


def compared(file: str, results: Path) -> str:
    """The table of a comparison of methods, and how it came about."""
    content = read_finished(results / file)
    table = brief_table(content)
    budget = content["budget"]
    each = f", {budget['passes']:.3g} passes of an image for each" if budget["passes"] else ""
    link = RESULTS / file
    picture = f", [picture]({link.with_suffix('.png')})" if (ROOT / link).with_suffix(".png").exists() else ""
    place = f"{told(content['machine'])}, torch {content['versions']['torch']}"
    words = f"; options for all: `{content['train']}`" if content.get("train") else ""
    otherwise = "".join(f"; {one}" for one in made_otherwise(content))
    made = f"{place}; {budget['asked']}{each}{words}{otherwise}; [JSON]({link}){picture}."
    return f"\n{table.title}:\n\n{table.markdown()}\n\n{made}\n\n"


def autoattack(found: list[dict[str, Any]]) -> Table:
    """RobustBench's rows, one under the other."""
    first, *others = (robustbench(one) for one in found)
    return replace(first, rows=tuple(row for table in (first, *others) for row in table.rows))


def caption(documents: dict[str, Document]) -> str:
    """Machine, repeats, and where the whole of it lies, a sentence for each machine."""
    places: dict[str, list[str]] = {}
    for file, document in documents.items():
        repeats = f"medians of {document.repeats} repeats: " if document.timed else ""
        link = RESULTS / file
        picture = f", [picture]({link.with_suffix('.png')})" if (ROOT / link).with_suffix(".png").exists() else ""
        place = f"{document.machine}, torch {document.versions['torch']}"
        places.setdefault(place, []).append(f"{repeats}[JSON]({link}){picture}")
    return "\n".join(f"{place}; {'; '.join(found)}." for place, found in places.items())


def renewed(text: str, results: Path = ROOT / RESULTS) -> str:
    """The README with every table as its JSON has it."""

    def block(found: re.Match[str]) -> str:
        table = "passes" if found[1].startswith("<!-- passes") else None
        return found[1] + rendered(found[2].split(), results, table) + found[3]

    text = BLOCK.sub(block, text)
    text = COMPARED.sub(lambda found: found[1] + compared(found[2], results) + found[3], text)
    return EVALUATED.sub(lambda found: found[1] + evaluated(found[2], found[3].split(), results) + found[4], text)


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    try:
        readme.write_text(renewed(readme.read_text()))
    except AfdError as error:
        sys.exit(f"readme.py: error: {error}")


if __name__ == "__main__":
    main()
