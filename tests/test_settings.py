"Profiles, parameters and seeds: what a run gets, and what it refuses before it starts."
import json
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from distillbook.lab.settings import (UnknownParameter, UnknownProfile, autocast, chapters, deterministic, fast_bfloat16, load_profile, notebook_parameters,
                                      notebook_path, parameters_from_code, parse_value, pick_device, profiles, project_root, resolve_parameters,
                                      seed_everything, short_name)


def notebook(path, *cells):
    "A notebook file: text for a plain cell, (text, tag) for a tagged one."
    rows = [dict(cell_type="code", source=c if isinstance(c, str) else c[0], outputs=[], execution_count=None,
                 metadata={} if isinstance(c, str) else {"tags": [c[1]]}) for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=rows, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

@pytest.fixture
def house(tmp_path, monkeypatch):
    "A small project: two chapters, a recipe, a solution and a settings file."
    notebook(tmp_path/"nbs/0_lab/00_first.ipynb", "1 + 1", ("seed = 0\nsteps = 300  # many\nrate = 1e-3\nteacher = 'base'\nfast = False", "parameters"))
    notebook(tmp_path/"nbs/2_distill/21_logit_kd.ipynb", ("seed = 0\nalpha = 0.5", "parameters"))
    notebook(tmp_path/"nbs/recipes/ship_it.ipynb", "print('no parameters')")
    notebook(tmp_path/"nbs/solutions/00_first.ipynb", ("seed = 99", "parameters"))
    notebook(tmp_path/"nbs/index.ipynb", "1")
    (tmp_path/"settings.ini").write_text("[smoke]\nseed = 3\nalpha = 0.9\n[smoke first]\nsteps = 10\n[full ship_it]\nhours = 2\n")
    monkeypatch.setenv("DISTILLBOOK_HOME", str(tmp_path))
    return tmp_path


# -- text to values ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, value", [("12", 12), ("-3", -3), ("+4", 4), ("1e-4", 1e-4), ("1.", 1.), (".5", .5), ("2E3", 2000.), ("true", True), ("False", False),
                                         ("nan", "nan"), ("inf", "inf"), ("2024_01", "2024_01"), ("0x10", "0x10"), ("'12'", "12"), ('"a b"', "a b"),
                                         ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("", ""), ("1e", "1e"), ("1.2.3", "1.2.3")])
def test_parse_value(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)

@given(st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
def test_values_survive_being_written(value):
    assert parse_value(str(value)) == value and type(parse_value(str(value))) is type(value)

@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_quotes_keep_any_text(text): assert parse_value(f"'{text}'") == text


# -- chapters ----------------------------------------------------------------------------------------------------------
def test_chapters_come_in_the_order_of_the_course(house):
    assert [p.stem for p in chapters()] == ["00_first", "21_logit_kd", "ship_it"]

@pytest.mark.parametrize("name", ["21_logit_kd", "logit_kd", "21", "21_logit_kd.ipynb"])
def test_a_chapter_has_several_names(house, name): assert notebook_path(name).stem == "21_logit_kd"

def test_a_path_is_a_name_too(house): assert notebook_path(house/"nbs/recipes/ship_it.ipynb").stem == "ship_it"

def test_an_unknown_chapter_is_answered_with_near_ones(house):
    with pytest.raises(FileNotFoundError, match="logit_dk.*did you mean.*logit_kd"): notebook_path("logit_dk")
    with pytest.raises(FileNotFoundError, match="zzz.*00_first, 21_logit_kd, ship_it"): notebook_path("zzz")

def test_the_project_is_found_from_inside(house, monkeypatch):
    monkeypatch.delenv("DISTILLBOOK_HOME")
    monkeypatch.chdir(house/"nbs/0_lab")
    assert project_root() == house.resolve()

def test_a_wrong_home_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_HOME", str(tmp_path/"nowhere"))
    with pytest.raises(FileNotFoundError, match="DISTILLBOOK_HOME is .*nowhere"): project_root()


# -- parameters --------------------------------------------------------------------------------------------------------
def test_parameters_keep_names_types_and_order(house):
    found = notebook_parameters(notebook_path("first"))
    assert list(found.items()) == [("seed", 0), ("steps", 300), ("rate", 1e-3), ("teacher", "base"), ("fast", False)]
    assert notebook_parameters(notebook_path("ship_it")) == {}

def test_pairs_and_annotations_are_read():
    assert parameters_from_code("'a note'\na, b = 1, -2.5\nc: str = 'x'\nd = None") == dict(a=1, b=-2.5, c="x", d=None)

@pytest.mark.parametrize("code", ["steps = 3 * 100", "rates = [1, 2]", "print(1)", "a.b = 1", "a, b = 1, 2, 3", "steps = other"])
def test_what_is_not_a_plain_value_is_refused(code):
    with pytest.raises(ValueError, match="one number, text or truth value"): parameters_from_code(code, "cell")

def test_two_tagged_cells_are_refused(tmp_path):
    path = notebook(tmp_path/"two.ipynb", ("a = 1", "parameters"), ("b = 1", "parameters"))
    with pytest.raises(ValueError, match="2 cells are tagged"): notebook_parameters(path)


# -- profiles ----------------------------------------------------------------------------------------------------------
def test_the_chapters_own_section_wins_over_the_shared_one(house):
    assert load_profile("smoke", "00_first") == dict(seed=3, alpha=0.9, steps=10) == load_profile("smoke", "first")
    assert profiles() == ["smoke", "full"]

def test_order_of_places(house):
    assert resolve_parameters("first", "smoke") == dict(seed=3, steps=10, rate=1e-3, teacher="base", fast=False)
    assert resolve_parameters("first", "smoke", {"seed": "7", "steps": 5})["seed"] == 7
    assert resolve_parameters("logit_kd", "smoke") == dict(seed=3, alpha=0.9)

def test_comments_behind_values_are_no_values(tmp_path, house):
    (tmp_path/"c.ini").write_text("# first\n[smoke]\nseed = 4   # why\nteacher = a#b\n; last\n")
    assert load_profile("smoke", "first", tmp_path/"c.ini") == dict(seed=4, teacher="a#b")

def test_an_unknown_profile_names_the_known(house):
    with pytest.raises(UnknownProfile, match="'smok'.*smoke, full"): resolve_parameters("first", "smok")
    with pytest.raises(UnknownProfile, match="for ship_it only"): resolve_parameters("first", "full")

def test_an_unknown_parameter_stops_before_the_run(house):
    with pytest.raises(UnknownParameter, match="no parameter 'setps' .from the command line.*did you mean steps"): resolve_parameters("first", "smoke", {"setps": 1})
    with pytest.raises(UnknownParameter, match=r"'hours' .from \[full ship_it\].*takes none"): resolve_parameters("ship_it", "full")

@pytest.mark.parametrize("name, given_, kept", [("steps", "1e3", 1000), ("steps", 2.0, 2), ("rate", "1", 1.0), ("teacher", "007", "007"), ("teacher", "'a'", "a"),
                                                ("fast", "TRUE", True), ("fast", "1", True), ("teacher", 12, "12")])
def test_types_are_the_notebooks(house, name, given_, kept):
    got = resolve_parameters("first", "smoke", {name: given_})[name]
    assert got == kept and type(got) is type(kept)

@pytest.mark.parametrize("name, given_", [("steps", "2.5"), ("steps", "many"), ("steps", "true"), ("rate", "fast"), ("fast", "maybe"), ("fast", "2"), ("steps", "nan")])
def test_wrong_types_are_named(house, name, given_):
    with pytest.raises(ValueError, match=f"parameter {name} takes"): resolve_parameters("first", "smoke", {name: given_})

def test_a_missing_or_damaged_settings_file_is_named(house, tmp_path):
    with pytest.raises(FileNotFoundError, match="no settings file .*none.ini"): profiles(tmp_path/"none.ini")
    (tmp_path/"bad.ini").write_text("seed = 3\n")
    with pytest.raises(ValueError, match="bad.ini cannot be read"): profiles(tmp_path/"bad.ini")

def test_every_section_of_the_real_file_fits_its_chapter(monkeypatch):
    monkeypatch.delenv("DISTILLBOOK_HOME", raising=False)
    monkeypatch.chdir(Path(__file__).parent)
    there = {short_name(p.stem) for p in chapters()}
    import configparser
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(project_root()/"settings.ini")
    for profile, chapter in (s.split(None, 1) for s in settings.sections() if " " in s):
        assert short_name(chapter) in there, f"[{profile} {chapter}] is for a chapter that is not there"
        resolve_parameters(chapter, profile)


# -- seeds, devices, precision -----------------------------------------------------------------------------------------
def test_a_seed_repeats_all_three_generators():
    import random, numpy, torch
    def draws(): return random.random(), float(numpy.random.rand()), float(torch.rand(()))
    seed_everything(5); first = draws()
    other = draws()
    seed_everything(5)
    assert draws() == first != other

def test_deterministic_gives_the_state_back():
    import torch
    before = deterministic()
    assert torch.are_deterministic_algorithms_enabled() and deterministic(before) and torch.are_deterministic_algorithms_enabled() == before

def test_devices():
    assert pick_device("cpu") == "cpu" and pick_device() in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="no device is called 'gpu'"): pick_device("gpu")
    with pytest.raises(ValueError, match="cuda:99.*not on this machine"): pick_device("cuda:99")

def test_autocast_uses_bfloat16_only_where_the_hardware_has_it():
    import torch
    with autocast("cpu"): product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast_bfloat16("cpu") else torch.float32)
