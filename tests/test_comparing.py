"""The words of `afd compare`: entries of words of `afd train`, alike in what they are compared on."""

import dataclasses
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from comparisons import comparison as content
from comparisons import entry

from afd import comparing
from afd.cli import main
from afd.comparing import divided
from afd.entries import made
from afd.errors import InputError
from afd.experiments import comparison
from afd.experiments.comparison import results
from afd.methods import AT, METHODS, TRADES, Natural

PLAIN = ["--data", "digits", "--width", "2"]


def read(words, monkeypatch):
    """The comparison that words ask for."""
    asked = []
    monkeypatch.setattr(comparison, "compare", lambda one, out, *, overwrite: asked.append((one, out, overwrite)))
    assert main(["compare", *shlex.split(words)]) == 0
    return asked[0]


def refused(words, capsys):
    """The line that words are refused with."""
    assert main(["compare", *(shlex.split(words) if isinstance(words, str) else words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("afd: error: ")
    assert said.count("\n") == 1
    return said.removeprefix("afd: error: ").rstrip("\n")


def test_own_words_are_told_from_those_of_train():
    words = (
        "--methods at,free --lr 0.1 --seeds 0 1 --graph --milestones 0.5 0.8 --epochs=3 --no-overwrite --weights a.pt"
    )
    own, shared = divided(words.split())
    assert own == ["--methods", "at,free", "--seeds", "0", "1", "--epochs=3", "--no-overwrite"]
    assert shared == ["--lr", "0.1", "--graph", "--milestones", "0.5", "0.8", "--weights", "a.pt"]


def test_each_method_gets_the_shared_words_that_it_has_and_it_is_known_for_whom_one_is_left_out(monkeypatch, capsys):
    words = "--methods natural,trades+awp,free --budget 5m --data mnist --attack-steps 7 --beta 2 --weight-decay 1e-3"
    words += " --eps-warmup 2"
    asked, out, overwrite = read(words, monkeypatch)
    assert capsys.readouterr().out == ""  # it is said when they join a table
    assert asked.left_out == {
        "--attack-steps": ("natural", "free"), "--beta": ("natural", "free"), "--eps-warmup": ("natural",)
    }  # fmt: skip
    assert asked.told_left_out(["natural"]) == "--attack-steps (natural); --beta (natural); --eps-warmup (natural)"
    assert asked.told_left_out(["trades+awp"]) == ""
    natural, trades, free = (entry.config for entry in asked.entries.values())
    assert list(asked.entries) == ["natural", "trades+awp", "free"]
    assert (asked.budget, asked.epochs, asked.seeds, asked.images, asked.reference) == ("5m", None, (0,), None, None)
    assert (out, overwrite) == (None, False)
    assert isinstance(natural.method, Natural)
    assert (trades.method.method.beta, trades.method.attack.steps) == (2, 7)
    assert natural.method.weight_decay == trades.method.core.weight_decay == free.method.weight_decay == 1e-3
    assert isinstance(asked.timed.method, AT)
    assert asked.timed.method.attack.steps == 7
    assert asked.train == "--data mnist --attack-steps 7 --beta 2 --weight-decay 1e-3 --eps-warmup 2"
    assert (natural.eps_warmup, free.eps_warmup) == (0, 2)


def test_own_words_of_an_entry_win():
    entries = {"mild": "trades --beta 1", "usual": "trades", "adam": "--optimizer adam at"}
    asked = made(entries, [*PLAIN, "--beta", "4"], epochs=3)
    assert [asked.entries[name].config.method.beta for name in ("mild", "usual")] == [1, 4]
    assert asked.entries["adam"].config.method.optimizer == "adam"
    assert asked.entries["mild"].words == "trades --beta 1"
    assert isinstance(asked.entries["mild"].config.method, TRADES)


def test_a_method_that_attacks_nothing_is_tested_where_the_others_are():
    asked = made({"natural": "natural", "at": "at"}, [*PLAIN, "--norm", "L2", "--eps", "0.4"], epochs=1)
    assert {(entry.config.test.norm, entry.config.test.eps) for entry in asked.entries.values()} == {("L2", 0.4)}
    asked = made({"natural": "natural", "at": "at"}, [*PLAIN, "--attack", "union", "--eps-l1", "none"], epochs=1)
    assert {entry.config.test.union for entry in asked.entries.values()} == {"Linf=0.2,L2=0.75"}


def test_a_file_says_all(tmp_path, monkeypatch):
    (tmp_path / "table.toml").write_text(
        'budget = "1h"\nseeds = [0, 3]\nimages = 20\nreference = "b"\ntrain = "--data digits --ema 0.9"\npasses = 1e9\n'
        '[entries]\na = "natural"\nb = "afd --loss dcgan"\n'
    )
    asked, out, overwrite = read(f"--config {tmp_path}/table.toml --out {tmp_path}/o --overwrite", monkeypatch)
    assert (asked.budget, asked.passes, asked.seeds, asked.images, asked.reference) == ("1h", 1e9, (0, 3), 20, "b")
    assert asked.entries["b"].config.method.loss == "dcgan"
    assert asked.entries["a"].config.ema == 0.9
    assert (out, overwrite) == (tmp_path / "o", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "methods is missing; name them as --methods natural,at,trades, or a file with --config"),
        ("--methods natural,,at --epochs 1", "methods is 'natural,,at', of which one is empty"),
        ("--methods at,trades,at --epochs 1", "methods names at twice; variants of a method have names of their own"),
        ("--methods at,foo --epochs 1", "the method of entry 'foo' is 'foo'; allowed are natural, at, trades"),
        (
            "--methods afd-wgan --epochs 1",
            'Class; perhaps you meant an entry of --config, afd-wgan = "afd --loss wgan"',
        ),
        ("--methods trade --epochs 1", "Class; perhaps you meant trades"),
        ("--methods natural --epochs 1 --attack-steps 2 --beta 2", "Unrecognized options: --beta"),
        ("--methods at+foo --epochs 1", "the method of entry 'at+foo' is 'at+foo'; allowed are"),
        ("--methods a:b --epochs 1", "entry 'a.b': method is 'a:b', which cannot be imported"),
        ("--methods at", "budget is missing; say what each method may cost, as --budget 5m, or name --epochs"),
        ("--methods at --budget 5m --epochs 2", "budget is 5m and epochs is 2; name one of the two"),
        ("--methods at --budget 5", "budget is '5'; it must be a time such as 5m, 300s, 2h or 1h30m"),
        ("--methods at --budget 0s", "budget is '0s'; it must be a time"),
        ("--methods at --epochs 0", "epochs is 0; it must be a finite number >= 1"),
        ("--methods at --epochs 1 --images 0", "images is 0; it must be a finite number >= 1"),
        ("--methods at --epochs 1 --seeds 1,1", "seeds are 1, 1; each must be named, and once"),
        ("--methods at --epochs 1 --seeds=-1", "one of the seeds is -1; it must be in [0, 2**62)"),
        (
            "--methods at --epochs 1 --seed 3",
            "the options for all have --seed, which is the comparison's own to say; name",
        ),
        ("--methods at --budget 1m --epoch-images 30", "have --epoch-images, which is the comparison's own to say"),
        (
            "--methods at --epochs 1 --on-alarm rollback",
            "entry 'at': on-alarm is rollback, which takes undone steps once",
        ),
        ("--methods at --epochs 1 --resume auto", "have --resume, which is the comparison's own to say"),
        ("--methods at --epochs 1 --lrr 0.1", "Unrecognized options: --lrr"),
        ("--methods natural --epochs 1 --beta 2", "Unrecognized options: --beta"),
        ("--methods at --epochs 1 --graph trades", "trades is named beside the options for all"),
        ("--methods at --epochs 1 --eps 3", "eps is 3; images lie in [0, 1]"),
        ("--methods at --epochs 1 --data imagenet", "imagenet"),
        ("--methods at --epochs 1 --overwrite", "overwrite is set, but out is not"),
        ("--results a b --methods at", "results is given, and methods too"),
        ("--results a --lr 0.1", "results is given, and lr too"),
        ("--config no.toml", "config is no.toml; there is no such file"),
        ("--config no.toml --epochs 2", "config is given, and epochs too"),
        ("--config no.toml --lr 2", "config is given, and lr too"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(words, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("x = ", "which cannot be read: "),
        ("epochs = 1", "[entries] is missing; it has a line for each"),
        ("epochs = 1\n[entries]", "entries is empty; a comparison needs at least one"),
        ("budgets = 1\n[entries]\na = 'at'", "a comparison has no setting 'budgets'; it has budget, epochs, passes"),
        ("epochs = 'x'\n[entries]\na = 'at'", "epochs is 'x'; it must be as in epochs = 12"),
        ("epochs = 1\nseeds = [0.5]\n[entries]\na = 'at'", "seeds is [0.5]; it must be as in seeds = [0, 1, 2]"),
        ("epochs = 1\nreference = 'z'\n[entries]\na = 'at'", "reference is 'z'; allowed are the entries a"),
        ("epochs = 1\n[entries]\nat = 'at'\nAT = 'at'", "entries are called 'at' and 'AT', which some file systems"),
        (f"epochs = 1\n[entries]\n{'a' * 101} = 'at'", "'..., 101 letters; at most 100 are allowed"),
        ("epochs = 1\npasses = 3\n[entries]\na = 'at'", "passes is given without the budget"),
        ("budget = '1m'\npasses = -3.0\n[entries]\na = 'at'", "passes is -3.0; it must be a number above 0"),
        ("epochs = 1\n[entries]\na = 3", "entry 'a' is 3; it must be words of afd train"),
        ("epochs = 1\n[entries]\na = ''", "the method of entry 'a' is ''; allowed are"),
        ("epochs = 1\n[entries]\na = '--lr 1'", "the method of entry 'a' is ''; allowed are"),
        ("epochs = 1\n[entries]\na = 'trade --beta 1'", "the method of entry 'a' is 'trade'; allowed are natural"),
        ("epochs = 1\n[entries]\na = 'at trades'", "two methods are named, at and trades"),
        ("epochs = 1\n[entries]\na = 'at --beta 1'", "entry 'a': Unrecognized options: --beta"),
        ("epochs = 1\n[entries]\na = 'at \"'", "which cannot be read: No closing quotation"),
        ("epochs = 1\n[entries]\na = 'at --lr -1'", "entry 'a': "),
        ("epochs = 1\n[entries]\n'a/b' = 'at'", "an entry is called 'a/b'; names of entries have letters, digits"),
        ("epochs = 1\n[entries]\n'..' = 'at'", "an entry is called '..'"),
        (
            "epochs = 1\n[entries]\n'table.md' = 'at'",
            "an entry is called 'table.md', which is a file of the comparison",
        ),
        ("epochs = 1\n[entries]\na = 'at --epochs 3'", "entry 'a' has --epochs, which is the comparison's own to say"),
        (
            "epochs = 1\n[entries]\na = 'at'\nb = 'at --eps 0.1'",
            "entry 'b': ball is Linf 0.1, and Linf 0.2 for the others",
        ),
        ("epochs = 1\n[entries]\na = 'natural --eps 0.1'", "entry 'a': ball is Linf 0.1, and Linf 0.2 for the others"),
        ("epochs = 1\n[entries]\na = 'at --width 5'", "entry 'a': width is 5, and 32 for the others"),
        ("epochs = 1\n[entries]\na = 'at --data mnist'", "entry 'a': data is mnist, and digits for the others"),
        ("epochs = 1\n[entries]\na = 'at --validation 0.2'", "entry 'a': validation is 0.2, and 0.1 for the others"),
        ("epochs = 1\n[entries]\na = 'at --eval-steps 3'", "entry 'a': eval-steps is pgd-3, and pgd-20 for the others"),
        (
            "epochs = 1\n[entries]\na = 'at --epoch-images 9'",
            "entry 'a' has --epoch-images, which is the comparison's own to say",
        ),
        ("epochs = 1\n[entries]\na = 'at --augment True'", "entry 'a': augment is True, and False for the others"),
        ("epochs = 1\n[entries]\na = 'at --precision bf16'", "entry 'a': precision is bf16, and fp32 for the others"),
        ("epochs = 1\n[entries]\na = 'at --weights a.pt'", "entry 'a': weights is a.pt, and None for the others"),
        (
            "epochs = 1\n[entries]\na = 'at --extra-data a.npz'",
            "entry 'a': extra-data is a.npz, and None for the others",
        ),
        (
            "epochs = 1\ntrain = '--extra-data a.npz'\n[entries]\na = 'at --extra-share 0.2'",
            "entry 'a': extra-share is 0.2, and 0.7 for the others",
        ),
        ("epochs = 1\n[entries]\na = 'at --on-alarm rollback'", "entry 'a': on-alarm is rollback, which takes undone"),
        ("epochs = 1\n[entries]\na = 'at --norm L2'", "entry 'a': ball is L2 0.75, and Linf 0.2 for the others"),
        (
            "epochs = 1\ntrain = '--attack union'\n[entries]\na = 'at'\nb = 'free'",
            "entry 'b': ball is Linf 0.2, and Linf 0.2, L2 0.75, L1 2 for the others",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_line(table, message, capsys, tmp_path):
    (tmp_path / "table.toml").write_text(table)
    said = refused(["--config", str(tmp_path / "table.toml")], capsys)
    assert said.startswith(f"config is {tmp_path}/table.toml")
    assert message in said


def test_results_are_put_side_by_side(monkeypatch):
    asked = []
    monkeypatch.setattr(results, "compare_results", lambda *arguments: asked.append(arguments[:3]))
    assert main(["compare", "--results", "a", "b", "--out", "o"]) == 0
    assert asked == [((Path("a"), Path("b")), Path("o"), False)]


def test_a_comparison_of_nothing_is_none():
    with pytest.raises(InputError, match="entries is empty"):
        made({}, [], epochs=1)


def test_every_option_has_a_help_line(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    helped = " ".join(re.sub(r"[│╭╮╰╯─\n]", " ", capsys.readouterr().out).split())
    source = inspect.getsource(comparing.CompareOptions)
    for field in dataclasses.fields(comparing.CompareOptions):
        match = re.search(rf'^    {field.name}: .*\n    """(.+?)"""', source, re.MULTILINE | re.DOTALL)
        assert match, f"{field.name} has no docstring"
        assert f"--{field.name}" in helped
        assert " ".join(match.group(1).split())[:40] in helped
    assert comparing.CompareOptions.__doc__.splitlines()[0] in helped


def test_what_all_entries_share_may_be_said_for_all():
    words = [*PLAIN, "--precision", "bf16", "--augment", "True", "--epoch-images", "40", "--on-alarm", "stop"]
    found = made({"natural": "natural", "at": "at --batch-size 16 --ema 0.9"}, words, epochs=2).entries
    assert {(one.config.precision, one.config.data.epoch_images) for one in found.values()} == {("bf16", 40)}


def test_methods_of_a_single_step_keep_it():
    words = {"at": "at", "fgsm-rs": "fgsm-rs", "gat": "gat", "own": "fgsm-rs --attack-steps 2"}
    asked = made(words, ["--data", "digits", "--attack-steps", "5"], epochs=1)
    found = asked.entries
    assert {name: one.config.attack.steps for name, one in found.items()} == {"at": 5, "fgsm-rs": 1, "gat": 1, "own": 2}
    assert asked.left_out == {"--attack-steps": ("fgsm-rs", "gat", "own")}


def test_what_adversarial_training_or_an_entry_there_takes_may_be_said_for_those_that_join(
    tmp_path, monkeypatch, capsys
):
    words = [*PLAIN, "--attack-steps", "2"]
    asked = made({"natural": "natural"}, words, epochs=1)
    assert asked.timed.method.attack.steps == 2
    assert asked.left_out == {"--attack-steps": ("natural",)}
    there = content({"trades": entry("trades", [(1.0, 1.0)])}, train="--data digits --beta 2")
    (tmp_path / "compare.json").write_text(json.dumps(there))
    words = f"--methods natural --epochs 1 --data digits --beta 2 --out {tmp_path}"
    assert read(words, monkeypatch)[0].left_out == {"--beta": ("natural",)}
    assert "Unrecognized options: --beta" in refused(words.replace("--beta 2", "--beta 3"), capsys)


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    named = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert set(METHODS) <= named
