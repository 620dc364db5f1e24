import dataclasses
import json
import random
import re
import subprocess

import pytest
from ml_collections import ConfigDict

from craft_jax import config as configs
from craft_jax.config import ExperimentConfig, Override
from craft_jax.errors import ConfigError, UsageError
from craft_jax.models import MODELS, model_class
from tests.conftest import ROOT, command, environment

MISTAKES = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.model = ConfigDict({"num_heads": 5, "d_model": 64})
    config.optim = ConfigDict({"learning_rat": 3e-4})
    return config
"""


REQUIRED = """
from ml_collections import ConfigDict, config_dict

def get_config():
    return ConfigDict({"model": {"d_model": config_dict.required_placeholder(int)}})
"""

OWN_MODELS = """
import dataclasses
from craft_jax.models.base import Model

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "own"
    width: int

class Bare(Model):
    pass

class Wide(Model):
    Config = Config
"""


def problems(values=None, *overrides):
    """The problems of a config, each field of `overrides` as `section.field=text`."""
    words = [Override(*word.split("=", 1)) for word in overrides]
    try:
        configs.from_values(values or {}, words, origin="the test")
    except ConfigError as error:
        return error.problems
    return []


def test_defaults_are_fine():
    config = configs.from_values({})
    assert isinstance(config, ExperimentConfig)
    assert config.model.name == "gpt"
    assert problems() == []


def test_five_mistakes_in_one_report(tmp_path):
    (tmp_path / "mine.py").write_text(MISTAKES, encoding="utf-8")
    overrides = [
        Override("model.num_layer", "4"),
        Override("data.batch_size", "many"),
        Override("training.num_steps", "-1"),
    ]
    with pytest.raises(ConfigError) as caught:
        configs.load(str(tmp_path / "mine.py"), overrides)
    expected = [
        r"optim\.learning_rat is no field; did you mean `learning_rate`\?",
        r"model\.num_layer is no field; did you mean `num_layers`\?",
        r"data\.batch_size='many' is not a whole number",
        r"training\.num_steps=-1 must be at least 1; the default is 1000",
        r"model\.num_heads=5 does not divide model\.d_model=64; try 4 or 8",
    ]
    assert len(caught.value.problems) == 5
    for pattern in expected:
        assert any(re.search(pattern, p) for p in caught.value.problems), pattern
    assert all("\n" not in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.n_layer=4", "did you mean `num_layers`?"),
        ("model.block_size=4", "did you mean `max_seq_len`?"),
        ("optim.lr=1", "did you mean `learning_rate`?"),
        ("model.learning_rate=1", "did you mean `optim.learning_rate`?"),
        ("modle.num_layers=4", "did you mean `model.num_layers`?"),
        ("num_layers=4", "did you mean `model.num_layers`?"),
        ("model.xyzzy=4", "model has name, vocab_size"),
        ("xyzzy.abc=4", "the sections are model, data"),
        ("model.num_layers=2.5", "is not a whole number"),
        ("model.num_layers=0", "must be at least 1"),
        ("model.num_layers=", "is not a whole number"),
        ("model.dropout=1", "must be less than 1"),
        ("model.dropout=-0.1", "must be at least 0"),
        ("model.bias=maybe", "is not true or false"),
        ("model.d_ff=big", "is not a whole number or none"),
        ("optim.learning_rate=nan", "is not finite"),
        ("optim.learning_rate=0", "must be greater than 0"),
        ("optim.schedule=cosin", "did you mean 'cosine'?"),
        ("training.precision=float8", "is not one of float32, bfloat16"),
        ("model.name=gtp", "is not one of gpt"),
        ("data.tokenizer=bpee", "did you mean 'bpe'?"),
        ("parallel.mode=x", "is not one of jit"),
        ("data.val_fraction=1", "must be less than 1"),
        ("training.seed=-1", "must be at least 0"),
        # Between fields.
        ("data.seq_len=129", "is longer than model.max_seq_len=128"),
        ("training.accumulate=3", "does not divide data.batch_size=16"),
        ("optim.warmup_steps=5000", "more than training.num_steps=1000"),
        ("optim.min_learning_rate=1", "above optim.learning_rate"),
        ("model.vocab_size=300", "data.vocab_size=1024 is more than model.vocab_size=300"),
        ("data.source=files", "needs data.path"),
        ("parallel.fsdp=-1", "at most one axis"),
        ("model.name=seq2seq", "but data.pairs is empty: name yours with `config.data.pairs="),
        ("data.pairs=dates", "model.name=gpt does not read data.pairs=dates; use model.name=seq2"),
        ("data.pairs=dats", "is not one of dates, reverse, sort, nor a file; did you mean 'dates'"),
        ("data.num_pairs=0", "must be at least 1"),
        ("model.num_heads=300", "does not divide model.d_model=128; try 128"),
        ("model.num_heads=" + "9" * 40, "(40 digits) must be at most"),
        ("model.d_model=true", "not a whole number; a flag without a value means true"),
        ("optim.beta2=0.9999999", "must be at most 0.999999"),
        ("optim.eps=1e-40", "must be at least 1e-30"),
        ("optim.weight_decay=100000", "each step would take away more than the weights"),
        ("optim.learning_rate=1e400", "is not finite"),
        ("data.path=a\nb", "has a control character"),
        ("data.path=a\udcff", "is not valid UTF-8"),
        ("data.dataset=mine", "names no class; write path/file.py:Class"),
        ("data.dataset=missing.py:Data", "no such file"),
        ("data.dataset=~nobody/missing.py:Data", "no such file"),
        ("training.callbacks=mine", "names no class"),
        ("model=3", "model is a section: name one of its fields"),
        ("=3", "write `config.SECTION.FIELD=VALUE`"),
        ("model.name=" + "x" * 5000, "(5002 characters) is not one of gpt"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, expected):
    (problem,) = problems(None, override)
    assert expected in problem
    assert override.split("=")[0].split(".")[-1] in problem


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.learning_rate=1", 1.0),
        ("optim.learning_rate=3e-4", 3e-4),
        ("optim.clip_norm=none", None),
        ("optim.warmup_steps=None", None),
        ("optim.warmup_steps=7", 7),
        ("model.bias=False", False),
        ("model.bias=yes", True),
        ("data.path=/a=b,c", "/a=b,c"),
        ("training.callbacks=", ()),
        ("training.callbacks=a:B, c:D", ("a:B", "c:D")),
    ],
)
def test_overrides_are_read_as_the_type_of_the_field(override, value):
    config = configs.from_values({}, [Override(*override.split("=", 1))])
    section, field = override.split("=")[0].split(".")
    assert getattr(getattr(config, section), field) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": {"num_layers": "4"}}, "model.num_layers='4' is not a whole number"),
        ({"model": {"num_layers": True}}, "is not a whole number"),
        ({"model": {"dropout": "0.1"}}, "is not a number"),
        ({"model": {"d_model": None}}, "is not a whole number"),
        ({"data": {"path": 3}}, "is not a text or none"),
        ({"model": 5}, "must be a section"),
        ({"training": {"callbacks": [1]}}, "is not a list of texts"),
        ({"optim": {"adam": {"beta": 1}}}, "optim.adam is no field"),
        ({"optim": {"learning_rate": 10**400}}, "is too large for a number"),
        ({"optim": {"name": ["adamw"]}}, "is not one of adamw"),
        ({"data": {"path": 10**6000}}, "data.path=(a int of too many digits) is not a text"),
        ({"data": {"path": "a\0b"}}, "has a control character"),
        ({"training": {"callbacks": ["a:B\n"]}}, "has a control character"),
        ({"model": {"name": print}}, "is not a text"),
        ({"model": {"name": ["gpt"]}}, "is not a text"),
        ({"model": {"a\nb": 1}}, "model.a b is no field"),
    ],
)
def test_wrong_types_in_a_file(values, expected):
    (problem,) = problems(values)
    assert expected in problem


def test_a_later_value_replaces_an_earlier_one():
    values = {"model": {"num_layers": 2}, "optim": {"learning_rate": 1}}
    config = configs.from_values(values, [Override("model.num_layers", "3")])
    assert config.model.num_layers == 3
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)


def test_pairs_and_their_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.tsv").write_text("a\tb\n", encoding="utf-8")
    values = {"model": {"name": "seq2seq"}, "data": {"pairs": "mine.tsv"}}
    config = configs.from_values(values)
    assert config.data.pairs == str(tmp_path / "mine.tsv")
    assert config.reads_pairs
    config.check_pairs()
    # A dataset of the user's own may be of pairs.
    (tmp_path / "own.py").write_text("", encoding="utf-8")
    assert problems({"model": {"name": "seq2seq"}, "data": {"dataset": "own.py:Data"}}) == []
    assert "contradicts data.path=" in problems(values, "data.path=x.txt")[0]
    assert "contradicts data.dataset=" in problems(values, "data.dataset=own.py:Data")[0]


def test_a_saved_config_may_name_no_pairs_yet():
    """That of an imported run; what trains or evaluates it asks for them."""
    saved = configs.from_values({}).to_json() | {"model": {"name": "seq2seq"}}
    config = configs.load(None, saved=saved)
    with pytest.raises(UsageError, match=r"name yours with `config\.data\.pairs=PATH`"):
        config.check_pairs()
    configs.load(None, [Override("data.pairs", "sort")], saved).check_pairs()
    text = configs.load(None, [Override("data.pairs", "sort")], configs.from_values({}).to_json())
    with pytest.raises(UsageError, match=r"does not read data.pairs=sort"):
        text.check_pairs()


def test_json_round_trip():
    config = configs.from_values(
        {}, [Override("training.callbacks", "a:B"), Override("data.path", "x")]
    )
    again = configs.load(None, saved=json.loads(json.dumps(config.to_json())))
    assert again == config


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("", encoding="utf-8")
    config = configs.from_values({"data": {"path": "text.txt", "dataset": "own.py:Data"}})
    assert config.data.path == str(tmp_path / "text.txt")
    assert config.data.dataset == f"{tmp_path / 'own.py'}:Data"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
        ("def get_config():\n    raise OSError('one\\ntwo')", "line 2: OSError: one two"),
        ("def get_config():\n    return get_config()", "line 2: RecursionError"),
        ("def get_config(a, b):\n    pass", "missing 2 required positional arguments"),
        ("def get_config():\n    return None", "returned NoneType, not ConfigDict"),
        ("get_config = 3", "has no function get_config"),
        ("x = 1\0", "mine.py line ?: source code string cannot contain null bytes"),
        (REQUIRED, "RequiredValueError: None value found"),
        ("x = 1", "has no function get_config"),
        ("def get_config(:", "line 1: invalid syntax"),
        ("\nimport no_such_module", "line 2: ModuleNotFoundError"),
        ("def get_config():\n    return {}", "returned dict, not ConfigDict"),
        ("def get_config():\n    x = 1\n    return 1 / 0", "line 3: ZeroDivisionError"),
    ],
)
def test_config_files_that_cannot_be_used(tmp_path, content, expected):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        configs.read_file(str(path))
    assert len(caught.value.problems) == 1


def test_a_folder_and_another_suffix_are_no_config_files(tmp_path):
    with pytest.raises(ConfigError, match="this is a folder; name a Python file in it"):
        configs.read_file(str(tmp_path))
    (tmp_path / "mine.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"its name must end in \.py"):
        configs.read_file(str(tmp_path / "mine.txt"))


def test_the_line_of_an_error_is_known_where_the_path_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("\n\n1 / 0", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.py`: line 3: ZeroDivisionError"):
        configs.read_file("mine.py")


def test_models_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_MODELS, encoding="utf-8")
    (problem,) = problems(None, "model.name=own.py:Bare")
    assert "Bare.Config must be a dataclass" in problem
    assert problems(None, "model.name=own.py:Wide") == [
        "model.width has no default; give it a value"
    ]
    (problem,) = problems(None, "model.name=own.py:Wide", "model.width=x")
    assert "model.width='x' is not a whole number" in problem
    config = configs.from_values({"model": {"name": "own.py:Wide", "width": 3}})
    assert config.model.width == 3


def test_init_from_may_be_none(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'init_from': 'a_run'})\n",
        encoding="utf-8",
    )
    for text, expected in (("none", None), ("", None), ("other", "other")):
        asked = []
        config = configs.load(
            str(tmp_path / "mine.py"), [Override("init_from", text)], weights=asked.append
        )
        assert asked == [expected]
        assert config.init_from == expected


def test_tables_of_sines_have_a_limit():
    values = {"model": {"name": "transformer", "positions": "sinusoidal"}}
    assert problems(values) == []
    (problem,) = problems(values, "model.max_seq_len=16000000")
    assert "use model.positions=learned" in problem


def test_no_device_is_touched_before_the_config_is_right(tmp_path):
    """A backend that does not exist would end in another error."""
    done = subprocess.run(
        command(f"--config={ROOT / 'configs/gpt.py'}", "--config.model.d_model=-1"),
        cwd=tmp_path,
        env=environment() | {"JAX_PLATFORMS": "no_such_backend"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.startswith("config error: model.d_model=-1 must be at least 1")
    assert len(done.stderr.splitlines()) == 1


def test_presets(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(preset='a'):\n"
        "    return ConfigDict({'model': {'num_layers': {'a': 1, 'b': 2}[preset]}})\n",
        encoding="utf-8",
    )
    assert configs.load(str(path)).model.num_layers == 1
    assert configs.load(f"{path}:b").model.num_layers == 2
    with pytest.raises(ConfigError, match="KeyError: 'c'"):
        configs.load(f"{path}:c")
    assert not list(tmp_path.glob("__pycache__"))


def test_placeholders_and_nested_dicts():
    config = ConfigDict({"model": ConfigDict({"d_model": 32}), "data": {"seq_len": 8}})
    built = configs.from_values(config.to_dict())
    assert (built.model.d_model, built.data.seq_len) == (32, 8)


def test_what_a_run_may_change_when_it_continues():
    saved = configs.from_values({}).to_json()
    words = [
        "training.num_steps=5000",
        "training.log_every=3",
        "model.d_model=64",
        "optim.beta1=0.8",
    ]
    now = configs.from_values({}, [Override(*word.split("=")) for word in words])
    allowed, refused = configs.changes(saved, now)
    assert {c.field for c in allowed} == {"training.num_steps", "training.log_every"}
    assert {c.field: (c.saved, c.now) for c in refused} == {
        "model.d_model": (128, 64),
        "optim.beta1": (0.9, 0.8),
    }


def test_any_single_mutation_ends_in_a_config_or_in_one_line_each():
    """Nothing that a command line can hold makes the checks themselves fail."""
    defaults = configs.from_values({}).to_json()
    fields = ["init_from", *(f"{s}.{n}" for s in configs.SECTIONS for n in defaults[s])]
    values = "0 -1 1 7 1e30 nan inf -inf none true é🙂 [] {} 1,2 2.5 a:b ../x 0x10".split()
    values += ["", "x" * 5000]
    rng = random.Random(0)
    for _ in range(500):
        field, value = rng.choice(fields), rng.choice(values)
        for problem in problems(None, f"{field}={value}"):
            assert "\n" not in problem
            assert problem.isprintable() or "🙂" in problem


def test_every_field_has_a_help_text():
    defaults = configs.from_values({})
    sections = [getattr(defaults, section) for section in configs.SECTIONS]
    for value in (*sections, *(model_class(name).Config for name in MODELS)):
        for field in dataclasses.fields(value):
            assert field.metadata["help"], f"{value}: {field.name}"


def test_a_reference_follows_an_override(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import config_dict\n"
        "def get_config():\n"
        "    rate = config_dict.FieldReference(1e-3)\n"
        "    config = config_dict.ConfigDict({'optim': {'learning_rate': rate}})\n"
        "    config.optim.min_learning_rate = rate * 0.1\n"
        "    config.training = {'num_steps': 10}\n"
        "    config.optim.decay_steps = config.training.get_ref('num_steps')\n"
        "    return config\n",
        encoding="utf-8",
    )
    given = [Override("optim.learning_rate", "2"), Override("training.num_steps", "50")]
    config = configs.load(str(tmp_path / "mine.py"), given)
    assert (config.optim.learning_rate, config.optim.min_learning_rate) == (2.0, 0.2)
    assert (config.training.num_steps, config.optim.decay_steps) == (50, 50)
    with pytest.raises(ConfigError, match=r"num_steps='many' is not a whole number"):
        configs.load(str(tmp_path / "mine.py"), [Override("training.num_steps", "many")])
