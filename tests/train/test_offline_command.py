"""`m6rec recommend`: a file of requests becomes a file of answers, and what cannot be done is said."""

import sys

import pyarrow.parquet
import pytest

from m6rec.train.cli import main
from tests.train.world import REQUESTS, write_lines


def said(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out if code == 0 else told.err


def test_the_command_answers_goes_on_and_restarts(folder, tmp_path, capsys, monkeypatch):
    source, output = write_lines(tmp_path / "in.jsonl", [*REQUESTS, {"histroy": []}]), tmp_path / "out.parquet"
    command = ["recommend", folder, "--input", source, "--output", output, "--chunk-size", 2, "--top-k", 3]
    code, told = said(capsys, *command)
    assert code == 2 and "line 8: " in told and "unknown key 'histroy'" in told and "3 finished chunks are kept" in told
    code, told = said(capsys, *command[:-1], 4)
    assert code == 2 and "top_k was 3, is 4" in told and "--restart" in told
    code, told = said(capsys, *command, "--on-error", "skip")
    expected = f"8 requests answered in {output}, 6 of them by an earlier run; 1 have an error instead of an answer\n"
    assert (code, told) == (0, expected)
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["answer"] and len(row["answer"]) for row in rows] == [3, 3, 3, 3, 3, 2, 3, None]
    assert said(capsys, *command)[0] == 2 and said(capsys, *command[:-1], 4, "--restart", "--on-error", "skip")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


@pytest.mark.parametrize(("option", "value", "other"), [("exit_layer", 1, 2), ("exit_confidence", 0.5, 0.75)])
def test_the_command_stops_early(folder, recommend, tmp_path, capsys, option, value, other):
    asked, bad = {**REQUESTS[2], "history": REQUESTS[3]["history"]}, {"histroy": []}
    source, output = write_lines(tmp_path / "in.jsonl", [asked, bad]), tmp_path / "out.parquet"
    command = ["recommend", folder, "--input", source, "--output", output, "--chunk-size", 1, "--task", "click"]
    early = [*command, f"--{option.replace('_', '-')}"]
    assert "1 finished chunks are kept" in said(capsys, *early, value)[1]
    assert f"{option} was {value}, is {other}" in said(capsys, *early, other)[1]
    assert f"{option} was {value}, is None" in said(capsys, *command)[1]
    assert said(capsys, *early, value, "--on-error", "skip")[0] == 0
    found = pyarrow.parquet.read_table(output)["answer"][0].as_py()
    expected = recommend(asked, task="click", **{option: value})
    told = [(row["item"], row["score"], row["exit_layer"]) for row in found]
    assert told == [(row["item"], pytest.approx(row["score"]), row.get("exit_layer")) for row in expected]
    assert {row["score"] for row in found}.isdisjoint(row["score"] for row in recommend(asked, task="click"))


def test_the_command_leaves_blocked_items_out_and_reranks(folder, recommend, tmp_path, capsys):
    source, output = write_lines(tmp_path / "in.jsonl", [*REQUESTS[:2], {"histroy": []}]), tmp_path / "out.parquet"
    first = recommend(REQUESTS[0], task="retrieval", top_k=5)
    guard = write_lines(tmp_path / "guard.json", [{"block_items": [row["item_id"] for row in first[:2]]}])
    command = ["recommend", folder, "--input", source, "--output", output, "--chunk-size", 1, "--top-k", 3]
    rules = [*command, "--guard", guard, "--rerank", "title=0"]
    assert "2 finished chunks are kept" in said(capsys, *rules)[1]
    assert 'guard was "Guard(block_items=(' in said(capsys, *command)[1]
    assert said(capsys, *rules, "--on-error", "skip")[1].startswith("3 requests answered")
    rows = pyarrow.parquet.read_table(output)["answer"][0].as_py()
    assert [(row["item_id"], row["penalty"]) for row in rows] == [(row["item_id"], 0) for row in first[2:]]
    assert "--rerank title: give FIELD=WEIGHT" in said(capsys, *command, "--rerank", "title")[1]
    code, told = said(capsys, "recommend", folder, "--request", "nobody", "--top-k", 1, "--guard", guard)
    assert (code, first[0]["item_id"] in told) == (0, False)


def test_what_the_command_cannot_do_is_said(folder, tmp_path, capsys, monkeypatch):
    command = [
        "recommend",
        folder,
        "--input",
        write_lines(tmp_path / "in.jsonl", ["a"]),
        "--output",
        tmp_path / "o.jsonl",
    ]
    assert "--workers 2 goes with --ray" in said(capsys, *command, "--workers", 2)[1]
    assert "exit_layer=9: give a number from 1 to" in said(capsys, *command, "--exit-layer", 9)[1]
    assert "exit_confidence=0.0: give" in said(capsys, *command, "--exit-confidence", 0, "--on-error", "skip")[1]
    assert "top_k=0: give" in said(capsys, *command, "--top-k", 0, "--on-error", "skip")[1]
    assert "chunk_size is 0" in said(capsys, *command, "--chunk-size", 0)[1]
    monkeypatch.setitem(sys.modules, "ray", None)
    code, told = said(capsys, *command, "--ray")
    assert code == 2 and "pip install 'm6rec[ray]'" in told
    assert not (tmp_path / "o.jsonl").exists()
