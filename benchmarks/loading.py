"""How fast images in files are read, and what training loses by that: ``python benchmarks/loading.py FOLDER``.

FOLDER has a folder ``train`` of class folders with JPEG files, 60,000 or more where memory is to be told for so many.
Everybody has two processes to decode in. Beside afd: Pillow in two bare processes, which hand nothing over, and, where
they are installed, what else reads such files: torch's DataLoader over Pillow, torchdata's StatefulDataLoader over the
same, and webdataset over tar shards of the same files.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import multiprocessing
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from afd.bench.results import Candidate, Case, Document
from afd.data import Batches
from afd.data.images import CropAndFlip
from afd.data.shards import ShardSource
from afd.data.sources import FolderSource
from afd.data.stored import StoredImages, stored
from afd.data.streaming import StreamedBatches
from afd.methods import AFD, AT
from afd.nn import build_model

RESULTS = Path(__file__).parent / "results"
WORKERS, BATCH, SHARDS = 2, 128, 10
PILLOW = "Pillow, two bare processes"
OTHERS = tuple(name for name in ("torchdata", "webdataset") if importlib.util.find_spec(name))


def by_pillow(path: str) -> Any:
    """Pixels of a file, as Pillow's users read it."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def bare(paths: list[str]) -> None:
    """Decodes files and keeps nothing."""
    for path in paths:
        by_pillow(path)


def in_two_processes(paths: list[str]) -> None:
    """The most that two processes with Pillow can do."""
    both = [multiprocessing.Process(target=bare, args=(paths[half::2],)) for half in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join()


class ByPillow:
    """A data set for torch's DataLoader."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        return torch.from_numpy(by_pillow(self.paths[number]).copy())


def passed(batches: Iterable[Any]) -> None:
    """All batches, which nobody uses."""
    for _ in batches:
        pass


def webdataset(shards: list[str]) -> None:
    """The same files in shards, in the order in which they lie there."""
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> Any:
        return torch.from_numpy(np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).copy())

    samples = wds.WebDataset(shards, shardshuffle=False).map(decode).batched(BATCH, collation_fn=torch.stack)
    passed(DataLoader(samples, batch_size=None, num_workers=WORKERS))


def sharded(paths: list[str], folder: Path) -> list[str]:
    """The files in tar shards."""
    found = []
    for number in range(SHARDS):
        shard = folder / f"train-{number:03d}.tar"
        with tarfile.open(shard, "w") as archive:
            for place, path in enumerate(paths[number::SHARDS]):
                for name, content in ((".jpg", Path(path).read_bytes()), (".cls", b"%d" % (place % 10))):
                    member = tarfile.TarInfo(f"{number:03d}{place:06d}{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        found.append(str(shard))
    return found


def streamed(images: StoredImages) -> None:
    """An epoch of training batches, augmented."""
    passed(StreamedBatches(images, BATCH, shuffle=True, augment=CropAndFlip()))


def readers(images: StoredImages, folder: Path) -> dict[str, Callable[[], None]]:
    """Everybody that reads, by name."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    paths = [images.told(int(place)) for place in order]
    shards = sharded(paths, folder)
    settings: dict[str, Any] = {"batch_size": BATCH, "num_workers": WORKERS}
    found: dict[str, Callable[[], None]] = {
        PILLOW: partial(in_two_processes, paths),
        "afd, folder": partial(streamed, images),
        "afd, shards": partial(streamed, stored(ShardSource(shards), workers=WORKERS)),
        "torch DataLoader over Pillow": lambda: passed(DataLoader(ByPillow(paths), **settings)),
    }
    if "torchdata" in OTHERS:
        from torchdata.stateful_dataloader import StatefulDataLoader

        found["torchdata StatefulDataLoader over Pillow"] = lambda: passed(
            StatefulDataLoader(ByPillow(paths), **settings)
        )
    if "webdataset" in OTHERS:
        found["webdataset over Pillow"] = partial(webdataset, shards)
    return found


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each, all in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first warms up
                found[name].append(time.perf_counter() - began)
        print(
            f"{number} of {repeats}", {name: round(times[-1], 2) for name, times in found.items() if times}, flush=True
        )
    return {name: statistics.median(times) for name, times in found.items()}


def trained(method: Any, batches: Batches) -> None:
    """An epoch of steps."""
    torch.manual_seed(0)
    model = build_model("resnet18", (3, 32, 32), 10, width=16)
    step = method.build(model)
    for x, y in batches:
        step(x, y)


def epochs(images: StoredImages) -> dict[str, Callable[[], None]]:
    """An epoch of AT and of AFD, from memory and from files."""
    settings: dict[str, Any] = {"shuffle": True, "augment": CropAndFlip(), "channels_last": True}
    held = images.loaded()
    loaders = {"memory": Batches(held, BATCH, **settings), "folder": StreamedBatches(images, BATCH, **settings)}
    methods = {"at": AT(), "afd": AFD()}
    return {
        f"{name}, {place}": partial(trained, method, loader)
        for name, method in methods.items()
        for place, loader in loaders.items()
    }


PEAK = """
import resource, sys
from pathlib import Path
import torch
from afd.data.images import CropAndFlip
from afd.data.sources import FolderSource
from afd.data.stored import stored
from afd.data.streaming import StreamedBatches
from afd.machine import peak_memory
images = stored(FolderSource(Path(sys.argv[1])), workers=2)
for number, _ in enumerate(StreamedBatches(images, 128, shuffle=True, augment=CropAndFlip())):
    if number == 30:
        break
print(peak_memory(torch.device("cpu")), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peaks(folder: Path, files: int) -> tuple[float, float]:
    """Peak bytes of the process that trains and of the largest worker, over so many files."""
    with tempfile.TemporaryDirectory() as place:
        each = files // 10
        for one in sorted(folder.iterdir()):
            (Path(place) / one.name).mkdir()
            known = sorted(one.iterdir())
            for number in range(each):
                (Path(place) / one.name / f"{number:06d}.jpg").symlink_to(known[number % len(known)])
        found = subprocess.run([sys.executable, "-c", PEAK, place], capture_output=True, text=True, check=True).stdout
    own, worker = map(float, found.split())
    return own, worker


def main() -> None:
    """Measures, and writes the JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--files", type=int, default=20_000, help="that are read for a throughput")
    options.add_argument("--epoch", type=int, default=6_400, help="images of an epoch that is trained")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    asked = options.parse_args()
    device = torch.device("cpu")
    images = stored(FolderSource(asked.folder / "train"), workers=WORKERS)
    some = images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(1)))
    cases = dict[str, Case]()

    def keep(name: str, settings: dict[str, Any], found: dict[str, Candidate]) -> None:
        cases[name] = Case(settings, found)
        told = {"workers": WORKERS, "batch": BATCH}
        Document.here("loading", device, asked.repeats, told, cases, OTHERS).write(asked.out)

    with tempfile.TemporaryDirectory() as place:
        part = some.take(torch.arange(min(asked.files, len(some))))
        times = timed(readers(part, Path(place)), asked.repeats)
    rate = {name: len(part) / seconds for name, seconds in times.items()}
    figures = {name: {"images_per_second": one, "of_pillow": one / rate[PILLOW]} for name, one in rate.items()}
    settings = {"files": len(part), "images": "x".join(map(str, images.shape))}
    keep("reading", settings, {name: Candidate(None, one) for name, one in figures.items()})
    part = some.take(torch.arange(min(asked.epoch, len(some))))
    times = timed(epochs(part), asked.repeats)
    figures = {
        name: {"epoch_seconds": one, "of_memory": one / times[f"{name.split(',')[0]}, memory"]}
        for name, one in times.items()
    }
    settings = {"files": len(part), "network": "resnet18, width 16"}
    keep("training", settings, {name: Candidate(None, one) for name, one in figures.items()})
    found = {f"{files:,} files": peaks(asked.folder / "train", files) for files in (6_000, 60_000)}
    keep("memory", {}, {name: Candidate(None, {"own": own, "worker": worker}) for name, (own, worker) in found.items()})


if __name__ == "__main__":
    main()
