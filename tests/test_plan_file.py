"""Plan files: what is written is read, what was changed or comes from elsewhere is refused with the reason."""

import json

import jsonschema
import numpy as np
import pytest

import translution
from translution import Plan, PlanError, Request, plan_file
from translution.plan_file import differences, fingerprint, load_plan, plan_data, plan_schema, read_plan, write_plan
from translution.spec import presets

OPERATOR = presets.translution((3,), 4, 2)
REQUEST = Request(OPERATOR, 2, "float64")


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "plan.json"
    write_plan(found, plan_data(Plan(OPERATOR, "numpy", "stream"), REQUEST, "latency", {"entries": []}))
    return found


def changed(path, **fields):
    """The file with other fields and the hash that belongs to them."""
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(data | {"hash": plan_file._hash(data)}))


def test_a_plan_comes_back(path):
    assert load_plan(path) == Plan(OPERATOR, "numpy", "stream")
    assert list(path.parent.iterdir()) == [path]


def test_the_schema_describes_what_is_written(path):
    jsonschema.Draft202012Validator.check_schema(plan_schema())
    jsonschema.validate(json.loads(path.read_text()), plan_schema())


def test_compile_loads_a_plan(path):
    params = {name: np.ones(shape) for name, shape in OPERATOR.parameters.items()}
    x = np.ones((2, 3, 4))
    want = translution.run(OPERATOR, params, x, backend="numpy", algorithm="stream")
    for given in (path, str(path)):
        call = translution.compile(OPERATOR, plan=given)
        assert call.plan == Plan(OPERATOR, "numpy", "stream")
        assert np.array_equal(call(params, x), want)
    with pytest.raises(translution.InputError, match="another operator"):
        translution.compile(presets.translution((4,), 4, 2), plan=path)


def test_a_changed_file_is_refused(path):
    path.write_text(path.read_text().replace('"stream"', '"pairwise"'))
    with pytest.raises(PlanError, match="changed since it was written"):
        load_plan(path)


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("machine", "processor", "processor was a slide rule, here it is "),
        ("versions", "numpy", "numpy was a slide rule, here it is "),
        ("versions", "cupy", "cupy was a slide rule, here it is not there"),
    ],
)
def test_a_plan_from_elsewhere_is_refused_with_every_difference(path, part, name, words):
    own = fingerprint()
    changed(path, fingerprint={**own, part: {**own[part], name: "a slide rule"}})
    assert len(differences(read_plan(path))) == 1
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert words in str(caught.value)
    assert "translution pick --recheck" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is no plan"),
        ('{"schema": "translution/operator"}', "is no plan"),
        ('{"schema": "translution/plan", "version": 2}', "version 2, this library reads version 1"),
        ('{"schema": "translution/plan", "version": 1}', "required property"),
    ],
)
def test_what_is_no_plan_is_refused(path, text, words):
    path.write_text(text)
    with pytest.raises(PlanError, match=words):
        load_plan(path)


def test_a_plan_whose_operator_breaks_a_rule_is_refused(path):
    data = json.loads(path.read_text())
    changed(path, operator=data["operator"] | {"num_heads": 3})
    with pytest.raises(PlanError, match="the plan's operator"):
        load_plan(path)


def test_an_interrupted_write_leaves_the_old_plan(path, monkeypatch):
    before = path.read_text()
    monkeypatch.setattr(plan_file.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_plan(path, {"half": "written"})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 18\n",
         "AMD EPYC, family 25, model 17"),
        ("model name : of another kind\n", "of another kind"),
        ("processor : 0\nBogoMIPS : 50\n", None),
        (None, None),
    ],
)  # fmt: skip
def test_processors_of_one_name_are_told_apart(described, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_file.platform, "processor", lambda: "what the system says")
    if described is not None:
        (tmp_path / "cpuinfo").write_text(described)
    assert plan_file._processor(tmp_path / "cpuinfo") == (expected or "what the system says")
