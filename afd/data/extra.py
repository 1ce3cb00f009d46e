"""Extra images: read from somebody's files, and mixed into the batches of a data set in a share."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from afd.data.images import AUGMENTATION, ORDER, Augment, Batches, Endless, Images
from afd.errors import DataError, InputError, InputTypeError, in_a_line, number, whole
from afd.files import check_source
from afd.installation import needed_by

IMAGES, LABELS = ("image", "images", "x"), ("label", "labels", "y")  # keys, in the order in which they are looked for
ENDINGS = (".png", ".jpg", ".jpeg")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
BLOCK = 2**26  # bytes of an array that are read at once


def read_extra(path: Path | str, like: Images) -> Images:
    """Labelled images beside a data set, in its form.

    Args:
        path: an .npz file or a folder.

            The file has images uint8 under "image", "images" or "x", [N, H, W, C] or [N, C, H, W], whichever the shape
            of `like` says (the former where both would do), or [N, H, W] of one channel; and labels, integers [N],
            under "label", "labels" or "y". Nothing is unpickled, and a file is read block by block, once.

            The folder has a folder for each class, with PNG or JPEG files in it; other files, and names that begin with
            a dot, are left out. Folders whose names are all numbers are the classes of these numbers, and need not be
            all; others are the classes in the order of their names, and must be as many as there are classes.
        like: the data set, which says channels, height, width, largest pixel value and number of classes.

    Returns:
        The images in CPU memory.

    Raises:
        DataError: there is no such file, it cannot be read, or its images or labels are not as described here.
        InputTypeError: `like` is no `Images`.
        InputError: the path is a device or pipe, or of a file that is no .npz.
        ExtraMissingError: Pillow, which reads PNG and JPEG, is not installed.
    """
    if not isinstance(like, Images):
        raise InputTypeError(f"like is a {type(like).__name__}; it must be an afd.data.Images")
    path = Path(path).expanduser()
    check_source("extra-data", path)
    if not path.exists():
        raise DataError(f"extra-data is {path}; there is no such file or folder")
    if path.is_dir():
        pixels, labels = _read_folder(path, like)
    elif path.suffix == ".npz":
        pixels, labels = _read_npz(path, like)
    else:
        raise InputError(f"extra-data is {path}; it must be an .npz file or a folder with a folder for each class")
    if like.scale < 255 and int(pixels.max()) > like.scale:
        raise DataError(
            f"{path} holds pixels up to {int(pixels.max())}; those of {like.name} are in [0, {like.scale:g}]"
        )
    return Images(pixels, labels, like.scale, like.num_classes, f"{like.name}, extra")


# --- An .npz file ---------------------------------------------------------------------------------------------------


def _read_npz(path: Path, like: Images) -> tuple[Tensor, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            image, label = (_found(path, names, keys) for keys in (IMAGES, LABELS))
            with archive.open(f"{label}.npy") as file:
                labels = _labels(path, label, file, like.num_classes)
            with archive.open(f"{image}.npy") as file:
                return _pixels(path, image, file, len(labels), like), labels
    except DataError:
        raise
    except Exception as error:  # whatever zipfile and numpy stumble over in a damaged file
        raise DataError(f"{path} cannot be read as an .npz file: {in_a_line(error)}") from error


def _found(path: Path, names: Sequence[str], keys: Sequence[str]) -> str:
    found = next((key for key in keys if key in names), None)
    if found is None:
        held = ", ".join(sorted(names)[:8]) or "nothing"
        raise DataError(f"{path} holds {held}; it must hold an array {' or '.join(map(repr, keys))}")
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype of the array that a file begins to hold, unread so far."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"an array is in version {version} of NumPy's format")
    shape, by_columns, dtype = read[version](file)
    return shape, by_columns, dtype


def _labels(path: Path, name: str, file: IO[bytes], num_classes: int) -> Tensor:
    shape, _, dtype = _header(file)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{path} holds {name!r}, {dtype} {list(shape)}; labels must be integers [N]")
    if shape[0] == 0:
        raise DataError(f"{path} holds no images; there must be at least one")
    labels = np.frombuffer(_read(file, shape[0] * dtype.itemsize), dtype)
    _check_labels(path, int(labels.min()), int(labels.max()), num_classes)
    return torch.from_numpy(labels.astype(np.int64))


def _check_labels(path: Path, least: int, largest: int, num_classes: int) -> None:
    if least < 0 or largest >= num_classes:
        wrong = least if least < 0 else largest
        raise DataError(f"{path} holds the label {wrong}; the data set has classes 0 ... {num_classes - 1}")


def _pixels(path: Path, name: str, file: IO[bytes], labels: int, like: Images) -> Tensor:
    """An array of images as uint8 [N, C, H, W], which is all that is held of it beside one block."""
    (shape, by_columns, dtype), (channels, height, width) = _header(file), like.shape
    if dtype != np.uint8:
        raise DataError(f"{path} holds {name!r} of {dtype}; images must be uint8, with values in [0, {like.scale:g}]")
    last, first = (height, width, channels), (channels, height, width)
    fits = [last, first, *([(height, width)] if channels == 1 else [])]
    if tuple(shape[1:]) not in fits:
        allowed = " or ".join(f"[N, {', '.join(map(str, one))}]" for one in fits)
        raise DataError(f"{path} holds {name!r} of shape {list(shape)}; for {like.name} it must be {allowed}")
    if shape[0] != labels:
        raise DataError(f"{path} holds {shape[0]} images and {labels} labels; it must hold as many of both")
    if by_columns:
        raise DataError(f"{path} holds {name!r} in Fortran's order; save it in C's (numpy.ascontiguousarray)")
    pixels = torch.empty(labels, channels, height, width, dtype=torch.uint8)
    rows = max(1, BLOCK // (channels * height * width))
    for start in range(0, labels, rows):
        part = pixels[start : start + rows]
        block = torch.frombuffer(bytearray(_read(file, part.numel())), dtype=torch.uint8)
        if tuple(shape[1:]) == last:
            part.copy_(block.view(-1, *last).permute(0, 3, 1, 2))
        else:
            part.copy_(block.view(-1, *first))
    return pixels


def _read(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it ends early")
    return content


# --- A folder of class folders --------------------------------------------------------------------------------------


def _read_folder(path: Path, like: Images) -> tuple[Tensor, Tensor]:
    with needed_by("reading images from a folder", "PIL"):
        from PIL import Image

    try:
        files = [(file, label) for folder, label in _classes(path, like.num_classes) for file in _files(folder)]
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    channels, height, width = like.shape
    if channels not in MODES:
        raise InputError(f"extra-data is the folder {path}, and images have {channels} channels; give an .npz file")
    pixels = np.empty((len(files), height, width, channels), dtype=np.uint8)
    for row, (file, _) in enumerate(files):
        pixels[row] = _decoded(file, Image.open, like).reshape(height, width, channels)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def _classes(path: Path, num_classes: int) -> list[tuple[Path, int]]:
    """The class folders, each with its class."""
    folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not folders:
        raise DataError(f"{path} holds no folders; it must hold one for each class, with PNG or JPEG files")
    if all(one.name.isascii() and one.name.isdigit() for one in folders):
        numbers = [int(one.name) for one in folders]
        _check_labels(path, min(numbers), max(numbers), num_classes)
        if len(set(numbers)) < len(numbers):
            raise DataError(f"{path} holds two folders of one class; a number may be the name of one only")
        return list(zip(folders, numbers, strict=True))
    if len(folders) != num_classes:
        raise DataError(
            f"{path} holds {len(folders)} folders ({', '.join(one.name for one in folders[:3])}, ...); it must hold "
            f"one for each of {num_classes} classes, in the order of their names, or folders named by classes' numbers"
        )
    return list(zip(folders, range(num_classes), strict=True))


def _files(folder: Path) -> list[Path]:
    """The images of a class, by name."""
    found = sorted(
        one for one in folder.iterdir() if one.suffix.lower() in ENDINGS and not one.name.startswith(".")
    )  # fmt: skip
    if not found:
        raise DataError(f"{folder} holds no PNG or JPEG files; the folder of a class must hold at least one")
    return found


def _decoded(file: Path, read: Callable[[Path], Any], like: Images) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels of an image file."""
    check_source("extra-data", file)
    channels, height, width = like.shape
    try:
        with read(file) as image:
            form = image.mode, image.height, image.width  # known before anything is decoded
            fits = form == (MODES[channels], height, width)
            if fits:
                image.load()  # numpy would make something else of what is cut short
            content = np.asarray(image) if fits else None
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise DataError(f"{file} cannot be read as an image: {in_a_line(error)}") from error
    if content is None:
        found, wanted = "{} of {}x{}".format(*form), f"{MODES[channels]} of {height}x{width}"
        raise DataError(f"{file} is {found}; images of {like.name} are {wanted}")
    return content


# --- Batches with a share of them -----------------------------------------------------------------------------------


ROWS, EXTRA_ORDER, EXTRA_AUGMENTATION = 2, 3, 4  # what is drawn, beside the data set's order and augmentation
STRETCH = 16  # rows, each stretch of which holds its share of extra images
Floats = np.ndarray[Any, np.dtype[np.float32]]


class MixedBatches(Batches):
    """Batches that hold a share of extra images, in epochs of any number of images.

    The data set and the extra images are each served in an endless sequence of orders, every order drawn anew from
    `seed` and its number, so that each image comes once before any comes again. An epoch is the next `epoch_images` of
    both together: what batch k of epoch e holds depends on seed, e and k alone, so that an interrupted run sees the
    same, in one process or several. An image is augmented by its own draw, a new one with each order.

    Of B rows, round(share B) are extra images, spread evenly, but at random within every 16 rows: each process and each
    micro-batch has its share, and neighbours may be of either kind. Extra image j has the index len(images) + j.

    Without extra images this serves the data set alone, and with the default `epoch_images` as `Batches` does.

    Args:
        images: the data set.
        batch_size: images per batch of all processes together, extra ones included.
        extra: more images, of the same form; None for none.
        share: of a batch that is extra images, in (0, 1); 0 where there are none.
        epoch_images: images of an epoch, extra ones included; None for len(images). The last batch may have fewer.
        seed: which sequence of orders and augmentations, at least 0.
        augment: as in `Batches`.
        device: where to keep all images and serve batches; None for where the data set is.
        rank: as in `Batches`.
        world_size: as in `Batches`.
        channels_last: as in `Batches`.

    Raises:
        InputTypeError: images or extra is no `Images`, or a number is of another type.
        InputError: extra has another form than images, a number is out of range, a batch has no row of one of the two,
            or the processes cannot share a batch evenly.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        extra: Images | None = None,
        share: float = 0.0,
        epoch_images: int | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            images, batch_size, shuffle=True, seed=seed, augment=augment, device=device, rank=rank,
            world_size=world_size, channels_last=channels_last,
        )  # fmt: skip
        self.share, self.epoch_images = share, len(images) if epoch_images is None else epoch_images
        whole("epoch_images", self.epoch_images, 1)
        if self.epoch_images < world_size:
            raise InputError(f"epoch_images is {epoch_images}; {world_size} processes need at least one each")
        self._check_extra(extra)
        self._sources = [Endless(self.images, partial(self._drawn, len(images), ORDER, AUGMENTATION))]
        if extra is not None:
            drawn = partial(self._drawn, len(extra), EXTRA_ORDER, EXTRA_AUGMENTATION)
            self._sources.append(Endless(extra.to(self.images.device), drawn))

    def _check_extra(self, extra: Images | None) -> None:
        number("share", self.share, 0.0)
        if extra is None:
            if self.share:
                raise InputError(f"share is {self.share}; without extra images it must be 0")
            return
        if not isinstance(extra, Images):
            raise InputTypeError(f"extra is a {type(extra).__name__}; it must be an afd.data.Images")
        if not len(extra):
            raise InputError("extra is empty; there must be at least one image")
        for name in ("shape", "scale", "num_classes"):
            theirs, ours = getattr(extra, name), getattr(self.images, name)
            if theirs != ours:
                raise InputError(f"extra has {name} {theirs}; it must be {ours}, as of the images")
        if not 0 < self.share < 1:
            raise InputError(f"share is {self.share}; with extra images it must be in (0, 1)")
        if not 0 < self._extra_in(self.batch_size) < self.batch_size:
            raise InputError(
                f"share is {self.share} of batch_size {self.batch_size}, which is {self._extra_in(self.batch_size)} "
                "rows; a batch must have at least one row of extra images and one of the others"
            )

    def __len__(self) -> int:
        whole_batches, rest = divmod(self.epoch_images, self.batch_size)
        return whole_batches if rest < self.world_size else whole_batches + 1

    def _extra_in(self, rows: int) -> int:
        """How many of a batch's rows are extra images."""
        return round(self.share * rows)

    def state_dict(self) -> dict[str, int]:
        """How many images there are of both kinds: a checkpoint has it, so that a run does not go on with others."""
        return {name: len(source.images) for name, source in zip(("images", "extra"), self._sources, strict=False)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Finds that the images are as many as `state_dict` said.

        Raises:
            InputError: they are not.
        """
        here = self.state_dict()
        if here != dict(state):
            there, now = (", ".join(f"{count} {name}" for name, count in one.items()) for one in (state, here))
            raise InputError(f"the run that goes on was trained on {there}, and here are {now}; it needs the same ones")

    def with_index(self, batch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `starting_at`, and which images each batch holds, int64 [B]; extra ones follow those of the data set."""
        chances = torch.rand(self.epoch_images, generator=self._generator(ROWS, self.epoch), device="cpu").numpy()
        epoch = self.epoch
        return (self._batch(epoch, one, chances) for one in range(batch, len(self)))

    def _batch(self, epoch: int, number: int, chances: Floats) -> tuple[Tensor, Tensor, Tensor]:
        kinds = self._kinds(chances[number * self.batch_size : (number + 1) * self.batch_size])
        rows = len(kinds) // self.world_size
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        parts = []
        for kind, source in enumerate(self._sources):
            skipped, count = (int((kinds[part] == kind).sum()) for part in (slice(mine.start), mine))
            parts.append(source.taken(self._before(kind, epoch, number) + skipped, count))
        index, pixels, labels, draws = (torch.cat(columns) for columns in zip(*parts, strict=True))
        # row i of the batch is the next image of its kind
        places = np.argsort(np.argsort(kinds[mine], kind="stable"), kind="stable")
        place, extra = (
            torch.from_numpy(one).to(index.device, non_blocking=True) for one in (places, np.sort(kinds[mine]))
        )
        x = self._load(pixels, place, None if self.augment is None else draws)
        index = index + extra * len(self.images)
        return x, labels.index_select(0, place), index.index_select(0, place)

    def _kinds(self, chances: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Of each row of a joint batch, whether it is an extra image, 0 or 1, out of a random number of each."""
        rows, size = np.arange(len(chances)), len(chances)
        extra = self._extra_in(size)
        even = (rows + 1) * extra // size - rows * extra // size
        return even[np.argsort(rows // STRETCH + chances, kind="stable")]

    def _before(self, kind: int, epoch: int, number: int) -> int:
        """Images of a kind in the batches before this one, of all epochs."""
        batches, rest = divmod(self.epoch_images, self.batch_size)
        whole_ones = epoch * batches + number
        extra = whole_ones * self._extra_in(self.batch_size) + epoch * self._extra_in(rest)
        return extra if kind else whole_ones * self.batch_size + epoch * rest - extra

    def _drawn(self, count: int, order: int, augmentation: int, number: int) -> tuple[Tensor, Tensor]:
        """The order of a number and its augmentation's draws, of so many images."""
        drawn = torch.randperm(count, generator=self._generator(order, number), device="cpu")
        draws = torch.randint(2**62, (count,), generator=self._generator(augmentation, number), device="cpu")
        return drawn, draws
