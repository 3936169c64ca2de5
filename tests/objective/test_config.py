"""Objectives that make no sense are refused when they are read, with the reason."""

import pytest

from m3i_large.errors import UserError
from m3i_large.objective import ObjectiveConfig, TermConfig
from m3i_large.recipe import load_recipe, recipe_names, validate

ONE_VIEW = {"view": "target", "mask": "none"}


def refused(values: dict) -> str:
    recipe = load_recipe("demo").to_dict() | {"objective": values}
    with pytest.raises(UserError) as caught:
        validate(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("term", "input", "reason"),
    [
        ({"target": "dense", "view": "same", "decoder": "pool"}, {}, "decoder pool cannot serve a dense target"),
        ({"target": "global", "view": "same", "decoder": "linear"}, {}, "decoder linear cannot serve a global target"),
        ({"target": "dense", "view": "other", "decoder": "linear"}, {}, "has no positions"),
        ({"target": "pixels", "view": "same", "decoder": "linear"}, {"mask": "random"}, "has no positions"),
        ({"target": "dense", "view": "other"}, ONE_VIEW, "shows the other view, but input.view is target"),
        ({"target": "pixels", "view": "same", "encoder": "ema"}, {}, "encoder ema cannot serve a pixels target"),
        ({"target": "category", "view": "same"}, {}, "no view: every view of an image has its label"),
        ({"target": "dense"}, {}, "needed: view same or other"),
        ({"target": "dense", "view": "same", "collapse": "none"}, {}, "collapse none does not fit"),
        ({"target": "dense", "view": "same", "posterior": {"kind": "boltzmann"}}, {}, "a dense target is a regression"),
        ({"target": "text", "posterior": {"kind": "gaussian"}}, {}, "a text target is a choice"),
        ({"target": "text", "posterior": {"kind": "boltzmann", "tau": 0.1}}, {}, "temperature .* is learned"),
        ({"target": "global", "view": "same", "collapse": "decorrelation"}, {}, "collapse decorrelation does not fit"),
        ({"target": "dense", "view": "same", "encoder": "frozen", "collapse": "none"}, {}, "frozen_checkpoint"),
        ({"target": "pixels", "view": "same", "decorrelation": 3}, {}, "decorrelation without collapse"),
        ({"target": "dense", "view": "same", "normalize_pixels": True}, {}, "normalize_pixels belongs to"),
        ({"target": "dense", "view": "same", "posterior": {"kind": "gaussian", "tau": 1}}, {}, "tau: got 1"),
    ],
)
def test_what_does_not_fit_is_refused(term: dict, input: dict, reason: str) -> None:
    import re

    message = refused({"input": input, "terms": [{"name": "t", **term}]})
    assert re.search(reason, message), message


def test_inputs_that_do_not_fit_are_refused() -> None:
    assert "fill: got drop with mask none" in refused({"input": {"mask": "none", "fill": "drop"}})
    assert "mask mix, which shows both views" in refused({"input": {"mask": "mix", "view": "other"}})
    both = [{"name": "a", "target": "pixels", "view": "same"}, {"name": "b", "target": "dense", "view": "same"}]
    assert "more than one dense target: dense, pixels" in refused({"terms": both})
    assert "names one twice" in refused({"terms": [{"name": "text"}, {"name": "text"}]})
    assert "target text twice" in refused({"terms": [{"name": "text"}, {"name": "again", "target": "text"}]})
    assert "terms is empty" in refused({"terms": []})


def test_the_default_is_m3i_and_survives_being_written() -> None:
    config = ObjectiveConfig()
    assert [(t.name, t.target, t.view, t.encoder) for t in config.terms] == [
        ("intra", "dense", "same", "ema"),
        ("inter", "dense", "other", "ema"),
        ("category", "category", None, "classifier"),
        ("text", "text", None, "text_tower"),
    ]
    for name in recipe_names():
        objective = load_recipe(name).objective
        assert ObjectiveConfig.model_validate(objective.model_dump(mode="json")) == objective, name
    gaussian = TermConfig.model_validate({"name": "g", "target": "global", "view": "same", "posterior": "gaussian"})
    assert gaussian.collapse == "stop_gradient"


def test_table_2_is_what_its_rows_say() -> None:
    """METHOD's reading of the paper's Table 2: input view, hidden or not, target, view predicted."""
    same, other = ("target", "same"), ("other", "other")
    rows = {"a": (same, False, "pixels"), "b": (same, False, "dense"), "c": (same, False, "global")}
    rows |= {"d": (same, True, "pixels"), "e": (same, True, "dense"), "f": (same, True, "global")}
    rows |= {"g": (other, False, "pixels"), "h": (other, False, "dense"), "i": (other, False, "global")}
    rows |= {"j": (other, True, "pixels"), "k": (other, True, "dense"), "l": (other, True, "global")}
    for row, ((shown, view), hidden, target) in rows.items():
        recipe = load_recipe(f"table2_{row}")
        (term,) = recipe.objective.terms
        given = recipe.objective.input
        assert (given.view, term.view, given.mask != "none", term.target) == (shown, view, hidden, target), row
        assert (recipe.train.epochs, recipe.backbone.name, recipe.data.num_classes) == (400, "vit_b16", 1000)
    siamese = load_recipe("siamese_im")
    assert round(siamese.objective.input.ratio * 196) == 196 - 118 and siamese.objective.input.mask == "block"
