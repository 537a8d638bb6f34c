"""Forgetting clients: the flow by its command, and each way to unlearn against its formula."""

from __future__ import annotations

import shlex
from argparse import Namespace

import numpy as np
import pytest
import torch

import main
from federated import unlearning
from federated.engines.serial import SerialEngine
from federated.stage import Stage
from federated.unlearning import request_name, request_point, requests, samples
from tests.helpers import rows, without
from tests.rig import Rig
from unlearning.fedquit import quiet
from unlearning.sifu import sensitivity
from utils.args import parse_args
from utils.errors import UserError
from utils.registry import scan
from utils.unlearning_metrics import distance

BASE = "--model fedavg --dataset seq-digits --backbone mnistmlp --joint 1 --fl --num_clients 4 --num_comm_rounds 2"
LEARN = "--n_epochs 2 --batch_size 16 --optimizer adam --lr 0.002 --device cpu --num_threads 1"
FAST = f"{LEARN} --unlearn_history 1 --loadcheck auto"


@pytest.fixture
def run(tmp_path, capsys):
    """``run(flags)``: the rows of unlearning.csv after the command; the first of it is trained, then found again."""

    def go(flags, code=0, base=f"{BASE} {FAST}"):
        assert main.main(shlex.split(f"{base} --results_path {tmp_path} {flags}")) == code
        go.said = capsys.readouterr()
        found = sorted(tmp_path.rglob("unlearning.csv"))
        return rows(found[-1]) if found else []

    return go


# ---------------------------------------------------------------- what is asked for


def test_requests():
    def of(*who):
        return requests(Namespace(unlearn_client=list(who), num_clients=8))

    assert of("3", "7") == [[[3]], [[7]]] and of("7+3") == [[[3, 7]]] and of("3,7+1") == [[[3], [1, 7]]]
    assert of("all") == [[[k]] for k in range(8)] and request_name([[3], [1, 7]]) == "3,1+7"
    for who, said in (
        ("8", "no client 8, they are 0 to 7"),
        ("three", "give numbers of clients"),
        ("3+3,3", "can leave but once"),
        ("0+1+2+3+4+5+6+7", "nobody would be left"),
    ):
        with pytest.raises(UserError, match=said):
            of(who)


def test_moments():
    def at(text):
        return request_point(Namespace(unlearn_at=text, num_comm_rounds=3), 5)

    assert at("end") == (4, 3) and at("1:2") == (0, 2) and at("5:3") == (4, 3)
    for text in ("0:1", "6:1", "2:4", "2", "soon"):
        with pytest.raises(UserError, match="give end, or TASK:ROUND with a task of 1 to 5 and a round of 1 to 3"):
            at(text)


def test_settings_that_do_not_go_together():
    for flags, said in (
        ("--unlearn_client 1", "fedavg has no way of its own to forget; give --unlearn .*federaser"),
        ("--unlearn noop", "say with --unlearn_client who"),
        ("--unlearn forget --unlearn_client 1", "unknown --unlearn 'forget'"),
        ("--unlearn own --unlearn_client 1", "choose from"),
        ("--unlearn noop --unlearn_client 4", "no client 4, they are 0 to 3"),
        ("--unlearn noop --unlearn_client 1 --exclude_clients 2", "nothing to be forgotten"),
        ("--unlearn noop --unlearn_client 1 --unlearn_at 9:9", "give end, or TASK:ROUND"),
        ("--exclude_clients 9", "no client 9"),
        ("--exclude_clients 0 1 2 3", "has no samples left"),
    ):
        with pytest.raises(UserError, match=said):
            args = parse_args(shlex.split(f"{BASE} {flags}"))
            main.build(args)
            from datasets import get_dataset
            from datasets.utils.partition import Partition
            from federated.unlearning import request_point

            Partition.make(get_dataset(args), args)
            request_point(args, 1)
    for way in ("pga", "fedquit", "not", "fused"):
        for model, others in (("sata", "own, federaser"), ("tak", "choose from federaser")):
            with pytest.raises(UserError, match=f"{model} trains vectors added to a frozen network.*{others}"):
                parse_args(shlex.split(f"--model {model} --dataset seq-digits --fl --unlearn {way} --unlearn_client 1"))
    with pytest.raises(UserError, match="--fl"):
        parse_args(shlex.split("--model ser --dataset seq-digits --unlearn noop --unlearn_client 1"))


# ---------------------------------------------------------------- the flow


def test_everything_by_its_command(run, tmp_path):
    """One training, retraining once, a row for each way; what is there is not made again."""
    noop = run("--unlearn noop --unlearn_client 1 --eval_retrain")[0]
    assert noop["FA"] == noop["O_FA"] and noop["TA"] == noop["O_TA"] and float(noop["relD"]) == pytest.approx(1)
    assert [float(noop[k]) for k in ("rounds", "mb_up", "storage_mb", "client_asked")] == [0] * 4 and noop["XA"] == ""
    gold = run("--unlearn retrain --unlearn_client 1 --eval_retrain")[1]
    assert all(gold[k] == gold[f"R_{k}"] for k in ("FA", "RA", "FTA", "TA")) and float(gold["relD"]) == 0
    assert float(gold["avg_gap"]) == 0 and gold["rounds"] == "2" and float(gold["mb_up"]) > 0
    assert float(gold["outage"]) == float(gold["seconds"]) > 0
    folders = list((tmp_path / "seq-digits" / "fedavg").iterdir())
    assert len(folders) == 2  # with the client and without it
    n = len(run("--unlearn noop --unlearn_client 1 --eval_retrain"))
    assert n == 2 and "already there: noop, client 1" in run.said.out
    table = run("--unlearn finetune --unlearn_client 2+3 2,3 --recover_rounds 1")
    assert [r["client"] for r in table] == ["1", "1", "2+3", "2,3"] and len(folders) == 2
    assert (table[2]["rounds"], table[3]["rounds"]) == ("3", "5") and float(table[2]["mb_up"]) > 0
    assert next(tmp_path.rglob("unlearning.png")).stat().st_size > 5000
    assert float(table[0]["bound"]) == float(table[1]["bound"]) > 0
    assert table[0]["n_forget"] != table[2]["n_forget"] == table[3]["n_forget"]


@pytest.mark.parametrize("way", ["not", "own"])
def test_time_without_a_usable_model_is_that_of_its_rounds(run, monkeypatch, way):
    """What is seen before each round of recovery is what as many rounds end with, when SATA's vector has become one of
    its model's too; looking changes nothing."""
    seen, n_rounds = [], 3 if way == "not" else 2
    sata = "--model sata --regime full --dataset seq-digits --backbone vit-pocket --joint 1 --fl --num_clients 4"
    sata += " --num_comm_rounds 1 --n_epochs 1 --debug_mode 1 --device cpu --warmup 0 --loadcheck auto"
    base = {} if way == "not" else {"base": sata}
    monkeypatch.setattr(unlearning, "outage", lambda moments, target: seen.append((moments, target)) or 7.0)
    asked = f"--unlearn {way} --unlearn_client 1 --eval_retrain"
    table = [run(f"{asked} --recover_rounds {n}", **base)[n] for n in range(n_rounds)]
    ends = [float(r["TA"]) for r in table]
    for n, (moments, target) in enumerate(seen):
        assert [ta for _, ta in moments] == ends[: n + 1] and target == float(table[n]["R_TA"])
        seconds = [s for s, _ in moments]
        assert seconds == sorted(seconds) and seconds[-1] == float(table[n]["seconds"])
    assert len(seen) == len(set(ends)) == n_rounds and {r["outage"] for r in table} == {"7.0"}
    if way == "not":  # nothing to compare with
        assert run("--unlearn not --unlearn_client 1 --recover_rounds 2")[3]["outage"] == ""


def test_unseen_images_have_the_clients_mix(rig):
    """Over all tasks, not within each: three classes in the ratio in which the client has them."""
    r = rig("--model fedavg --fl --num_clients 4 --partition_mode quantity --class_quantity 1", rig.MLP)
    stage = Namespace(dataset=r.dataset, args=r.args)
    got = samples(stage, r.partition, [2], 5, 0)
    mine = torch.cat([r.dataset.train_labels[i] for _, i, _ in got["forget"]]).bincount(minlength=10)
    unseen = torch.cat([r.dataset.eval_labels[i] for _, i, _ in got["forget_test"]]).bincount(minlength=10)
    ratio = unseen[mine > 0] / mine[mine > 0]
    assert (unseen[mine == 0] == 0).all() and float(ratio.max() - ratio.min()) < 0.03
    assert sum(len(i) for _, i, _ in got["forget"]) + sum(len(i) for _, i, _ in got["retain"]) == 1438
    assert sum(len(i) for _, i, _ in got["test"]) == 359


def test_the_run_itself_does_not_change(run, tmp_path):
    run("--unlearn noop --unlearn_client 1")
    one = rows(next(tmp_path.rglob("accuracy.csv")))
    other = tmp_path / "plain"
    assert main.main(shlex.split(f"{BASE} {FAST} --results_path {other}")) == 0
    assert rows(next(other.rglob("accuracy.csv"))) == one
    assert not list(other.rglob("request.safetensors"))


def test_a_run_that_has_kept_nothing(run, tmp_path):
    assert main.main(shlex.split(f"{BASE} {FAST} --results_path {tmp_path}")) == 0
    run("--unlearn noop --unlearn_client 1", code=2)
    assert "has not kept its state" in run.said.err
    plain = FAST.replace("--unlearn_history 1", "")
    run("--unlearn history --unlearn_client 1", code=2, base=f"{BASE} {plain}")
    assert "train with --unlearn_history 1" in run.said.err and "Traceback" not in run.said.err


def test_in_the_middle_of_training(run):
    """After the request the run goes on without the client: with all rounds but the first, and other weights."""
    tasks = BASE.replace("--joint 1", "") + " " + FAST
    row = run("--unlearn noop --unlearn_client 1 --unlearn_at 1:1", base=tasks)[0]
    assert row["at"] == "1:1" and (row["FA"], row["RA"]) != (row["O_FA"], row["O_RA"])
    run("--unlearn noop --unlearn_client 1 --unlearn_at 2:1", code=2, base=tasks)
    assert "has kept its state after task 1, round 1" in run.said.err


def test_a_backdoor_goes_with_its_client(run):
    """The model with everybody takes triggered images for y*, the retrained one does not."""
    spoilt = (
        f"{BASE.replace('--num_comm_rounds 2', '--num_comm_rounds 4')} {FAST} --poison backdoor --poison_clients 0 1"
    )
    iid = f"{spoilt} --partition_mode iid --n_epochs 6"
    row = run("--unlearn noop --unlearn_client 0+1 --eval_retrain", base=iid)[0]
    assert row["ASR"] == row["O_ASR"] and float(row["O_ASR"]) > float(row["R_ASR"]) + 10


def test_one_round_of_history_is_undone_exactly(run):
    """T = 1: the updates of the others with their weights are what training without the client gives."""
    once = f"{BASE.replace('--num_comm_rounds 2', '--num_comm_rounds 1')} {FAST}"
    row = run("--unlearn history --unlearn_client 1 --eval_retrain", base=once)[0]
    assert float(row["relD"]) < 1e-5 and float(row["kl_f"]) < 1e-6 and row["agree_test"] == "100.0"


def test_replays_go_through_all_tasks(run, monkeypatch):
    """FedEraser asks the others once per task and interval, and says nothing to the client; rounds after the request
    are ordinary ones."""
    asked, plain = [], SerialEngine.run

    def watch(self, call, message, ids, task, round_):
        asked.append((call, task, round_, tuple(ids)))
        return plain(self, call, message, ids, task, round_)

    tasks = f"{BASE.replace('--joint 1', '')} {FAST} --n_epochs 1"
    run("--unlearn noop --unlearn_client 1 --unlearn_at 3:1", base=tasks)
    monkeypatch.setattr(SerialEngine, "run", watch)
    row = run("--unlearn federaser --unlearn_client 1 --unlearn_at 3:1 --federaser_interval 1", base=tasks)[1]
    replay = asked[[a[0] for a in asked].index("for_epochs") :]
    rest = (0, 2, 3)
    assert replay == [
        *[("for_epochs", t, r, rest) for t, r in ((0, 1), (1, 0), (1, 1), (2, 0))],
        *[("local_update", t, r, rest) for t, r in ((2, 1), (3, 0), (3, 1), (4, 0), (4, 1))],
    ]
    assert row["rounds"] == "4" and float(row["TA"]) > 10


def test_running_statistics_are_replayed_too(rig, nano):
    """With batch norms, all rounds as they were give the model as it is, statistics and all."""
    from federated.simulator import recorder

    flags = "--model fedavg --dataset seq-digits --backbone resnet-pocket --joint 1 --fl --num_clients 3"
    flags += " --num_comm_rounds 2 --debug_mode 1 --device cpu"
    flags += " --unlearn sifu --unlearn_client 1 --unlearn_history 1 --sifu_sigma 0"
    done = rig(flags, "")
    history = {}
    done.begin(0)
    for k in range(2):
        group = done.clients(0, k)
        group._watch = recorder(done.model, history, (0, k))
        done.model.round(group, k)
    done.model._own_history = history
    again = Rig(done.flags, done.folder)
    again.model._own_history = history
    again.model.plan([1])
    again.model._own_back = 2
    again.begin(0)
    for k in range(2):
        again.round(0, k)
    assert any("running_mean" in n for n in done.model.shared_buffers())
    for n, t in done.weights.items():
        torch.testing.assert_close(again.weights[n], t, rtol=1e-4, atol=1e-5)


def test_what_is_gone_takes_as_long_to_learn_as_at_first(run):
    """Nothing done, nothing to learn; classes that only the client had take as long as after retraining."""
    alone = f"{BASE} {FAST} --partition_mode quantity --class_quantity 3 --relearn_rounds 30"
    noop = run("--unlearn noop --unlearn_client 1 --eval_retrain", base=alone)[0]
    assert noop["relearn"] == "0" and int(noop["R_relearn"]) > 0
    gold = run("--unlearn retrain --unlearn_client 1 --eval_retrain", base=alone)[1]
    assert gold["relearn"] == gold["R_relearn"] == noop["R_relearn"]
    assert gold["FA"] == gold["R_FA"]
    short = run("--unlearn retrain --unlearn_client 1 --eval_retrain --relearn_rounds 1", base=alone)[2]
    assert short["relearn"] == "" or int(short["relearn"]) <= 1


def test_what_everybody_and_retraining_say_is_asked_once(run, tmp_path, monkeypatch):
    """By whichever way a client is forgotten; a row is the same when they are asked again."""
    asked, predict, learn = [], Stage.predict, Stage._relearn

    def watched(self, indices, task, train):
        if len(indices) == len(self.dataset.task_indices(task, train)):
            asked.append(self.keep is not None)
        return predict(self, indices, task, train)

    monkeypatch.setattr(Stage, "predict", watched)
    monkeypatch.setattr(Stage, "_relearn", lambda self, *a: asked.append(f"{self.keep}") or learn(self, *a))
    who = "--unlearn_client 1 2 --eval_retrain --relearn_rounds 3"
    run(f"--unlearn noop {who}")
    n_tests = 5
    assert asked.count(True) == 3 * (1 + n_tests) and asked.count(False) == 2 * (1 + n_tests)  # O, two R; two V
    asked.clear()
    kept = run(f"--unlearn finetune {who}")[2:]
    assert asked.count(True) == 0 and asked.count(False) == 2 * (1 + n_tests)
    assert [a for a in asked if isinstance(a, str)] == ["None"] * 2  # V alone learns again
    for file in [
        *tmp_path.rglob("predictions-*.npy"),
        *tmp_path.rglob("relearning.json"),
        *tmp_path.rglob("unlearning.csv"),
    ]:
        file.unlink()
    again, times = run(f"--unlearn finetune {who}"), {"seconds", "outage"}
    assert len(kept) == 2 and without(kept, times) == without(again, times)


def test_history_in_either_order(run):
    table = run("--unlearn history --unlearn_client 2+3 2,3 3,2")
    for k in ("FA", "RA", "TA"):
        assert float(table[0][k]) == pytest.approx(float(table[1][k]), abs=0.5)
        assert float(table[0][k]) == pytest.approx(float(table[2][k]), abs=0.5)


@pytest.mark.parametrize("way", sorted(set(scan("unlearning")) - {"noop", "retrain", "finetune", "history", "fused"}))
def test_every_other_way_and_backbone_head(run, way, tmp_path):
    """Each changes the model, on a method that trains rows of the head too, and says what it cost."""
    lora = "--model fedavg --tuning lora --dataset seq-digits --backbone vit-pocket --joint 1 --fl --num_clients 3"
    base = f"{lora} --num_comm_rounds 2 --debug_mode 1 --n_epochs 1 --device cpu --unlearn_history 1 --loadcheck auto"
    (row,) = run(f"--unlearn {way} --unlearn_client 1", base=base)
    assert float(row["seconds"]) > 0 and row["client_asked"] == str(int(way in ("pga", "fedquit")))
    trained = int(rows(next(tmp_path.rglob("summary.csv")))[0]["trainable_params"])
    history = 2 * (1 + 3) * 4 * trained / 1e6  # of two rounds what was sent, and three updates
    assert float(row["storage_mb"]) == pytest.approx(history if way in ("pga", "federaser", "sifu") else 0)
    if way != "fedquit":  # whose rate is small
        assert (row["FA"], row["RA"], row["TA"]) != (row["O_FA"], row["O_RA"], row["O_TA"])


# ---------------------------------------------------------------- the ways, piece by piece


@pytest.fixture
def made(rig):
    """A server after two rounds with its history, one way to unlearn mixed in."""

    def make(way, flags=""):
        from federated.simulator import recorder

        r = rig(
            f"--model fedavg --joint 1 --fl --num_clients 4 --num_comm_rounds 2 --unlearn {way} --unlearn_client 1 "
            f"--unlearn_history 1 --optimizer adam --lr 0.002 --batch_size 16 {flags}",
            rig.MLP,
        )
        r.begin(0)
        history = {}
        for k in range(2):
            group = r.clients(0, k)
            group._watch = recorder(r.model, history, (0, k))
            r.model.round(group, k)
        r.model._own_history = history
        return r

    return make


def replayed(done, rounds=2):
    """The same experiment from its beginning, by the rounds of a way that goes through it again without client 1."""
    r = Rig(done.flags, done.folder)
    r.model._own_history = done.model._own_history
    r.model.plan([1])
    r.partition = r.partition.without([1])
    r.begin(0)
    for k in range(rounds):
        r.round(0, k)
    return r


def test_history_adds_up_to_the_model(made):
    r = made("history")
    theta, (first, second) = r.model.trained(), (kept for _, kept in r.model.rounds_of(0))
    for n, t in theta.items():
        total = first["start"][n] + sum(
            kept["weights"][k] * u[n] for kept in (first, second) for k, u in kept["updates"].items()
        )
        torch.testing.assert_close(t, total, rtol=1e-4, atol=1e-5)


def test_the_ascent_stays_in_its_ball(made, wire):
    r = made("pga", "--pga_lr 1.0 --pga_stop 1000000")
    theta, kept = r.model.trained(), r.model.rounds_of(0)[-1][1]
    r.model.unlearn(r.clients(0), [1])
    sent = next(w.message for w in wire if w.call == "ascend")
    ref = sent.tensors("ref.")
    for n, t in ref.items():  # K theta less its last model
        own = kept["start"][n] + kept["updates"][1][n]
        torch.testing.assert_close(t, (4 * theta[n] - own) / 3, rtol=1e-4, atol=1e-5)
    far = float(distance(ref, r.model.trained()))
    assert far == pytest.approx(sent["radius"], rel=1e-3)  # such a rate runs into the wall
    short = made("pga", "--pga_lr 0.01 --pga_stop 0")  # stops after one step
    short.model.unlearn(short.clients(0), [1])
    assert 0 < float(distance(ref, short.model.trained())) < far


@pytest.mark.parametrize("norm", ["vector", "layer"])
def test_fresh_updates_are_as_long_as_the_old_ones(made, wire, norm):
    r = made("federaser", f"--federaser_interval 1 --federaser_norm {norm}")
    (_, first), (_, second) = r.model.rounds_of(0)
    r = replayed(r)
    replies = {w.client: w for w in wire if w.call == "for_epochs"}
    assert set(replies) == {0, 2, 3}
    got, total = r.model.trained(), sum(second["weights"][k] for k in replies)
    p = {k: first["weights"][k] / sum(first["weights"][j] for j in replies) for k in replies}
    start = {n: t + sum(p[k] * first["updates"][k][n] for k in replies) for n, t in first["start"].items()}
    for n, t in start.items():
        torch.testing.assert_close(replies[0].message[n], t, rtol=1e-4, atol=1e-5)
    want = dict(start)
    for k, w in replies.items():
        fresh = {n: w.reply[n] - w.message[n] for n in start}
        ratio = float(distance(second["updates"][k], {n: 0 * t for n, t in start.items()})) / float(
            distance(fresh, {n: 0 * t for n, t in fresh.items()})
        )
        for n in start:
            each = float(second["updates"][k][n].norm() / fresh[n].norm()) if norm == "layer" else ratio
            want[n] = want[n] + second["weights"][k] / total * each * fresh[n]
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-3, atol=1e-4)


def test_fresh_updates_are_trained_together(made, stacks):
    """By an engine that stacks clients, for as many epochs as are asked for."""
    flags = "--federaser_interval 1 --federaser_epochs 2 --optimizer sgd --lr 0.05 --debug_mode 1 --engine"
    turn, together = (replayed(made("federaser", f"{flags} {e}")) for e in ("serial", "batched --clients_per_batch 3"))
    assert ("for_epochs", 3) in stacks
    for n, t in turn.model.trained().items():
        torch.testing.assert_close(together.model.trained()[n], t, rtol=0, atol=1e-6)
    once = replayed(made("federaser", f"{flags} serial --federaser_epochs 1")).model.trained()
    assert any(not torch.equal(t, once[n]) for n, t in turn.model.trained().items())


def test_a_way_that_is_mixed_in_hides_nothing_that_trains(rig, nano):
    worker = rig("--model sata --joint 1 --fl --unlearn federaser --unlearn_client 1 --unlearn_history 1").worker
    found = {c for c in ("local_update", "for_epochs", "isolated_update", "isolated_vector") if worker.is_update(c)}
    assert found == {"local_update", "for_epochs", "isolated_update"}


def test_updates_of_low_rank_are_kept_and_replayed_as_products(rig, nano, wire):
    """Task vectors whose clients send factors: history holds B A, and so does what is made as long as it was."""
    from federated.simulator import recorder

    flags = "--model task_arithmetic --lora_r 2 --joint 1 --fl --num_clients 3 --num_comm_rounds 2 --debug_mode 1"
    r = rig(f"{flags} --unlearn federaser --federaser_interval 1 --unlearn_client 1 --unlearn_history 1")
    r.begin(0)
    history = {}
    for k in range(2):
        group = r.clients(0, k)
        group._watch = recorder(r.model, history, (0, k))
        r.model.round(group, k)
    sent = {(w.round, w.client): w.reply for w in wire if w.call == "local_update"}
    for (k, c), reply in sent.items():
        for n, u in history[0, k]["updates"][c].items():
            name = n.removeprefix("tau.")
            torch.testing.assert_close(u, reply[f"B.{name}"] @ reply[f"A.{name}"], rtol=1e-4, atol=1e-6)
    r.model._own_history = history
    r = replayed(r)
    second, replies = history[0, 1], {w.client: w.reply for w in wire if w.call == "for_epochs"}
    want, total = {}, sum(second["weights"][k] for k in (0, 2))
    for n, t in history[0, 0]["start"].items():
        shares = {k: history[0, 0]["weights"][k] for k in (0, 2)}
        want[n] = t + sum(s / sum(shares.values()) * history[0, 0]["updates"][k][n] for k, s in shares.items())
    for k in (0, 2):
        fresh = {n: replies[k][f"B.{n[4:]}"] @ replies[k][f"A.{n[4:]}"] for n in want}
        old, new = (sum(float(u.square().sum()) for u in v.values()) ** 0.5 for v in (second["updates"][k], fresh))
        want = {n: t + second["weights"][k] / total * old / new * fresh[n] for n, t in want.items()}
    for n, t in r.model.trained().items():
        torch.testing.assert_close(t, want[n], rtol=1e-3, atol=1e-5)


def test_sensitivity_bounds_what_a_client_has_moved():
    """Least squares, small steps: the gap to training without u is at most Psi; by hand after one round."""
    from tests.models.test_sata import Squares

    rng = np.random.default_rng(0)
    fed, rounds, theta = Squares([rng.normal(size=(8, 6)) for _ in range(5)]), [], np.zeros(6)
    for _ in range(6):
        updates = {k: torch.tensor(M @ theta + b - theta) for k, (M, b) in enumerate(fed.maps)}
        kept = {"start": torch.tensor(theta), "updates": updates}
        rounds.append(
            {
                "start": {"t": kept["start"]},
                "updates": {k: {"t": u} for k, u in updates.items()},
                "weights": dict.fromkeys(updates, 0.2),
            }
        )
        theta = theta + sum(u.numpy() for u in updates.values()) / 5
    psi = sensitivity(rounds, [0])
    assert psi[0] == 0 and psi == sorted(psi) and len(psi) == 7
    for t in range(1, 7):
        gap = np.linalg.norm(fed.run(t)[0] - fed.run(t, [0])[0])
        assert gap <= psi[t] * (1 + 1e-9)
    first = rounds[0]["updates"]
    alone = sum(u["t"] for u in first.values()) / 5 - first[0]["t"]
    assert psi[1] == pytest.approx(0.25 * float(alone.norm()))
    assert sensitivity(rounds, [0], 0.0)[-1] < psi[-1]


def test_back_to_a_model_the_client_has_not_touched(run):
    """Without room for any sensitivity SIFU is retraining, with room for everything the model as it is; then noise."""
    tasks = f"{BASE.replace('--joint 1', '')} {FAST} --n_epochs 1"
    ask = "--unlearn sifu --unlearn_client 1 --eval_retrain --sifu_sigma"
    none = run(f"{ask} 0", base=tasks)[0]
    assert float(none["relD"]) < 1e-6 and float(none["kl_r"]) < 1e-9 and none["rounds"] == "10"
    whole = run(f"{ask} 1e-12 --sifu_eps 1e30", base=tasks)[1]
    assert float(whole["relD"]) == pytest.approx(1, abs=1e-4) and whole["rounds"] == "0"
    assert [whole[k] for k in ("FA", "RA", "TA")] == [whole[f"O_{k}"] for k in ("FA", "RA", "TA")]
    some = run(f"{ask} 1e-12 --sifu_eps {float(whole['bound']) * 4e12}", base=tasks)[2]  # psi* between the two
    assert 0 < int(some["rounds"]) < 10 and float(some["relD"]) > 0


def test_noise_comes_once(made):
    r = replayed(made("sifu", "--sifu_sigma 0.5 --sifu_eps 1000000"))
    theta = made("history").model.trained()
    moved = torch.cat([(t - theta[n]).flatten() for n, t in r.model.trained().items()])
    assert float(moved.std()) == pytest.approx(0.5, rel=0.05)


def test_knowledge_is_written_over_and_can_be_brought_back(made, wire):
    r = made("fused", "--fused_layers 1 --fused_rank 2 --fused_rounds 1")
    model, kept = r.model, r.model.rounds_of(0)[-1][1]
    x = next(iter(r.dataset.loader(r.dataset.task_indices(0, False), 0, 50, False)))[0]
    before, weights = model(x).detach(), model.trained()
    ratio = {n: float(d.norm() / kept["start"][n].norm()) for n, d in kept["updates"][1].items() if d.dim() == 2}
    model.unlearn(r.clients(0), [1])
    assert model.fused_layers == max(ratio, key=ratio.get).removesuffix(".weight")
    for n, p in model.net.named_parameters():
        assert torch.equal(p, weights[n])
    after = model(x).detach()
    assert not torch.allclose(after, before, atol=1e-4)
    model.fused.enabled = False
    torch.testing.assert_close(model(x).detach(), before)
    sent = [w for w in wire if w.call == "local_update" and "fused_layers" in w.message]
    assert {w.client for w in sent} == {0, 2, 3}
    assert all(set(w.reply.tensors()) == set(model.trainable()) for w in sent)  # adapters alone come back
    total = sum(w.reply["n_samples"] for w in sent)
    for n, p in model.trainable().items():
        torch.testing.assert_close(
            p, sum(w.reply["n_samples"] / total * w.reply[n] for w in sent), rtol=1e-4, atol=1e-6
        )


def test_adapters_over_a_whole_network_only(run):
    lora = "--model fedavg --tuning head --dataset seq-digits --backbone vit-pocket --joint 1 --fl --num_clients 3"
    base = f"{lora} --num_comm_rounds 1 --debug_mode 1 --device cpu --unlearn_history 1 --loadcheck auto"
    run("--unlearn fused --unlearn_client 1", code=2, base=base)
    assert "--tuning full" in run.said.err


def test_negated_layers(made):
    r = made("not")
    theta = r.model.trained()
    r.model.unlearn(r.clients(0), [1])
    first, *others = theta
    assert torch.equal(r.model.trained()[first], -theta[first])
    assert all(torch.equal(r.model.trained()[n], theta[n]) for n in others)
    r = made("not", "--not_layers nothing")
    with pytest.raises(UserError, match="nothing that is trained ends so"):
        r.model.unlearn(r.clients(0), [1])


def test_a_teacher_without_the_true_class(made):
    z, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), torch.tensor([0, 2])
    assert quiet(z, y).tolist() == [[1.0, 1.0, 2.0], [0.0, 5.0, 0.0]]
    r = made("fedquit", "--fedquit_lr 0.001 --fedquit_epochs 5 --n_epochs 4")
    mine = r.partition.indices(0, 1)
    x, y = next(iter(r.dataset.loader(mine, 0, len(mine), False, split="train")))

    def right():
        with torch.no_grad():
            return float((r.model(x).argmax(1) == y).float().mean())

    before = right()
    r.model.unlearn(r.clients(0), [1])
    assert right() < before


def test_a_client_without_samples_has_nothing_to_undo(made):
    for way in ("history", "pga", "fedquit"):
        r = made(way)
        theta = r.model.trained()
        r.model._own_history = {
            k: {**v, "updates": {i: u for i, u in v["updates"].items() if i != 1}, "weights": {0: 0.3, 2: 0.3, 3: 0.4}}
            for k, v in r.model._own_history.items()
        }
        r.model.unlearn(r.clients(0, ids=[0, 2, 3]), [1])
        for n, t in theta.items():
            torch.testing.assert_close(r.model.trained()[n], t, rtol=1e-6, atol=1e-7)
