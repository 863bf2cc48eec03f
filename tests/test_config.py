"""From a file to a config: overrides, types, and errors that name the key before anything is loaded."""

import json

import pytest

from hybrid import HybridConfig, InputError, make_reward


@pytest.fixture
def file(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_every_section_may_be_left_out(file):
    assert HybridConfig.from_file(file("{}")) == HybridConfig()


def test_yaml_and_json_are_read_alike(file):
    values = {"ppo": {"epochs": 8}, "optimizer": {"LR": 2e-5}}
    yaml = file("ppo:\n  epochs: 8\noptimizer:\n  LR: 2e-5\n")
    written = file(json.dumps(values), "config.json")
    assert HybridConfig.from_file(yaml).ppo == HybridConfig.from_file(written).ppo
    assert HybridConfig.from_file(yaml).ppo.epochs == 8


def test_an_empty_section_is_its_default(file):
    assert HybridConfig.from_file(file("optimizer:\nppo:\nmixing:\n")) == HybridConfig()


def test_functions_in_a_config_are_saved_by_name(tmp_path):
    HybridConfig(reward={"type": "python", "function": json.dumps}).save(tmp_path / "config.yaml")
    assert HybridConfig.from_file(tmp_path / "config.yaml").reward["function"] == "json:dumps"


def test_overrides_win_over_the_file(file):
    config = HybridConfig.from_file(file("ppo:\n  epochs: 8\n"), ["ppo.epochs=2", "model.name=gpt2", "kl.coef=1e-3"])
    assert (config.ppo.epochs, config.model.name, config.kl.coef) == (2, "gpt2", 1e-3)
    assert HybridConfig.from_file(file("{}"), {"ppo.epochs": 3}).ppo.epochs == 3


def test_a_reward_in_a_config_is_written_as_its_spec():
    spec = {"type": "length_window", "min": 3}
    assert HybridConfig(reward=make_reward(spec)).to_dict()["reward"] == spec


def test_to_dict_reads_back_as_itself():
    config = HybridConfig.from_dict({"references": [{"weight": 0.5}, {"model": "gpt2"}], "ppo": {"clip": 0.1}})
    assert HybridConfig.from_dict(config.to_dict()) == config
    config = HybridConfig.from_dict({"model": {"lora": {"rank": 4, "target_modules": ["q_proj"]}}})
    assert HybridConfig.from_dict(config.to_dict()) == config


def test_a_number_that_yaml_takes_for_text_is_a_number(file):
    assert HybridConfig.from_file(file("kl:\n  coef: 5e-2\n")).kl.coef == 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shed: 1", "unknown key 'shed'"),
        ("ppo:\n  epoch: 3", "did you mean 'ppo.epochs'"),
        ("samplin:\n  top_k: 3", "did you mean 'sampling'"),
        ("ppo:\n  epochs: many", "ppo.epochs"),
        ("ppo: 3", "section 'ppo' must be a mapping"),
        ("ppo:\n  clip: 2", "PPOConfig.clip must lie in"),
        ("ppo:\n  batch_size: 0", "PPOConfig.batch_size must be >= 1"),
        ("ppo:\n  batch_size: 8\n  minibatch_size: 16", "minibatch_size must be at most batch_size = 8"),
        ("sft:\n  batch_size: 0", "SFTConfig.batch_size"),
        ("optimizer:\n  lr: -1", "optimizer.lr must be > 0"),
        ("optimizer:\n  lr: fast", "optimizer.lr must be a number"),
        ("optimizer:\n  name: adamww", "did you mean"),
        ("optimizer:\n  BETTA1: 0.1", "did you mean"),
        ("model:\n  device: gpu", "ModelConfig.device must be auto, cpu, cuda"),
        ("model:\n  device: cuda:99", "CUDA devices"),
        ("references:\n  - wieght: 1", r"did you mean 'references\[0\].weight'"),
        ("mixing:\n  cycle: 3", "did you mean 'cycles'"),
        ("model:\n  dtype: int8", "model.dtype"),
        ("model:\n  lora:\n    rnk: 4", "did you mean 'model.lora.rank'"),
        ("model:\n  lora: true", "section 'model.lora' must be a mapping"),
        ("model:\n  lora:\n    rank: many", "model.lora: .*rank"),
        ("model:\n  lora:\n    rank: 0", "LoraConfig.rank must be >= 1"),
        ("model:\n  load_in_4bit: true", "load_in_4bit needs model.lora"),
        ("model:\n  lora: {}\nreferences:\n- dtype: bfloat16", r"references\[0\] is the policy's own model"),
        ("references:\n- load_in_4bit: true", "load_in_4bit needs ReferenceConfig.model"),
        ("kl:\n  in_loss: true", "KLConfig.in_loss needs kind k2 or k3"),
        ("ppo:\n  epochs:", "ppo.epochs is empty"),
        ("kl:\n  coef: .nan", "kl.coef must be a number, got nan"),
        ("kl:\n  coef: .inf", "KLConfig.coef must be >= 0 and finite"),
        ("ppo:\n  lr_factor: .inf", "PPOConfig.lr_factor must be >= 0 and finite"),
        ("optimizer:\n  lr: true", "optimizer.lr must be a number"),
        ("run:\n  seed: 99999999999999999999", "RunConfig.seed must lie in"),
        ("eval:\n  seed: -99999999999999999999", "EvalConfig.seed must lie in"),
        ("run:\n  seed: " + "9" * 5000, "cannot be read"),
        ("run: " + "[" * 2000, "cannot be read"),
        ("model:\n  device: meta", "must be auto or one of cpu, cuda"),
        ("sft: {}\nppo: {}\nsft: {}", "the key 'sft' stands twice"),
        ("ppo: {epochs: 1, epochs: 2}", "the key 'epochs' stands twice"),
        ('{"ppo": {"epochs": 1, "epochs": 2}}', "the key 'epochs' stands twice"),
        ("- 1", "must hold a mapping"),
        ("ppo: [", "is not YAML"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(file, text, message):
    with pytest.raises(InputError, match=message) as caught:
        HybridConfig.from_file(file(text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(file):
    path = file("{}")
    with pytest.raises(InputError, match=r"did you mean 'config.yaml'"):
        HybridConfig.from_file(path.with_name("confg.yaml"))


@pytest.mark.parametrize("override", ["ppo.epochs", "ppo.epochs.more=3"])
def test_an_override_that_is_none_is_refused(file, override):
    with pytest.raises(InputError, match="override"):
        HybridConfig.from_file(file("ppo:\n  epochs: 2"), [override])


def test_a_pattern_of_files_is_text_in_an_override():
    assert HybridConfig.from_dict({}, ["data.train=*.jsonl"]).data.train == "*.jsonl"
