"""The README's Python example runs as printed, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_trains_a_robust_network():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True).stdout
    robust = float(re.fullmatch(r"PGD-40: ([\d.]+)%\n", printed).group(1))
    assert robust > 40


def test_the_two_commands_come_first():
    commands = re.findall(r"^make \S+", README, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
    assert README.index("make demo") < 100


def test_every_make_target_and_option_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    config = (ROOT / "afd" / "config.py").read_text().replace("_", "-")
    for option in set(re.findall(r"afd train.* --([a-z-]+)", README)) - {"help"}:
        assert option in config, option
