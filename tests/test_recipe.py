"""Recipes: layering, overrides, and one clear line for everything that can be wrong in one."""

from pathlib import Path

import pytest
import yaml
from tiny import recipe as tiny_recipe

from m3i_large.build import build_objective
from m3i_large.errors import UserError
from m3i_large.recipe import Recipe, load_recipe, recipe_header, recipe_names, validate


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_says_what_it_reproduces_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert validate(yaml.safe_load(recipe.to_yaml())) == recipe
    header = recipe_header(name)
    assert "deepspeed launchers/pretrain.py --ds ds_configs/zero3.json" in header
    assert "Cost:" in header and any(word in header for word in ("UNMEASURED", "README"))


@pytest.mark.parametrize("name", recipe_names())
def test_demo_scale_keeps_the_objective_and_takes_the_size(name: str) -> None:
    recipe, demo = load_recipe(name, ["scale=demo"]), load_recipe("demo")
    assert recipe.backbone == demo.backbone and recipe.data == demo.data and recipe.train == demo.train
    assert recipe.objective.terms == load_recipe(name).objective.terms
    assert recipe.objective.input.patch == demo.objective.input.patch


def test_extends_merges_mappings_and_replaces_lists() -> None:
    base, child = load_recipe("m3i"), load_recipe("m3i_vit_b16_in1k")
    assert (base.train.epochs, child.train.epochs) == (400, 1600)
    assert child.data == base.data and child.train.global_batch == base.train.global_batch
    yfcc = load_recipe("m3i_vit_b16_yfcc15m")
    assert [s.name for s in yfcc.data.sources] == ["yfcc15m"]


def test_overrides_reach_every_level_in_order() -> None:
    recipe = load_recipe("demo", ["train.steps=7", "data.sources.1.name=other", "optim.lr.peak=0.5", "train.steps=9"])
    assert recipe.train.steps == 9 and recipe.data.sources[1].name == "other" and recipe.optim.lr.peak == 0.5


def test_the_objective_of_the_demo_is_all_four_terms() -> None:
    assert [term.name for term in load_recipe("demo").objective.terms] == ["intra", "inter", "category", "text"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "train.stepz: unknown key, did you mean 'steps'"),
        ("optim.lr.peek=3", "optim.lr.peek: unknown key, did you mean 'peak'"),
        ("data.sources.0.shard=x", "data.sources.0.shard: unknown key, did you mean 'shards'"),
        ("trian.steps=3", "trian: unknown key, did you mean 'train'"),
        ("train.steps=many", "train.steps: .*got 'many'"),
        ("train.global_batch=0", "train.global_batch: .*got 0"),
        ("train.contrast_batch=7", "global_batch 96 is not a multiple of contrast_batch 7"),
        ("steps", "override: got 'steps'; needed: key=value"),
        ("scale=huge", "scale: got 'huge'; needed: demo"),
        ("train.steps.deep=1", "override: train.steps.deep does not exist"),
        ("data.sources.9.name=x", "override: data.sources.9.name does not exist"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("demo", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'demo'"):
        load_recipe("dmeo")
    with pytest.raises(UserError, match=r"nowhere\.yaml, which does not exist"):
        load_recipe("nowhere.yaml")


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    for text, message in {"a: [": "not valid YAML", "- 1": "holds no mapping", "train: {}": "Field required"}.items():
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(str(path))
        assert "\n" not in str(caught.value)
    (tmp_path / "b.yaml").write_text("extends: m3i_vit_b16_in1k\n")
    with pytest.raises(UserError, match="one level"):
        load_recipe(str(tmp_path / "b.yaml"))


def test_micro_batch_is_derived_and_an_override_only_asserts_it(tmp_path: Path) -> None:
    train = load_recipe("demo").train
    assert [train.micro_batch_at(w) for w in (1, 2, 3, 8)] == [96, 48, 32, 12]
    with pytest.raises(UserError, match="does not divide over 5 ranks"):
        train.micro_batch_at(5)
    assert load_recipe("demo", ["train.micro_batch=48"]).train.micro_batch_at(2) == 48
    with pytest.raises(UserError, match="got 48, but contrast_batch 96 on 1 ranks makes it 96"):
        load_recipe("demo", ["train.micro_batch=48"]).train.micro_batch_at(1)


def parameters(recipe: Recipe) -> dict:
    return {n: p.detach().clone() for n, p in build_objective(recipe).named_parameters()}


def test_the_seed_alone_decides_the_initial_weights(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path)
    one, again = parameters(validate(values)), parameters(validate(values))
    values["train"]["seed"] = 4
    other = parameters(validate(values))
    assert all((one[n] == again[n]).all() for n in one)
    assert any((one[n] != other[n]).any() for n in one)
    for name, value in one.items():
        if name.startswith("target."):
            assert (value == one[name.replace("target.", "student.", 1)]).all()


def test_only_the_towers_that_the_terms_need_are_built(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path)
    values["objective"]["terms"] = [{"name": "intra"}, {"name": "category"}]
    names = {n.split(".")[0] for n in parameters(validate(values))}
    assert names == {"student", "target", "decoder", "pool", "category_head"}
    values["objective"]["terms"] = [{"name": "text"}]
    names = {n.split(".")[0] for n in parameters(validate(values))}
    assert names == {"student", "text", "pool", "text_head"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("table2_d", ["backbone.name=internimage_t"], "mask random leaves patches out, .* needed: none or mix"),
        ("demo_internimage", ["backbone.arch.drop_path=0.1"], "drop_path is for fine-tuning"),
        ("demo_internimage", ["objective.input.patch=8"], "patch: got 8; needed: a multiple of the token stride 16"),
        ("demo_internimage", ["data.image_size=96"], "data.image_size: got 96; needed: .*image_size 64"),
    ],
)
def test_what_a_backbone_cannot_do_is_one_clear_line(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_objective(load_recipe(name, overrides))
    assert "\n" not in str(caught.value)
