"""The comparison: what it says of several runs, whatever one of them lacks, and that no text gets out of its place."""

import io
import json
import re

import pytest
from rich.console import Console
from run.pages import Page, evaluation

from hybrid.core import InputError
from hybrid.run.compare import comparison_table, write_comparison


def sample(index, prompt, response, step=9, **more):
    row = {"step": step, "phase": "eval", "index": index, "prompt": prompt, "response": response, "reward": 0.5}
    return row | {"target": "", "components": {}} | more


def run(folder, *rows, samples=(), config="run:\n  seed: 1\n"):
    """A run's folder of these rows; without rows two evaluations and two training steps."""
    folder.mkdir(parents=True)
    training = {"step": 1, "phase": "sft", "loss": 3.0}, {"step": 9, "phase": "ppo", "reward": 0.2, "kl": 1.0}
    rows = rows or (*training, evaluation(0, reward=0.1, sft_loss=3.2), evaluation(9, reward=0.5, sft_loss=2.5))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def compared(tmp_path, *folders):
    return write_comparison(folders, tmp_path / "page.html").read_text("utf-8")


def test_last_evaluations_stand_side_by_side(tmp_path):
    a = run(tmp_path / "a", evaluation(0, reward=9), evaluation(4, reward=0.25, num_prompts=8))
    page = Page(compared(tmp_path, a, run(tmp_path / "b")))
    assert page.row("Mean reward") == ["0.250", "0.500"]
    assert page.row("Measure") == ["a step 4, 8 prompts", "b step 9"]


@pytest.mark.parametrize(
    ("measure", "numbers", "best"),
    [
        ("reward", (0.1, 0.5), [2]),
        ("sft_loss", (2.0, 3.0), [1]),
        ("perplexity", (9.0, 7.0), [2]),
        ("rouge_l", (0.3, 0.2), [1]),
        ("kl", (1.0, 2.0), []),
        ("reward", (0.5, 0.5), []),
        ("reward", (0.50001, 0.5), []),
        ("reward", (None, 0.5), []),
    ],
)
def test_best_run_is_marked_where_a_measure_has_a_better_end(tmp_path, measure, numbers, best):
    folders = [run(tmp_path / name, evaluation(9, **{measure: n})) for name, n in zip("ab", numbers, strict=True)]
    assert [column for _, column in Page(compared(tmp_path, *folders)).best] == best


def test_two_of_three_runs_may_be_the_best(tmp_path):
    folders = [run(tmp_path / name, evaluation(9, reward=n)) for name, n in (("a", 1), ("b", 0), ("c", 1))]
    assert [column for _, column in Page(compared(tmp_path, *folders)).best] == [1, 3]


def test_measure_that_the_report_does_not_know_is_shown(tmp_path):
    a = run(tmp_path / "a", evaluation(9, bleu=12.5, novelty=0.25, novelty_sem=0.01))
    page = Page(compared(tmp_path, a, run(tmp_path / "b")))
    assert page.row("BLEU") == ["12.5", "n/a"]
    assert page.row("novelty") == ["0.25 ±\u00a00.01", "n/a"]


def test_only_settings_that_differ_are_shown_by_path(tmp_path):
    a = run(tmp_path / "a", config="ppo: {clip: 0.2, epochs: 4}\noptimizer: {}\nreferences: [{weight: 1.0}]\n")
    b = run(tmp_path / "b", config="ppo: {clip: 0.2, epochs: 8}\noptimizer: {lr: 0.1}\nreferences: [{weight: 2.0}]\n")
    rows = Page(compared(tmp_path, a, b)).rows
    diff = rows[[row[0] for row in rows].index("Setting") + 1 :]
    assert diff == [
        ["ppo.epochs", "4", "8"],
        ["references.0.weight", "1.0", "2.0"],
        ["optimizer.lr", "not set", "0.1"],
    ]


def test_number_and_the_text_of_it_differ(tmp_path):
    page = Page(compared(tmp_path, run(tmp_path / "a", config="x: 1\n"), run(tmp_path / "b", config="x: '1'\n")))
    assert page.row("x") == ["1", "'1'"]


def test_run_without_a_config_does_not_make_every_setting_differ(tmp_path):
    a, b = run(tmp_path / "a", config="x: 1\ny: 1\n"), run(tmp_path / "b", config="x: 2\ny: 1\n")
    page = Page(compared(tmp_path, a, b, run(tmp_path / "c", config="")))
    assert page.row("x") == ["1", "2", "not set"]
    assert not any(row[0] == "y" for row in page.rows)


def test_same_prompt_stands_side_by_side_whatever_its_index(tmp_path):
    a = run(tmp_path / "a", samples=[sample(0, "Why?", "A0", step=0), sample(0, "Why?", "A1"), sample(1, "Alone", "x")])
    b = run(tmp_path / "b", samples=[sample(0, "How?", "B0"), sample(3, "Why?", "B3")])
    html = compared(tmp_path, a, b)
    assert re.findall(r'<p class="text" dir="auto">(.*?)</p>', html) == ["A1", "B3"]


def test_prompt_that_comes_twice_is_matched_in_order(tmp_path):
    folders = [run(tmp_path / n, samples=[sample(0, "Why?", f"{n}0"), sample(1, "Why?", f"{n}1")]) for n in "ab"]
    html = compared(tmp_path, *folders)
    assert re.findall(r'<p class="text" dir="auto">(.*?)</p>', html) == ["a0", "b0", "a1", "b1"]


def test_run_that_was_not_asked_keeps_its_column(tmp_path):
    folders = [run(tmp_path / name, samples=[sample(0, "Why?", name)]) for name in "ab"]
    assert compared(tmp_path, *folders, run(tmp_path / "c")).count("not asked") == 1


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'{{ 7*7 }} </style>"


@pytest.mark.filterwarnings("error")
def test_no_text_of_a_run_becomes_a_tag(tmp_path):
    config = f"model:\n  name: {json.dumps(HOSTILE)}\n"
    samples = [sample(0, HOSTILE, HOSTILE, target=HOSTILE, components={HOSTILE: 1.0})]
    hostile = evaluation(9, **{"reward": 1, HOSTILE: 2.0})
    name = "<img src=x onerror=alert(1)> [bold]"
    a = run(tmp_path / name, evaluation(0, reward=0), hostile, samples=samples, config=config)
    html = compared(tmp_path, a, run(tmp_path / "b", samples=samples))
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert "49" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


def test_response_with_a_lone_surrogate_is_shown(tmp_path):
    folders = [run(tmp_path / name, samples=[sample(0, "Why?", "a \ud83d b")]) for name in "ab"]
    assert compared(tmp_path, *folders).count("a &#55357; b") == 2


def test_page_refers_to_nothing_outside_it_and_uses_no_id_twice(tmp_path):
    html = compared(tmp_path, run(tmp_path / "a"), run(tmp_path / "b"))
    page = Page(html)
    assert not re.search(r"https?:|//\w", html)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "clip-path")]
    assert all(re.fullmatch(r"#\w+|url\(#\w+\)", link) for link in links)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_each_run_has_its_colour_in_every_curve_and_in_the_legend(tmp_path):
    html = compared(tmp_path, run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c"))
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        assert {f"var(--run-{n})" in drawing for n in range(3)} == {True}
        assert not re.search(r"#[0-9a-f]{6}\b(?!\))", drawing)
    assert re.findall(r'<li class="run (run-\d)">(\w)<', html) == [("run-0", "a"), ("run-1", "b"), ("run-2", "c")]


def test_the_look_is_the_reports(tmp_path):
    html = compared(tmp_path, run(tmp_path / "a"), run(tmp_path / "b"))
    assert "prefers-color-scheme: dark" in html
    assert "--paper:" in html


def test_same_runs_give_the_same_bytes_and_no_other_file(tmp_path):
    folders = [run(tmp_path / "runs" / name, samples=[sample(0, "Why?", name)]) for name in "ab"]
    first = compared(tmp_path, *folders)
    assert compared(tmp_path, *folders) == first
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "page.html"}


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path):
    a, b = run(tmp_path / "x" / "run"), run(tmp_path / "y" / "run")
    page = Page(compared(tmp_path, a, b, run(tmp_path / "z")))
    assert page.row("Measure") == ["x/run step 9", "y/run step 9", "z step 9"]


@pytest.mark.parametrize("rows", [[{"step": 1, "phase": "sft", "loss": 1.0}], [evaluation(0, reward=None)]])
def test_run_with_next_to_nothing_still_gives_a_page(tmp_path, rows):
    folders = [run(tmp_path / name, *rows, config="") for name in "ab"]
    html = compared(tmp_path, *folders)
    assert "</html>" in html
    assert "No evaluation was recorded." in html
    assert "no curves before a second step" in html
    assert "No two runs have answered the same prompt." in html


def test_same_config_is_said_to_be_the_same(tmp_path):
    assert "No setting differs." in compared(tmp_path, run(tmp_path / "a"), run(tmp_path / "b"))


def test_console_table_has_a_row_a_measure_and_a_column_a_run(tmp_path):
    console = Console(width=100, file=io.StringIO())
    console.print(comparison_table([run(tmp_path / "a"), run(tmp_path / "[b]")]))
    printed = console.file.getvalue()
    assert "[b]" in printed
    assert re.search(r"Mean reward\s+0\.500\s+0\.500", printed)


def test_one_run_is_no_comparison(tmp_path):
    with pytest.raises(InputError, match="2 to 8 run folders, got 1"):
        compared(tmp_path, run(tmp_path / "a"))


def test_run_given_twice_is_refused(tmp_path):
    a = run(tmp_path / "a")
    with pytest.raises(InputError, match="given twice"):
        compared(tmp_path, a, tmp_path / "b" / ".." / "a")


def test_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nothing' is not a run folder"):
        compared(tmp_path, run(tmp_path / "a"), tmp_path / "nothing")


def test_output_that_cannot_be_written_is_refused(tmp_path):
    folders = run(tmp_path / "a"), run(tmp_path / "b")
    with pytest.raises(InputError, match="cannot write the comparison to"):
        write_comparison(folders, tmp_path / "a" / "metrics.jsonl" / "page.html")
    with pytest.raises(InputError, match="cannot write the comparison to"):
        write_comparison(folders, tmp_path / "a")


def test_a_file_that_is_no_comparison_is_not_overwritten(tmp_path):
    folders = run(tmp_path / "a"), run(tmp_path / "b")
    (tmp_path / "data.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(InputError, match="is there already, and no comparison of ours"):
        write_comparison(folders, tmp_path / "data.jsonl")
    page = write_comparison(folders, tmp_path / "page.html").read_bytes()
    assert write_comparison(folders, tmp_path / "page.html").read_bytes() == page
