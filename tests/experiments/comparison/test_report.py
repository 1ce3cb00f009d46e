"""The report of a comparison: its figures are those of compare.json, wherever they are shown."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from comparisons import ALARM, comparison, entry, run, waiting
from rich.console import Console

from afd.experiments.comparison import report, rows
from afd.experiments.comparison.picture import BAR, draw
from afd.experiments.comparison.rows import Figure, amount, points_of, rows_of
from afd.metrics import interval, paired_interval

SHARES = ("clean", "pgd-40", "autoattack", "transfer", "worst")


@pytest.fixture
def content():
    """A reference of three seeds, one as good, one that failed its checks, one that failed, one that waits."""
    entries = {
        "natural": entry("natural", [(0.99, 0.0)], seconds=60.0),
        "at": entry("at", [(0.98, 0.90), (0.975, 0.89), (0.985, 0.91)], transfer=0.95),
        "trades": entry("trades", [(0.98, 0.901)]),
        "afd-wgan": entry("afd-wgan", [(0.97, 0.85), (0.96, 0.86)], method="afd", verdict="fail", seconds=600.0),
        "fgsm-rs": entry("fgsm-rs", [(0.97, 0.80)], verdict="warn", alarms=[ALARM, ALARM | {"epoch": 6}]),
        "mart": waiting("mart", "failed", "the loss is not finite"),
        "llr": waiting("llr"),
    }
    return comparison(entries, seeds=[0, 1, 2])


def printed(content, width=100):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    report.present(content, console)
    return console.file.getvalue()


def table(content):
    return list(csv.DictReader(io.StringIO(report.as_csv(content))))


def named(content, name):
    return next(row for row in rows_of(content) if row.name.removesuffix(" †") == name)


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_figures_come_with_their_intervals(content):
    found = named(content, "trades").figure("autoattack")
    share = content["entries"]["trades"]["runs"]["0"]["evaluation"]["autoattack"]
    assert found == Figure(share, *interval(1000 * share, 1000))


def test_differences_are_those_of_the_same_images(content):
    """trades and the reference differ in few images, whatever each one's own interval."""
    runs = content["entries"]
    mine, theirs = (runs[name]["runs"]["0"]["evaluation"] for name in ("trades", "at"))
    row = named(content, "trades")
    found = row.differences["autoattack"]
    assert found.value == pytest.approx(mine["autoattack"] - theirs["autoattack"])
    assert found.low <= found.value <= found.high
    own = row.figure("autoattack")
    assert found.high - found.low < 0.2 * (own.high - own.low)
    assert named(content, "natural").differences["autoattack"].clear
    assert not named(content, "trades").differences["clean"].clear
    assert not named(content, "at, seed 0").differences


def test_a_mean_is_paired_over_the_seeds_that_both_have(content):
    bits = rows._withstood
    a, b = (torch.stack([bits(content, name, seed, "clean") for seed in "01"]) for name in ("afd-wgan", "at"))
    found = named(content, "afd-wgan, mean of 2 seeds").differences["clean"]
    means = a.double().mean(0), b.double().mean(0)
    assert found.value == pytest.approx(float((means[0] - means[1]).mean()))
    assert (found.low, found.high) == pytest.approx(paired_interval(*means))
    content["entries"]["at"]["runs"] = {"7": content["entries"]["at"]["runs"]["0"]}
    assert not named(content, "afd-wgan, mean of 2 seeds").differences


def test_a_mean_has_an_interval_over_images_and_the_range_of_its_seeds(content):
    shares = [one["evaluation"]["autoattack"] for one in content["entries"]["at"]["runs"].values()]
    found = named(content, "at, mean of 3 seeds").figure("autoattack")
    assert found.value == pytest.approx(sum(shares) / 3)
    assert (found.low, found.high) == interval(1000 * found.value, 1000)
    assert (min(found.seeds), max(found.seeds)) == (min(shares), max(shares))
    assert found.deviation == pytest.approx(float(torch.tensor(shares, dtype=torch.float64).std()))
    assert named(content, "trades").figure("autoattack").seeds == ()


def test_seeds_that_agree_leave_the_uncertainty_of_the_images():
    """A range over seeds is none over images: of equal seeds it is a point, and the interval is not."""
    made = comparison({"at": entry("at", [(0.9, 0.5)] * 2), "mart": entry("mart", [(0.9, 0.6), (0.9, 0.4)])})
    at, mart = (points_of(made)[number].figure("autoattack") for number in (0, 1))
    assert at.high - at.low > 0.05
    assert mart.value == pytest.approx(at.value, abs=0.03)
    assert max(mart.seeds) - min(mart.seeds) > 0.15 > mart.high - mart.low


def test_a_difference_of_means_has_those_of_its_seeds(content):
    bits = rows._withstood
    found = named(content, "afd-wgan, mean of 2 seeds").differences["autoattack"]
    for seed, apart in zip("01", found.seeds, strict=True):
        a, b = (bits(content, name, seed, "autoattack").double() for name in ("afd-wgan", "at"))
        assert apart == pytest.approx(float((a - b).mean()))
    assert found.value == pytest.approx(sum(found.seeds) / 2)
    del content["entries"]["at"]["runs"]["1"]  # one pair is left, and that is no range
    assert named(content, "afd-wgan, mean of 2 seeds").differences["autoattack"].seeds == ()


def test_interval_and_seeds_of_a_mean_are_told_apart_everywhere(content, tmp_path):
    row = named(content, "afd-wgan, mean of 2 seeds")
    found, apart = row.figure("autoattack"), row.differences["autoattack"]
    for one, form in ((found, ".2f"), (apart, "+.2f")):
        low, high, least, most = (
            f"{100 * value:{form}}" for value in (one.low, one.high, min(one.seeds), max(one.seeds))
        )
        told = f"({low} to {high}; seeds {least} to {most}, ± {100 * one.deviation:.2f})"
        assert told in report.as_markdown(content)
        assert told in report.brief_table(content).markdown()
        report.write_all(tmp_path, content)
        words = Page((tmp_path / "report.html").read_text()).text
        assert f"{low} to {high}seeds {least} to {most}, ± {100 * one.deviation:.2f}" in words  # a line break between
    (line,) = (line for line in table(content) if line["entry"] == "afd-wgan" and line["seed"] == "mean")
    for name, one in (("autoattack", found), ("autoattack_difference", apart)):
        ends = [one.low, one.high, min(one.seeds), max(one.seeds)]
        assert [float(line[f"{name}_{end}"]) for end in ("low", "high", "least", "largest")] == ends
    lines = printed(content).splitlines()
    mean = next(number for number, text in enumerate(lines) if text.startswith("afd-wgan, mean of 2"))
    (seeds,) = (number for number in range(mean, mean + 4) if lines[number].startswith("  seeds"))
    assert f"±{100 * found.deviation:.2f}" in lines[seeds]
    assert f"{100 * min(found.seeds):.1f}…{100 * max(found.seeds):.1f}" in lines[seeds + 1]
    assert f"{100 * found.low:.1f}…{100 * found.high:.1f}" in lines[mean + 1]


def test_the_bars_of_a_mean_are_its_interval(content):
    content["entries"] = {name: content["entries"][name] for name in ("at", "trades")}
    found = points_of(content)[0].figure("autoattack")
    bars = [line.get_ydata() for line in draw(content).axes[-1].lines if line.get_alpha() == BAR["alpha"]]
    assert any(list(ends) == pytest.approx([100 * found.low, 100 * found.high]) for ends in bars)


def test_chance_is_counted_once_for_each_entry_and_figure(content):
    notes = " ".join(report.notes_of(content, rows_of(content)))
    # natural, trades, afd-wgan and fgsm-rs, clean and under AutoAttack
    assert "If there were no difference at all, about one in twenty of these 8 (one for each entry" in notes


def test_a_reference_that_failed_leaves_no_differences(content):
    content["reference"] = "mart"
    assert not any(row.differences for row in rows_of(content))


def test_what_no_seed_has_is_no_mean(content):
    assert named(content, "afd-wgan, mean of 2 seeds").figure("transfer") is None
    assert named(content, "at, mean of 3 seeds").figure("transfer") is not None


# --- Everywhere ------------------------------------------------------------------------------------------------------


def test_the_csv_is_compare_json_again(content):
    lines = table(content)
    means, lines = ([line for line in lines if (line["seed"] == "mean") == mean] for mean in (True, False))
    assert [line["entry"] for line in means] == ["at", "afd-wgan"]
    assert len(lines) == sum(len(one["runs"]) for one in content["entries"].values())
    for line in lines:
        made = content["entries"][line["entry"]]
        found = made["runs"][line["seed"]]
        assert (line["state"], line["error"]) == (found["state"], found["error"] or "")
        for name in SHARES:
            value = (found["evaluation"] or {}).get(name)
            assert line[name.replace("-", "_")] == ("" if value is None else repr(value))
        assert line["passes"] == ("" if made["passes"] is None else repr(made["passes"]))
        assert line["best_robust"] == repr(found["measured"]["best"]["robust"] if found["measured"] else "").strip("'")
    failed = {line["entry"]: line["failed_checks"] for line in lines if line["verdict"] == "fail"}
    assert failed == {"afd-wgan": "Square beats white-box"}
    trades = next(line for line in lines if line["entry"] == "trades")
    assert float(trades["autoattack_difference"]) == named(content, "trades").differences["autoattack"].value


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_every_figure_in_its_width(content, width):
    shown = printed(content, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" in shown  # in intervals alone: no figure is cut short
    for row in rows_of(content):
        for name in SHARES:
            if row.figure(name):
                assert f"{100 * row.figure(name).value:.2f}" in shown
    words = " ".join(shown.split())
    assert "failed: the loss is not finite" in re.sub(r"(?<=\S) {2,}", " ", words)
    assert "fail: Square" in words
    assert "catastrophic" in words
    assert "waiting" in words


def test_markdown_has_a_row_of_each_and_marks_what_is_clear(content):
    text = report.as_markdown(content)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| entry | clean"))
    rows = [line for line in lines if line.startswith("| ") and line.count(" | ") == head.count(" | ")]
    assert len(rows) == 2 + len(rows_of(content))
    natural = next(line for line in rows if line.startswith("| natural "))
    assert re.search(r"\| \*\*-8\d\.\d\d \\\* \(-9\d\.\d\d to -8\d\.\d\d\)\*\* \|", natural)
    assert "afd-wgan, seed 1 †" in text
    assert "† Checks for self-deception failed" in text
    assert "54,000 to train on, 6,000 to choose by, the first 1,000 of the test images to attack" in text
    assert "5m of `at` at 1,190 images a second: 120M passes of an image, for every entry" in text


def test_words_for_all_are_told(content, tmp_path):
    report.write_all(tmp_path, content)
    assert "- options for all: `--data mnist --width 8`" in (tmp_path / "table.md").read_text()
    assert "options for all" in Page((tmp_path / "report.html").read_text()).text
    assert {line["words_for_all"] for line in table(content)} == {"--data mnist --width 8"}
    del content["train"]  # as in records of before
    assert "options for all" not in report.as_markdown(content)


def test_runs_that_were_made_otherwise_are_named_with_what_is_other(content):
    assert "made otherwise" not in report.as_markdown(content)
    newer = content["versions"] | {"torch": "2.14.0"}
    for seed in "01":
        content["entries"]["afd-wgan"]["runs"][seed]["made"] = content["entries"]["at"]["runs"]["0"]["made"] | {
            "commit": "fedcba9", "versions": newer,
        }  # fmt: skip
    del content["entries"]["trades"]["runs"]["0"]["made"]  # as in records of before
    line = "- made otherwise: afd-wgan (seed 0), afd-wgan (seed 1): torch 2.14.0, commit fedcba9"
    assert line in report.as_markdown(content).splitlines()
    told = {(one["entry"], one["seed"]): (one["torch"], one["commit"]) for one in table(content)}
    assert told["afd-wgan", "0"] == ("2.14.0", "fedcba9")
    assert told["trades", "0"] == told["at", "0"] == ("2.13.0+cpu", "0123abc")


def test_what_is_not_finished_says_so_everywhere(content, tmp_path):
    content["finished"] = False
    report.write_all(tmp_path, content)
    progress = "9 of 10 runs are done or have failed"
    assert f"**Not finished: {progress}.**" in (tmp_path / "table.md").read_text()
    assert f"Not finished: {progress}." in (tmp_path / "report.html").read_text()
    assert f"(not finished: {progress})" in " ".join(printed(content).split())
    assert "(not finished)" in draw(content).get_suptitle()


def test_a_comparison_of_which_nothing_is_done_has_a_report(tmp_path):
    content = comparison({"at": waiting("at"), "llr": waiting("llr", "trained")}, finished=False)
    report.write_all(tmp_path, content)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "compare.png", "report.html"}
    assert "trained, not attacked yet" in printed(content)
    report.write_all(tmp_path, comparison({}, finished=False))


def test_balls_of_a_union_are_all_named():
    content = comparison({"at": waiting("at")}, ball={"union": {"Linf": "8/255", "L2": "0.5"}})
    assert "the union of L∞ ε = 8/255, L2 ε = 0.5" in report.as_markdown(content)
    assert "the union of L∞ ε = 8/255, L2 ε = 0.5" in draw(content).get_suptitle()


# --- The page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Notes links, anchors and pictures, and that every element is closed in its turn."""

    EMPTY = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.anchors, self.pictures, self.text = [], [], set(), [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.open += [] if tag in self.EMPTY else [tag]
        self.links += [found["href"]] if "href" in found else []
        self.anchors |= {found["id"]} if "id" in found else set()
        self.pictures += [found["src"]] if "src" in found else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_leads_to_what_is_there(content, tmp_path):
    there = tmp_path / "trades" / "seed-0"
    (there / "evaluation").mkdir(parents=True)
    (there / "evaluation" / "report.html").write_text("")
    (there / "curves.png").write_bytes(b"")
    report.write_all(tmp_path, content)
    page = Page((tmp_path / "report.html").read_text())
    files = [link for link in page.links if not link.startswith("#")]
    assert files == ["trades/seed-0/curves.png", "trades/seed-0/evaluation/report.html"]
    assert all((tmp_path / link).is_file() for link in files)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.anchors
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    for row in rows_of(content):
        assert row.name in page.text
    words = " ".join(page.text.split())
    assert "afd compare --config table.toml" in words
    assert "Alarm: catastrophic overfitting in epoch 4: one step 99%, many 2%; more steps help" in words
    assert "26 passes for each image, 6 epochs, of 54,000 images, 8.4M passes in all" in words
    assert "failed: the loss is not finite" in words


def test_names_are_text_and_never_markup(tmp_path):
    name = "<b>[bold]a|b*_`&"
    made = entry(name, [(0.9, 0.5)]) | {"words": "at --x '<i>'"}
    content = comparison({"at": entry("at", [(0.9, 0.4)]), name: made})
    report.write_all(tmp_path, content)
    text = (tmp_path / "report.html").read_text()
    assert "<b>[bold]" not in text
    assert "<i>" not in text
    assert name in Page(text).text
    assert name in "".join(printed(content).split())
    line = next(line for line in (tmp_path / "table.md").read_text().splitlines() if "bold" in line)
    assert re.sub(r"\\(.)", r"\1", re.split(r"(?<!\\)\|", line)[1]).strip() == name
    assert table(content)[1]["entry"] == name


# --- The picture -----------------------------------------------------------------------------------------------------


def points(picture):
    """The points of the closest panel, by entry."""
    return {one.get_gid(): one for one in picture.axes[-1].collections if one.get_gid()}


def spread(count):
    """Entries close together, and natural training far away."""
    generator = torch.Generator().manual_seed(5)
    entries = {"natural": entry("natural", [(0.99, 0.0)], seconds=50.0)}
    for number in range(count):
        clean, attacked = torch.rand(2, generator=generator).tolist()
        made = [(0.97 + 0.02 * clean, 0.86 + 0.04 * attacked)]
        entries[f"method-{number}"] = entry(f"method-{number}", made, seconds=100.0 + 10 * number)
    return comparison(entries, reference="natural")


def test_points_lie_where_the_figures_are_and_are_as_large_as_the_cost(content):
    content["entries"].pop("natural")
    picture = draw(content)
    assert len(picture.axes) == 1
    drawn = points(picture)
    assert picture.get_suptitle().startswith("mnist, L∞ ε = 0.3, 1,000 test images; bars: 95% over images")
    assert drawn.keys() == {"at", "trades", "afd-wgan", "fgsm-rs"}
    for row in points_of(content):
        found = row.figure("clean"), row.figure("autoattack")
        assert drawn[row.entry].get_offsets()[0].tolist() == pytest.approx([100 * one.value for one in found])
    assert drawn["afd-wgan"].get_sizes()[0] > drawn["at"].get_sizes()[0] > 0


def test_failed_checks_are_hollow(content):
    hollow = {name for name, one in points(draw(content)).items() if not len(one.get_facecolors())}
    assert hollow == {"afd-wgan"}


def test_a_model_at_chance_is_told_from_a_robust_one(content):
    content["entries"]["mart"] = entry("mart", [(0.11, 0.1)])
    assert named(content, "mart").checks == "pass; clean accuracy is at chance"
    assert not named(content, "trades").at_chance
    assert next(row for row in table(content) if row["entry"] == "mart")["at_chance"] == "True"
    legend = [one.get_text() for one in draw(content).legends[0].get_texts()]
    assert "clean accuracy at chance" in legend


def test_axes_show_no_more_than_shares_can_be(content):
    for axes in draw(content).axes:
        for low, high in (axes.get_xlim(), axes.get_ylim()):
            assert -2 <= low < high <= 102


def test_costs_of_nothing_are_not_in_the_legend(content):
    for one in content["entries"].values():
        for found in one["runs"].values():
            found["seconds"] = 0.0
    assert not any("of training" in one.get_text() for one in draw(content).legends[0].get_texts())


def test_a_comparison_of_runs_that_are_done_or_failed_is_finished(content):
    del content["entries"]["llr"]
    content["finished"] = False  # as records of before said
    assert report.unfinished(content) == ""


def test_sizes_are_in_the_order_of_cost():
    drawn = points(draw(spread(6)))
    sizes = [drawn[f"method-{number}"].get_sizes()[0] for number in range(6)]
    assert sizes == sorted(set(sizes))


def test_without_every_time_passes_are_the_cost(content):
    content["entries"]["at"]["runs"]["0"]["seconds"] = None
    content["entries"]["trades"]["runs"]["0"]["seconds"] = None
    content["entries"]["trades"]["passes"] = 4e6
    picture = draw(content)
    drawn = points(picture)
    assert drawn["trades"].get_sizes()[0] < drawn["at"].get_sizes()[0]
    assert "4M passes" in {text.get_text() for text in picture.legends[0].get_texts()}


def test_what_lies_far_away_does_not_squeeze_the_others():
    picture = draw(spread(19))
    whole, close = picture.axes
    assert whole.get_ylim()[0] < 0
    assert close.get_ylim()[0] > 80
    assert "natural" not in points(picture)
    assert [text.get_text() for text in whole.texts] == ["natural"]


def test_a_difference_within_the_bars_does_not_look_large():
    picture = draw(comparison({"at": entry("at", [(0.98, 0.9)]), "mart": entry("mart", [(0.98, 0.902)])}))
    low, high = picture.axes[0].get_ylim()
    ends = interval(900, 1000)
    assert high - low > 0.9 * 100 * (ends[1] - ends[0])


def test_names_of_twenty_entries_cover_neither_each_other_nor_points():
    picture = draw(spread(19))
    close = picture.axes[-1]
    boxes = [text.get_window_extent() for text in close.texts]
    assert len(boxes) == 19
    for number, one in enumerate(boxes):
        assert close.bbox.x0 <= one.x0 <= one.x1 <= close.bbox.x1
        assert close.bbox.y0 <= one.y0 <= one.y1 <= close.bbox.y1
        assert not any(one.overlaps(other) for other in boxes[:number])
        for point in points(picture).values():
            assert not one.contains(*close.transData.transform(point.get_offsets()[0]))


# --- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said"), [(None, "-"), (12, "12"), (54000, "54k"), (8.4e6, "8.4M"), (1.2e9, "1.2G")]
)
def test_amounts_are_short(number, said):
    assert amount(number) == said


def test_a_run_of_few_images_is_as_uncertain_as_it_is():
    made = comparison({"at": {**entry("at", []), "runs": {"0": run("f", 9, 1.0, 1.0)}}}, images=9)
    found = rows_of(made)[0].figure("autoattack")
    assert (found.value, found.high) == (1.0, pytest.approx(1.0))
    assert found.low < 0.71
