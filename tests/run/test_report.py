"""The report: what it says of a run, and that nothing in a run can break the page or reach out of it."""

import json
import math
import random
import re

import pytest
from run.pages import Page, evaluation

from hybrid.core import InputError
from hybrid.run import RunLog, summary, summary_table, write_report

# prompt, target, response before, response after
TEXTS = [
    ("The service was", "quick and friendly.", "slow and the waiter was rude.", "warm, a joy."),
    ("I bought this phone and", "it lasts two full days.", "it broke.", "I love it!"),
    ("<script>alert('prompt')</script> & so", "", "<script>alert(1)</script>", "</p><img src=x>"),
    ("", "An answer to nothing.", "", "Lovely."),
    ("هذا الفيلم كان", "رائعا من البداية إلى النهاية.", "مملا جدا.", "جميلا جدا."),
    ("First line\n\n    indented line\nthird", "✨ fine ✨", "meh 😐", "wow 🎉🎉"),
]


def write_run(folder, *, cycles=3, phases=("sft", "ppo", "eval"), num_prompts=14):
    """A run that looks like one: cycles of 8 SFT and 12 PPO steps, an evaluation before and after each."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model:\n  name: models/gpt2-small\nrun:\n  seed: 7\nppo:\n  clip: 0.2\n")
    noise = random.Random(0).gauss
    with RunLog(folder, total_steps=20 * cycles, live=False) as log:
        for step in range(20 * cycles + 1):
            done = step / (20 * cycles or 1)
            learned = 1 / (1 + math.exp(-8 * (done - 0.45)))
            sft_loss = 3.3 - 0.4 * done**0.5
            policy = {"reward": -0.2 + 0.8 * learned, "kl": 6 * learned, "response_length": 34 - 6 * learned}
            phase = "sft" if (step - 1) % 20 < 8 else "ppo"
            row = {"step": step, "phase": phase, "cycle": (step - 1) // 20, "elapsed": 3.1 * step}
            if step and phase in phases:
                if phase == "sft":
                    row |= {"loss": sft_loss + noise(0, 0.06), "tokens_per_second": noise(8200, 250)}
                else:
                    row |= {name: number + noise(0, 0.06 * abs(number)) for name, number in policy.items()}
                    row |= {"entropy": 3.1 - 0.7 * learned, "tokens_per_second": noise(2600, 120)}
                log.step(row)
            if step % 20 == 0 and "eval" in phases:
                shares = {"positive": 0.4 + 0.5 * learned, "eos_share": 0.4 + 0.5 * learned}
                more = {"reward_sem": 0.045, "sft_loss": sft_loss, "distinct_2": 0.9 - 0.1 * learned}
                log.step({"step": step, "phase": "eval", "num_prompts": 128} | policy | shares | more)
                log.samples(sample(step, index, done) for index in range(num_prompts))
    return folder


def sample(step, index, done):
    prompt, target, before, after = TEXTS[index % len(TEXTS)]
    reward = 0.1 * (index % len(TEXTS)) + done * (1 if index % len(TEXTS) != 1 else -1) - 0.3
    return {
        "step": step,
        "phase": "eval",
        "index": index,
        "prompt": prompt,
        "response": after if done == 1 else before,
        "target": target,
        "reward": reward,
        "components": {"sentiment": reward + 0.1, "length": -0.1},
    }


def write_rows(folder, *rows, samples=()):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "reviews-small")


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text("utf-8")


def test_script_in_a_response_is_escaped(html):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_no_text_of_a_run_becomes_a_tag(html):
    assert not {"script", "img"} & set(Page(html).tags)


def test_script_in_the_config_and_in_the_run_name_is_escaped(tmp_path):
    folder = write_rows(tmp_path / "<script>")
    (folder / "config.yaml").write_text("model: <script>\n")
    assert "script" not in Page(write_report(folder).read_text("utf-8")).tags


def test_page_names_no_address(html):
    assert not re.search(r"https?:|//\w", html)


def test_page_refers_to_nothing_but_its_own_parts(html):
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "clip-path")]
    assert links
    assert all(re.fullmatch(r"#\w+|url\(#\w+\)", link) for link in links)
    assert "link" not in page.tags


def test_no_id_is_used_twice(html):
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_same_run_gives_the_same_bytes(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_report_leaves_no_other_file_behind(run, html):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "samples.jsonl", "report.html"}


def test_all_six_curves_are_drawn(html):
    assert html.count("<svg") == 6


def test_every_figure_is_described_in_words(html):
    labels = [value for name, value in Page(html).attributes if name == "aria-label"]
    assert len(labels) == 6
    assert all("from" in label for label in labels)


def test_curves_take_their_colours_from_the_page(html):
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--sft)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", drawings)


def test_samples_are_the_first_twelve_prompts_by_index(html):
    assert re.findall(r'class="index">(\d+)<', html) == [str(index) for index in range(12)]


def test_samples_show_only_prompts_that_both_evaluations_have(tmp_path):
    samples = [sample(0, 0, 0), sample(0, 1, 0), sample(9, 1, 1), sample(9, 2, 1)]
    folder = write_rows(tmp_path / "run", samples=samples)
    assert re.findall(r'class="index">(\d+)<', write_report(folder).read_text("utf-8")) == ["1"]


def test_response_with_a_lone_surrogate_is_shown(tmp_path):
    folder = write_rows(tmp_path / "run", samples=[sample(0, 0, 0) | {"response": "a \ud83d b"}])
    assert "a &#55357; b" in write_report(folder).read_text("utf-8")


def test_title_gives_run_model_and_seed(html):
    assert "<h1>reviews-small</h1>" in html
    assert "<dd>models/gpt2-small</dd>" in html
    assert "<dd>7</dd>" in html


def test_summary_compares_the_first_with_the_last_evaluation(tmp_path):
    rewards = [
        evaluation(0, reward=-0.1, reward_sem=0.02),
        evaluation(5, reward=9),
        evaluation(9, reward=0.4),
    ]
    (row,) = summary(write_rows(tmp_path / "run", *rewards)).rows
    assert row.values == ("-0.100 ±\u00a00.020", "0.400")
    assert row.change == "+0.500"


@pytest.mark.parametrize(
    ("name", "before", "after", "change"),
    [
        ("positive", 0.25, 0.75, "+50 points"),
        ("sft_loss", 4.0, 3.0, "-25.0%"),
        ("distinct_2", 0.8, 0.6, "\N{MULTIPLICATION SIGN}0.75"),
        ("response_length", 30.0, 28.5, "-1.5"),
        ("sft_loss", 0.0, 3.0, ""),
    ],
)
def test_summary_writes_each_change_in_its_own_way(tmp_path, name, before, after, change):
    rows = evaluation(0, **{name: before}), evaluation(9, **{name: after})
    assert summary(write_rows(tmp_path / "run", *rows)).rows[0].change == change


def test_measure_that_one_evaluation_lacks_has_no_change(tmp_path):
    (row,) = summary(write_rows(tmp_path / "run", evaluation(0, kl=None), evaluation(9, kl=2.0))).rows
    assert (row.values, row.change) == (("n/a", "2.00"), "")


def test_step_that_a_resumed_run_repeats_counts_once(tmp_path):
    rows = evaluation(0, reward=0), evaluation(9, reward=1), evaluation(9, reward=2)
    assert summary(write_rows(tmp_path / "run", *rows)).rows[0].values == ("0.000", "2.000")


def test_summary_of_one_evaluation_has_one_column(tmp_path):
    assert summary(write_run(tmp_path / "run", cycles=0)).steps == (0,)


def test_summary_table_prints_every_row(run):
    assert summary_table(summary(run)).row_count == len(summary(run).rows) == 7


@pytest.mark.parametrize("phases", [(), ("sft",), ("ppo",), ("eval",), ("sft", "eval")])
def test_run_without_some_phase_still_gives_a_page(tmp_path, phases):
    assert "</html>" in write_report(write_run(tmp_path / "run", cycles=1, phases=phases)).read_text("utf-8")


def test_legend_names_only_the_phases_there_were(tmp_path):
    html = write_report(write_run(tmp_path / "run", phases=("sft",))).read_text("utf-8")
    assert re.findall(r'<li class="(\w+)">', html) == ["sft"]


def test_run_with_one_evaluation_gives_a_page_without_before_and_after(tmp_path):
    html = write_report(write_run(tmp_path / "run", cycles=0)).read_text("utf-8")
    assert "The one evaluation on 128 held-out prompts." in html
    assert "Before" not in html
    assert "<svg" not in html


def test_folder_without_metrics_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}.*not a run folder"):
        write_report(tmp_path)


def test_row_without_a_step_is_refused_by_line(tmp_path):
    folder = write_rows(tmp_path / "run", evaluation(0), {"phase": "sft"})
    with pytest.raises(InputError, match="line 2 has no step"):
        summary(folder)


def test_unknown_phases_and_numbers_are_left_alone(tmp_path):
    rows = {"step": 1, "phase": "dpo", "margin": 2}, {"step": 2, "phase": "ppo", "novelty": "high"}
    assert "</html>" in write_report(write_rows(tmp_path / "run", *rows)).read_text("utf-8")


def test_a_config_that_is_no_text_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config\.yaml' cannot be read"):
        write_report(folder)


def test_samples_that_no_run_has_written_are_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text('{"step": 1, "phase": "eval", "index": 0, "prompt": "a"}\n')
    with pytest.raises(InputError, match=r"samples\.jsonl holds what no run has written"):
        write_report(folder)
