"""The embedded data set: what is in it, that nothing held out leaks, that it is whole or absent."""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resvg_py import svg_to_bytes

from m3i_large.data.demo import DemoSummary, _is_used, _render, _select, build_demo_data
from m3i_large.data.drawings import (
    SPLITS,
    STYLES,
    Concept,
    caption,
    concept_code,
    concept_family,
    find_drawings,
    read_concepts,
    read_group_names,
)
from m3i_large.data.source_config import SourceConfig
from m3i_large.data.sources import RawSample, open_sources
from m3i_large.errors import UserError

LIMIT, SIZE = 700, 24
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
WHO = {"man": "1f468", "woman": "1f469", "person": "1f9d1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoSummary:
    return build_demo_data(tmp_path_factory.mktemp("demo") / "data", size=SIZE, limit=LIMIT)


def samples_of(demo: DemoSummary, split: str, source: str) -> list[RawSample]:
    kind = "image_category" if source == "category" else "image_text"
    config = SourceConfig(name=source, kind=kind, shards=f"{split}/{source}-*.tar")
    (opened,) = open_sources([config], demo.root, index=demo.root.parent / "index")
    return [opened.read(i, meta=True) for i in range(len(opened))]


def concept_in(family: str, name: str, *, code: str = "1") -> Concept:
    return Concept(code=code, name=name, family=family, group=None, subgroup=None, tones=0)


def decode(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("man running", "running"),
        ("Woman running: medium-dark skin tone", "running"),
        (":person_running_facing_right_light_skin_tone:", "running"),
        (":man_dark_skin_tone_bald:", "bald"),
        ("women holding hands: light skin tone, dark skin tone", "holding hands"),
        ("woman and man holding hands", "holding hands"),
        ("kiss: woman, man", "kiss"),
        ("family man woman girl boy", "family"),
        ("old woman", "person"),
        ("baby", "person"),
        ("princess", "with crown"),
        ("merman", "mermaid"),
        ("Mrs. Claus", "claus"),
        ("woman\u2019s hat", "woman\u2019s hat"),
        ("snowman", "snowman"),
        ("light skin tone", "light skin tone"),
        ("dark sky", "dark sky"),
    ],
)
def test_family_of_a_name(name: str, family: str) -> None:
    assert concept_family(name) == family


def test_families_hold_under_every_gender_and_tone() -> None:
    for base in (
        "person running",
        "health worker",
        "person with veil",
        "person in tuxedo",
        "people wrestling",
        "pregnant person",
    ):
        for who, tone in itertools.product(("man", "woman", "person"), (None, *TONES)):
            words = [who if w in ("person", "people") else w for w in base.split()]
            name = " ".join(words if who in words else [who, *words]) + (f": {tone} skin tone" if tone else "")
            assert concept_family(name) == concept_family(base), name


def test_no_family_is_in_two_splits_by_code_points_either() -> None:
    """An oracle without names: concepts that differ only in tone, gender sign or which person is drawn."""
    splits = defaultdict(set)
    ignored = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "2640", "2642", "200d", "27a1"}
    for concept in read_concepts():
        parts = ["person" if p in (*WHO.values(), "1f466", "1f467", "1f9d2") else p for p in concept.code.split("-")]
        if rest := tuple(p for p in parts if p not in ignored):
            splits[rest].add(concept.split)
    assert len(splits) > 1500 and not {k: v for k, v in splits.items() if len(v) > 1}


def test_about_a_tenth_of_the_concepts_and_every_group_is_held_out() -> None:
    drawn = find_drawings()
    base = [c for c in read_concepts() if not c.tones and all((style, c.code) in drawn for style in STYLES)]
    counts = Counter(c.split for c in base)
    for split in ("valid", "heldout"):
        assert 0.08 < counts[split] / len(base) < 0.12
        assert {c.group for c in base if c.split == split} >= set(read_group_names())
    assert len(read_group_names()) == 10 and read_group_names() == sorted(read_group_names())


def test_names_and_codes() -> None:
    assert concept_code("0023-FE0F-20E3") == "23-20e3"
    assert caption(":man_dark_skin_tone_bald:") == "man bald: dark skin tone"
    assert caption(":people_holding_hands_light_skin_tone_medium-dark_skin_tone:") == (
        "people holding hands: light skin tone, medium-dark skin tone"
    )
    named = {c.code: c for c in read_concepts()}
    smile, run, flag = named["1f600"], named["1f3c3-1f3fd-200d-2640"], named["1f1eb-1f1f7"]
    assert (smile.name, smile.group, smile.subgroup, smile.tones) == (
        "grinning face",
        "Smileys & Emotion",
        "face-smiling",
        0,
    )
    assert (run.name, run.family, run.group, run.tones) == (
        "woman running: medium skin tone",
        "running",
        "People & Body",
        1,
    )
    assert (
        flag.is_territory and flag.name == "france" and named["1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"].is_territory
    )
    assert not smile.is_territory and not named["1f3f4-200d-2620"].is_territory
    assert len({c.name for c in named.values()}) == len(named)


def test_every_split_and_source_exists_and_counts_agree(demo: DemoSummary) -> None:
    counts = {
        f"{split}/{source}": len(samples_of(demo, split, source))
        for split in SPLITS
        for source in (*STYLES, "category")
    }
    assert demo.built and demo.samples == counts and min(counts.values()) > 10
    assert demo.classes == read_group_names() == json.loads((demo.root / "classes.json").read_text())["classes"]
    assert demo.num_bytes == sum(path.stat().st_size for path in demo.root.glob("*/*.tar"))


def test_no_family_and_no_picture_of_one_concept_in_two_splits(demo: DemoSummary) -> None:
    families = {
        split: {s.meta["family"] for source in (*STYLES, "category") for s in samples_of(demo, split, source)}
        for split in SPLITS
    }
    for one, two in itertools.combinations(SPLITS, 2):
        assert families[one] and not families[one] & families[two]


def test_every_query_has_one_right_answer(demo: DemoSummary) -> None:
    for split in ("valid", "heldout"):
        by_style = {style: samples_of(demo, split, style) for style in STYLES}
        concepts = {style: [s.meta["concept"] for s in samples] for style, samples in by_style.items()}
        assert concepts["openmoji"] == concepts["twemoji"]
        for style, samples in by_style.items():
            assert all(
                s.meta["base"] and s.meta["style"] == style and "skin tone:" not in (s.text or "") for s in samples
            )
            for values in ([s.text for s in samples], [s.image for s in samples], concepts[style]):
                assert len(set(values)) == len(samples)
        assert {s.text for s in by_style["openmoji"]} == {s.text for s in by_style["twemoji"]}


def test_names_and_pictures_that_repeat_are_left_out_of_the_held_out_splits() -> None:
    family = next(f"family {i}" for i in range(1000) if concept_in(f"family {i}", "x").split == "heldout")
    named = [("1", "a"), ("2", "b"), ("3", "a"), ("4", "c"), ("5", "d"), ("6", "e")]
    pictures = {(style, code): f"{style}{code}".encode() for style in STYLES for code, _ in named}
    pictures["twemoji", "4"] = pictures["twemoji", "2"]  # "c" looks like "b" in one style
    del pictures["openmoji", "5"]  # "d" is drawn in one style only
    concepts = [concept_in(family, name, code=code) for code, name in named]
    assert [c.code for c in _select(concepts, "heldout", pictures)] == ["1", "2", "6"]
    assert _select(concepts, "valid", pictures) == _select(concepts, "train", pictures) == []


def test_the_whole_data_set_is_selected_as_described() -> None:
    """On all concepts, with the drawings' sources in place of their pictures."""
    pictures = {key: file.read_bytes() for key, file in find_drawings().items()}
    concepts = [c for c in read_concepts() if _is_used(c) and any((style, c.code) in pictures for style in STYLES)]
    chosen = {split: _select(concepts, split, pictures) for split in SPLITS}
    assert chosen["train"] == [c for c in concepts if c.split == "train"] and len(chosen["train"]) > 2500
    for split in ("valid", "heldout"):
        assert 150 < sum(not c.is_territory for c in chosen[split]) < 200
        assert not any(c.tones for c in chosen[split])
        for style in STYLES:
            assert len({pictures[style, c.code] for c in chosen[split]}) == len(chosen[split])
    # OpenMoji has one drawing for both.
    assert len({"artist", "man artist"} & {c.name for c in chosen["heldout"]}) == 1


def test_training_pairs_have_tones_but_no_two_and_no_flags(demo: DemoSummary) -> None:
    named = {c.code: c for c in read_concepts()}
    for style in STYLES:
        samples = samples_of(demo, "train", style)
        concepts = [named[s.meta["concept"]] for s in samples]
        assert {c.tones for c in concepts} == {0, 1} and not any(c.is_territory for c in concepts)
        assert all(
            s.text == c.name and s.meta["base"] == (c.tones == 0) for s, c in zip(samples, concepts, strict=True)
        )


def test_categories_are_the_groups_in_both_styles(demo: DemoSummary) -> None:
    for split in SPLITS:
        samples = samples_of(demo, split, "category")
        assert all(demo.classes[s.category or 0] == s.meta["group"] and s.meta["base"] for s in samples)
        assert {s.meta["style"] for s in samples} == set(STYLES)
        assert "country-flag" in {s.meta["subgroup"] for s in samples}


def test_pictures_show_the_drawing_in_its_colours_on_white(demo: DemoSummary) -> None:
    drawings = find_drawings()
    square = 0
    for sample in [s for style in STYLES for s in samples_of(demo, "heldout", style)]:
        picture = decode(sample.image)
        assert picture.shape == (SIZE, SIZE, 3)
        svg = drawings[sample.meta["style"], sample.meta["concept"]].read_text(encoding="utf-8")
        drawn = Image.open(
            io.BytesIO(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white", dpi=96))
        )
        if drawn.size == (SIZE, SIZE):
            square += 1
            assert np.array_equal(picture, np.asarray(drawn.convert("RGB")))
    assert square > 20


def test_a_drawing_that_is_not_square_is_centred(tmp_path: Path) -> None:
    file = tmp_path / "wide.svg"
    file.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><rect width="40" height="20" fill="#f00"/></svg>'
    )
    picture = decode(_render({("x", "1"): file}, size=40, progress=lambda *_: None)["x", "1"]).astype(int)
    red = (picture == [255, 0, 0]).all(-1)
    assert red[10:30].all() and not red[:10].any() and not red[30:].any() and (picture[:10] == 255).all()


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_two_builds_are_byte_identical_and_a_third_call_does_nothing(tmp_path: Path) -> None:
    one, two = (build_demo_data(tmp_path / name, size=16, limit=60) for name in ("one", "two"))
    assert digests(one.root) == digests(two.root)
    assert (one.root.stat().st_mode & 0o777) == 0o755 and sorted(os.listdir(tmp_path)) == ["one", "two"]
    before = {p: p.stat().st_mtime_ns for p in one.root.rglob("*")}
    again = build_demo_data(one.root, size=16, limit=60)
    assert (
        not again.built
        and again.samples == one.samples
        and {p: p.stat().st_mtime_ns for p in one.root.rglob("*")} == before
    )
    with tarfile.open(next(one.root.glob("train/openmoji-*.tar"))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "m3i")}
    licences = (one.root / "LICENSES.md").read_text(encoding="utf-8")
    assert all(
        words in licences for words in ("CC BY-SA 4.0", "CC BY 4.0", "MIT", "OpenMoji 17", "Twitter, Inc.", "16 x 16")
    )


def test_what_else_lies_there_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{foreign} is not a complete data set"):
        build_demo_data(foreign, size=16, limit=20)
    assert os.listdir(foreign) == ["photo.jpg"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=f"{file} is not a complete data set"):
        build_demo_data(file, size=16, limit=20)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert build_demo_data(empty, size=16, limit=20).built
    with pytest.raises(UserError, match=r"\(1, 16, 20\); needed: \(1, 24, 20\)"):
        build_demo_data(empty, size=24, limit=20)
    shard = next(empty.glob("train/twemoji-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard} differs from its manifest; remove {empty}"):
        build_demo_data(empty, size=16, limit=20)
    shard.unlink()
    with pytest.raises(UserError, match=f"{empty} is not a complete data set"):
        build_demo_data(empty, size=16, limit=20)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo_data(tmp_path / "data", size=16, limit=20, progress=interrupt)
    assert os.listdir(tmp_path) == []
    seen: list[tuple[str, int, int]] = []
    build_demo_data(tmp_path / "new/data", size=16, limit=20, progress=lambda *values: seen.append(values))
    assert seen[-1] == ("write", 3, 3) and next(s for s in seen if s[0] == "render")[1:] == (seen[0][2], seen[0][2])
    with pytest.raises(UserError, match="got size 0"):
        build_demo_data(tmp_path / "zero", size=0)
