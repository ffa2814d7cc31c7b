"""Polyps in colonoscopy images: five published sets, as PraNet packs them or each in a folder of its own.

Kvasir-SEG (Jha et al., MMM 2020) and CVC-ClinicDB (Bernal et al., CMIG 2015) are trained on; EndoScene
(Vázquez et al., JHE 2017, its CVC-300), CVC-ColonDB (Bernal et al., PR 2012) and ETIS-LaribPolypDB (Silva et
al., IJCARS 2014) are other centres. PraNet (Fan et al., MICCAI 2020) packs all five.
"""

import hashlib
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist, squareform

from datamodules.sources.folder import Folder, Pair, PairSource, decoding, expand, make_format, pair_files
from datamodules.sources.listing import shown
from errors import InputError


@dataclass(frozen=True)
class Published:
    """A published set.

    Attributes:
        count: images that it has where the paper's figures come from.
        folders: names that its folder goes by, the usual one first; case, ``-`` and ``_`` do not matter.
    """

    count: int
    folders: tuple[str, ...]


SETS: dict[str, Published] = {
    "kvasir": Published(1000, ("Kvasir-SEG", "Kvasir")),
    "clinicdb": Published(612, ("CVC-ClinicDB", "ClinicDB", "CVC-612")),
    "endoscene": Published(60, ("CVC-300", "EndoScene")),
    "colondb": Published(380, ("CVC-ColonDB", "ColonDB")),
    "etis": Published(196, ("ETIS-LaribPolypDB", "ETIS-Larib", "ETIS")),
}

# Last frame of each of the 29 video sequences of CVC-ClinicDB, which has the frames 1 to 612: so Dataset
# Ninja's CVC-612 (datasetninja.com/cvc-612), and others after polyp.grand-challenge.org/CVCClinicDB.
# fmt: off
SEQUENCE_ENDS = (
    25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317,
    342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612,
)
# fmt: on

KNOWN_FORMS = (
    "PraNet's, TrainDataset/{images,masks} and TestDataset/{CVC-300,CVC-ClinicDB,Kvasir,CVC-ColonDB,"
    "ETIS-LaribPolypDB}/{images,masks}; and raw, Kvasir-SEG/{images,masks} and CVC-ClinicDB/{Original,"
    "Ground Truth} side by side, with CVC-300, CVC-ColonDB or ETIS-LaribPolypDB where there are any"
)
_IMAGES = ("images", "image", "original")
_MASKS = ("masks", "mask", "groundtruth")
_PACKED = ("", "PNG", "TIF")  # where a set's folder holds its two folders, the first that does
_SHADES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
LOOK_SIZE = 16
ALIKE = 5.0  # grey levels: the same frame stored twice differs by less, two frames by more

SetName = Literal["kvasir", "clinicdb", "endoscene", "colondb", "etis"]
TestName = Literal["test", "kvasir", "clinicdb", "endoscene", "colondb", "etis"]
_Pairs = dict[str, Pair]


class PolypsSource(PairSource):
    """Colonoscopy images with polyp masks from several centres.

    Reads, by what lies in ``root``, PraNet's packing or the raw sets side by side; ``image``/``mask`` for
    ``images``/``masks`` and ``PNG/Original`` for ``Original`` are known too. In PraNet's ``TrainDataset``
    names that are numbers are frames of CVC-ClinicDB, all others are of Kvasir-SEG. Files, types and sizes of
    the samples are as for :class:`FolderSource`: RGB, masks cut above 127, ids like ``clinicdb-12``.

    Each set that is trained on is split by itself: a tenth of it, rounded down, is ``val``, seven tenths are
    ``train`` and the rest is held out. Kvasir-SEG's 1,000 and CVC-ClinicDB's 612 thereby make the paper's
    1,128, 161 and 323. Images that nearly coincide, as four pairs of Kvasir-SEG do, stay in one split.

    The constructor reads every image once, to compare them; it takes seconds.

    Args:
        root: folder in one of the two forms; ``~`` and environment variables are filled in.
        name: name of the set in reports; None is ``polyps``.
        train_on: sets that are trained on, of ``kvasir``, ``clinicdb``, ``endoscene``, ``colondb``, ``etis``.
        tests: test sets, a row each. ``test`` is what is held out of all sets trained on; the name of a set
            is what is held out of it or, where it is not trained on, all of it. None is ``test`` and every
            set on disk that is not trained on.
        split: ``paper`` is 7:1:2 of all images of a set, wherever PraNet has put them. ``pranet`` keeps
            PraNet's own training and test folders, and ``val`` is a tenth of the training folder.
        by_sequence: keep the frames of a video sequence of CVC-ClinicDB in one split. A split by frame, the
            paper's, has neighbouring frames of one polyp in training and test.
        size: height and width (H, W) of the samples in pixels; one number makes them square.
        n_train: keep only the first so many of ``train``, which is in random order. None keeps all.
        allow_empty: take masks without a polyp too; every image of the five sets shows one.
        seed: seed of the split; it does not depend on the order on disk, nor on what else is trained on.

    Raises:
        InputError: ``root`` has neither form or both, a named set is not there, images and masks do not
            pair, an image cannot be read or is not RGB with 8 bits, the same image is in the sets trained
            on twice or, nearly the same, in two sets of which one is trained on, or the split is impossible.
    """

    def __init__(
        self,
        root: str,
        name: str | None = None,
        train_on: Sequence[SetName] = ("kvasir", "clinicdb"),
        tests: Sequence[TestName] | None = ("test",),
        split: Literal["paper", "pranet"] = "paper",
        by_sequence: bool = False,
        size: tuple[int, int] | int = 256,
        n_train: int | None = None,
        allow_empty: bool = False,
        seed: int = 0,
    ) -> None:
        _check_names(train_on, "train_on", SETS)
        _check_names(tests, "tests", ("test", *SETS))
        if seed < 0:
            raise InputError(f"seed is {seed}; it must be at least 0")
        self.name = "polyps" if name is None else name
        self.class_names = ("background", "polyp")
        self.channels = 3
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        form = make_format(self.size, self.channels, self.class_names, 127, None)
        self._format = replace(form, needs_object=not allow_empty)

        shelf = _Shelf(expand(root))
        if split == "pranet" and shelf.form != "PraNet":
            raise InputError(f"split: pranet needs PraNet's form, {shelf.root} has the raw one: choose paper")
        if split == "pranet" and by_sequence:
            raise InputError(
                "split: pranet has frames of one sequence in training and test, by_sequence forbids it: "
                "choose split: paper"
            )
        if tests is None:
            wanted = ["test", *(key for key in shelf.present() if key not in train_on)]
        else:
            wanted = list(tests)
        others = [key for key in wanted if key not in ("test", *train_on)]
        folders = {key: shelf.read(key) for key in [*train_on, *others]}
        looks = _look_at([pair for kept in folders.values() for pair in kept.all.values()])
        _check_leaks(train_on, folders, looks)
        _check_copies(train_on, folders, looks)
        _warn_of_counts(folders, shelf.root)

        parts: dict[str, dict[str, list[Pair]]] = {
            key: _split(key, folders[key], split, by_sequence, seed, looks) for key in train_on
        }
        kept = {"train": _training(parts, n_train, seed), "val": _joined(parts, train_on, "val")}
        for key in wanted:
            if key in others:
                whole = folders[key].test if split == "pranet" else folders[key].all
                kept[key] = sorted(whole.values(), key=lambda pair: pair.stem)
            else:
                kept[key] = _joined(parts, train_on if key == "test" else [key], "test")
        self._keep(kept)


def _check_names(names: Sequence[str] | None, argument: str, known: Iterable[str]) -> None:
    if names is None:
        return
    for name in names:
        if name not in known:
            raise InputError(f"{argument}: {name!r} is none of {', '.join(known)}")
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{argument} is {list(names)}: name at least one set, and each once")


# ------------------------------------------------------------------------------- what is on disk


@dataclass(frozen=True)
class _Kept:
    """The images of one set by file: those in PraNet's training folder, and all others."""

    train: _Pairs
    test: _Pairs

    @property
    def all(self) -> _Pairs:
        return self.train | self.test


class _Shelf:
    """A folder of sets in one of the two forms."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder: check root")
        self.root = root
        packed = {key: _named(root, (key,)) for key in ("TrainDataset", "TestDataset")}
        raw = {key: found for key, each in SETS.items() if (found := _named(root, each.folders))}
        if any(packed.values()) and raw:
            both = [path.name for path in (*packed.values(), *raw.values()) if path]
            raise InputError(f"{root} has PraNet's form and the raw one ({', '.join(both)}): keep one")
        if not any(packed.values()) and not raw:
            raise InputError(f"{root} fits no known form. Known are {KNOWN_FORMS}. Found: {shown(root)}")
        self.form = "raw" if raw else "PraNet"
        self._training: dict[str, _Pairs] = {key: {} for key in SETS}
        self._home = root
        if not raw:
            training, self._home = (_needed(path, key, root) for key, path in packed.items())
            for stem, pair in _pairs(training).items():
                key = "clinicdb" if stem.isdecimal() else "kvasir"
                self._training[key][stem] = replace(pair, stem=f"{key}-{stem}")

    def present(self) -> list[str]:
        """Names of the sets that have a folder."""
        return [key for key, each in SETS.items() if _named(self._home, each.folders)]

    def read(self, key: str) -> _Kept:
        """Pair the images of a set."""
        path = _named(self._home, SETS[key].folders)
        if path is None:
            raise InputError(
                f"{self._home} has no {SETS[key].folders[0]}: add it, or take {key} out of tests; "
                f"found: {shown(self._home)}"
            )
        test = {stem: replace(pair, stem=f"{key}-{stem}") for stem, pair in _pairs(path).items()}
        training = self._training[key]
        for stem in sorted(test.keys() & training.keys()):
            raise InputError(
                f"{training[stem].image} and {test[stem].image} are both {stem!r} of {key}, one for training "
                "and one for the test: remove one, with its mask"
            )
        return _Kept(training, test)


def _needed(path: Path | None, name: str, root: Path) -> Path:
    if path is None:
        raise InputError(f"{root} has no {name}, and PraNet's form needs it; found: {shown(root)}")
    return path


def _canonical(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _named(folder: Path, names: Iterable[str]) -> Path | None:
    """The sub-folder that goes by one of the names; two of them are one too many."""
    wanted = {_canonical(name) for name in names}
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and _canonical(path.name) in wanted]
    if len(found) > 1:
        raise InputError(f"{folder} has {found[0].name} and {found[1].name}, two names of one set: keep one")
    return found[0] if found else None


def _pairs(folder: Path) -> _Pairs:
    """Find the images and the masks of one set, and pair them by file name."""
    for inside in (folder / name for name in _PACKED):
        if not inside.is_dir():
            continue
        images, masks = _named(inside, _IMAGES), _named(inside, _MASKS)
        if images and masks:
            return pair_files(Folder(str(inside), images.name, masks.name))
    raise InputError(
        f"{folder} has no two folders images and masks, image and mask, or Original and Ground Truth; "
        f"found: {shown(folder)}"
    )


def _warn_of_counts(folders: Mapping[str, _Kept], root: Path) -> None:
    for key, kept in folders.items():
        expected = SETS[key].count
        if len(kept.all) != expected:
            warnings.warn(
                f"{root}: {key} has {len(kept.all)} images, the published set {expected}: figures are not "
                "those of the paper's split",
                stacklevel=3,
            )


# --------------------------------------------------------------------------------------- splits


def _joined(parts: Mapping[str, Mapping[str, list[Pair]]], keys: Iterable[str], name: str) -> list[Pair]:
    """One split of several sets, one set after the other."""
    return [pair for key in keys for pair in parts[key][name]]


def _training(parts: Mapping[str, Mapping[str, list[Pair]]], n_train: int | None, seed: int) -> list[Pair]:
    """``train`` of all sets in random order, or its beginning."""
    pooled = _joined(parts, parts, "train")
    if n_train is not None and not 1 <= n_train <= len(pooled):
        raise InputError(f"n_train is {n_train}; train has {len(pooled)}: choose 1 to that many")
    return [pooled[i] for i in default_rng(seed).permutation(len(pooled))][:n_train]


def _split(
    key: str, kept: _Kept, split: str, by_sequence: bool, seed: int, looks: Mapping[Path, "_Look"]
) -> dict[str, list[Pair]]:
    """``train``, ``val`` and ``test`` of one set, each sorted by name."""
    rng = default_rng([seed, zlib.crc32(key.encode())])
    pool = kept.train if split == "pranet" else kept.all
    count = len(pool)
    wanted = {"val": count // 10} if split == "pranet" else {"test": 0, "val": count // 10}
    if split == "paper":
        wanted["test"] = count - count * 7 // 10 - wanted["val"]
    elif not kept.train or not kept.test:
        raise InputError(f"split: pranet: PraNet has no {key} for training: take it out of train_on")
    in_sequences = by_sequence and key == "clinicdb"
    groups = _sequences(pool) if in_sequences else _alike(pool, looks)

    left = [groups[i] for i in rng.permutation(len(groups))]
    parts: dict[str, list[Pair]] = {"test": [] if split == "paper" else list(kept.test.values())}
    for name, number in wanted.items():
        chosen = _choose([len(group) for group in left], number)
        parts[name] = [pair for i in chosen for pair in left[i]]
        left = [group for i, group in enumerate(left) if i not in chosen]
    parts["train"] = [pair for group in left for pair in group]
    for name, pairs in parts.items():
        if not pairs:
            raise InputError(f"no image of {key} falls to {name}: {count} images are too few, add some")
    return {name: sorted(pairs, key=lambda pair: pair.stem) for name, pairs in parts.items()}


def _choose(sizes: Sequence[int], wanted: int) -> set[int]:
    """Indices of sizes that add up to the number wanted, or as near as any do; early ones where possible."""
    reached: dict[int, tuple[int, int]] = {}  # sum: index of the size added last, sum before it
    for index, size in enumerate(sizes):
        for before in [0, *reached]:
            if before + size <= 2 * wanted and before + size not in reached:
                reached[before + size] = (index, before)
    chosen: set[int] = set()
    total = min(reached, key=lambda each: (abs(each - wanted), each), default=0)
    while total:
        index, total = reached[total]
        chosen.add(index)
    return chosen


def _sequences(pool: Mapping[str, Pair]) -> list[list[Pair]]:
    """Frames of CVC-ClinicDB by video sequence."""
    groups: dict[int, list[Pair]] = {}
    for pair in sorted(pool.values(), key=lambda pair: pair.stem):
        frame = pair.stem.removeprefix("clinicdb-")
        if not frame.isdecimal() or not 1 <= int(frame) <= SEQUENCE_ENDS[-1]:
            raise InputError(
                f"{pair.image}: by_sequence needs the published names, the frame numbers 1 to "
                f"{SEQUENCE_ENDS[-1]}: rename the frames, or set by_sequence to false"
            )
        groups.setdefault(int(np.searchsorted(SEQUENCE_ENDS, int(frame))), []).append(pair)
    return [groups[sequence] for sequence in sorted(groups)]


# ----------------------------------------------------------------------------- how images look


@dataclass(frozen=True)
class _Look:
    """What tells two images apart: a digest of the pixels, and ``LOOK_SIZE``² grey values."""

    digest: bytes
    small: NDArray[np.float32]


def _look_at(pairs: Sequence[Pair]) -> dict[Path, _Look]:
    with ThreadPoolExecutor() as pool:
        return dict(zip((p.image for p in pairs), pool.map(lambda p: _look(p.image), pairs), strict=True))


def _look(path: Path) -> _Look:
    with decoding(path), Image.open(path) as file:
        # Pillow reads 16 bits a channel as the upper 8 and says so only here, before it reads.
        deep = ";16" in str(file.tile) and file.mode in ("RGB", "RGBA")
        mode = file.mode
        image = file.convert("RGB")
    if deep:
        raise InputError(f"{path} has 16 bits a channel, and the published images have 8: save it with 8")
    if mode in _SHADES:
        raise InputError(f"{path} is grey, mode {mode}, where an RGB image is needed: is it a mask?")
    small = image.convert("L").resize((LOOK_SIZE, LOOK_SIZE), Image.Resampling.BOX)
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    return _Look(digest, np.asarray(small, np.float32).ravel())


def _alike(pool: Mapping[str, Pair], looks: Mapping[Path, _Look]) -> list[list[Pair]]:
    """Images that nearly coincide in one group, in the order of their names."""
    pairs = sorted(pool.values(), key=lambda pair: pair.stem)
    if len(pairs) < 2:
        return [[pair] for pair in pairs]
    apart = squareform(pdist(np.stack([looks[pair.image].small for pair in pairs]), "cityblock"))
    count, label = connected_components(apart < ALIKE * LOOK_SIZE**2, directed=False)
    groups: list[list[Pair]] = [[] for _ in range(count)]
    for index, pair in zip(label, pairs, strict=True):
        groups[index].append(pair)
    return groups


def _check_leaks(train_on: Sequence[str], folders: Mapping[str, _Kept], looks: Mapping[Path, _Look]) -> None:
    """Refuse an image that is in the sets trained on twice, or in them and in a test set."""
    seen: dict[bytes, Path] = {}
    for key in sorted(folders, key=lambda key: key not in train_on):
        for pair in folders[key].all.values():
            first = seen.get(looks[pair.image].digest)
            if first is not None:
                raise InputError(
                    f"{first} and {pair.image} are one image under two names, which leaks from training into "
                    "a test: remove one, with its mask"
                )
            if key in train_on:
                seen[looks[pair.image].digest] = pair.image


def _check_copies(train_on: Sequence[str], folders: Mapping[str, _Kept], looks: Mapping[Path, _Look]) -> None:
    """Refuse an image of a set trained on that nearly coincides with one of another set."""
    pairs = {key: list(kept.all.values()) for key, kept in folders.items()}
    small = {key: np.stack([looks[pair.image].small for pair in each]) for key, each in pairs.items()}
    for key, other in combinations(sorted(folders, key=lambda key: key not in train_on), 2):
        if key not in train_on:
            continue
        apart = cdist(small[key], small[other], "cityblock")
        i, j = np.unravel_index(apart.argmin(), apart.shape)
        if apart[i, j] < ALIKE * LOOK_SIZE**2:
            raise InputError(
                f"{pairs[key][i].image} and {pairs[other][j].image} are nearly the same image, which leaks "
                "from training into a test: remove one, with its mask"
            )
