"""The report of a run on preferences: its table, its figures, its pairs, and that no text gets out of its place."""

import json
import re

import pytest
from run.pages import Page, pair_row, preference_rows

from hybrid.core import InputError
from hybrid.run import summary, summary_table, write_comparison, write_report

HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }}"


def write(folder, rows, samples=()):
    folder.mkdir(parents=True)
    for name, lines in (("metrics", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sampled(objective="dpo", num_pairs=14, **texts):
    """Pairs before and after, the third of which is wrong in the end."""
    after = [(i, 1.5, 2.25 if i == 2 else -0.5) for i in range(num_pairs)]
    before = [(i, 0.25, 0.0) for i in range(num_pairs)]
    return [
        pair_row(step, i, a, b, objective, **texts) for step, found in ((0, before), (4, after)) for i, a, b in found
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences") / "run"
    return write(folder, preference_rows("reward_model"), sampled("reward_model"))


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text("utf-8")


def test_the_table_begins_with_the_accuracy_and_its_standard_error(html):
    page = Page(html)
    assert page.rows[1][1:] == ["50.0% ±\u00a05.0%", "87.5% ±\u00a05.0%", "+37.5 points"]
    assert page.rows[1][0].startswith("Pairwise accuracy")
    assert page.row("Margin") == ["1.000", "1.750", "+0.750"]
    assert "on 16 held-out pairs." in html


def test_facts_and_legend_name_the_objective(html):
    assert "<dd>4 reward model</dd>" in html
    assert re.findall(r'<li class="([\w-]+)">(.*?)</li>', html) == [
        ("more-0", "reward model"),
        ("eval", "held-out evaluation, ± standard error"),
    ]


def test_rewards_are_two_lines_in_one_figure_told_apart_and_labelled(html):
    (label, drawing) = re.search(r'aria-label="(Rewards .*?)".*?(<svg.*?</svg>)', html, re.DOTALL).groups()
    assert "chosen, reward model from 0.1 to 0.4" in label and "rejected, held-out evaluation" in label
    assert {"var(--up)" in drawing, "var(--down)" in drawing, ">chosen<" in drawing, ">rejected<" in drawing} == {True}


def test_there_are_four_curves_a_reliability_diagram_and_a_histogram(html):
    captions = re.findall(r"<figcaption>(.*?) <small>", html)
    assert captions == ["Reward model loss", "Pairwise accuracy", "Rewards", "Margin", "Calibration", "Margins"]


def test_drawings_take_all_their_colours_from_the_page(html):
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", drawings)
    for name in set(re.findall(r"var\((--[\w-]+)\)", drawings)):
        assert html.count(f"{name}: #") == 2, f"{name} is not both light and dark"


def test_no_id_is_used_twice_and_nothing_outside_is_named(html):
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?:|//\w", html)


def test_twelve_pairs_are_shown_and_the_wrong_one_is_marked(html):
    assert html.count('<h3 class="pair">') == 12
    articles = re.findall(r"<article>.*?</article>", html, re.DOTALL)
    assert [number for number, article in enumerate(articles) if "✗ wrong" in article] == [2]
    text = " ".join(re.sub(r"<[^>]+>", " ", articles[2]).split())
    assert text == "2 Prompt 2 ✗ wrong Chosen Good 2 +0.25 → +1.50 Rejected Bad 2 +0.00 → +2.25"


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected", "objective"])
def test_no_text_of_a_pair_becomes_a_tag(tmp_path, where):
    samples = [row | {where: HOSTILE} for row in sampled(num_pairs=3)]
    html = write_report(write(tmp_path / "run", preference_rows(), samples)).read_text("utf-8")
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;" in html or where == "objective"
    assert "49" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


def test_the_name_of_an_objective_or_a_phase_becomes_no_tag(tmp_path):
    html = write_report(write(tmp_path / "run", preference_rows(HOSTILE), sampled(HOSTILE))).read_text("utf-8")
    assert "script" not in Page(html).tags


def test_same_run_gives_the_same_bytes(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_one_evaluation_is_shown_without_before_and_after(tmp_path):
    rows = [row for row in preference_rows() if row["step"] == 0]
    html = write_report(write(tmp_path / "run", rows, [pair_row(0, 0, 1.0, 2.0)])).read_text("utf-8")
    assert "✗ wrong" in html and "→" not in html
    assert "on 16 held-out pairs." in html


def test_a_joint_run_names_its_objectives_in_table_and_legend(tmp_path):
    rows = preference_rows("dpo", phase="joint")
    rows = [row | ({"sft_loss": 1.0, "sft_coef": 0.1} if row["phase"] == "joint" else {}) for row in rows]
    rows += [row for row in preference_rows("reward_model") if row["phase"] != "eval"]
    html = write_report(write(tmp_path / "run", rows)).read_text("utf-8")
    assert '<li class="joint">joint DPO and SFT</li>' in html
    assert '<li class="more-0">reward model</li>' in html


def test_pairs_that_no_run_has_written_are_refused(tmp_path):
    folder = write(tmp_path / "run", preference_rows(), [{"step": 0, "phase": "pairs", "index": 0, "objective": "dpo"}])
    with pytest.raises(InputError, match=r"samples\.jsonl holds what no run has written: 'prompt'"):
        write_report(folder)


def test_the_console_table_says_how_many_pairs_there_were(run):
    assert summary(run).num_pairs == 16
    assert summary_table(summary(run)).title == "Held-out evaluation, 16 pairs"


def test_a_comparison_marks_the_better_accuracy_and_the_lower_loss(tmp_path):
    worse = [
        row | ({"dpo/accuracy": 0.75, "dpo/loss": 0.1} if row["step"] == 4 and row["phase"] == "eval" else {})
        for row in preference_rows()
    ]
    folders = [write(tmp_path / "a", preference_rows()), write(tmp_path / "b", worse)]
    html = write_comparison(folders, tmp_path / "page.html").read_text("utf-8")
    page = Page(html)
    assert page.row("Pairwise accuracy") == ["87.5% ±\u00a05.0%", "75.0% ±\u00a05.0%"]
    assert page.row("Measure") == ["a step 4, 16 pairs", "b step 4, 16 pairs"]
    assert [column for _, column in page.best] == [1, 2]
    assert page.row("Chosen reward") == ["0.875", "0.875"]
    assert "num_pairs" not in html
    captions = re.findall(r"<figcaption>(.*?) <small>", html)
    assert captions == ["DPO loss", "Pairwise accuracy", "Rewards", "Margin"]
    (rewards,) = re.findall(r'aria-label="Rewards .*?(<svg.*?</svg>)', html, re.DOTALL)
    assert "stroke-dasharray" in rewards and {f"var(--run-{n})" in rewards for n in (0, 1)} == {True}
