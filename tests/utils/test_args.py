"""Where settings come from, and which of them wins."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser

import pytest

import models
import utils.args
from models.er import Er
from utils.args import parse_args
from utils.errors import UserError, nearest
from utils.loggers import identity, settings_hash

ER = ["--model=er", "--dataset=seq-digits", "--backbone=mnistmlp"]


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """``configs(path, text)`` writes a config file where parse_args looks; those that ship are out of sight."""
    monkeypatch.setattr(utils.args, "ROOT", tmp_path)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_the_command_line_wins_over_configs_over_defaults(configs):
    flags = ["--model", "er", "--dataset", "seq-digits", "--backbone", "mnistmlp"]
    assert (parse_args(flags).lr, parse_args(flags).n_epochs, parse_args(flags).seed) == (0.03, 5, 0)
    configs("datasets/configs/seq-digits/long.yaml", "n_epochs: 7\nlr: 0.7\nbatch_size: 77\nseed: 70\n")
    flags += ["--dataset_config", "long"]
    args = parse_args(flags)
    assert (args.n_epochs, args.lr, args.batch_size, args.seed, args.buffer_size) == (7, 0.7, 77, 70, 200)
    configs(
        "models/config/er.yaml",
        "default: {lr: 0.8, batch_size: 88, buffer_size: 800}\nbest: {lr: 0.9, buffer_size: 900}\n",
    )
    args = parse_args(flags)
    assert (args.n_epochs, args.lr, args.batch_size, args.seed, args.buffer_size) == (7, 0.8, 88, 70, 800)
    args = parse_args([*flags, "--model_config=best"])
    assert (args.n_epochs, args.lr, args.batch_size, args.seed, args.buffer_size) == (7, 0.9, 88, 70, 900)
    args = parse_args([*flags, "--model_config=best", "--lr", "1", "--num_epochs=2", "--buffer_size=1"])
    assert (args.n_epochs, args.lr, args.batch_size, args.seed, args.buffer_size) == (2, 1.0, 88, 70, 1)
    # wherever they stand
    assert parse_args(["--lr=1", *flags]).lr == 1.0


def test_sections_by_setting_and_data_set(configs):
    text = """
    default:
      lr: 0.1
      fl: {lr: 0.2, num_clients: 4}
      central: {batch_size: 6}
      seq_digits: {n_epochs: 9, fl: {n_epochs: 8}}
      seq-mnist: {n_epochs: 1, lr: 5}
    """
    configs("models/config/er.yaml", text)
    central, fl = parse_args(ER), parse_args([*ER, "--fl"])
    assert (central.lr, central.batch_size, central.n_epochs) == (0.1, 6, 9)
    assert (fl.lr, fl.batch_size, fl.n_epochs, fl.num_clients) == (0.2, 16, 8, 4)


def test_data_sets_have_defaults_for_both_settings():
    central, fl = parse_args(ER), parse_args([*ER, "--fl"])
    assert (central.n_epochs, central.batch_size) == (5, 32)
    assert (fl.n_epochs, fl.batch_size, fl.num_comm_rounds) == (2, 16, 3)
    assert parse_args(["--model=er", "--dataset=seq-digits"]).backbone == "vit-pocket"


def test_a_config_may_name_the_backbone_and_its_flags(configs):
    configs("models/config/er.yaml", "default: {backbone: vit-pocket, pretrained: 0}")
    args = parse_args(["--model=er", "--dataset=seq-mnist"])  # whose default is another
    assert (args.backbone, args.pretrained) == ("vit-pocket", 0)
    assert parse_args(["--model=er", "--dataset=seq-mnist", "--backbone=vit-pocket"]).pretrained == 0


def test_values_of_every_kind_in_a_config(configs):
    configs(
        "models/config/er.yaml",
        "default: {lr_milestones: [3, 5], joint: true, clip_grad: null, lr: 1e-3, notes: 'a b'}",
    )
    args = parse_args(ER)
    assert (args.lr_milestones, args.joint, args.clip_grad, args.lr, args.notes) == ([3, 5], 1, None, 1e-3, "a b")


@pytest.mark.parametrize(
    "text, message",
    [
        ("default: {lr: fast}", "--lr: 'fast' is not a number"),
        ("default: {lr: -1}", "--lr: '-1' is out of range"),
        ("default: {bufer_size: 1}", "config of er: unknown setting 'bufer_size': did you mean 'buffer_size'"),
        ("default: {num_clients: 0, batch_size: 0}", "out of range"),
        ("default: [1, 2", "er.yaml is not valid YAML"),
        ("- 1", "er.yaml must hold a mapping"),
    ],
)
def test_configs_pass_the_same_checks(configs, text, message):
    configs("models/config/er.yaml", text)
    with pytest.raises(UserError, match=message) as caught:
        parse_args(ER)
    assert "\n" not in str(caught.value)


def test_unknown_sections_list_those_there_are(configs):
    configs("models/config/er.yaml", "best: {lr: 1}\nother: {}\n")
    with pytest.raises(UserError, match="er.yaml has no such section: choose from default, best, other"):
        parse_args([*ER, "--model_config=bets"])
    configs("datasets/configs/seq-digits/a.yaml", "")
    with pytest.raises(UserError, match="there is no datasets/configs/seq-digits/b.yaml: those there are: a"):
        parse_args([*ER, "--dataset_config=b"])


def test_aliases_of_fed_mammoth():
    argv = ["--model=er", "--dataset=seq-digits", "--network", "mnistmlp", "--num_epochs", "3", "--fl", "--beta=0.1"]
    args = parse_args(argv)
    assert (args.backbone, args.n_epochs, args.distribution_alpha) == ("mnistmlp", 3, 0.1)


def test_federated_flags_imply_fl_where_there_is_no_other_way():
    assert parse_args(["--model=fedavg", "--dataset=seq-digits", "--backbone=mnistmlp", "--num_clients=3"]).fl
    with pytest.raises(UserError, match="--num_clients only make sense with --fl"):
        parse_args([*ER, "--num_clients=3"])


def test_switches_in_every_spelling():
    for given, value in (("--joint", 1), ("--joint=1", 1), ("--joint=true", 1), ("--joint=0", 0), ("--joint=False", 0)):
        assert parse_args([*ER, given]).joint == value
    assert parse_args([*ER, "--joint", "--seed", "4"]).seed == 4


def test_the_minibatch_follows_the_batch():
    assert parse_args([*ER, "--batch_size=12"]).minibatch_size == 12
    assert parse_args([*ER, "--batch_size=12", "--minibatch_size=3"]).minibatch_size == 3


def test_what_was_given_and_how_to_give_it_again():
    argv = [*ER, "--notes", "two words; $HOME", "--num_epochs=2"]
    args = parse_args(argv)
    assert args.given == ["backbone", "dataset", "model", "n_epochs", "notes"]
    assert shlex.split(args.command) == ["python", "main.py", *argv]


class OldStyle(Er):
    NAME = "er"

    @staticmethod
    def get_parser():
        """Mammoth's older style: a parser of its own, with the general flags in it."""
        parser = ArgumentParser(description="old")
        utils.args.add_management_args(parser)
        utils.args.add_experiment_args(parser)
        utils.args.add_rehearsal_args(parser)
        parser.add_argument("--lr", type=float, default=9.0)
        parser.add_argument("--penalty_weight", type=float, required=True, help="its own")
        parser.set_defaults(optim_mom=0.25)
        return parser


def test_parsers_of_older_methods(monkeypatch):
    monkeypatch.setattr(models, "get_model_class", lambda name: OldStyle)
    args = parse_args([*ER, "--penalty_weight=2", "--lr=0.5"])
    assert (args.penalty_weight, args.buffer_size, args.lr, args.optim_mom) == (2.0, 200, 0.5, 0.25)
    with pytest.raises(UserError, match="required: --penalty_weight"):
        parse_args(ER)


# ---- what makes two runs the same


def test_settings_that_change_no_number_are_no_part_of_the_identity():
    plain = settings_hash(parse_args(ER))
    for flag in (
        "--notes=x",
        "--num_threads=1",
        "--savecheck=task",
        "--stop_after=2",
        "--results_path=x",
        "--device=cpu",
    ):
        assert settings_hash(parse_args([*ER, flag])) == plain
    assert settings_hash(parse_args(["--num_epochs=5", *ER, "--lr=0.03"])) == plain  # given or by default
    for flag in ("--lr=0.1", "--seed=1", "--buffer_size=3", "--fl", "--debug_mode=1", "--joint"):
        assert settings_hash(parse_args([*ER, flag])) != plain
    group = settings_hash(parse_args(ER), seed=False)
    assert group == settings_hash(parse_args([*ER, "--seed=4"]), seed=False) != plain
    assert "num_clients" not in identity(parse_args(ER)) and "num_clients" in identity(parse_args([*ER, "--fl"]))


def test_nearest_names_come_closest_first():
    assert nearest("bufer_size", ["batch_size", "buffer_size", "lr"]) == "did you mean 'buffer_size' or 'batch_size'?"
    assert nearest("Seq_Digit", ["seq-digits", "x"]) == "did you mean 'seq-digits'?"
    assert nearest("zzz", ["b", "a"]) == "choose from a, b"


# ---- Mammoth's config files

MAMMOTH = """
default:
  optim_mom: 0.9
seq-digits:
  dataset_config: long
  lr: 1e-2
  optim_wd: 1e-4
  500:
    lr: 0.5
    model: er
    lr_scheduler: multisteplr
    lr_milestones: [2, 3]
  200:
    lr: 0.2
    n_epochs: 2
seq-mnist:
  lr: 9
"""


def test_best_settings_by_data_set_and_buffer_size(configs):
    configs("models/config/er.yaml", MAMMOTH)
    configs("datasets/configs/seq-digits/long.yaml", "n_epochs: 40\nbatch_size: 64\nlr_scheduler: None\n")
    configs("datasets/configs/seq-digits/short.yaml", "n_epochs: 4\n")

    def got(*flags):
        a = parse_args([*ER, *flags])
        return a.lr, a.optim_wd, a.n_epochs, a.batch_size, a.lr_scheduler, a.dataset_config, a.optim_mom

    assert got() == (0.03, 0, 5, 32, "none", None, 0.9)  # the default section alone
    best = "--model_config=best"
    assert got(best) == (0.2, 1e-4, 2, 64, "none", "long", 0.9)  # buffers hold 200 samples unless said
    assert got(best, "--buffer_size", "500") == (0.5, 1e-4, 40, 64, "multisteplr", "long", 0.9)
    assert parse_args([*ER, best, "--buffer_size=500"]).lr_milestones == [2, 3]
    assert got(best, "--buffer_size=500", "--dataset_config=short") == (0.5, 1e-4, 4, 32, "multisteplr", "short", 0.9)
    assert got(best, "--buffer_size=500", "--lr=7")[0] == 7
    with pytest.raises(UserError, match="--buffer_size 300: the config file has settings for 500, 200"):
        got(best, "--buffer_size=300")


def test_file_names_and_what_they_are_for(configs):
    configs("models/config/ewc-on.yaml", "seq_digits: {e_lambda: 3, model: ewc-on}\n")
    flags = ["--model=ewc_on", "--dataset=seq-digits", "--backbone=mnistmlp"]
    assert parse_args([*flags, "--model_config=best"]).e_lambda == 3
    configs("models/config/sgd.yaml", "seq-digits: {lr: 3, model: er}\n")
    with pytest.raises(UserError, match="sgd.yaml is of another model than 'sgd'"):
        parse_args(["--model=sgd", "--dataset=seq-digits", "--model_config=best"])
    configs("models/config/sgd.yaml", "seq-mnist: {lr: 3}\n")
    with pytest.raises(UserError, match="no such section, nor settings for seq-digits: choose from default, seq-mnist"):
        parse_args(["--model=sgd", "--dataset=seq-digits", "--model_config=best"])
    configs("models/config/sgd.yaml", "seq-digits: {100: {lr: 3}}\n")
    with pytest.raises(UserError, match="--buffer_size is not a flag of this method"):
        parse_args(["--model=sgd", "--dataset=seq-digits", "--model_config=best"])
    configs("models/config/sgd.yaml", "seq-digits: {dataset_config: nope}\n")
    with pytest.raises(UserError, match="there is no datasets/configs/seq-digits/nope.yaml: those there are: none"):
        parse_args(["--model=sgd", "--dataset=seq-digits", "--model_config=best"])


def test_a_backbone_with_arguments(configs):
    backbone = "backbone: {type: vit_pocket, args: {nclasses: 10, pretrained: false}}\n"
    flags = ["--model=er", "--dataset=seq-mnist"]  # whose default is another
    configs("datasets/configs/seq-mnist/x.yaml", backbone)
    args = parse_args([*flags, "--dataset_config=x"])
    assert (args.backbone, args.pretrained) == ("vit-pocket", 0)
    configs("models/config/er.yaml", "seq-mnist:\n  200:\n    " + backbone)
    args = parse_args([*flags, "--model_config=best"])
    assert (args.backbone, args.pretrained) == ("vit-pocket", 0)


def test_attributes_of_the_data_set_are_settings(configs):
    configs("datasets/configs/seq-digits/two.yaml", "N_TASKS: 2\nN_CLASSES_PER_TASK: 5\nn_epochs: 3\n")
    configs("datasets/configs/seq-digits/again.yaml", "n_tasks: 2\nn_classes_per_task: 5\nn_epochs: 3\n")
    plain, two, again = (
        parse_args([*ER, "--n_epochs=3", *x]) for x in ([], ["--dataset_config=two"], ["--dataset_config=again"])
    )
    assert "dataset_attributes" not in plain and two.n_epochs == 3
    assert identity(two)["dataset_attributes"] == {"N_TASKS": 2, "N_CLASSES_PER_TASK": 5}
    assert settings_hash(two) == settings_hash(again) != settings_hash(plain)
    configs("datasets/configs/seq-digits/two.yaml", "N_TASK: 2\n")
    with pytest.raises(UserError, match="unknown attribute 'N_TASK': did you mean 'N_TASKS'"):
        parse_args([*ER, "--dataset_config=two"])
