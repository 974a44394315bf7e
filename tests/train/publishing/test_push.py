"""What is pushed to a Hub comes back the same, with the package and without; what must not be pushed is refused."""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline

from m6rec import Evidence, M6RecForRecommendation, RecommendationPipeline
from m6rec.catalogue_m6rec import EVIDENCE
from m6rec.train.answering.loading import load_pipeline
from m6rec.train.cli import main
from m6rec.train.config.recipe import load_recipe
from m6rec.train.publishing import check as publishing
from m6rec.train.publishing.push import push
from m6rec.train.runs.finetune import finetune
from tests.fast import some
from tests.minihub import MiniHub, use
from tests.modeling_m6rec.test_hub import WITHOUT_PACKAGE
from tests.train.world import recipe_of, write_world

REQUEST = {
    "history": [{"event": "watch", "item": {"title": "Red Harbour", "year": 1990}}, "漫长的冬天"],
    "candidates": [{"title": "Night Train"}, "夜行列车", "Salt"],
}
SOURCE = {"history": ["Low Tide", {"item": {"item_id": "i3"}}]}
WHOLE = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
WHOLE |= {
    "processor_config.json",
    "chat_template.jinja",
    "handler.py",
    "README.md",
    "README_zh.md",
    "metrics.json",
    "curves.png",
}
WHOLE |= {f"catalogue/{name}" for name in ("catalogue.json", "items.parquet", "vectors.safetensors")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output folders of a run with checkpoints, and of one that trains an adapter for the first one's model."""
    place = tmp_path_factory.mktemp("push")
    tables = write_world(place / "world")
    task = {"learn": ["retrieval", "click"]}
    steps = {"save_strategy": "steps", "save_steps": 1}
    finetune(load_recipe(recipe_of(tables, place / "films", task=task, training=steps)))
    base = {"model": {"checkpoint": str(place / "films")}, "tuning": {"method": "lora"}, "task": task}
    finetune(load_recipe(recipe_of(tables, place / "tuned", **base, training={"learning_rate": 0.1})))
    return place


@pytest.fixture
def films(folders, tmp_path):
    return shutil.copytree(folders / "films", tmp_path / "films")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with MiniHub() as started:
        use(started, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield started


def ask(recommend):
    return [recommend(REQUEST, explain=True), recommend(SOURCE, top_k=3), recommend("a man", task="click")]


def quiet(*lines):
    """Take what a push says."""


def run(code, hub, tmp_path):
    """Run code in a fresh process in another folder; it has `ask`, and returns `result`."""
    (tmp_path / "given.json").write_text(json.dumps([REQUEST, SOURCE]))
    script = """
        import json, sys
        REQUEST, SOURCE = json.load(open("given.json"))
        def ask(recommend):
            return [recommend(REQUEST, explain=True), recommend(SOURCE, top_k=3), recommend("a man", task="click")]
    """
    script = textwrap.dedent(script) + code + "\njson.dump(result, open('result.json', 'w'))\n"
    env = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "result.json").read_text())


PULL = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
import torch

autos = AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, AutoProcessor
loaded = [auto.from_pretrained("org/films", trust_remote_code=True) for auto in autos]
batch = loaded[-1]([REQUEST], "click", return_tensors="pt")
scores = loaded[1].eval().score("click", **batch).tolist()
recommend = pipeline("recommendation", model="org/films", trust_remote_code=True, device="cpu")
result = [[type(each).__name__ for each in loaded], type(recommend).__module__, scores, ask(recommend)]
"""


def expected(folder):
    """What the model in a folder answers."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    scores = model.eval().score("click", **processor([REQUEST], "click", return_tensors="pt")).tolist()
    return scores, json.loads(json.dumps(ask(load_pipeline(str(folder)))))


# -------------------------------------------------------------------------------------------------- there and back


@pytest.mark.slow
def test_pushed_and_pulled_without_the_package(films, hub, tmp_path):
    push(films, "org/films", quiet)
    names, module, *answers = run(WITHOUT_PACKAGE + PULL, hub, tmp_path)
    model = "M6RecForRecommendation"
    assert names == ["M6RecConfig", model, model, "M6RecTokenizer", "M6RecProcessor"]
    assert module.startswith("transformers_modules.") and tuple(answers) == expected(films)


def test_evidence_is_published_without_events_and_users(films, hub):
    recommend = load_pipeline(str(films))
    recommend.catalogue.set_evidence(Evidence(learnt=0.5), recommend.processor)
    events = [{"user_id": f"secret-{user}", "item_id": f"i{item}"} for user in range(3) for item in (1, 3, 2)]
    recommend.catalogue.observe(events)
    recommend.catalogue.save(films / "catalogue")
    recommend.catalogue.observe([{"user_id": "secret-late", "item_id": "i1"}])
    push(films, "org/films", quiet)
    files = hub.files("org/films")
    sent = {name for name in files if name.startswith("catalogue/")}
    assert sent == {
        f"catalogue/{name}" for name in (EVIDENCE, "catalogue.json", "items.parquet", "vectors.safetensors")
    }
    assert not any(b"secret-" in content for content in files.values())
    answers = json.loads(json.dumps(recommend(SOURCE, explain=True, top_k=3)))
    assert answers[0]["parts"]["transitions"] > 0
    pulled = pipeline("recommendation", model="org/films", device="cpu")
    assert json.loads(json.dumps(pulled(SOURCE, explain=True, top_k=3))) == answers


def test_pushed_and_pulled_with_the_package(films, hub):
    push(films, "org/films", quiet)
    scores, answers = expected(films)
    shutil.move(films, films.with_name("away"))
    model, processor = AutoModel.from_pretrained("org/films"), AutoProcessor.from_pretrained("org/films")
    assert type(model) is M6RecForRecommendation
    assert model.eval().score("click", **processor([REQUEST], "click", return_tensors="pt")).tolist() == scores
    recommend = pipeline("recommendation", model="org/films", device="cpu")
    assert type(recommend) is RecommendationPipeline and ask(recommend) == answers


@pytest.mark.slow
def test_pulled_by_a_clean_process_with_the_package(films, hub, tmp_path):
    push(films, "org/films", quiet)
    _, module, *answers = run("import m6rec\n" + PULL, hub, tmp_path)
    assert module.startswith("m6rec.") and tuple(answers) == expected(films)


def test_what_is_pushed(films, hub, capsys):
    assert main(["push", str(films), "org/films"]) == 0
    files = hub.files("org/films")
    code = {path.name for path in films.glob("*_m6rec.py")}
    assert files.keys() - {".gitattributes"} == WHOLE | code
    for name in files.keys() - {".gitattributes", "README.md", "README_zh.md", "handler.py"}:
        assert files[name] == (films / name).read_bytes()
    said = capsys.readouterr().out
    for stays in ("checkpoint-1/: a state of the training", "recipe.yaml: it names places", "card.json: the card says"):
        assert f"\n  {stays}" in said
    assert f"published as {hub.url}/org/films/commit/" in said
    assert all(f" {name}\n" in said for name in WHOLE)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".csv"))]


def test_an_endpoint_answers_by_the_handler_that_is_pushed(films, hub, tmp_path):
    push(films, "org/films", quiet)
    (tmp_path / "handler.py").write_bytes(hub.files("org/films")["handler.py"])
    spec = importlib.util.spec_from_file_location("handler", tmp_path / "handler.py")
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    answer, recommend = handler.EndpointHandler(str(films)), load_pipeline(str(films))
    assert answer({"inputs": SOURCE, "parameters": {"top_k": 3}}) == recommend(SOURCE, top_k=3)
    first, error = answer({"inputs": [SOURCE, {"history": 5}]})
    assert [row["item_id"] for row in first] == [row["item_id"] for row in recommend(SOURCE)] and "history" in error[
        "error"
    ]
    with pytest.raises(ValueError, match="`inputs` is missing"):
        answer({"input": SOURCE})
    with pytest.raises(ValueError, match="'guard'"):
        answer({"inputs": SOURCE, "parameters": {"guard": "x"}})


def test_a_dry_run_sends_nothing(films, hub, capsys):
    (films / "training_args.bin").write_bytes(b"pickle")
    (films / "events.csv").write_text("user_id,item_id\n")
    (films / "notes").mkdir()
    (films / "notes" / "model.safetensors").write_bytes(b"")
    assert main(["push", str(films), "org/films", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not hub.log and not hub.repositories
    assert "training_args.bin: a pickle of the Trainer's settings" in said
    assert "events.csv: a table or text, perhaps training data" in said
    assert "notes/model.safetensors: no weights of this model" in said
    assert "nothing was sent" in said
    cards = Path(re.search(r"written for the push lie in (.*)", said)[1])
    assert sorted(path.name for path in cards.iterdir()) == ["README.md", "README_zh.md"]
    assert "# org/films" in (cards / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(cards)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the push that is killed is a fork of this process")
def test_a_push_that_is_killed_and_repeated(films, hub, monkeypatch):
    """It is killed when the first big file is there and the second arrives: nobody sees half a model."""
    arrived = []

    def before(method, path):
        if method == "PUT":
            arrived.append(path)
            if len(arrived) == 2:
                os.kill(pushing.pid, signal.SIGKILL)

    whole = HfApi.create_commit  # one file after the other, so that the first is there when the second arrives
    monkeypatch.setattr(HfApi, "create_commit", lambda *given, **more: whole(*given, **more, num_threads=1))
    monkeypatch.setattr(hub, "before", before)
    pushing = multiprocessing.get_context("fork").Process(target=push, args=(films, "org/films", quiet))
    pushing.start()
    pushing.join(60)
    assert pushing.exitcode == -signal.SIGKILL
    assert hub.files("org/films").keys() == {".gitattributes"}
    del hub.log[:]
    push(films, "org/films", quiet)
    assert hub.files("org/films").keys() >= WHOLE
    sent = [path for method, path in hub.log if method == "PUT"]
    assert arrived[0] not in sent and len(sent) > 1
    assert hub.files("org/films")["model.safetensors"] == (films / "model.safetensors").read_bytes()


def test_pushed_again(films, hub):
    """The same changes nothing; what the new model has no more goes, what others put there stays."""
    push(films, "org/films", quiet)
    commits = hub.repositories["org/films"].commits
    count = len(commits)
    push(films, "org/films", quiet)
    assert len(commits) == count
    shutil.rmtree(films / "catalogue")
    hub.repositories["org/films"].commit("main", hub.repositories["org/films"].files("main") | {"NOTES.md": "x"})
    hub.contents["x"] = b"notes"
    push(films, "org/films", quiet)
    files = hub.files("org/films")
    assert not [name for name in files if name.startswith("catalogue/")] and "NOTES.md" in files
    assert "found = " not in files["README.md"].decode()


def test_a_branch_and_a_private_repository(films, hub):
    push(films, "org/films", quiet, private=True, revision="trial")
    repository = hub.repositories["org/films"]
    assert repository.private and hub.files("org/films").keys() == {".gitattributes"}
    assert hub.files("org/films", "trial").keys() >= WHOLE
    push(films, "org/open", quiet)
    with pytest.raises(ValueError, match=r"org/open is there and public"):
        push(films, "org/open", quiet, private=True)


def test_big_weights_are_divided(films, hub, monkeypatch):
    monkeypatch.setattr(publishing, "SHARD", 60_000)
    push(films, "org/films", quiet)
    files = hub.files("org/films")
    parts = [name for name in files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)]
    assert len(parts) > 2 and "model.safetensors" not in files and "model.safetensors.index.json" in files
    pulled, weights = AutoModel.from_pretrained("org/films"), load_file(films / "model.safetensors")
    assert all(torch.equal(pulled.state_dict()[name], weight) for name, weight in weights.items())
    assert ask(pipeline("recommendation", model="org/films", device="cpu")) == ask(load_pipeline(str(films)))


def test_an_adapter_goes_alone_and_comes_back_with_its_base(folders, hub, capsys):
    films, tuned = folders / "films", folders / "tuned"
    assert main(["push", str(tuned), "org/tuned"]) == 2
    message = capsys.readouterr().err
    assert "base_model_name_or_path is" in message and "--base org/base" in message and not hub.repositories
    push(films, "org/films", quiet)
    assert main(["push", str(tuned), "org/tuned", "--base", "org/films"]) == 0
    files = hub.files("org/tuned")
    assert {"adapter_model.safetensors", "catalogue/vectors.safetensors"} <= files.keys()
    assert "model.safetensors" not in files and not [name for name in files if name.startswith("base")]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/films"
    head = ModelCard(files["README.md"].decode()).data
    assert (head.base_model, head.base_model_relation, head.library_name) == ("org/films", "adapter", "peft")
    assert "[org/films](https://huggingface.co/org/films)" in files["README.md"].decode()
    there, here = (ask(load_pipeline(name)) for name in ("org/tuned", str(tuned)))
    assert there == here != ask(load_pipeline(str(films)))
    assert pipeline("recommendation", model="org/tuned", device="cpu")(SOURCE, top_k=3)
    with pytest.raises(ValueError, match=r"'org/x'.*no adapter"):
        push(films, "org/films", quiet, base="org/x")


# --------------------------------------------------------------------------------------------------- what is refused


def in_json(file, key, value):
    def put(folder):
        content = json.loads((folder / file).read_text())
        content[key] = value
        (folder / file).write_text(json.dumps(content))

    return put


def in_text(file, text):
    return lambda folder: (folder / file).write_text(text)


def items(**columns):
    def put(folder):
        path = folder / "catalogue" / "items.parquet"
        table = pyarrow.parquet.read_table(path)
        for name, value in columns.items():
            table = table.append_column(name, pyarrow.array([*[""] * (len(table) - 1), value]))
        pyarrow.parquet.write_table(table, path)

    return put


TOKEN = "hf_" + "aB3" * 11
REFUSED = [
    (in_json("config.json", "note", TOKEN), r"config\.json, line 1: a token of the Hub"),
    (in_json("processor_config.json", "hub_token", "x"), r"processor_config\.json, key hub_token: a secret"),
    (in_json("tokenizer_config.json", "api_key", "x"), r"tokenizer_config\.json, key api_key: a secret"),
    (in_json("config.json", "token", "x"), r"config\.json, key token: a secret"),
    (in_json("config.json", "inner", {"passwords": ["x"]}), r"config\.json, key inner\.passwords: a secret"),
    (in_json("config.json", "apiKeys", {"a": "x"}), r"config\.json, key apiKeys: a secret"),
    (in_json("config.json", "texts", {"/data/x.txt": 1}), r"config\.json, key texts\./data/x\.txt: a path"),
    (in_json("config.json", "note", "runs in /data"), r"config\.json, key note: a path .* 'runs in /data'"),
    (in_text("README.md", f"# My films\n\nlogin {TOKEN}\n"), r"README\.md, line 3: a token of the Hub"),
    (in_text("README.md", "# My films\nhttps://me:pass@host/x\n"), r"README\.md, line 2: a password in an address"),
    (in_text("README.md", "use 1a2b3c4d5e6f\n"), r"README\.md, line 1: a secret of this machine's environment"),
    (in_text("LICENSE", "-----BEGIN RSA PRIVATE KEY-----\n"), r"LICENSE, line 1: a private key"),
    (in_text("layout_m6rec.py", "x = 1\npassword = 'abcdefgh'\n"), r"layout_m6rec\.py, line 2: a secret"),
    (items(note=TOKEN), r"items\.parquet, column note, row 14: a token of the Hub"),
    (in_json("config.json", "note", "/home/me/films"), r"config\.json, key note: a path .* '/home/me/films'"),
    (in_json("processor_config.json", "time", ["C:\\films"]), r"processor_config\.json, key time\[0\]: a path"),
    (in_json("tokenizer_config.json", "name_or_path", "/data"), r"tokenizer_config\.json, key name_or_path: a path"),
    (in_text("README.md", "# x\n\ndata in /srv/films/raw\n"), r"README\.md, line 3: a path .*'/srv/films/raw'"),
    (items(file="/srv/films/1.png"), r"items\.parquet, column file, row 14: a path"),
    (items(user_id="u1"), r"items\.parquet, column user_id: training data"),
    (in_text("model.safetensors", "pickle"), r"model\.safetensors: no safetensors"),
    (in_text("curves.png", "pickle"), r"curves\.png: no PNG"),
]


FAST = [REFUSED[place] for place in (0, 1, 7, 8, 10, 13, 19, 20)]
"""One of each rule; test_privacy.py has the rules' other cases."""


@pytest.mark.parametrize(("spoil", "message"), some(REFUSED, FAST), ids=[message for _, message in REFUSED])
def test_refused(films, hub, monkeypatch, spoil, message):
    monkeypatch.setenv("MY_API_KEY", "1a2b3c4d5e6f")
    spoil(films)
    with pytest.raises(ValueError, match=message) as error:
        push(films, "org/films", quiet)
    assert TOKEN not in str(error.value) and "1a2b3c4d5e6f" not in str(error.value)
    assert not hub.repositories


def test_names_of_tokens_are_no_secrets(films, hub, capsys):
    for name, value in [
        ("num_virtual_tokens", 8),
        ("max_tokens", 9),
        ("first_option_token", "yes"),
        ("pad_token", "!"),
    ]:
        in_json("config.json", name, value)(films)
    in_json("processor_config.json", "item_rows", {"password": 1, "/data/token": 2})(films)
    assert main(["push", str(films), "org/films", "--dry-run"]) == 0, capsys.readouterr().err


def test_all_that_is_refused_is_named_at_once(films, hub, capsys):
    in_json("config.json", "note", "/home/me/films")(films)
    in_text("README.md", f"# x\n{TOKEN}\n")(films)
    assert main(["push", str(films), "org/films"]) == 2
    message = capsys.readouterr().err
    assert "config.json, key note" in message and "README.md, line 2" in message and "Nothing was sent" in message


def test_a_table_that_the_recipe_reads_is_training_data(films, hub):
    recipe = (films / "recipe.yaml").read_text()
    (films / "recipe.yaml").write_text(re.sub("items: .*", f"items: {films / 'metrics.json'}", recipe))
    with pytest.raises(ValueError, match=r"metrics\.json: training data, which the recipe reads"):
        push(films, "org/films", quiet)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", r"lacks weights: model\.safetensors or model\.safetensors\.index\.json"),
        ("processor_config.json", r"lacks its processor: processor_config\.json"),
        ("tokenizer.json", r"lacks its tokenizer: tokenizer\.json"),
        ("network_m6rec.py", r"network_m6rec\.py is missing, which the model's code needs"),
    ],
)
def test_what_is_missing_is_named(films, hub, file, message):
    (films / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        push(films, "org/films", quiet)


def test_a_configuration_that_names_no_code(films, hub):
    in_json("config.json", "auto_map", {"AutoConfig": "configuration_m6rec.M6RecConfig"})(films)
    with pytest.raises(ValueError, match=r"config\.json does not name the code of AutoModel, AutoModelForCausalLM"):
        push(films, "org/films", quiet)


def test_code_of_others_stays(films, hub, capsys):
    (films / "strange_m6rec.py").write_text("x = 1\n")
    assert main(["push", str(films), "org/films"]) == 0
    assert "strange_m6rec.py: no code of this model" in capsys.readouterr().out
    assert "strange_m6rec.py" not in hub.files("org/films")


def test_wrong_names(films, hub, capsys):
    with pytest.raises(ValueError, match=r"the name is 'films'; expected org/name"):
        push(films, "films", quiet)
    with pytest.raises(FileNotFoundError, match=r"no folder 'nowhere'"):
        push("nowhere", "org/films", quiet)
    assert main(["push", str(films), "org/films", "training.seed=1"]) == 2
    assert "push takes no 'training.seed=1'" in capsys.readouterr().err


def test_a_hub_that_is_not_there(films, monkeypatch, capsys):
    with MiniHub() as gone:
        pass
    use(gone, monkeypatch)
    assert main(["push", str(films), "org/films"]) == 2
    assert re.search(rf"the Hub \({gone.url}\) cannot be reached.*repeat", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------------- the card


def test_a_card_of_ones_own_goes_as_it_is(films, hub):
    own = "---\nlicense: mit\n---\n# Mine\n"
    (films / "README.md").write_text(own)
    push(films, "org/films", quiet)
    files = hub.files("org/films")
    assert files["README.md"].decode() == own and "# org/films" in files["README_zh.md"].decode()


def test_a_card_that_the_hub_refuses_is_not_sent(films, hub):
    (films / "README.md").write_text("---\nlicense: mine alone\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r'"license" must be one of'):
        push(films, "org/films", quiet)
    assert hub.files("org/films").keys() == {".gitattributes"}


def test_given_facts_are_filled_in_by_hand(films, hub):
    path: Path = films / "card.json"
    facts = json.loads(path.read_text())
    facts |= {"licence": "mit", "limits": ["It knows fifteen films."]}
    path.write_text(json.dumps(facts))
    push(films, "org/films", quiet)
    text = hub.files("org/films")["README.md"].decode()
    assert "license: mit\n" in text and "- It knows fifteen films." in text
    path.write_text(json.dumps({**facts, "licenze": "mit"}))
    with pytest.raises(ValueError, match=r"card\.json has unknown keys licenze"):
        push(films, "org/films", quiet)
