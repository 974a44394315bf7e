"""A student learns a teacher's vectors, scores and relations; what cannot be compared is refused."""

import copy

import pytest
import torch

from m6rec import M6RecForRecommendation
from m6rec.layout_m6rec import item_layout
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs import distill
from m6rec.train.runs.build import prepare
from m6rec.train.runs.finetune import finetune
from tests.modeling_m6rec.tiny import ITEM, Writer, build, close, pad
from tests.train.world import recipe_of, write_world

SHAPE = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_groups": 1, "embedding_size": 12, "exit_layers": [1]}


def test_a_divergence_is_that_of_the_known_rows():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    known = torch.tensor([True, False, True])
    by_hand = [
        sum(p * (p.log() - q.log()) for p, q in zip(teacher[row].softmax(0), student[row].softmax(0))) for row in (0, 2)
    ]
    close(distill.imitated(student, teacher, known), sum(by_hand) / 2)
    close(distill.imitated(teacher, teacher, known), torch.tensor(0.0))


def test_vectors_are_compared_by_the_divergence_of_all_products(monkeypatch):
    torch.manual_seed(0)
    student = distill.Fit(*(torch.randn(size, 4, requires_grad=True) for size in (7, 5)))
    teacher = distill.Fit(torch.randn(7, 3), torch.randn(5, 3))
    own, wanted = (each.users @ each.items.T / distill.TEMPERATURE for each in (student, teacher))
    expected = distill.imitated(own, wanted, torch.ones(7, dtype=torch.bool))
    expected.backward()
    slopes = [each.grad.clone() for each in student]
    monkeypatch.setitem(distill.PRODUCTS_AT_ONCE, "cpu", 15)  # 3 places at a time
    for each in student:
        each.grad = None
    found = distill.vector_loss(student, teacher)
    found.backward()
    close(found, expected)
    for each, slope in zip(student, slopes):
        close(each.grad, slope)
    nothing = distill.Fit(torch.zeros(0, 4), torch.randn(5, 4))
    assert distill.vector_loss(nothing, distill.Fit(torch.zeros(0, 3), teacher.items)) == 0


def texts():
    writer = Writer(3)
    return pad([writer.segment(ITEM, 2, 5) for _ in range(3)])


def by_hand(student, teacher, ids, mask):
    """Relations of one text and one head at a time, from the input of the last segment layer."""
    found = []
    for row, own in zip(ids, mask.bool()):
        row = row[own][None]
        states = []
        for model in (student, teacher):
            given = []
            last = model.model.layer(model.config.num_segment_layers - 1)
            hook = last.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
            distill.read_standalone(model.model, row, item_layout(row, row.bool() | True))
            hook.remove()
            inner = last.attention_norm(given[-1])
            attention = last.self_attn
            states.append([part(inner)[0] for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        for one, other in zip(*states):
            for head in range(4):
                a, b = (part.chunk(4, -1)[head] for part in (one, other))
                a, b = (part @ part.T / part.shape[-1] ** 0.5 for part in (a, b))
                p, q = b.softmax(-1), a.softmax(-1)
                found += [(p * (p.log() - q.log())).sum(-1)]
    return torch.cat(found).sum() / (int(mask.sum()) * 4 * 3)


def test_relations_are_those_of_each_text_alone():
    settings = {"num_attention_heads": 4, "hidden_size": 40, "num_joint_layers": 2, "num_key_value_heads": 4}
    student = build({**settings, "num_hidden_groups": 1, "hidden_size": 24, "embedding_size": 20}).train()
    teacher, batch = build(settings), texts()
    loss = distill.relation_loss(student, teacher, **{"ids": batch["input_ids"], "mask": batch["attention_mask"]})
    close(loss, by_hand(student, teacher, batch["input_ids"], batch["attention_mask"]))
    loss.backward()
    assert student.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in teacher.parameters())
    same = distill.relation_loss(teacher, copy.deepcopy(teacher), batch["input_ids"], batch["attention_mask"])
    close(same, torch.tensor(0.0))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A world, and the folder of a model that was trained on it."""
    folder = tmp_path_factory.mktemp("teacher")
    data = write_world(folder / "data")
    model = {"preset": "tiny", "shape": {"num_attention_heads": 4, "hidden_size": 32}}
    learn = {"learn": ["retrieval", "click"], "negatives_per_event": 1}
    finetune(load_recipe(recipe_of(data, folder / "run", model=model, task=learn)))
    return data, folder / "run"


def student_of(teacher, folder, **sections):
    data, place = teacher
    model = {"preset": "tiny", "shape": SHAPE}
    learn = {"learn": ["retrieval", "click"], "negatives_per_event": 1}
    more = {"model": model, "task": learn, "distillation": {"teacher": str(place)}}
    return load_recipe(recipe_of(data, folder, **{**more, **sections}))


def distance(run, student):
    """How far a student is from its teacher on the run's first rows, by exit layer: by vectors, by scores."""
    maker = distill.distiller(run)
    batch = run.collator(rows_of(run))
    wanted = maker.keywords["teacher"].eval()
    given = {name: batch[name] for name in distill.INPUTS if name in batch}
    with torch.no_grad():
        expected, scored = fits(wanted, batch), wanted(**given).scores
        scores = [float(score_difference(student(**given, exit_layer=layer).scores, scored)) for layer in (1, 2)]
        return [
            (float(distill.vector_loss(fits(student, batch, exit_layer=layer), expected)), scores[layer - 1])
            for layer in (1, 2)
        ]


def score_difference(own, wanted):
    known = ~wanted.isnan()
    return ((own - wanted)[known] ** 2).mean()


def fits(model, batch, **more):
    """The vectors of labelled places and of the items of the loss, from the model's other outputs."""
    given = {name: batch[name] for name in distill.INPUTS if name in batch}
    out = model(**given, **more)
    places = (batch["retrieval_labels"] != -100).sum(1)
    users = [own[~own.isnan().any(-1)][-count:] if count else own[:0] for own, count in zip(out.user_vectors, places)]
    ids, mask = batch["item_input_ids"], batch["item_attention_mask"]
    return distill.Fit(torch.cat(users), model.embed_items(ids, mask, memory_ids=batch["candidate_embedding_ids"]))


def rows_of(run):
    from m6rec.train.runs.training_set import training_set

    rows = training_set(run, {})
    return [rows[index] for index in range(0, len(rows), max(len(rows) // 8, 1))]


def test_a_student_comes_nearer_to_its_teacher_at_every_exit(teacher, tmp_path):
    training = {"max_steps": 15, "learning_rate": 0.01}
    only = {"teacher": str(teacher[1]), "labels": 0.0}
    recipe = student_of(teacher, tmp_path / "run", training=training, distillation=only)
    run = prepare(recipe)
    assert run.model.config.num_hidden_groups == 1 and run.model.config.embedding_size == 12
    before = distance(run, run.model.eval())
    finetune(recipe)
    after = distance(run, M6RecForRecommendation.from_pretrained(tmp_path / "run"))
    for (vectors, scores), (own_vectors, own_scores) in zip(before, after):
        assert own_vectors < 0.7 * vectors and own_scores < 0.7 * scores


def test_a_student_reads_as_its_teacher(teacher, tmp_path):
    run = prepare(student_of(teacher, tmp_path / "run"))
    other = distill.load_model(str(teacher[1]))
    for name in ("vocab_size", "first_kind_token_id", "num_item_embeddings"):
        assert getattr(run.model.config, name) == getattr(other.config, name)


def test_what_cannot_be_compared_is_refused(teacher, tmp_path):
    shape = {"preset": "tiny", "shape": SHAPE}
    wrong = [
        ({"model": {**shape, "item_embeddings": True}}, "set model.item_embeddings=false"),
        (
            {"model": {**shape, "freeze_segments": True}},
            "distillation.relations",
        ),
        ({"model": {**shape, "shape": {**SHAPE, "num_joint_layers": 4}}}, "need segment layers"),
        ({"model": {**shape, "shape": {**SHAPE, "hidden_size": 18, "num_attention_heads": 3}}}, "must be multiples"),
        ({"model": {**shape, "shape": {**SHAPE, "interactions": ["like"]}}}, "set the same score_tasks"),
        ({"tuning": {"method": "lora"}}, "trains a whole model"),
    ]
    for sections, why in wrong:
        run = prepare(student_of(teacher, tmp_path / "run", **sections))
        with pytest.raises(ValueError, match=why):
            distill.distiller(run)
